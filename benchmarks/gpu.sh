#!/usr/bin/env bash
# Every gpu test, kernel and training step on a bare CUDA machine, in under 10 minutes: no network, no installation, the
# package run from this checkout. Wants Python >= 3.11 with torch, triton and timm; what else is missing it names and goes on
# without. Each section has a limit of its own, and none stops those after it.
#
#   bash benchmarks/gpu.sh                   PYTHON=python3.12 OUT=/some/folder bash benchmarks/gpu.sh
#
# Adds to records.csv in $OUT (default: benchmarks/results), case by case, and leaves a log of each section there: 8
# files at most. Ends with the claims, each "holds", "FAILS" or "not measured", and one line of exit statuses. The exit
# status is 1 if a section or a claim failed, 2 if there is no CUDA device. Where there is none, DEVICE=cpu SCALE=quick
# rehearses all of it in two minutes, and tests/kernels/rehearsal.py compiles what it launches.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
DEVICE=${DEVICE:-cuda}
SCALE=${SCALE:-full}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# cuBLAS reads it once, with the first product of a process; without it, what is asked to be deterministic is refused.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
# What one section compiled, the next ones find.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/sparse-robust-triton-$(id -u)}
has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: $PYTHON has no torch that sees a CUDA device here; nothing was run" >&2
    exit 2
fi
if ! mkdir -p "$OUT" || ! [ -w "$OUT" ]; then
    echo "gpu.sh: cannot write to $OUT; name another folder: OUT=/some/folder bash benchmarks/gpu.sh" >&2
    exit 2
fi
SINCE=$(date -u +%Y-%m-%dT%H:%M:%S)
statuses="" failed=0

# section NAME LIMIT COMMAND...: run it with a limit in seconds, into a log; say what came of it, and go on. What takes
# longer is interrupted, so that it says what it found until then.
section() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    echo "== $name"
    timeout -s INT -k 5 "$limit" "$@" >"$OUT/gpu-$name.log" 2>&1
    status=$?
    ended "$name" "$status" "$limit" $((SECONDS - began))
}
ended() { # ended NAME STATUS LIMIT SECONDS
    local name=$1 status=$2 log=$OUT/gpu-$1.log
    # Killed after it went on when interrupted; for want of memory it would have been sooner.
    [ "$status" -ne 137 ] || [ "$4" -lt "${3%.*}" ] || status=124
    [ "$status" -ne 124 ] || echo "gpu.sh: $name was stopped after $3 s" | tee -a "$log"
    [ "$status" -eq 0 ] || { failed=1; tail -n 25 "$log"; }
    statuses+="$name $status ($4 s), "
}
left_out() {
    echo "== $1: not run, $2"
    statuses+="$1 not run, "
}
run=("$PYTHON" benchmarks/run.py --device "$DEVICE" --scale "$SCALE" --out "$OUT/records.csv")
bench() { # bench NAME LIMIT OPERATION...: time operations
    local name=$1 limit=$2
    shift 2
    if has rich && has timm; then
        section "$name" "$limit" "${run[@]}" --only "$@"
    else
        left_out "$name" "it needs rich and timm"
    fi
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu --format=csv,noheader 2>/dev/null || true
"$PYTHON" -c 'import sys
from sparse_robust.bench import machine, machine_line
print(machine_line(machine(sys.argv[1])))' "$DEVICE" 2>/dev/null || true
for module in pytest hypothesis rich timm accelerate jsonargparse datasets; do
    has "$module" || echo "gpu.sh: no $module here; what needs it is left out"
done

# While the tests run nothing is timed yet. The gates of the kernels compile meanwhile, by Triton and by torch.compile,
# and the sections that time them find it in the caches.
beside() { # beside NAME LIMIT COMMAND...: the same in the background; joined says what came of it
    beside=$1 beside_limit=$2 beside_began=$SECONDS
    shift 2
    timeout -k 5 "$beside_limit" "$@" >"$OUT/gpu-$beside.log" 2>&1 &
    beside_process=$!
}
joined() {
    echo "== $beside"
    wait "$beside_process"
    ended "$beside" $? "$beside_limit" $((SECONDS - beside_began))
}
if has rich && has timm; then
    beside gates 120 "${run[@]}" --samples 0 --only pgd-step masks
else
    left_out gates "it needs rich and timm"
fi
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
    # Several processes: compiling and the references take one core each, and an error of one is not that of all.
    cores=$(nproc) many=()
    ! has xdist || many=(-n $((cores < 8 ? cores : 8)) --dist worksteal)
    section tests 110 "$PYTHON" -m pytest -m gpu -q --tb=short --durations=5 -p no:cacheprovider \
        "${many[@]}" "${ready[@]}"
else
    left_out tests "it needs pytest"
fi
[ -z "${beside_process:-}" ] || joined

# Ceilings first: what follows is held against them. Then training, which most depends on the machine; then the kernels.
bench training 140 ceilings robust-step
bench kernels 85 pgd-step
bench masks 55 masks
bench layers 80 select optimizer-step masked-step replica-refresh memory-format

# The gates alone, on small odd shapes, under the memory checker. It sees what cudaMalloc gave: so no cache of torch's.
PATH=$PATH:/usr/local/cuda/bin
if command -v compute-sanitizer >/dev/null && has rich && has timm; then
    section sanitizer 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 "$PYTHON" benchmarks/run.py \
        --device cuda --scale quick --samples 0 --out "$OUT/records.csv" --only pgd-step masks optimizer-step
else
    left_out sanitizer "there is no compute-sanitizer"
fi

echo
if [ -e "$OUT/records.csv" ]; then
    "$PYTHON" benchmarks/run.py --device "$DEVICE" --show --claims --since "$SINCE" --out "$OUT/records.csv" || failed=1
fi
echo "${statuses%, } (0: all passed; 124: out of time)"
exit "$failed"
