#!/bin/sh
# What Ray starts as its HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH), at each of its reloads too.
exec "${TRIAD_PYTHON:-python3}" -P "$(dirname "$0")/haproxy.py" "$@"
