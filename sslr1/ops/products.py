"""Which library multiplies float32 matrices on a CPU.

torch gives them to MKL, which takes general code on CPUs of other makers than its own. On AMD's with AVX-512 oneDNN is
twice as fast and as exact, but torch goes there only where it may round to bfloat16
(findings/torch_float32_products_on_amd.sh). Whether anything is rounded is tried first, once a process.
"""

from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

SMALLEST = 512  # columns of a decode step's rows: below, oneDNN's own cost a call is more than it saves
EXACT = 1e-6  # relative error of a float32 product; one of bfloat16 has 2e-3


@contextmanager
def fast_products(device, columns=SMALLEST):
    """float32 products on a CPU by the faster library, to float32's digits, in what is called within, backward passes
    too. columns: of the matrices, where they have few rows.

    Nothing changes on other devices and CPUs, and where the precision of such products has been set before."""
    if device.type != "cpu" or columns < SMALLEST or not _is_free() or not _onednn_is_faster():
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@cache
def _onednn_is_faster() -> bool:
    return torch.backends.mkldnn.is_available() and _amd_with_avx512() and _onednn_is_exact()


def _is_free() -> bool:
    """Whether nobody has set what float32 products may be rounded to."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for one backend, by the newer of torch's two ways
        return False


def _amd_with_avx512() -> bool:
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "AuthenticAMD" in about and "avx512_bf16" in about


def _onednn_is_exact() -> bool:
    """Whether a product that may be rounded to bfloat16 isn't."""
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 576, generator=rng), torch.randn(576, 256, generator=rng)
    torch.set_float32_matmul_precision("medium")
    try:
        y = x @ w
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = x.double() @ w.double()
    return bool((y - exact).norm() <= EXACT * exact.norm())
