"""A stand-in for a GPU: another device, "standin", whose memory is the host's, so that the trainer runs on it as it is.

Its tensors are torch's own of a backend of their own (PrivateUse1): torch refuses to mix them with the CPU's, autograd
and `to` know them, and an operation on them is the CPU's on the same memory. So every copy between the two passes one
place here, whoever asked for it, and is counted with the function of ours that did. It stays until the process ends:
`python bench/transfers.py` and tests start one for it.
"""

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from itertools import zip_longest

import torch
from torch.distributed.fsdp._fully_shard import _fsdp_init, _fsdp_param, _fully_shard
from torch.utils import backend_registration
from torch.utils._pytree import tree_map, tree_map_only

NAME = "standin"
CPU, ATEN = torch.device("cpu"), torch.ops.aten
ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# What torch takes from a backend of its own in place of the usual operations
CONVOLUTIONS = {
    "convolution_overrideable": ATEN.convolution.default,
    "convolution_backward_overrideable": lambda grad, x, weight, *options: ATEN.convolution_backward.default(
        grad, x, weight, [weight.shape[0]], *options
    ),
}
copied = Counter()  # bytes from the host to the device, by the function of ours that asked for them
waited = Counter()  # copies to the host, and single numbers that it asked for, likewise
_memory, _library, _sweep_at = {}, [], [256]  # _memory: by the address of the device's storage


class Stream:
    """Or an event on one: everything is done in order, at once."""

    def __init__(self, *_, **__):
        pass

    def nothing(self, *_, **__):
        pass

    wait_stream = wait_event = record = wait = synchronize = nothing

    def record_event(self, event=None):
        return event or Stream()


class Module(backend_registration._DummyBackendModule):
    """torch.standin: what FSDP2 asks of a device."""

    Stream = Event = Stream

    def current_stream(self, device=None):
        return Stream()

    def stream(self, stream):
        return nullcontext()

    def set_device(self, device):
        pass


def start() -> torch.device:
    """The device, from now on."""
    if not _library:
        backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
        for module in (_fsdp_init, _fully_shard):  # or FSDP2 would put tensors of another kind into buffers
            module._move_states_to_device = lambda *_: None
        _fsdp_param.alloc_storage = _fsdp_param.free_storage = lambda _: None  # whole weights stay allocated
        every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        every.fallback(_fallback, "PrivateUse1")
        for name, cpus in CONVOLUTIONS.items():
            aten.impl(name, partial(_fallback, cpus), "PrivateUse1")
        _library.extend((every, aten))
    return torch.device(NAME, 0)


@contextmanager
def counting():
    """Collect, inside, what is copied: (Counter of bytes from the host to the device, of waits), by function."""
    before = copied.copy(), waited.copy()
    found = Counter(), Counter()
    yield found
    for out, now, then in zip(found, (copied, waited), before):
        out.update(now - then)


def _here(x):
    return isinstance(x, torch.Tensor) and x.device.type == NAME


def _on(raw, onto=None):
    """A tensor of the device over the memory of a CPU tensor; onto: an empty one that becomes it."""
    memory = raw.untyped_storage()
    storage = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), torch.device(NAME, 0), memory.nbytes())
    _keep(storage, memory)
    out = torch._C._acc.create_empty_tensor([0], raw.dtype) if onto is None else onto
    place = raw.storage_offset(), list(raw.shape), list(raw.stride())
    ATEN.set_.source_Storage_storage_offset.redispatch(ON_CPU, out, storage, *place)
    return out


def _keep(storage, memory):
    """Let a CPU storage live as long as the device's over its memory: torch has no hook for the end of one."""
    _memory[storage._cdata] = storage._weak_ref(), memory
    if len(_memory) >= _sweep_at[0]:
        for key, (ref, _) in list(_memory.items()):
            if torch.UntypedStorage._expired(ref):
                torch.UntypedStorage._free_weak_ref(ref)
                del _memory[key]
        _sweep_at[0] = 2 * len(_memory) + 256


def _off(x):
    """The CPU tensor over the memory of one of the device."""
    storage, empty = x.untyped_storage(), torch.empty(0, dtype=x.dtype)
    if storage._cdata in _memory:
        return empty.set_(_memory[storage._cdata][1], x.storage_offset(), x.shape, x.stride())
    return empty if x.shape == (0,) else empty.as_strided(x.shape, x.stride())  # without memory


def _fallback(op, *arguments, **options):
    if op is ATEN._copy_from.default:
        return _copy(*arguments[:2])
    if op is ATEN._local_scalar_dense.default:
        waited[_asker()] += 1
    given = []

    def off(x):
        if _here(x):
            given.append((_off(x), x))
            return given[-1][0]
        return CPU if isinstance(x, torch.device) and x.type == NAME else x

    def on(raw):
        for known, x in given:
            if known is raw:  # in place, or an output that may have got other memory
                return x if raw.shape == x.shape and raw.data_ptr() == x.data_ptr() else _on(raw, x)
        memory = raw.untyped_storage()._cdata
        shared = [x for known, x in given if known.untyped_storage()._cdata == memory]
        with torch.inference_mode(shared[0].is_inference() if shared else torch.is_inference_mode_enabled()):
            return _on(raw)

    arguments, options = tree_map(off, (_as_tensors(op, arguments), options))
    return tree_map_only(torch.Tensor, on, op(*arguments, **options))


def _as_tensors(op, arguments) -> list:
    """Numbers that stand for tensors, as they come from Python's operators, are tensors again."""
    kinds = [argument.type for argument in op._schema.arguments] if hasattr(op, "_schema") else ()
    return [
        torch.tensor(x, dtype=torch.float64 if type(x) is float else None)
        if type(x) in (bool, int, float) and isinstance(kind, torch.TensorType)
        else x
        for x, kind in zip_longest(arguments, kinds[: len(arguments)])
    ]


def _copy(source, target):
    if not _here(source):
        copied[_asker()] += source.nbytes
    elif not _here(target):
        waited[_asker()] += 1
    (_off(target) if _here(target) else target).copy_(_off(source) if _here(source) else source)
    return target


def _asker() -> str:
    """The innermost function of ours on the stack, "sslr1/ops/transfer.py:upload"."""
    frame = sys._getframe()
    while frame:
        path = frame.f_code.co_filename
        if "/sslr1/" in path:
            return f"sslr1/{path.rpartition('/sslr1/')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def render_by_triton(launch=True) -> None:
    """Render with the Triton kernels' host side, as on a GPU: launched in Triton's interpreter (TRITON_INTERPRET=1 must
    have been there before the first import), or not at all, for canvases of zeros."""
    from sslr1.kernels import render as kernels

    render = import_module("sslr1.ops.render")  # whose function has its name
    choose = render.choose_backend
    render.choose_backend = lambda backend, device: "triton" if device.type == NAME else choose(backend, device)
    for name in ("halve", "blur", "paint"):
        setattr(kernels, name, Launches(getattr(kernels, name), launch))


class Launches:
    """A kernel in Triton's interpreter, on the memory of its arguments; or, not to be launched, one that zeroes the
    first of them if it is to be painted."""

    def __init__(self, kernel, launch):
        self.kernel, self.launch = kernel, launch

    def __getitem__(self, grid):
        def run(*arguments, **options):
            if self.launch:
                self.kernel[grid](*(_off(x) if _here(x) else x for x in arguments), **options)
            elif "PATCH" in options:
                arguments[0].zero_()

        return run
