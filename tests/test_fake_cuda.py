"""A decode step and the learner's pass over a micro-batch as a GPU would be given them, without one: on tensors that
have shapes, dtypes and a device but no numbers (FakeTensorMode). An operation that mixes devices or asks for a number
fails there by itself; one that makes a CPU tensor, or gives one back, fails here. Kernels are launched for nothing,
products with sums of another dtype, which can't be traced, are replaced by what has their shape.
"""

import ctypes
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from sslr1 import distributed, model, ops, puzzles
from sslr1.data import mixed
from sslr1.learner import Learner
from sslr1.learner.learner import Counts
from sslr1.model import shared_prefix
from sslr1.ops import (
    attention,
    backends,
    chunks,
    decode_attend,
    decode_delta,
    decode_rows,
    decode_samples,
    flash,
    loss_walk,
    packed_attention,
    sampling,
)
from sslr1.ops.state_layout import Chunks
from sslr1.rollout import Engine, wave
from sslr1.rollout.cache import Shape
from sslr1.rollout.kept import Kept
from tests.learner.test_learner import OPTIONS, make_groups

CUDA = torch.device("cuda", 0)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Accessing the data pointer of FakeTensor"
)  # for its alignment, by kernels' hosts


@pytest.fixture
def guarded():
    """Where torch was built without CUDA, its C++ has nothing that sets a GPU as the current device, and will not index
    a tensor there: what does nothing, for the meta device, takes the place."""
    if torch.cuda._is_compiled():  # FakeTensorMode sees to it
        yield
        return
    cuda, meta = 1, 14  # of c10::DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    assert guards[meta] and not guards[cuda]
    guards[cuda] = guards[meta]
    yield
    guards[cuda] = None


class Device(FakeTensorMode):
    """While `watched`, every operation gives tensors of the device and no others."""

    watched, seen, waits = False, 0, 0

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        if op is torch.ops.aten.index.Tensor and arguments[1][0] is not None and arguments[1][0].dtype == torch.bool:
            self.waits += 1  # for how many there are; all of them, as far as shapes go
            return arguments[0].clone()
        out = super().__torch_dispatch__(op, types, arguments, options)
        if self.watched:
            self.seen += 1
            elsewhere = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.device != CUDA]
            assert not elsewhere, f"{op} gives a tensor on {elsewhere[0].device}"
        return out

    def upload(self, x):
        """A tensor of numbers, as it is on the device. Not watched."""
        with unset_fake_temporarily():
            x = self.from_tensor(x.detach())
        watched, self.watched = self.watched, False
        with self:
            x = x.to(CUDA)
        self.watched = watched
        return x

    def upload_all(self, packed):
        """A `Packed` and its layout, as `to` does."""
        parts = {k: self.upload(x) for k, x in vars(packed).items() if isinstance(x, torch.Tensor)}
        layout, states = copy(packed.layout), copy(packed.state_layout)
        for name, x in vars(layout).items():
            if isinstance(x, torch.Tensor):
                setattr(layout, name, self.upload(x))
        for name, x in vars(states).items() if states else ():
            if isinstance(x, torch.Tensor):
                setattr(states, name, self.upload(x))
            elif isinstance(x, Chunks):
                there = {field: self.upload(y) for field, y in x._asdict().items()}
                with unset_fake_temporarily():  # which stays on the CPU
                    there["steps"] = self.from_tensor(x.steps)
                setattr(states, name, Chunks(**there))
        prompts = [replace(p, pixel_values=self.upload(p.pixel_values)) for p in packed.prompts]
        return replace(
            packed,
            **parts
            | {"layout": layout, "state_layout": states, "prompts": prompts, "image_grid_thw": packed.image_grid_thw},
        )

    def take(self, module):
        """The same for all of a module's parameters and buffers, in place; tied ones stay tied."""
        known = {}
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None and id(p) not in known:
                    known[id(p)] = torch.nn.Parameter(self.upload(p), p.requires_grad)
                part._parameters[name] = p if p is None else known[id(p)]
            for name, b in part._buffers.items():
                part._buffers[name] = b if b is None else self.upload(b)
        return module


class Kernel:
    """A Triton kernel that is launched with tensors of the device and computes nothing."""

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        assert all(x.device == CUDA for x in arguments if isinstance(x, torch.Tensor))


def there_and_back(q, k, v, *tables):
    """Attention, and its gradient behind it, which autograd can't be asked for: a torch without CUDA has no thread for
    it."""
    out, lse = packed_attention.forward(q, k, v, *tables)
    assert [x.shape for x in packed_attention.backward(out, q, k, v, out, lse, *tables)] == [x.shape for x in (q, k, v)]
    return out, lse


@pytest.fixture
def device(guarded, monkeypatch):
    from sslr1.kernels import decode, recurrent, sample, step
    from sslr1.kernels import row_loss as rows

    for module, name in (
        *((recurrent, n) for n in ("step", "conv_step")),
        *((step, n) for n in ("norms", "swiglu_rows", "split_turn", "gather_gate", "delta", "gate_norm")),
        *((step, n) for n in ("begin_rows", "end_rows")),
        *((decode, n) for n in ("prompt_part", "own_part", "join")),
        *((sample, n) for n in ("draw_uniforms", "statistics", "pick")),
        (rows, "kernel"),
    ):
        monkeypatch.setattr(module, name, Kernel())
    whole, added = chunks.product, chunks.add_product

    def product(a, b, dtype, out=None):
        if a.dtype == dtype:
            return whole(a, b, dtype, out)
        shape = (*a.shape[:1], *b.shape[1:])
        return a.new_empty(shape, dtype=dtype) if out is None else out.copy_(a[:, :1] + b[:1])

    def add_product(into, a, b):
        added(into, a, b) if a.dtype == into.dtype else into.add_(a[:, :1] + b[:1])

    monkeypatch.setattr(chunks, "product", product)
    monkeypatch.setattr(chunks, "add_product", add_product)
    # The CUDA kernel takes addresses, which these have not: Triton's takes its place
    monkeypatch.setattr(backends, "_missing", lambda name: "" if name == "triton" else "not here")
    monkeypatch.setattr(backends, "_say_what_is_missing", lambda operation: None)
    monkeypatch.setattr(flash, "_library", lambda: "torch")
    for name, run in {
        "sample": sampling._op_sample,
        "decode_attention": attention._op_decode_attention,
        "step_begin": decode_samples._op_step_begin,
        "step_end": decode_samples._op_step_end,
        "step_norm": decode_rows._op_step_norm,
        "step_swiglu": decode_rows._op_step_swiglu,
        "step_attention": decode_attend._op_step_attention,
        "step_delta": decode_delta._op_step_delta,
        "token_logprobs": loss_walk._token_logprobs,
        "grpo_loss": lambda *arguments: loss_walk._grpo_loss(*arguments[:-2], True, True),
        "packed_attention": there_and_back,
    }.items():
        monkeypatch.setattr(torch.ops.sslr1, name, run)
    found = Device()
    tables = shared_prefix.vision_tables

    def vision_tables(visual, grid_thw, _):  # from numbers on the CPU, and then uploaded
        with unset_fake_temporarily():
            known = tables(visual, grid_thw, "cpu")
        return {n: found.upload(x) if isinstance(x, torch.Tensor) else x for n, x in known.items()}

    monkeypatch.setattr(shared_prefix, "vision_tables", vision_tables)
    return found


def decode(folder, device, dtype, kept=False, **sampling):
    """Two steps of four samples of each of three prompts, of all and of half of them; in buffers that are kept, after
    another call with groups of one."""
    network = model.load_model(folder, dtype).requires_grad_(False)
    engine = Engine(network, model.load_tokenizer(folder))
    with device, torch.no_grad():
        device.take(network)
        settings = {"stop": engine.stop_ids, "suppressed": engine.suppressed, "batch_invariant": False}
        shape = Shape(places=3, longest=50, group_size=4, max_tokens=9, rows=12)
        waves, held = [], Kept(shape)
        if kept:
            for asked in (Shape(places=2, longest=40, group_size=1, max_tokens=7, rows=2), shape):
                waves.append(held.wave(network, asked, lambda *_: True, None, **settings))
        else:
            waves.append(wave.Wave(network, shape, **settings))
        for w in waves:
            w.begin(7, {"temperature": 0.9, "top_p": 1.0, "top_k": 0} | sampling, 7)
            device.watched = True
            for block in ((0, w.most_rows, 0, w.places), (0, w.most_rows // 2, 0, w.places)):
                for _ in range(3 if kept else 1):
                    w.graphs.run(w.step, block, ()) if kept else w.step(*block)
            device.watched = False
    assert not kept or (held.waves == {1: waves[0], 4: waves[1]} and all(len(w.graphs.captured) == 2 for w in waves))
    assert device.seen > 100 and not device.waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50}], ids=["plain", "restricted"])
def test_a_decode_step(any_tiny, device, dtype, sampling):
    decode(any_tiny, device, dtype, **sampling)


def test_steps_in_buffers_that_are_kept(any_tiny, device, monkeypatch):
    def capture(step, block, pool):
        step(*block)
        return SimpleNamespace(replay=lambda: None), 0

    monkeypatch.setattr(wave, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    decode(any_tiny, device, torch.bfloat16, kept=True)


@pytest.mark.parametrize(
    "fault, words",
    [
        (lambda slots, logits, *_: logits.amax().item(), "local_scalar_dense"),
        (lambda slots, logits, *_: bool((slots == 0).all()), "local_scalar_dense|is_nonzero"),
        (lambda slots, logits, *_: logits.argmax(-1).cpu(), "cpu"),
        (lambda slots, logits, *_: torch.zeros(3), "cpu"),
        (lambda slots, logits, *_: logits[:, torch.tensor([1, 2])], "cpu"),
        (lambda slots, logits, *_: logits.index_select(0, slots.nonzero()[:, 0]), "nonzero"),
    ],
)
def test_a_fault_in_a_step_is_seen(tiny, device, monkeypatch, fault, words):
    inner = wave.Wave.draw
    monkeypatch.setattr(wave.Wave, "draw", lambda self, *given: fault(*given) or inner(self, *given))
    with pytest.raises(Exception, match=words):
        decode(tiny, device, torch.bfloat16)


@pytest.mark.parametrize("max_side", [None, 30])
def test_an_image_decoded_there(device, max_side):
    """It is reduced and turned where it is, and downloaded last."""
    with device:
        for orientation in range(1, 9):
            stored = torch.zeros(60, 90, 3, dtype=torch.uint8, device=CUDA)
            host, there = mixed.finished(stored, orientation, max_side)
            size = (60, 90, 3) if max_side is None else (20, 30, 3)
            assert host.shape == there.shape == (size if orientation < 5 else (size[1], size[0], 3))
            assert (host.device.type, there.device, there.dtype) == ("cpu", CUDA, torch.uint8)


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.1, "entropy_coef": 0.01}], ids=["plain", "penalties"])
def test_a_micro_batch_of_the_learner(any_tiny, device, photographs, seed, monkeypatch, options):
    """Between the upload and the step's numbers it waits once, for which rows have a gradient."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    network = model.load_model(any_tiny, torch.bfloat16)
    groups, rewards = make_groups(any_tiny, photographs, seed)
    policy = model.Policy(network)
    packed = model.pack(groups, **policy.pack_options)
    drawn = torch.cat([s.logprobs for g in groups for s in g.samples])
    with device, torch.no_grad():
        device.take(network)
        learner = Learner(
            *(policy, distributed.World(0, 1, CUDA)),
            **dict(optim=OPTIONS.optim, loss=OPTIONS.loss.model_copy(update=options)),
            **dict(
                temperature=0.9, max_tokens=10, token_budget=10_000, steps=10, max_logp_gap=0.1 if options else None
            ),
        )
        if options:
            learner.set_reference(policy)
        packed = device.upload_all(packed)
        rewards, drawn = device.upload(rewards), device.upload(drawn)
        step = dict(kept={}, counts=Counts(tokens=40, sequences=12, unshared=0, reward_std=0.3))
        device.watched = True
        found = learner._backward(packed, drawn, rewards, **step) | learner._backward(packed, drawn, rewards, **step)
    assert device.seen > 500 and device.waits == 4 and {"loss", "gap_max", "policy_loss"} <= set(found)


def test_a_steps_pictures_go_up_together_and_are_rendered_there(device, monkeypatch, photographs, seed):
    """Images and tables by one copy each; the kernels are given tensors of the device alone."""
    from sslr1.kernels import render as kernels

    from sslr1.ops import transfer

    launched, flat, found = [], [], device

    class Launched(Kernel):
        def __call__(self, *arguments, **options):
            super().__call__(*arguments, **options)
            launched.append(sum(isinstance(x, torch.Tensor) for x in arguments))

    def upload_together(tensors, where, purpose):
        assert where == CUDA
        flat.append(purpose)
        return [device.upload(x) for x in tensors]

    for name in ("halve", "blur", "paint"):
        monkeypatch.setattr(kernels, name, Launched())
    render = import_module("sslr1.ops.render")  # whose function has its name
    monkeypatch.setattr(render, "_atlas", lambda where: device.upload(render.atlas()))
    monkeypatch.setattr(torch.ops.sslr1, "render_patches", render._op_render_patches)
    inner = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *shape, device="cpu", **options: (
            found.upload(inner(*shape, **options)) if device == CUDA else inner(*shape, device=device, **options)
        ),
    )
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    monkeypatch.setattr(transfer, "upload_together", upload_together)
    monkeypatch.setattr(transfer, "upload", lambda x, where, purpose: device.upload(x))
    names = ["ordering", "correspondence", "rotation", "inpainting"]
    batch = puzzles.make(photographs, names, level=2, seed=seed)
    pixel_values, grids = batch.render_patches(device=CUDA)
    assert pixel_values.device == CUDA and len(pixel_values) == int(grids.prod(1).sum())
    assert flat == ["images", "plans"] and len(launched) >= 1


def test_copies_to_the_device_are_pinned_and_wait_for_nothing(monkeypatch):
    """Each by itself, and several by one: from pinned memory, of which there is none here, without waiting."""
    pinned, copies = [], []
    inner = {"empty": torch.empty, "to": torch.Tensor.to}

    def empty(*sizes, pin_memory=False, **options):
        pinned.append(pin_memory)
        return inner["empty"](*sizes, **options)

    def to(x, device, non_blocking=False):
        copies.append((torch.device(device).type, non_blocking))
        return inner["to"](x, "meta")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(True) or x)
    sources = [torch.zeros(5, 7, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)]
    monkeypatch.setattr(torch.Tensor, "to", to)
    before = ops.transfer.total()
    one = ops.transfer.upload(sources[0], "cuda", "images")
    several = ops.transfer.upload_together(sources, "cuda", "images")
    assert pinned == [True, True] and copies == [("cuda", True)] * 2
    assert [(x.shape, x.dtype) for x in (one, *several)] == [(x.shape, x.dtype) for x in (sources[0], *sources)]
    assert ops.transfer.total() - before == 105 + 112 + 32  # the first of several is followed by what aligns the next
