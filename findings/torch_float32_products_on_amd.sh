#!/usr/bin/env bash
# torch 2.13.0 (MKL 2024.2, oneDNN 3.12.0), Linux x86_64, AMD CPUs with AVX-512 BF16 (seen on an EPYC).
# By default a float32 matrix product goes to MKL, which names an AMD CPU an "Intel(R) Architecture processor" and takes general code. With
# torch.set_float32_matmul_precision("medium"), documented as multiplying in bfloat16, it goes to oneDNN, which may then round to bfloat16,
# finds no AMX and takes its AVX-512 float32 code: as exact as before (error below 1e-6), in half the time or less. With "high" all is as with the default.
# Why it surprises: a setting that is to trade digits for speed gives the speed and keeps the digits. Only the libraries' verbose logs tell.
# Whom it concerns: whoever trains, tests or samples in float32 on AMD CPUs, and whoever compares such figures with an Intel CPU's.
set -euo pipefail
amx=$(grep -c -m1 amx_bf16 /proc/cpuinfo || true); wide=$(grep -c -m1 avx512_bf16 /proc/cpuinfo || true)
if [ "$amx" != 0 ] || [ "$wide" = 0 ] || ! grep -q AuthenticAMD /proc/cpuinfo; then
    echo "needs an AMD CPU with AVX-512 BF16 and without AMX" >&2; exit 3
fi
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.3.5'
cat > "$folder/product.py" <<'PY'
import os, sys, time

import torch

torch.manual_seed(0)
torch.set_float32_matmul_precision(sys.argv[1])
x, w = torch.randn(1024, 576), torch.randn(1536, 576)
exact = x.double() @ w.double().T
x @ w.T
begun = time.perf_counter()
for _ in range(20):
    y = x @ w.T
taken = (time.perf_counter() - begun) / 20
error = ((y - exact).norm() / exact.norm()).item()
print(f"time {sys.argv[1]}: {1e3 * taken:.2f} ms", file=sys.stderr)
print(f"{sys.argv[1]}: error {'below 1e-6' if error < 1e-6 else 'above 1e-6'}")
PY
for precision in highest high medium; do
    OMP_NUM_THREADS=1 MKL_VERBOSE=1 ONEDNN_VERBOSE=1 "$folder/venv/bin/python" "$folder/product.py" $precision >"$folder/log"
    tail -1 "$folder/log"
    # the first product: MKL's calls are named by their BLAS name, oneDNN's by their implementation
    grep -m1 -oE 'SGEMM|brg_matmul:[a-z0-9_]+.*attr-fpmath:[a-z0-9]+' "$folder/log" | sed -E 's/,undef,.*attr/ attr/'
done | tee "$folder/found"
diff "$folder/found" - <<'END'
highest: error below 1e-6
SGEMM
high: error below 1e-6
SGEMM
medium: error below 1e-6
brg_matmul:avx512_core attr-fpmath:bf16
END
