#!/usr/bin/env bash
# What needs an NVIDIA GPU, in parts that do not need each other, what matters most first:
#
#   benchmarks/gpu.sh [--dry-run] [all | PART ...]     JSON to benchmarks/results, or to $QUIRE_RESULTS
#
#   correct     kernels against float64, the engine against transformers, with graphs         200 s
#   decode      steady decode at batch 1, 32, 256: share of the bandwidth bound, GPU idle
#               time per step; the same in deterministic mode                                 180 s
#   kernels     each kernel beside what the hardware allows                                   170 s
#   workload    256 requests of 100-1024 tokens in and out; the same in deterministic mode    140 s
#   start       from the start of a process to its first token                                 60 s
#   peer        the workload in transformers' continuous batching                             120 s
#   summary     what was found, beside the goals
#
# The seconds are the most that a part takes; all parts but `peer` end within 13 minutes. Figures are written as
# they are found: a part that is stopped leaves what it has. With --dry-run everything runs tiny, on the CPU.
#
# Needs python3 with torch, triton and numpy; `start` also safetensors, `peer` transformers, `correct` both of them,
# pytest and hypothesis, and with pytest-xdist it is several times as fast. No network.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
out=${QUIRE_RESULTS:-benchmarks/results}
small=qwen3-0.6b large=llama-3.1-8b
failed=0 dry=

run() {  # LIMIT_S COMMAND...
  local limit=$1 started=$SECONDS status=0; shift
  echo "== $*"
  timeout -k 10 "$limit" "$@" || status=$?
  [ "$status" = 0 ] || { echo "== FAILED ($status): $*"; failed=1; }
  echo "== $((SECONDS - started)) s"
}

correct() { run 200 "$python" -m benchmarks.gpu_correct $dry --json "$out/gpu-correct.json"; }
decode() {
  run 80 "$python" -m benchmarks.decode $dry --model $small --deterministic both --json "$out/gpu-decode-$small.json"
  run 100 "$python" -m benchmarks.decode $dry --model $large --deterministic both --json "$out/gpu-decode-$large.json"
}
kernels() { run 170 "$python" -m benchmarks.kernels $dry --budget 140 --json "$out/gpu-kernels.json"; }
workload() {
  run 70 "$python" -m benchmarks.engine $dry --model $small --deterministic both --json "$out/gpu-engine-$small.json"
  run 70 "$python" -m benchmarks.engine $dry --model $large --json "$out/gpu-engine-$large.json"
}
start() { run 60 "$python" -m benchmarks.start $dry --model $small --json "$out/gpu-start.json"; }
peer() { run 120 "$python" -m benchmarks.engine $dry --peer --model $small --json "$out/gpu-peer-$small.json"; }
summary() { "$python" -m benchmarks.gpu_summary "$out"; }

[ "${1:-}" = --dry-run ] && { dry=--dry-run small=tiny large=tiny; shift; }
parts=(correct decode kernels workload start peer summary)
[ $# -gt 0 ] && [ "$1" != all ] && parts=("$@")
for part in "${parts[@]}"; do
  case $part in
    correct | decode | kernels | workload | start | peer | summary) ;;
    *) sed -n 's/^# \{0,1\}//p' "$0" | sed -n 2,19p; exit 2 ;;
  esac
done
if [ "${parts[*]}" != summary ]; then
  mkdir -p "$out"
  "$python" - "$dry" <<'PY' || exit 1
import sys, torch
if not torch.cuda.is_available() and not sys.argv[1]:
    sys.exit("benchmarks/gpu.sh: no CUDA device; nothing was run")
import triton
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a dry run"
print(name, "torch", torch.__version__, "triton", triton.__version__)
PY
fi
for part in "${parts[@]}"; do "$part"; done
exit $failed
