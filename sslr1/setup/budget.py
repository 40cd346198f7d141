"""`python -m sslr1.train CONFIG --plan RANKS`: memory and communication of each GPU, by arithmetic, without starting
anything.

What is exact (weights, gradients, moments, replica, logits, caches) follows from the model's shapes; activations are an
estimate of what autograd keeps, and say so.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import AttentionInterface

from sslr1 import model, ops, puzzles
from sslr1.data.stream import CHUNK
from sslr1.model import gated_delta_net, lean_layers, lora, shared_prefix
from sslr1.model.gated_delta_net import KEPT
from sslr1.ops.chunks import default_height
from sslr1.rollout.cache import bytes_a_sample, bytes_a_token, logit_bytes, places_for
from sslr1.rollout.engine import free_bytes
from sslr1.rollout.kept import rounded
from sslr1.setup import lengths
from sslr1.sums import plain_sum

MASTER = 4  # bytes of a parameter and a reduced gradient
TEXT = 200  # tokens of a question beside its pictures
ROOM = 0.9  # of a GPU's memory; the rest is CUDA's, NCCL's, and what the allocator can't hand out


@dataclass
class Line:
    """what, GB on each GPU, how it comes about, and when it is there: always, in the learner or the rollout only, or in
    one part of the learner's turn: "forward" to the loss, or "reduce", at the end of the backward pass, when the others
    are gone."""

    what: str
    gb: float
    how: str
    when: str = "always"


@dataclass(kw_only=True)
class Shapes:
    """What the arithmetic takes of a model and of how it is spread: numbers of parameters (all, those that are trained,
    and of those that are sharded the largest layer's or block's, and what is in none), bytes of the compute dtype,
    ranks, and those that share a copy, tokens of a prompt of the mixture's, of which every picture is as large as it
    may be, and of its longest, and of each tower its layers, width and bytes kept for the backward pass."""

    every: int
    trained: int
    largest: int
    rest: int  # embeddings, head and norms: whole during the whole forward and backward
    adapted: bool  # whether adapters are trained, and the rest lies whole on each rank in the compute dtype
    dtype: int
    ranks: int
    shards: int
    prompt: int
    longest: int
    text: object  # the text model's configuration
    layers: tuple  # (depth, width, bytes a token) of the decoder
    blocks: tuple  # (depth, width, bytes a patch) of the vision tower
    patches: int  # of a visual token
    values: int  # of a patch
    seen: int  # numbers that the vision tower gives a visual token, where it is frozen; else 0
    wide: int  # bytes that a copy in the compute dtype takes more, for what stays in float32

    @property
    def sharded(self) -> int:
        """Parameters that ranks share out among them."""
        return self.trained if self.adapted else self.every

    @property
    def own(self) -> bool:
        """Whether the sampler reads the learner's weights."""
        return self.ranks == 1 and self.dtype == MASTER

    @property
    def gathered(self) -> bool:
        """Whether layers compute with something else than the parameters that this rank holds."""
        return self.shards > 1 or self.dtype != MASTER


def plan(config, path, ranks: int, device="cuda", longest=0) -> tuple[list, list]:
    """(memory lines, communication lines) of one rank. config: a Config, or what has its values; path: the model's
    folder, of which config.json is enough, or a name in model.SIZES; longest: tokens of a prompt at least that the
    longest is taken to have, where there are tasks, whose rows this doesn't read. Raises UserError as `model.outline`
    does."""
    shapes = shapes_of(config, outline(config, path), ranks, device)
    shapes.longest = max(shapes.longest, longest)
    return lines_of(config, shapes, device)


def outline(config, path):
    """The configuration's `model.outline` of a folder or a name, with its adapters. Raises UserError."""
    network = model.outline(path)
    if adapted := lora.wanted(config.model.lora, network, path):
        lora.add(network, adapted, torch.float32)
    return network


def lines_of(config, shapes, device="cuda") -> tuple[list, list]:
    """The same of a model's Shapes."""
    memory = _states(config, shapes) + _pictures(config, shapes)
    memory += _learner(config, shapes, device) + _rollout(config, shapes, device)
    traffic = _traffic(config, shapes)
    for line in [*memory, *traffic]:
        line.gb /= 1e9
    return memory, traffic


def shapes_of(config, network, ranks: int, device="cuda") -> Shapes:
    """The Shapes of an `outline`, which is altered."""
    model.freeze(network, config.model.frozen)
    narrow = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and device != "cpu")
    vision = network.config.vision_config
    every = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    towers = network.model.language_model.layers, network.model.visual.blocks
    adapted = lora.lora_of(network) is not None

    def sharded(part):
        return sum(p.numel() for p in part.parameters() if p.requires_grad or not adapted)

    parts = [sharded(part) for tower in towers for part in tower]
    kept = activations(network, torch.bfloat16 if narrow else torch.float32)
    widths = network.config.text_config.hidden_size, vision.hidden_size
    deepstack = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    tokens_of, mixture = prompt_lengths(config, vision), config.puzzles.mixture
    tokens = {name: tokens_of(name, config.puzzles.levels[name]) for name in mixture}
    return Shapes(
        every=every,
        trained=trained,
        largest=max(parts),
        rest=sharded(network) - sum(parts),
        adapted=adapted,
        dtype=2 if narrow else 4,
        ranks=ranks,
        shards=ranks // config.train.replicate,
        prompt=round(plain_sum(share * tokens[name] for name, share in mixture.items()) / plain_sum(mixture.values())),
        longest=max(tokens_of(name, level) for name, level in lengths.kinds(config)),
        text=network.config.text_config,
        layers=(len(towers[0]), widths[0], kept[0]),
        blocks=(len(towers[1]), widths[1], kept[1]),
        wide=sum(p.numel() for name, p in network.named_parameters() if name.endswith(KEPT)) * (2 if narrow else 0),
        patches=vision.spatial_merge_size**2,
        values=3 * vision.temporal_patch_size * vision.patch_size**2,
        seen=0 if shared_prefix.trains_tower(network) else widths[0] * (1 + deepstack),
    )


def prompt_lengths(config, vision):
    """A function of a puzzle's name and level: tokens of a prompt with the largest pictures that images of
    data.max_side (1024 px, where that is null) and the configuration's bounds make."""
    c = config.puzzles
    limits = {key: value for key in ("min_pixels", "max_pixels") if (value := getattr(c, key))}
    spec = ops.PatchSpec(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, **limits)
    side = config.data.max_side or 1024
    return lambda name, level: puzzles.most_pixels(name, level, spec, side, c.composed) // spec.unit**2 + TEXT


def _states(config, shapes) -> list:
    """What is there for as long as the run lasts, and the gradients."""
    s, moment, over = shapes, 2 if config.optim.moments == "bfloat16" else 4, f" / {shapes.shards} shards"
    frozen = s.every - s.sharded
    whole = f"{frozen:,} frozen ones x {s.dtype} bytes, whole; " if frozen else ""
    lines = [
        Line("weights", s.sharded * MASTER, f"{whole}{s.sharded:,} parameters x {MASTER} bytes{over}"),
        Line("gradients", s.trained * MASTER, f"{s.trained:,} trained x {MASTER} bytes{over}", "learner"),
        Line("AdamW's moments", 2 * s.trained * moment, f"twice {moment} bytes a trained parameter{over}"),
    ]
    if config.loss.kl_coef and s.adapted:  # of a run that begins with new ones nothing: they are switched off
        lines.append(
            Line("reference's adapters", s.trained * MASTER, f"where step 0 has any, {MASTER} bytes each{over}")
        )
    elif config.loss.kl_coef:
        lines.append(Line("reference's weights", s.every * s.dtype + s.wide, f"frozen, {s.dtype} bytes each{over}"))
    for line in lines:
        line.gb /= s.shards
    lines[0].gb += frozen * s.dtype + (s.wide if frozen else 0)
    how = "the learner's own" if s.own else f"{'adapters, ' if s.adapted else ''}whole, {s.dtype} bytes each"
    return [*lines, Line("sampler's weights", 0 if s.own else s.sharded * s.dtype + (0 if s.adapted else s.wide), how)]


def _pictures(config, shapes) -> list:
    """A step's patches, which stay from the rollout to the last update, beside the next step's; and what a frozen
    tower makes of them."""
    s, prompts = shapes, config.rollout.prompts // shapes.ranks
    visual = prompts * (s.prompt - TEXT)
    seen = visual * s.seen * s.dtype
    patches = visual * s.patches
    return [
        Line("pixel patches", 2 * patches * s.values * s.dtype, f"{patches:,} of a step, and the next one's"),
        Line("visual tokens", seen, f"{visual:,} of a step, kept from the rollout"),
    ]


def _learner(config, shapes, device) -> list:
    """What forward and backward pass take beside the states."""
    s, tokens = shapes, config.train.token_budget
    height = default_height(tokens, s.text.hidden_size, device)
    wide = MASTER + (s.dtype if s.dtype == 2 else 0)
    gathered = (s.rest + 2 * s.largest) * s.dtype if s.gathered else 0

    rest = "adapters in no layer" if s.adapted else "embeddings and head"

    def reduced(count):
        """Of a group of parameters: gradients as autograd gives them, or their float32 sum, beside FSDP2's input."""
        return count * (MASTER + max(s.dtype, MASTER / s.shards))

    return [
        Line("gathered weights", gathered, f"{rest}, two layers", "learner"),
        Line(
            "whole gradients", reduced(s.largest) + s.largest * MASTER, "two layers, while they are reduced", "learner"
        ),
        Line("whole gradients of the rest", reduced(s.rest), f"{rest}, when activations are gone", "reduce"),
        Line(
            "loss",
            (height + s.text.hidden_size * (not s.adapted)) * s.text.vocab_size * wide,
            f"logits of {height:,} rows" + ", the head's gradient" * (not s.adapted),
            "forward",
        ),
        _activations(config, shapes),
    ]


def _activations(config, shapes) -> Line:
    """Of a micro-batch, full to the budget: all that autograd keeps, of recomputed layers their input alone."""
    s, tokens, again = shapes, config.train.token_budget, config.train.recompute
    patches = round(tokens * (1 - TEXT / s.prompt) * s.patches)
    size = 0
    for count, (depth, width, kept) in ((tokens, s.layers), (patches, s.blocks)):
        # of these only the input stays, and one is whole again
        recomputed = -(-depth // again) if again and kept else 0
        size += count * ((depth - recomputed + (recomputed > 0)) * kept + recomputed * width * s.dtype)
    how = f"{tokens:,} tokens x {s.layers[0]} layers, {patches:,} patches x {s.blocks[0]} blocks"
    return Line("activations (estimate)", size, how + (f", every {again}. recomputed" if again else ""), "forward")


def _rollout(config, shapes, device) -> list:
    """The rollout's buffers: keys and values of the groups that are held at a time, and a step's logits. On a GPU they
    are an evaluation's too, whose calls have more prompts where ranks are many."""
    r, prompt = config.rollout, shapes.longest if device == "cpu" else rounded(shapes.longest)
    groups = places_for(r.prompts // shapes.ranks, r.group_size, r.wave_rows, r.wave_groups)
    rows, a_token = rows_of(config, shapes.ranks), bytes_a_token(shapes.text, shapes.dtype)
    a_sample, samples = bytes_a_sample(shapes.text, shapes.dtype), groups * r.group_size
    kept = groups * (prompt + r.group_size * r.max_tokens) * a_token
    how = f"{samples} samples x {r.max_tokens} tokens, {groups} prompts of up to {prompt}"
    asked = 0 if device == "cpu" else min(CHUNK, -(-config.eval.count // shapes.ranks))
    asked = places_for(asked, 1, r.wave_rows, r.wave_groups)
    one_each = max(0, asked - samples)  # samples
    more = (max(0, asked - groups) * prompt + one_each * r.max_tokens) * a_token + one_each * a_sample
    return [
        Line("rollout's cache", kept, how, "rollout"),
        Line("rollout's states", samples * a_sample, f"{samples} samples, of linear layers", "rollout"),
        Line("evaluation's share of it", more, f"{asked} prompts, a sample each", "rollout"),
        Line("rollout's logits", logit_bytes(shapes.text, rows), f"{rows} samples, twice", "rollout"),
    ]


def rows_of(config, ranks) -> int:
    """Samples that decode together at most, on a rank."""
    r = config.rollout
    groups = places_for(r.prompts // ranks, r.group_size, r.wave_rows, r.wave_groups)
    return min(groups, max(1, r.wave_rows // r.group_size)) * r.group_size


def _traffic(config, shapes) -> list:
    """What a rank sends and receives."""
    s, train = shapes, config.train
    share = (s.shards - 1) / s.shards
    gathered = s.sharded * s.dtype * share
    return [
        Line("weights gathered, a micro-batch", 2 * gathered, "once forward, once backward"),
        Line("reference's weights gathered, a micro-batch", bool(config.loss.kl_coef) * gathered, "once forward"),
        Line("gradients reduced, a micro-batch", s.trained * MASTER * share, "once backward"),
        Line("gradients between copies, an update", s.trained * MASTER / s.shards * (train.replicate > 1), "HSDP"),
        Line("sampler refreshed, a step", 0 if s.own else s.sharded * MASTER * share, "whole weights, one by one"),
    ]


def activations(network, dtype) -> tuple[float, float]:
    """Bytes that a decoder layer keeps for its backward pass a token, and a vision block a patch: 0 for a frozen one.

    Both towers run on the meta device, and what autograd saves is counted; attention as flash kernels have it, which
    keep queries, keys, values and their output. network: a `model.outline`, which is altered.
    """
    network.to("meta", dtype)
    visual, language = network.model.visual, network.model.language_model
    for part in (visual, language):
        part.config._attn_implementation_internal = ATTENTION
    lean_layers.plug_in(network)
    state_layout = gated_delta_net.plug_in(language) and ops.StateLayout([(256, ())]).to("meta")
    grid = torch.tensor([[1, 16, 16]])
    patches = torch.empty(256, visual.patch_embed.proj.weight[0].numel(), dtype=dtype, device="meta")
    embeds = torch.empty(1, 256, network.config.text_config.hidden_size, dtype=dtype, device="meta")
    with kept_bytes(network) as of_patches:
        visual(patches, grid_thw=grid, **shared_prefix.vision_tables(visual, grid, "meta"))
    with kept_bytes(network) as of_tokens:
        language(
            inputs_embeds=embeds.requires_grad_(),
            position_ids=torch.empty(3, 1, 256, dtype=torch.int64, device="meta"),
            attention_mask=shared_prefix.no_mask(embeds),
            use_cache=False,
            state_layout=state_layout,
        )
    return sum(of_tokens.values()) / 256 / len(language.layers), sum(of_patches.values()) / 256 / len(visual.blocks)


@contextmanager
def kept_bytes(model):
    """Collect, inside, the bytes of each storage that autograd saves tensors in, but the model's parameters'."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, alive = {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)  # or another could take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q.transpose(1, 2))
        ctx.save_for_backward(q, k, v, out)
        return out


ATTENTION = "sslr1_flash_plan"  # with "flash" in its name, as VISION_ATTENTION
AttentionInterface.register(ATTENTION, lambda module, q, k, v, *_, **__: (_Attention.apply(q, k, v), None))


def peak(memory) -> float:
    """GB at most: what is always there, and the larger of what learner and rollout take in turn. Without what CUDA,
    NCCL and cuBLAS keep for themselves, and what torch's allocator has but can't hand out."""
    times = ("always", "learner", "forward", "reduce", "rollout")
    of = {when: plain_sum(line.gb for line in memory if line.when == when) for when in times}
    return of["always"] + max(of["learner"] + max(of["forward"], of["reduce"]), of["rollout"])


def stays(memory, room, held=None) -> bool:
    """Whether the rollout's buffers and captured steps, as planned or `held` GB of them, can stay during the learner's
    turn in `room` GB. Elsewhere they are made anew in each step."""
    without = peak([line for line in memory if line.when != "rollout"])
    planned = plain_sum(line.gb for line in memory if line.when == "rollout")
    return without + (planned if held is None else held) <= room


def make_room(engine, memory, device) -> None:
    """Before the learner's turn: has an Engine give back what it keeps, where what of the GPU's memory is free, or
    torch's, does not hold both. memory: a function that gives the plan's lines, which takes seconds."""
    if held := engine.kept_bytes:
        room = ROOM * (free_bytes(device) + torch.cuda.memory_allocated(device))
        if not stays(memory(), room / 1e9, held / 1e9):
            engine.release()


def kept(memory) -> list:
    """The lines with the rollout's as always there."""
    return [replace(line, when="always") if line.when == "rollout" else line for line in memory]


def report(config, path, ranks: int) -> str:
    """The plan as text."""
    memory, traffic = plan(config, path, ranks)
    copies = "1 copy" if config.train.replicate == 1 else f"{config.train.replicate} copies"
    lines = [f"{ranks} GPU(s), {copies} of the model; GB on each:"]
    for title, found in (("memory", memory), ("sent and received", traffic)):
        lines += ["", title, *(f"  {line.gb:9.2f}  {line.what}: {line.how}" for line in found if line.gb)]
        if title == "memory":
            lines.append(f"  {peak(found):9.2f}  at most: learner and rollout take turns")
            if config.rollout.cuda_graphs:
                what = f"where {ROOM:.0%} of a GPU hold this much: the rollout's buffers and captured steps stay"
                lines.append(f"  {peak(kept(found)):9.2f}  {what}")
    return "\n".join(lines)
