#!/bin/bash
# The first ten minutes on a GPU: `bench/gpu.sh [OUT]`, in the repository's root, with the package and its tests installed. No network.
# The most telling first, each item with a cap, together under 570 s; what an item read before its cap stays. OUT (gpu_readings) gets
# readings.jsonl, readings.json, table.md for bench/RESULTS.md, and what was printed besides.
# DEVICE=cpu TINY=1 runs every part at sizes of a CPU, to see that it runs. PYTHON: the interpreter.
set -u
OUT=${1:-gpu_readings}
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_COMPILE_THREADS=8
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
: >"$OUT/readings.jsonl"

one() { # cap in seconds, item
  local begin=$SECONDS
  timeout -k 2 "$1" "$PYTHON" bench/gpu.py "$2" --device "$DEVICE" ${TINY:+--tiny} --out "$OUT/readings.jsonl" 2>"$OUT/$2.err"
  local rc=$?
  [ $rc = 0 ] || echo "{\"item\": \"$2\", \"failed\": \"exit status $rc, cap $1 s\"}" | tee -a "$OUT/readings.jsonl"
  echo "# $2: $((SECONDS - begin)) s, $SECONDS s in all"
}

one 30 versions
one 180 step       # does the true step run, how long, where the time and the memory go; compiled
one 50 attention   # which kernels take each teacher
if [ "$DEVICE" = cuda ]; then
  timeout -k 2 100 "$PYTHON" -m pytest tests/gpu -m gpu -x -q -p no:cacheprovider --timeout 90 2>&1 | tail -15 | tee "$OUT/tests.log"
fi
one 50 ceilings    # bf16, fp8 and TF32 products
one 90 teachers    # plain, compiled, fp8
one 40 upsamplers  # local attention, position table
"$PYTHON" bench/gpu.py table "$OUT/readings.jsonl" --out "$OUT/readings.json" | tee "$OUT/table.md"
