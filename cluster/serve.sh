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

server=
interrupted=
interrupt() {
  printf '\nstopping at once\n'
  interrupted=yes
  [ -n "$server" ] || exit 130
  # What the log has from here on is how it was interrupted.
  kill "${attendant:-}" 2>/dev/null || true
}
trap interrupt INT

# Behind this script, which waits and passes SIGTERM on. Ctrl-C reaches both; a shell by itself would have what it
# starts behind it ignore that.
serve() {
  trap - INT
  exec python -m cluster.serve "$file"
}

if [ "${LOG:-}" = debug ]; then
  serve &
  server=$!
  attended=("$port" "$server")
else
  mkdir -p "$(dirname "$log")"
  python -m cluster.welcome tell "$file" "$log"
  serve >"$log" 2>&1 &
  server=$!
  attended=("$port" "$server" "$log")
fi
python -m cluster.welcome attend "${attended[@]}" &
attendant=$!
disown "$attendant" # or bash tells of its end
trap 'printf "\nstopping, once what has begun is finished\n"; kill -TERM "$server"' TERM

# A signal ends a wait early.
status=0
wait "$server" || status=$?
while kill -0 "$server" 2>/dev/null; do
  status=0
  wait "$server" || status=$?
done
if [ "$status" -ne 0 ] && [ -n "$interrupted" ]; then
  exit 130
fi
if [ "$status" -ne 0 ] && [ "$status" -lt 128 ] && [ "${LOG:-}" != debug ]; then
  echo "Triad ended with an error; the end of $log:" >&2
  tail -n 30 "$log" >&2
fi
exit "$status"
