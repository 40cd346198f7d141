#!/usr/bin/env bash
# What only a GPU can show, from a bare checkout: builds the extension, runs the tests marked gpu and the benchmarks. Needs torch,
# triton, transformers, pytest, pybind11 and, for the CUDA part, nvcc; no DALI, no flash-attn, no network. With pydantic, two ranks on
# the one GPU are tested too; with trl, a whole step is measured against it.
#
#   bench/gpu.sh [SLICE…]      build tests render loss sampling decode rollout learner step; all of them unless some are named
#   bench/gpu.sh --list        the files that hold tests marked gpu
#   OUT=folder                 where the results go as well: JSON, tables, the tests' log (default: bench/results only)
#   PYTHON=python3 SECONDS_A_ROW=4
#
# A slice that fails doesn't keep the others from running; the exit status says whether any did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
marked=$(grep -rl --include='test_*.py' '^@pytest.mark.gpu' tests) # others may need packages that are not there
[ "${1:-}" != --list ] || { echo "$marked"; exit; }
slices=("$@")
[ $# -gt 0 ] || slices=(build tests render loss sampling decode rollout learner step)
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT

for slice in "${slices[@]}"; do
    case $slice in
        build | tests | render | loss | sampling | decode | rollout | learner | step) ;;
        *) echo "bench/gpu.sh: no slice '$slice'; there are build tests render loss sampling decode rollout learner step" >&2; exit 2 ;;
    esac
done
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh: $python sees no GPU: nothing was run" >&2
    exit 1
fi
"$python" -c 'import torch, triton, transformers as t; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, "transformers", t.__version__)'

failed=()
for slice in "${slices[@]}"; do
    echo "== $slice"
    case $slice in
        build) "$python" -m pip install -q --no-deps --no-build-isolation -e . ;;
        tests) "$python" -m pytest -q -m gpu -p no:cacheprovider $marked 2>&1 | tee "$log/tests.txt" ;;
        *) "$python" bench/ "$slice" --seconds "${SECONDS_A_ROW:-4}" 2>&1 | tee "$log/$slice.txt" ;;
    esac || failed+=("$slice")
done
if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    cp "$log"/*.txt "$OUT" 2>/dev/null
    "$python" -c 'import sys; sys.path.insert(0, "bench"); from machine import machine, results_file; print(results_file("kernels", machine()))' |
        while read -r path; do [ ! -f "$path" ] || cp "$path" "$OUT"; done
fi
echo "== ran: ${slices[*]}; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
