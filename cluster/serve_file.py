"""`python -m cluster.serve_file port=8001 num_replicas=2` prints a Serve file for `serve run`, checked.

`serve run cluster.app:deploy` takes the same keys, but Serve lets the port be chosen in a file only.
"""

import json
import sys
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.config import ClusterConfig


class HttpAddress(BaseModel):
    """The address at which Serve listens."""

    model_config = ConfigDict(frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)


def serve_file(arguments: Sequence[str]) -> str:
    """The Serve file for `key=value` of ClusterConfig or HttpAddress. Raises ValueError, naming the key."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator:
            raise ValueError(f"'{argument}': write key=value")
        if value:
            given[key] = value
    address = HttpAddress.model_validate({k: given.pop(k) for k in HttpAddress.model_fields if k in given})
    config = ClusterConfig.model_validate(given)
    application = {
        "name": config.app,
        "route_prefix": "/",
        "import_path": "cluster.app:deploy",
        "args": config.model_dump(mode="json", exclude_unset=True),
    }
    file = {"http_options": address.model_dump(), "applications": [application]}
    return json.dumps(file, indent=2)  # YAML takes JSON too


def main() -> None:
    try:
        print(serve_file(sys.argv[1:]))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']}" for e in error.errors()]
        sys.exit("\n".join(problems))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
