"""What a decode step and a learner's pass launch, move and keep, counted without a GPU: on tensors that have shapes,
dtypes and a device but no numbers (FakeTensorMode), at the real shapes of every recipe.

    python bench/ counts

Counted is what would be launched on a GPU: an operation of torch's that is no view is one kernel, and an operation of
ours is as many as its host code launches, which runs here with kernels that do nothing. Copies and fills count. A
kernel reads its inputs and writes its outputs, each once and whole; of tables and caches what it takes or writes of
them. "cached" leaves out a tensor under 25 MB that the next kernel reads: its write and that read. Time is bytes at the
memory's rate and 2.5 us a kernel. A layer's figures are the difference between models with one layer more and less, so
they repeat exactly.

Decode: 512 samples in groups of 16 behind prompts of 1,000 tokens, with 100 tokens of their own. "generate" is
transformers' step on as many rows with a cache of as many tokens, "ours" the step that the engine takes. A learner's
layer has a packed group of 1,000 and 16 times 200 tokens; kept for backward is by saved-tensor hooks, every storage
once, without the weights. Of the delta rule and its convolution there, an operation is one kernel.
"""

import contextlib
import copy
import ctypes
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from row import Row, Sides
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslr1 import model, ops
from sslr1.model import decode_layers, lean_layers, load
from sslr1.model.gated_delta_net import dtypes_of, linear_layers
from sslr1.model.shared_prefix import no_mask, plug_in
from sslr1.model.sizes import SIZES
from sslr1.ops import (
    attention,
    backends,
    chunks,
    decode_attend,
    decode_delta,
    decode_rows,
    decode_samples,
    delta_rule,
    sampling,
    short_conv,
)
from sslr1.rollout import cache as caches
from sslr1.rollout import wave

warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # for its alignment, by kernels' hosts

CUDA = torch.device("cuda", 0)
ROWS, GROUP, PROMPT, OWN = 512, 16, 1000, 100
PACKED = (1000, (200,) * 16)
KERNEL_US, RATES = 2.5, {"H200": 4.3e12, "H100": 3.35e12}
CACHED = 25e6  # bytes
RECIPES = ("qwen2.5-vl-3b", "qwen2.5-vl-7b", "mimo-vl-7b", "qwen3-vl-4b", "qwen3.5-4b", "qwen3.5-9b")


@dataclass
class Kernel:
    """reads, writes: (storage, bytes) each."""

    name: str
    reads: list = field(default_factory=list)
    writes: list = field(default_factory=list)

    @property
    def bytes(self):
        return sum(n for _, n in (*self.reads, *self.writes))


@dataclass(frozen=True)
class Cost:
    kernels: int = 0
    bytes: int = 0
    uncached: int = 0  # bytes, where small tensors that the next kernel reads are not counted

    def __add__(self, other):
        return Cost(*(a + b for a, b in zip(self.values, other.values)))

    def __sub__(self, other):
        return Cost(*(a - b for a, b in zip(self.values, other.values)))

    def times(self, n):
        return Cost(*(n * a for a in self.values))

    @property
    def values(self):
        return self.kernels, self.bytes, self.uncached

    def seconds(self, rate):
        return self.bytes / rate + self.kernels * KERNEL_US * 1e-6


aten = torch.ops.aten
NOTHING = {  # which launch nothing
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view),
    *(aten.sym_size, aten.sym_stride, aten.sym_numel, aten.is_pinned, aten.lift_fresh, aten.detach),
}
ROWS_OF = {aten.embedding, aten.index_select, aten.index, aten.gather}  # read what they give
INTO = {aten.index_copy_, aten.index_put_, aten.scatter_, aten.index_copy, aten.index_fill_, aten._index_put_impl_}
FILLS = {aten.copy_, aten.fill_, aten.zero_}  # don't read what they write
FRESH = {aten.new_zeros, aten.new_ones, aten.new_full, aten.zeros_like, aten.ones_like, aten.full_like}
# Kernels that an operation of ours launches where its host code does not run here; others' count once
LAUNCHES = {"sslr1.packed_attention": 17, "sslr1.packed_attention_backward": 17}
# Arguments of our kernels that they write; of what is missing here, and takes part of a buffer, see PARTS
WRITES = {
    "prompt_part": ("parts", "lses"),
    "own_part": ("result",),
    "join": ("result",),
    "statistics": ("blocks",),
    "pick": ("tokens", "logprobs"),
    "step": ("out",),
    "conv_step": ("out",),
    "norms": ("out",),
    "swiglu_rows": ("out",),
    "split_turn": ("q",),
    "gather_gate": ("out",),
    "delta": ("out",),
    "gate_norm": ("out",),
    "draw_uniforms": ("out",),
    "begin_rows": ("own_lengths", "token", "position", "written", "key"),
    "end_rows": ("counts", "live"),
}
# {kernel: {argument: bytes read, bytes written}} of buffers of which it takes a part
PARTS = {
    "pick": {"logits": lambda a: (a["blocks"].shape[0] * (4096 + 1) * a["logits"].element_size(), 0)},
    "split_turn": {
        "q_norm": lambda a: (a["NORM"] * size(a["q_norm"]), 0),
        "k_norm": lambda a: (a["NORM"] * size(a["k_norm"]), 0),
        "own_k": lambda a: (0, len(a["samples"]) * a["heads_kv"] * a["D"] * a["q"].element_size()),
        "own_v": lambda a: (0, len(a["samples"]) * a["heads_kv"] * a["D"] * a["q"].element_size()),
        "qkv": lambda a: (size(a["qkv"]) - (a["EACH"] > a["D"]) * size(a["q"]), 0),  # gates are read later
    },
    "gather_gate": {"qkv": lambda a: (a["GATED"] * size(a["out"]), 0)},
    "delta": {"states": lambda a: (_rows(a["states"], len(a["samples"])),) * 2},
    "step": {"states": lambda a: (_rows(a["states"], len(a["samples"])),) * 2},
    "conv_step": {"tails": lambda a: (_rows(a["tails"], len(a["samples"])),) * 2},
}
for _name in ("statistics", "pick"):  # the logits again, where nothing is restricted
    PARTS.setdefault(_name, {})["allowed"] = lambda a: (0, 0)


def _rows(x, n):
    return n * x[0].numel() * x.element_size()


def size(x) -> int:
    """Bytes that lie there: what is expanded counts once."""
    n = x.element_size()
    for length, stride in zip(x.shape, x.stride()):
        n *= length if stride or not length else 1
    return n


class Counter(TorchDispatchMode):
    """`kernels`: those launched, in order."""

    def __init__(self):
        super().__init__()
        self.kernels, self.alive = [], []

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        out = op(*arguments, **(options or {}))
        packet, schema = op.overloadpacket, op._schema
        view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if packet in NOTHING or view or op.namespace == "prim":
            return out
        inputs = [x for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        kernel = Kernel(str(packet).removeprefix("aten."))
        if packet in ROWS_OF:
            self._read(kernel, inputs[0], sum(map(size, outputs)))
            inputs = inputs[1:]
        elif packet in INTO:
            source = inputs[-1] if len(inputs) > 2 or packet is aten.index_put_ else inputs[0]
            self._write(kernel, inputs[0], size(source))
            inputs, outputs = inputs[1:], []
        elif packet in FILLS | FRESH:
            inputs = inputs[1:]
        for x in {id(x): x for x in inputs}.values():
            self._read(kernel, x, size(x))
        for x in outputs:
            self._write(kernel, x, size(x))
        self.kernels.append(kernel)
        return out

    def _key(self, x):
        self.alive.append(x)  # or another could take its place
        return x.untyped_storage()._cdata

    def _read(self, kernel, x, n):
        kernel.reads.append((self._key(x), n))

    def _write(self, kernel, x, n):
        kernel.writes.append((self._key(x), n))

    def add(self, name, reads, writes):
        kernel = Kernel(name)
        for x in reads:
            self._read(kernel, x, size(x))
        for x in writes:
            self._write(kernel, x, size(x))
        self.kernels.append(kernel)

    def launch(self, name, arguments):
        """A kernel of ours. arguments: by name."""
        kernel, parts = Kernel(name), PARTS.get(name, {})
        for key, x in arguments.items():
            if not isinstance(x, torch.Tensor):
                continue
            if key in parts:
                read, written = parts[key](arguments)
            else:
                read, written = (0, size(x)) if key in WRITES[name] else (size(x), 0)
            if read:
                self._read(kernel, x, read)
            if written:
                self._write(kernel, x, written)
        self.kernels.append(kernel)

    def cost(self) -> Cost:
        whole = uncached = sum(kernel.bytes for kernel in self.kernels)
        for before, kernel in zip(self.kernels, self.kernels[1:]):
            for key, n in before.writes:
                again = sum(m for other, m in kernel.reads if other == key)
                if again and n < CACHED:
                    uncached -= n + again
        return Cost(sum(LAUNCHES.get(kernel.name, 1) for kernel in self.kernels), whole, uncached)


class Launch:
    """Stands for a Triton kernel."""

    def __init__(self, name, kernel, counter):
        self.name, self.names, self.counter = name, kernel.arg_names, counter

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        self.counter().launch(self.name, dict(zip(self.names, arguments)) | options)


@contextlib.contextmanager
def pretended(counter):
    """A GPU's way through our code with FakeTensorMode's tensors; kernels are told to counter()."""
    from sslr1.kernels import decode, recurrent, sample, step
    from triton.runtime.jit import JITFunction

    launched = {decode: ("prompt_part", "own_part", "join"), sample: ("draw_uniforms", "statistics", "pick")}
    launched |= {recurrent: ("step", "conv_step")}
    launched |= {
        step: ("norms", "swiglu_rows", "split_turn", "gather_gate", "delta", "gate_norm", "begin_rows", "end_rows")
    }
    operators = {
        "sample": sampling._op_sample,
        "decode_attention": attention._op_decode_attention,
        "gated_delta_step": delta_rule._op_step,
        "causal_conv_step": short_conv._op_step,
        "step_begin": decode_samples._op_step_begin,
        "step_end": decode_samples._op_step_end,
        "step_norm": decode_rows._op_step_norm,
        "step_swiglu": decode_rows._op_step_swiglu,
        "step_attention": decode_attend._op_step_attention,
        "step_delta": decode_delta._op_step_delta,
    }

    def product(a, b, dtype, out=None):  # with sums of another dtype, which can't be traced on a CPU
        into = a.new_empty(a.shape[0], b.shape[1], dtype=dtype) if out is None else out
        counter().add("mm", (a, b), (into,))
        return into

    def sdpa(q, k, v, **options):
        out = q.new_empty(q.shape)
        counter().add("scaled_dot_product_attention", (q, k, v), (out,))
        return out

    with contextlib.ExitStack() as stack:
        stack.enter_context(guard())
        for module, names in launched.items():
            for name in names:
                inner = getattr(module, name)
                assert isinstance(inner, JITFunction), name
                stack.enter_context(mock.patch.object(module, name, Launch(name, inner, counter)))
        for name, run in operators.items():
            stack.enter_context(mock.patch.object(torch.ops.sslr1, name, run))
        there = mock.patch.object(backends, "_missing", lambda name: "" if name == "triton" else "not here")
        stack.enter_context(there)
        stack.enter_context(mock.patch.object(backends, "_say_what_is_missing", lambda _: None))
        stack.enter_context(mock.patch.object(chunks, "product", product))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", sdpa))
        yield


@contextlib.contextmanager
def guard():
    """Where torch was built without CUDA, its C++ has nothing that sets a GPU as the current device, and will not index
    a tensor there: what does nothing, for the meta device, takes the place."""
    if torch.cuda._is_compiled():  # FakeTensorMode sees to it
        yield
        return
    cuda, meta = 1, 14  # of c10::DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[cuda] = guards[cuda], guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


def network_of(name, layers, device=CUDA):
    """A published model with these kinds of layers in place of its own, bfloat16, on the pretended GPU or elsewhere."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**copy.deepcopy(SIZES[name]))
    text = config.text_config
    text.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None):
        text.layer_types = [f"{kind}_attention" for kind in layers]
    config.vision_config.depth = 1  # no step looks at pictures
    network = load._built(config).requires_grad_(False)
    dtypes = dtypes_of(network, torch.bfloat16)
    known = {}
    for path, part in network.named_modules():
        for key, p in part._parameters.items():
            if p is not None:
                dtype = dtypes.get(f"{path}.{key}".removeprefix("."), torch.bfloat16)
                made = known.get(id(p))
                if made is None:
                    made = torch.nn.Parameter(torch.empty(p.shape, dtype=dtype, device=device), requires_grad=False)
                    known[id(p)] = made
                part._parameters[key] = made
        for key, b in part._buffers.items():
            part._buffers[key] = b if b is None else torch.empty(b.shape, dtype=b.dtype, device=device)
    return network


def engine_step(network):
    """Our step, on a replica: weights of one product lie together."""
    plug_in(network)
    together(network)
    P = ROWS // GROUP
    shape = caches.Shape(places=P, longest=PROMPT, group_size=GROUP, max_tokens=OWN, rows=ROWS)
    found = wave.Wave(network, shape, stop=[1], suppressed=[2, 3], batch_invariant=False)
    found.begin(7, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}, OWN)
    return lambda: found.step(0, ROWS, 0, P)


def together(network):
    """As `SamplerWeights` lays a replica's weights."""
    known = dict(network.named_parameters())
    dtypes = {key: p.dtype for key, p in known.items()}
    for key, tensor in decode_layers.joined(network, known, dtypes, CUDA).items():
        owner, _, leaf = key.rpartition(".")
        setattr(network.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))


def generates_step(network):
    """transformers' step of `generate` with sampling, by its own modules and cache: model, float32 logits, softmax,
    draw, and what it appends."""
    from transformers import DynamicCache

    text = network.config.text_config
    network.set_attn_implementation("sdpa")
    past = DynamicCache(config=text)
    kv = ROWS, text.num_key_value_heads, PROMPT + OWN - 1, caches.head_size(text)
    linear = linear_layers(text)
    for number, layer in enumerate(past.layers):
        layer.dtype, layer.device = torch.bfloat16, CUDA
        if number not in linear:
            layer.keys, layer.values = (torch.empty(kv, dtype=torch.bfloat16, device=CUDA) for _ in range(2))
            layer.is_initialized = True
            continue
        state, (wide, taps) = caches.of_a_sample(text)
        layer.conv_states[0] = torch.empty(ROWS, wide, taps + 1, dtype=torch.bfloat16, device=CUDA)
        layer.recurrent_states[0] = torch.empty(ROWS, *state, device=CUDA)
        for known in (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized):
            known[0] = True
        layer.has_previous_state[0] = True
        layer.conv_kernel_size = {0: taps + 1}
    ids = torch.empty(ROWS, PROMPT + OWN, dtype=torch.int64, device=CUDA)
    unfinished = torch.empty(ROWS, dtype=torch.int64, device=CUDA)
    mask = torch.empty(ROWS, PROMPT + OWN, dtype=torch.int64, device=CUDA)
    stop = torch.empty(1, dtype=torch.int64, device=CUDA)
    positions = torch.empty(3, ROWS, 1, dtype=torch.int64, device=CUDA)

    def step():
        states = network.model.language_model(
            inputs_embeds=network.model.language_model.embed_tokens(ids[:, -1:]),
            attention_mask=None,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
        ).last_hidden_state
        logits = network.lm_head(states)[:, -1].to(copy=True, dtype=torch.float32)
        drawn = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
        drawn = drawn * unfinished + 0 * (1 - unfinished)
        torch.cat([ids, drawn[:, None]], -1)
        torch.cat([mask, mask.new_ones(ROWS, 1)], -1)
        unfinished & ~torch.isin(drawn, stop)

    return step


STEPS = {"generate": generates_step, "ours": engine_step}


def traced(name, layers, make) -> Counter:
    counter = Counter()
    with pretended(lambda: counter), FakeTensorMode(), torch.no_grad():
        step = make(network_of(name, layers))
        with counter:
            step()
    return counter


@cache
def decode(name, side) -> dict:
    """{"full": Cost of a layer, "linear": of one, "rest": of what lies around them, "step": of all}"""
    from transformers import AutoConfig

    text = AutoConfig.for_model(**copy.deepcopy(SIZES[name])).text_config
    linear, whole = len(linear_layers(text)), text.num_hidden_layers
    one, two = (traced(name, kinds, STEPS[side]).cost() for kinds in (("full",), ("full", "full")))
    found = {"full": two - one, "rest": one - (two - one)}
    found["step"] = found["rest"] + found["full"].times(whole - linear)
    if linear:
        found["linear"] = traced(name, ("full", "linear"), STEPS[side]).cost() - one
        found["step"] += found["linear"].times(linear)
    return found


class Kept:
    """Bytes that autograd keeps, every storage once, without `weights`."""

    def __init__(self, weights):
        self.weights, self.storages = {w.untyped_storage()._cdata for w in weights}, {}

    def keep(self, x):
        storage = x.untyped_storage()
        if storage._cdata not in self.weights:
            self.storages[storage._cdata] = storage  # alive, or another could take its place
        return x

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def trained(name, layers, lean=False):
    """(Cost of forward, of backward, bytes kept between them) of these layers over a packed group, bfloat16. lean: as
    the learner has them; only the bytes kept are then a GPU's, since plain forms stand in for the kernels."""
    counter = Counter()
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = network_of(name, layers, "cpu").requires_grad_(True)
        plug_in(network)
        if lean:
            lean_layers.plug_in(network)
        language, text = network.model.language_model, network.config.text_config
        tokens = PACKED[0] + sum(PACKED[1])
        with unset_fake_temporarily():
            layout = ops.Layout([PACKED]), ops.StateLayout([PACKED]) if linear_layers(text) else None
        embeds = torch.empty(1, tokens, text.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.empty(3, 1, tokens, dtype=torch.int64)
        kept = Kept(network.parameters())
        options = dict(layout=layout[0], state_layout=layout[1], use_cache=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda x: x):
            out = language(
                inputs_embeds=embeds, position_ids=positions, attention_mask=no_mask(embeds), **options
            ).last_hidden_state
        forward, counter.kernels = counter.cost(), []
        gradient = torch.empty_like(out)
        with counter:
            out.backward(gradient)
    return forward, counter.cost(), kept.bytes


@cache
def learner(name) -> dict:
    """{kind: {"forward": Cost, "backward": Cost, "kept": bytes a token, "ours": bytes a token}} of a layer of
    transformers' modules, and what the learner's own keep."""
    one, lean = trained(name, ("full",)), trained(name, ("full",), True)
    found = {}
    for kind in ("full", "linear") if "qwen3.5" in name else ("full",):
        two, tokens = trained(name, ("full", kind)), PACKED[0] + sum(PACKED[1])
        forward, backward, kept = (a - b for a, b in zip(two, one))
        ours = trained(name, ("full", kind), True)[2] - lean[2]
        found[kind] = dict(forward=forward, backward=backward, kept=kept // tokens, ours=ours // tokens)
    return found


def least(name) -> int:
    """Bytes of a decode step that no kernel can spare: weights once, the prompts' keys and values once a group, the
    samples' own, linear layers' states read and written, float32 logits once."""
    with FakeTensorMode():
        network = model.outline(name)
    text = network.config.text_config
    language = network.model.language_model
    weights = sum(2 * p.numel() for p in (*language.layers.parameters(), network.lm_head.weight))
    tokens = ROWS // GROUP * PROMPT + ROWS * OWN
    states = 2 * ROWS * caches.bytes_a_sample(text, 2)
    return weights + tokens * caches.bytes_a_token(text, 2) + states + 4 * ROWS * text.vocab_size


def table(name) -> str:
    lines, floor = [f"{name}: at least {least(name) / 1e9:.2f} GB a step"], least(name)
    for side in STEPS:
        found = decode(name, side)
        step = found["step"]
        layer = ", ".join(
            f"{kind} layer {found[kind].kernels} kernels {found[kind].bytes / 1e6:,.1f} MB"
            for kind in ("full", "linear")
            if kind in found
        )
        times = ", ".join(f"{card} {1e3 * step.seconds(rate):.2f} ms" for card, rate in RATES.items())
        lines.append(
            f"  decode, {side}: {layer}; rest {found['rest'].kernels}; step {step.kernels:,} kernels, "
            f"{step.bytes / 1e9:.2f} GB ({step.bytes / floor:.2f} x), cached {step.uncached / 1e9:.2f} GB "
            f"({step.uncached / floor:.2f} x); {times}"
        )
    for kind, found in learner(name).items():
        lines.append(
            f"  learner, {kind} layer: {found['forward'].kernels} + {found['backward'].kernels} kernels, "
            f"{found['forward'].bytes / 1e9:.2f} + {found['backward'].bytes / 1e9:.2f} GB, keeps "
            f"{found['kept'] / 1e3:.1f} kB a token, the learner's own {found['ours'] / 1e3:.1f}"
        )
    return "\n".join(lines)


def rows(mode):
    if mode != "cpu":
        return []
    return [
        Row(
            what=f"counted: {name}, decode step of {ROWS} samples, layer of a packed group",
            make=lambda name=name: Sides(ours=lambda: None, facts=lambda _: {"counted": counted(name)}, once=True),
        )
        for name in RECIPES
    ]


def counted(name) -> dict:
    print(table(name), flush=True)
    sides = {side: {kind: cost.values for kind, cost in decode(name, side).items()} for side in STEPS}
    layers = {kind: {key: getattr(x, "values", x) for key, x in found.items()} for kind, found in learner(name).items()}
    return {"least_bytes": least(name), "decode": sides, "learner": layers}
