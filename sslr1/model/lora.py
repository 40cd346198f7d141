"""LoRA: a frozen model with low-rank adapters at some of its linear layers, in PEFT's words and files.

`model.lora` of the configuration, or a folder that holds an adapter, becomes a `Lora`, which `add` puts into a
`skeleton`. Everything downstream sees a model with some more parameters (`….lora_A.weight`, `….lora_B.weight`), which
are the only ones that are trained. The others keep their published names, and lie in the compute dtype, once on each
rank: the sampler reads the same storage (`rollout.weights`), so that sharding them would make a second copy, not spare
one. What PEFT calls `base_model.model.X.lora_A.weight` is `X.lora_A.weight` here.
"""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from sslr1 import ops
from sslr1.errors import UserError
from sslr1.model import parallel
from sslr1.model.folder import ADAPTER, holds_adapter, opened, settings
from sslr1.model.gated_delta_net import cast

F32 = torch.float32
PREFIX = "base_model.model."  # PEFT's, of every name in an adapter's file
PARTS = ("lora_A.weight", "lora_B.weight")
TOWERS = {"targets": "model.language_model.", "vision": "model.visual."}
ALL = "all-linear"
# Settings of adapter_config.json that leave what an adapter computes as it is, or that are looked at here
READ = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "init_lora_weights", "lora_dropout")
NEUTRAL = (
    *("auto_mapping", "revision", "task_type", "inference_mode", "peft_version", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "ephemeral_gpu_offload"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size"),
    "ensure_weight_tying",
)
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others alter the base's matrices


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of one rank at the linears of these names. alpha: their product counts alpha / rank times, with rslora
    (rank-stabilised, arXiv 2312.03732) alpha / sqrt(rank)."""

    rank: int
    alpha: float
    rslora: bool
    names: tuple

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(nn.Linear):
    """A linear of a frozen matrix under its own name, with an adapter beside it."""

    def __init__(self, base: nn.Linear, lora: Lora):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = (
            nn.Linear(i, o, bias=False, device=base.weight.device, dtype=torch.promote_types(base.weight.dtype, F32))
            for i, o in ((base.in_features, lora.rank), (lora.rank, base.out_features))
        )
        self.scale, self.active = lora.scale, True

    def forward(self, x):
        if not self.active:
            return super().forward(x)
        lora_a, lora_b = (part.weight.to(x.dtype) for part in (self.lora_A, self.lora_B))
        return ops.lora_linear(x, self.weight, self.bias, lora_a, lora_b, self.scale)


def is_adapter(name) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.endswith(PARTS)


def chosen(network, asked) -> Lora:
    """The Lora that a configuration's section `model.lora` asks of a `skeleton`. Raises UserError for targets that are
    not there, or can't have an adapter."""
    names = []
    for key, tower in TOWERS.items():
        words = getattr(asked, key)
        if words is not None:
            names += _matched(network, words, f"model.lora.{key}", tower)
    if not names:
        raise UserError("model.lora has no targets: set model.lora.targets, model.lora.vision or both")
    return Lora(rank=asked.rank, alpha=asked.alpha or 2 * asked.rank, rslora=asked.rslora, names=tuple(sorted(names)))


def _matched(network, words, key, tower) -> list:
    """Names of a tower's linears that PEFT would choose by `target_modules`: "all-linear", a regular expression for the
    whole name, or a list of names or their ends."""
    modules = {name: module for name, module in network.named_modules() if name.startswith(tower)}
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if isinstance(words, str) and words.lower() == ALL:
        return linears
    if isinstance(words, str):
        try:
            pattern = re.compile(words)
        except re.error as error:
            raise UserError(f"{key}: {words!r} is not a regular expression: {error}") from None
        tests = {words: pattern.fullmatch}
    else:
        tests = {word: lambda name, word=word: name == word or name.endswith(f".{word}") for word in words}
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    found = []
    for word, test in tests.items():
        hits = [name for name in modules if test(name)] or ["lm_head"] * bool(test("lm_head"))
        if not hits:
            raise UserError(f"{key}: {word!r} is no module of {tower.rstrip('.')}; its linears end in {known}")
        for name in hits:
            if name not in linears:
                raise UserError(f"{key}: {word!r} names {name}, {_not_a_target(network, name)}; linears end in {known}")
        found += hits
    return list(dict.fromkeys(found))


def _not_a_target(network, name) -> str:
    kind = type(network.get_submodule(name)).__name__
    if kind == "Embedding" or name == "lm_head":
        return (
            "which can't have an adapter here: the loss takes the head's matrix as it is, and an adapter of embeddings "
            "that are tied to it would be one of both (PEFT merges it into both)"
        )
    return f"a {kind}: adapters are for linears only"


def add(network, lora: Lora, dtype) -> None:
    """Freeze a `skeleton` in `dtype` and put adapters in, trained ones, in float32 (float64 beside float64)."""
    cast(network, dtype)
    for name in lora.names:
        network.set_submodule(name, LoraLinear(network.get_submodule(name), lora))
    network.lora = lora
    freeze(network)


def freeze(network) -> None:
    """Train the adapters alone."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def follow(network, like) -> None:
    """Put adapters into `network` where `like` has them; nothing where it has none."""
    lora = lora_of(like)
    if lora:
        for name in lora.names:
            network.set_submodule(name, LoraLinear(network.get_submodule(name), lora))
        network.lora = lora


def lora_of(network) -> Lora | None:
    """What `add` has put into a model."""
    return getattr(network, "lora", None)


def adapters(network):
    """(name, parameter) of each half of an adapter."""
    return ((name, p) for name, p in network.named_parameters() if is_adapter(name))


@torch.no_grad()
def begin(network, seed) -> None:
    """Fill adapters, sharded or not, as PEFT begins them: A uniform within 1 / sqrt(its inputs), B zero, so that they
    change nothing yet. The draws are keyed by seed and name: the same on every number of ranks."""
    for name, parameter in adapters(network):
        rows = torch.zeros(parameter.shape)
        if name.endswith(PARTS[0]):
            key = ops.fold("lora", seed, name)
            bound = parameter.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
            rows.uniform_(-bound, bound, generator=torch.Generator().manual_seed(key % 2**63))
        parallel.fill(parameter, rows)


def load(network, folder) -> None:
    """Fill adapters, sharded or not, from an adapter's folder that `read` has read."""
    with opened(Path(folder) / ADAPTER[1]) as tensors:
        keys = _keys(network, tensors.keys())
        for name, parameter in adapters(network):
            parallel.fill(parameter, tensors.get_slice(keys[name]))


def read(folder, network) -> Lora:
    """The Lora of an adapter's folder for the `skeleton` of its base, from its settings and its file's header. Raises
    UserError where it is not one of PEFT's plain ones, or does not fit."""
    folder = Path(folder)
    file, weights = folder / ADAPTER[0], folder / ADAPTER[1]
    found = settings(file)
    if found.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {found.get('peft_type')!r}; only LORA is supported")
    odd = {k: v for k, v in found.items() if k not in (*NEUTRAL, *READ) and v not in (None, False, 0, "none", [], {})}
    if found.get("init_lora_weights", True) not in PLAIN_STARTS:
        odd["init_lora_weights"] = found["init_lora_weights"]
    if odd:
        said = ", ".join(f"{key}={value!r}" for key, value in odd.items())[:300]
        raise UserError(f"{file} asks for {said}, which is not supported: only plain LoRA of linears is")
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(f"{file}: r is {rank!r} and lora_alpha {alpha!r}; they take numbers, of 1 or more")
    if not weights.is_file():
        raise UserError(f"{folder} holds no {ADAPTER[1]} (pickled adapters are not read)")
    modules = dict(network.named_modules())
    with opened(weights) as tensors:
        keys = _keys(network, tensors.keys())
        names = sorted({name.rpartition(".lora_")[0] for name in keys})
        for name in names:
            if not isinstance(modules.get(name), nn.Linear) or name == "lm_head":
                what = _not_a_target(network, name) if name in modules else "which its base does not have"
                raise UserError(f"{weights} has an adapter of {name}, {what}")
        for name in names:
            linear = modules[name]
            shapes = [rank, linear.in_features], [linear.out_features, rank]
            for part, shape in zip(PARTS, shapes):
                key = keys.get(f"{name}.{part}")
                held = tensors.get_slice(key).get_shape() if key else None
                if held != shape:
                    raise UserError(f"{weights}: {name}.{part} has shape {held}, its base and r={rank} make it {shape}")
    if not names:
        raise UserError(f"{weights} holds no adapter of a linear")
    return Lora(rank=rank, alpha=alpha, rslora=bool(found.get("use_rslora")), names=tuple(names))


def _keys(network, keys) -> dict:
    """{our name: key in an adapter's file}; names of older versions are translated as for a model's own weights.
    Raises UserError."""
    from sslr1.model.load import renamer

    rename, out = renamer(network), {}
    for key in keys:
        name = key.removeprefix(PREFIX)
        module, _, part = name.rpartition(".lora_")
        if not key.startswith(PREFIX) or not is_adapter(name):
            raise UserError(f"tensor {key!r} of an adapter is not half of a linear's ({PREFIX}….{PARTS[0]})")
        out[f"{rename(f'{module}.weight').removesuffix('.weight')}.lora_{part}"] = key
    return out


def wanted(asked, network, path) -> Lora | None:
    """The Lora of a configuration for the skeleton of its model.path, None where it has none: of section `model.lora`,
    or of the adapter that lies there. Raises UserError."""
    if not holds_adapter(path):
        return chosen(network, asked) if asked.rank else None
    found = read(path, network)
    if asked.rank:
        _agree(asked, found, network, path)
    return found


def _agree(asked, found: Lora, network, path) -> None:
    """Raises UserError where `model.lora` of a configuration says otherwise than the adapter at model.path."""
    wanted = chosen(network, asked)
    differ = [
        f"{key}: {_short(getattr(wanted, key))}, the adapter's is {_short(getattr(found, key))}"
        for key in ("rank", "alpha", "rslora", "names")
        if getattr(wanted, key) != getattr(found, key)
    ]
    if differ:
        raise UserError(
            f"model.path {str(path)!r} is an adapter with settings of its own, and model.lora asks for others "
            f"({'; '.join(differ)}): leave model.lora out, or merge the adapter first"
        )


def _short(value) -> str:
    return f"{len(value)} linears" if isinstance(value, tuple) else str(value)


def write(folder, tensors, lora: Lora, base) -> None:
    """An adapter as PEFT's own folder. tensors: {name: whole tensor}; base: the model's folder, which it names by its
    whole path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / ADAPTER[1], {"format": "pt"})
    told = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).resolve()),
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(lora.names),
        inference_mode=True,
    )
    (folder / ADAPTER[0]).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def gathered(network) -> dict:
    """Whole adapters of a (possibly sharded) model, in the host's memory. All ranks must call it."""
    return {name: parallel.whole(p.detach()).to("cpu", copy=True) for name, p in adapters(network)}


@torch.no_grad()
def merge(network) -> None:
    """Add adapters into their linears in place, in float32 or more, rounded to the linears' dtype; plain linears are
    left."""
    for name in lora_of(network).names:
        module = network.get_submodule(name)
        wide = torch.promote_types(module.weight.dtype, F32)
        delta = module.lora_B.weight.to(wide) @ module.lora_A.weight.to(wide)
        module.weight.copy_(module.weight.to(wide) + module.scale * delta)
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        plain.weight, plain.bias = module.weight, module.bias
        network.set_submodule(name, plain)
    del network.lora


@contextmanager
def switched_off(network):
    """Without its adapters: the base alone."""
    found = [module for module in network.modules() if isinstance(module, LoraLinear)]
    for module in found:
        module.active = False
    try:
        yield
    finally:
        for module in found:
            module.active = True


class Reference:
    """The policy as its adapters were in an adapter's folder, for loss.kl_coef: the base is the policy's own. Adapters
    that change nothing (a run that began with new ones) are switched off; of others this rank's rows are held, and
    change places with the trained ones for a pass."""

    def __init__(self, policy, folder):
        self.policy, self.model, self.held = policy, policy.model, None
        with opened(Path(folder) / ADAPTER[1]) as tensors:
            keys = _keys(self.model, tensors.keys())
            if any(bool(tensors.get_tensor(key).any()) for name, key in keys.items() if name.endswith(PARTS[1])):
                self.held = {name: parallel.part(p, tensors.get_slice(keys[name])) for name, p in adapters(self.model)}

    def __call__(self, packed, loss):
        if self.held is None:
            with switched_off(self.model):
                return self.policy(packed, loss)
        parallel.exchange(dict(adapters(self.model)), self.held)
        try:
            return self.policy(packed, loss)
        finally:
            parallel.exchange(dict(adapters(self.model)), self.held)
