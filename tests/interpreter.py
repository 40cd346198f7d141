"""Triton kernels on CPU tensors, in a process of its own: whether they are interpreted is settled when they are
imported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def interpret(program, seed):
    """Run `program` in the interpreter, with torch's generator set to `seed`."""
    start = (
        "import torch, sys; from tests import interpreter; interpreter.mend(); torch.manual_seed(int(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{start}{program}\nprint('interpreted')", str(seed)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "interpreted\n", done.stderr[-3000:]


def mend():
    """Triton 3.6 makes the bounds of a loop numbers by int() of an array of one dimension, which NumPy 2.4 refuses; 3.7
    does as here."""
    from triton.runtime import interpreter

    inner = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        inner(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch
