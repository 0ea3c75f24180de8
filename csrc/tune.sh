#!/bin/sh
# Builds the CUDA operators once per set of compiler flags and times each build on this GPU:
#
#   csrc/tune.sh OUT "" "-DD2EXT_MIN_BLOCKS=6" "-DD2EXT_MIN_BLOCKS=6 -DD2EXT_THREAD_ROWS=16"
#
# writes OUT/tune_0.json, OUT/tune_1.json, ... (python -m d2ext.layers.benchmark --out), in the order of
# the arguments; the last build stays in place. The macros are defined in csrc/cuda/.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
out=$1
shift
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
index=0
pids=
for flags in "$@"; do
  D2EXT_BUILD=cuda D2EXT_NVCC_FLAGS="$flags" "$PYTHON" setup.py build_ext \
    --build-lib "$work/lib$index" --build-temp "$work/temp$index" >"$work/build$index.log" 2>&1 &
  pids="$pids $!"
  index=$((index + 1))
done
for pid in $pids; do
  wait "$pid" || { tail -n 50 "$work"/build*.log >&2; exit 1; }
done
index=0
for flags in "$@"; do
  cp "$work/lib$index"/d2ext/d2ext_C*.so d2ext/
  echo "== $index: ${flags:-as committed}"
  "$PYTHON" -m d2ext.layers.benchmark --device cuda --out "$out/tune_$index.json"
  index=$((index + 1))
done
