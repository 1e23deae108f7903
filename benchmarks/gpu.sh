#!/usr/bin/env bash
# Every gpu test and benchmark, on a bare CUDA machine, in under 10 minutes: no network, no installation, the package run
# from this checkout. Wants Python >= 3.11 with torch, triton and timm; what else is missing it names and goes on without.
#
#   bash benchmarks/gpu.sh                   PYTHON=python3.12 OUT=/some/folder bash benchmarks/gpu.sh
#
# Adds to records.csv in $OUT (default: benchmarks/results) and leaves gpu-tests.log and gpu-bench.log there. Ends with a short
# table; the exit status is 1 if a test or a gate failed, 2 if there is no CUDA device.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: $PYTHON has no torch that sees a CUDA device here; nothing was run" >&2
    exit 2
fi
mkdir -p "$OUT" || exit 2
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu --format=csv,noheader 2>/dev/null || true
for module in pytest hypothesis rich timm accelerate jsonargparse datasets; do
    has "$module" || echo "gpu.sh: no $module here; what needs it is left out"
done

tests="not run"
if has pytest; then
    # Only the files that hold gpu tests: others may import what is not here.
    mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu\b' tests)
    ready=()
    for file in "${files[@]}"; do
        if grep -qE '^(import|from) hypothesis' "$file" && ! has hypothesis; then
            echo "gpu.sh: left out $file, which needs hypothesis"
        else
            ready+=("$file")
        fi
    done
    if [ "${#ready[@]}" -gt 0 ]; then
        timeout 240 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider "${ready[@]}" 2>&1 | tee "$OUT/gpu-tests.log"
        tests=${PIPESTATUS[0]}
    fi
fi

bench="not run"
if has rich && has timm; then
    timeout 300 "$PYTHON" benchmarks/run.py --device cuda --out "$OUT/records.csv" >"$OUT/gpu-bench.log" 2>&1
    bench=$?
    [ "$bench" -eq 0 ] || cat "$OUT/gpu-bench.log"
fi

echo
[ "$bench" = "not run" ] || "$PYTHON" benchmarks/run.py --show --out "$OUT/records.csv"
echo "gpu tests: $tests; benchmarks: $bench (0: all passed)"
[[ "$tests" = 0 || "$tests" = "not run" ]] && [[ "$bench" = 0 || "$bench" = "not run" ]]
