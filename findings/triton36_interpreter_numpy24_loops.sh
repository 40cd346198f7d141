#!/usr/bin/env bash
# triton 3.6.0 with NumPy 2.4.0 and newer, Linux x86_64, Python 3.11, TRITON_INTERPRET=1.
# A kernel whose loop runs to a number that it was passed, `for i in range(n)`, raises in the interpreter: InterpreterError, from "only
# 0-dimensional arrays can be converted to Python scalars". The same kernel runs with NumPy 2.3.5, and with triton 3.7.1 beside either.
# Why it surprises: triton 3.6.0 names no bound for NumPy, pip installs the pair without a word, kernels without such a loop pass, and on
# a GPU nothing is wrong. NumPy's change was announced as the end of a deprecation (int() of an array of one dimension), so no warning
# stands before it once the pair is installed.
# Whom it concerns: whoever tests Triton kernels on CPU machines (CI), and keeps the triton that a released torch pins (2.11: 3.6.0).
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"; pip="$folder/venv/bin/pip install --quiet --disable-pip-version-check"
$pip 'numpy==2.3.5' 'torch==2.13.0'
cat > "$folder/loop.py" <<'PY'
import sys, numpy, torch, triton
import triton.language as tl

@triton.jit
def add_up(out, n):
    total = 0
    for i in range(n):
        total += i
    tl.store(out, total)

out = torch.zeros(1, dtype=torch.int32)
try:
    add_up[(1,)](out, 5)
    found = f"{out.item()}"
except Exception as error:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    found = f"{type(error).__name__}: {error}"
print(f"triton {triton.__version__}, NumPy {numpy.__version__}: {found}")
PY
for triton in 3.6.0 3.7.1; do
    $pip --no-deps "triton==$triton"
    for numpy in 2.3.5 2.4.0; do
        $pip --no-deps "numpy==$numpy"
        TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/loop.py" | tee -a "$folder/found"
    done
done
diff "$folder/found" - <<'END'
triton 3.6.0, NumPy 2.3.5: 10
triton 3.6.0, NumPy 2.4.0: TypeError: only 0-dimensional arrays can be converted to Python scalars
triton 3.7.1, NumPy 2.3.5: 10
triton 3.7.1, NumPy 2.4.0: 10
END
