#!/usr/bin/env bash
# What needs an NVIDIA GPU, in parts of less than 8 minutes each:
#
#   benchmarks/gpu.sh [all | PART ...]     JSON to benchmarks/results, or to $QUIRE_RESULTS
#
#   correct     kernels against float64, the engine against transformers, with graphs
#   kernels     each kernel beside what the hardware allows
#   decode      steady decode at batch 1, 32, 256: share of the bandwidth bound, GPU idle time per step
#   start       from the start of a process to its first token
#   workload    256 requests of 100-1024 tokens in and out, beside transformers' continuous batching
#   summary     what was found, beside the goals
#
# Needs python3 with torch, triton and transformers, for `correct` also pytest and hypothesis; none of the server's
# dependencies, and no network.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
out=${QUIRE_RESULTS:-benchmarks/results}
small=qwen3-0.6b large=llama-3.1-8b
failed=0

run() {  # LIMIT_S COMMAND...
  local limit=$1 started=$SECONDS status=0; shift
  echo "== $*"
  timeout "$limit" "$@" || status=$?
  [ "$status" = 0 ] || { echo "== FAILED ($status): $*"; failed=1; }
  echo "== $((SECONDS - started)) s"
}

correct() {
  local tests="-c benchmarks/gpu.ini --rootdir . -m gpu -x -q"
  run 240 "$python" -m pytest $tests tests/kernels
  run 220 "$python" -m pytest $tests tests/integration/test_engine_cuda.py
}
kernels() { run 400 "$python" -m benchmarks.kernels --json "$out/gpu-kernels.json"; }
decode() {
  run 200 "$python" -m benchmarks.decode --model $small --json "$out/gpu-decode-$small.json"
  run 240 "$python" -m benchmarks.decode --model $large --json "$out/gpu-decode-$large.json"
}
start() { run 240 "$python" -m benchmarks.start --model $small --json "$out/gpu-start.json"; }
workload() {
  run 240 "$python" -m benchmarks.engine --peer --model $small --json "$out/gpu-engine-$small.json"
  run 220 "$python" -m benchmarks.engine --model $large --json "$out/gpu-engine-$large.json"
}
summary() { "$python" -m benchmarks.gpu_summary "$out"; }

parts=(correct kernels decode start workload summary)
[ $# -gt 0 ] && [ "$1" != all ] && parts=("$@")
for part in "${parts[@]}"; do
  case $part in
    correct | kernels | decode | start | workload | summary) ;;
    *) sed -n 's/^# \{0,1\}//p' "$0" | sed -n 2,14p; exit 2 ;;
  esac
done
if [ "${parts[*]}" != summary ]; then
  mkdir -p "$out"
  "$python" - <<'PY' || exit 1
import sys, torch
if not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: no CUDA device; nothing was run")
import triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
PY
fi
for part in "${parts[@]}"; do "$part"; done
exit $failed
