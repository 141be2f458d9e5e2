#!/usr/bin/env bash
# Serves until Ctrl-C; on SIGTERM what has begun is finished first.
# From the environment: MODEL, DTYPE, REPLICAS, PORT, REDIS_URL, POLICY; empty is the default. Arguments are further
# settings, key=value (docs/settings.md). What Ray and the actors say goes to a file below .run, of which the errors
# come here; LOG=debug has all of it here instead.
set -euo pipefail
log="$PWD/.run/serve-${PORT:-8000}.log"
cd "$(dirname "$0")/.."

port="${PORT:-8000}"
python -m cluster.welcome check "$port"
# The file in it may hold the password of redis_url; mktemp makes it its owner's only.
folder="$(mktemp -d /tmp/triad-XXXXXX)"
trap 'rm -rf "$folder"' EXIT
file="$folder/serve.yaml"
exports="$(python -m cluster.environment "$folder")"
eval "$exports"
python -m cluster.serve_file "port=$port" "model=${MODEL:-}" "dtype=${DTYPE:-}" "num_replicas=${REPLICAS:-}" \
  "redis_url=${REDIS_URL:-}" "policy=${POLICY:-}" "$@" >"$file"

# Behind this script, which waits and passes SIGTERM on; Ctrl-C reaches both.
if [ "${LOG:-}" = debug ]; then
  python -m cluster.serve "$file" &
  server=$!
  attended=("$port" "$server")
else
  mkdir -p "$(dirname "$log")"
  python -m cluster.welcome tell "$file" "$log"
  python -m cluster.serve "$file" >"$log" 2>&1 &
  server=$!
  attended=("$port" "$server" "$log")
fi
trap : INT
trap 'kill -TERM "$server"' TERM
python -m cluster.welcome attend "${attended[@]}" &

# A signal ends a wait early.
status=0
wait "$server" || status=$?
while kill -0 "$server" 2>/dev/null; do
  status=0
  wait "$server" || status=$?
done
if [ "$status" -ne 0 ] && [ "$status" -lt 128 ] && [ "${LOG:-}" != debug ]; then
  echo "Triad ended with an error; the end of $log:" >&2
  tail -n 30 "$log" >&2
fi
exit "$status"
