"""Which implementation computes an operation: one chooser, one registration, the only import of the extension.

Every operation has a plain PyTorch reference; "cpp" is the extension on CPU tensors, "cuda" its kernels on CUDA
tensors, "triton" kernels/triton on CUDA tensors, or on CPU ones in Triton's interpreter (TRITON_INTERPRET=1).
"""

import os
import warnings
from functools import cache

import torch

try:
    from sslr1 import _C
except ImportError:  # not built: the references do the same, slower
    _C = None

DEVICE = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}  # whose tensors a backend takes
_library = torch.library.Library("sslr1", "FRAGMENT")


def choose(operation, asked, device, order, unfit=None) -> str:
    """The backend that `asked` means for tensors on `device`.

    order: the operation's backends, the fastest first; unfit: why the kernels can't take these tensors whatever their
    device, None where they can. "auto" is the first that can run, in the end the reference. Raises ValueError where the
    one asked for can't run or doesn't exist.
    """
    if asked == "auto":
        here = [name for name in order if device.type == DEVICE[name] and not unfit]
        if "cuda" in here and _missing("cuda"):
            _say_what_is_missing(operation)
        return next((name for name in here if not _missing(name)), "reference")
    if asked == "reference":
        return asked
    if asked not in order:
        raise ValueError(f"{operation} has no backend {asked!r}; it has {', '.join(map(repr, (*order, 'reference')))}")
    why = unfit or _missing(asked)
    if not why and device.type != DEVICE[asked] and not (asked == "triton" and interpreted()):
        why = f"takes {DEVICE[asked].upper()} tensors, these are on {device}"
    if why:
        raise ValueError(f"{operation}: backend {asked!r} {why}")
    return asked


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing(backend):
    if backend in ("cpp", "cuda") and _C is None:
        return "needs the compiled extension sslr1._C: install the package (pip install -e .)"
    if backend == "cuda" and not _C.has_cuda:
        return "needs an extension that was built where nvcc and libcudart_static.a are"
    return None


@cache
def _say_what_is_missing(operation):
    """Once, where there is a GPU."""
    warnings.warn(
        f"sslr1._C {'is not installed' if _C is None else 'was built without its CUDA part'}: {operation} takes "
        "Triton's kernel. Install the package where nvcc and libcudart_static.a are (pip install -e .)",
        stacklevel=3,
    )


def register(schema, implementation, fake, backward=None, setup=None) -> None:
    """Define torch.ops.sslr1.<name> by its schema; `fake` gives outputs of the right shapes. backward, setup: as for
    torch.library.register_autograd."""
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sslr1::{name}", fake)
    if backward is not None:
        torch.library.register_autograd(f"sslr1::{name}", backward, setup_context=setup)
