#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: correctness first, then the kernels, then the engine. Under 8 minutes.
# Needs python3 with torch and triton, and for the tests pytest, hypothesis and transformers; no server
# dependencies. Writes JSON to $1, benchmarks/results by default.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
python3 - <<'PY' || exit 1
import sys, torch
if not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: no CUDA device; nothing was run")
import triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
PY
failed=0
step() {  # NAME LIMIT_S COMMAND...
  local name=$1 limit=$2; shift 2
  echo "== $name"
  local started=$SECONDS
  timeout "$limit" "$@" || { echo "== $name FAILED ($?)"; failed=1; }
  echo "== $name: $((SECONDS - started)) s"
}
step "kernel tests" 150 python3 -m pytest -c benchmarks/gpu.ini --rootdir . -m gpu tests/kernels -x -q
step "engine tests" 120 python3 -m pytest -c benchmarks/gpu.ini --rootdir . -m gpu tests/integration/test_engine_cuda.py -x -q
step "kernels" 120 python3 -m benchmarks.kernels --json "$out/gpu-kernels.json"
step "engine, qwen3-0.6b" 60 python3 -m benchmarks.engine --model qwen3-0.6b --json "$out/gpu-engine-qwen3-0.6b.json"
step "engine, llama-3.1-8b" 60 python3 -m benchmarks.engine --model llama-3.1-8b --json "$out/gpu-engine-llama-3.1-8b.json"
exit $failed
