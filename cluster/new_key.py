"""`python -m cluster.new_key NAME [--admin]` makes an API key: shown once, its hash for the key file."""

import argparse
import json
import sys
from collections.abc import Sequence

from router.auth import digest_of, new_key, parse_keys

PROG = "python -m cluster.new_key"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog=prog, description="Makes an API key: shown once, its hash for the key file."
    )
    found.add_argument("name", help="whose key it is, for logs and metrics")
    found.add_argument("--admin", action="store_true", help="may change the policy at run time")
    found.add_argument("--requests-per-minute", type=int)
    found.add_argument("--tokens-per-minute", type=int)
    return found


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    given = parser(prog).parse_args(arguments)
    key = new_key()
    entry = {name: value for name, value in vars(given).items() if value not in (None, False)}
    text = json.dumps({"keys": [entry | {"sha256": digest_of(key).hex()}]}, indent=2)
    try:
        parse_keys(text)
    except ValueError as error:
        sys.exit(str(error))
    print(f"the key, which nothing keeps: {key}", file=sys.stderr)
    print(text)


if __name__ == "__main__":
    main()
