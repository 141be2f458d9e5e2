#!/usr/bin/env bash
# Serves until Ctrl-C. From the environment: MODEL, REPLICAS, PORT, REDIS_URL, POLICY; empty is the default.
set -euo pipefail
cd "$(dirname "$0")/.."

port="${PORT:-8000}"
file="$(mktemp)"
# The file may hold the password of redis_url; mktemp made it readable to its owner only.
python -m cluster.serve_file "port=$port" "model=${MODEL:-}" "num_replicas=${REPLICAS:-}" \
  "redis_url=${REDIS_URL:-}" "policy=${POLICY:-}" >"$file"

serve run "$file" &
server=$!
trap 'rm -f "$file"' EXIT
trap 'kill -INT "$server" 2>/dev/null; wait "$server"; exit 130' INT TERM

until curl -sf -o /dev/null --max-time 2 "http://127.0.0.1:$port/readyz"; do
  kill -0 "$server" 2>/dev/null || { wait "$server"; exit 1; }
  sleep 1
done
echo "== Triad is ready on http://127.0.0.1:$port (try /v1/models, /v1/triad/state) =="
wait "$server"
