#!/usr/bin/env bash
# Serves until Ctrl-C; on SIGTERM what has begun is finished first.
# From the environment: MODEL, DTYPE, REPLICAS, PORT, REDIS_URL, POLICY; empty is the default.
set -euo pipefail
cd "$(dirname "$0")/.."

port="${PORT:-8000}"
# The file in it may hold the password of redis_url; mktemp makes it its owner's only.
folder="$(mktemp -d /tmp/triad-XXXXXX)"
trap 'rm -rf "$folder"' EXIT
file="$folder/serve.yaml"
exports="$(python -m cluster.environment "$folder")"
eval "$exports"
python -m cluster.serve_file "port=$port" "model=${MODEL:-}" "dtype=${DTYPE:-}" "num_replicas=${REPLICAS:-}" \
  "redis_url=${REDIS_URL:-}" "policy=${POLICY:-}" >"$file"

# Behind this script, which waits and passes SIGTERM on; Ctrl-C reaches both.
python -m cluster.serve "$file" &
server=$!
trap : INT
trap 'kill -TERM "$server"' TERM

(
  ready="import urllib.request as r; r.urlopen('http://127.0.0.1:$port/readyz', timeout=2)"
  until python -c "$ready" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || exit 0
    sleep 1
  done
  echo "== Triad is ready on http://127.0.0.1:$port (try /v1/models, /v1/triad/state) =="
) &

# A signal ends a wait early.
status=0
wait "$server" || status=$?
while kill -0 "$server" 2>/dev/null; do
  status=0
  wait "$server" || status=$?
done
exit "$status"
