"""The planner's arithmetic against what a learner holds, and its command."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from sslr1 import config, model, ops, train
from sslr1.config.inputs import Lora
from sslr1.errors import UserError
from sslr1.model import cost, gated_delta_net, lora, parallel
from sslr1.model.tiny import build_tiny
from sslr1.ops.chunks import default_height
from sslr1.rollout.cache import GroupCache, Shape, bytes_a_token
from sslr1.setup import budget, build, card, entry, session
from tests.conftest import launch_anew
from tests.forks import launch
from tests.learner.test_learner import make_groups, make_learner
from tests.model.test_load import COUNTS, PUBLISHED, published

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    "any_tiny, frozen, moments",
    [
        pytest.param("qwen2_5_vl", "none", "float32", marks=pytest.mark.slow),
        ("qwen2_5_vl", "none", "bfloat16"),
        pytest.param("qwen2_5_vl", "vision", "float32", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "none", "float32", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "none", "bfloat16", marks=pytest.mark.slow),
        ("qwen3_vl", "vision", "float32"),
        ("qwen3_5", "none", "float32"),
        pytest.param("qwen3_5", "none", "bfloat16", marks=pytest.mark.slow),
        pytest.param("qwen3_5", "vision", "float32", marks=pytest.mark.slow),
    ],
    indirect=["any_tiny"],
)
def test_equal_to_what_a_learner_holds(any_tiny, photographs, seed, one_process, frozen, moments):
    tree = {"model": {"path": "m", "frozen": frozen}, "data": {"path": "d"}, "optim": {"moments": moments}}
    settings = config.check(tree)
    lines, _ = budget.plan(settings, any_tiny, 1, device="cpu")
    planned = {line.what: line.gb * 1e9 for line in lines}
    learner, weights = make_learner(any_tiny, one_process, frozen=frozen, optim=settings.optim)
    held = {}

    def bytes_of(tensors):
        return sum(parallel.local(t).numel() * t.element_size() for t in tensors)

    zero = learner.optimizer.zero_grad
    parameters = list(learner.policy.parameters())

    def measured(**options):
        held["gradients"] = bytes_of(p.grad for p in parameters if p.grad is not None)
        zero(**options)

    learner.optimizer.zero_grad = measured
    learner.step(*make_groups(any_tiny, photographs, seed))
    held["weights"] = bytes_of(parameters)
    held["AdamW's moments"] = bytes_of(
        s[m] for s in learner.optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")
    )
    for what, size in held.items():
        assert size == pytest.approx(planned[what], rel=1e-9), what
    assert weights.shared and planned["sampler's weights"] == 0


@pytest.mark.parametrize(
    "any_tiny, dtype",
    [
        ("qwen2_5_vl", "float32"),
        pytest.param("qwen2_5_vl", "bfloat16", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "float32", marks=pytest.mark.slow),
        ("qwen3_vl", "bfloat16"),
        pytest.param("qwen3_5", "float32", marks=pytest.mark.slow),
        ("qwen3_5", "bfloat16"),
    ],
    indirect=["any_tiny"],
)
def test_equal_to_what_a_learner_of_adapters_holds(any_tiny, photographs, seed, one_process, dtype):
    """The base in the compute dtype, once with the sampler's; of adapters weights, gradients and moments."""
    tree = {"model": {"path": "m", "dtype": dtype, "lora": {"rank": 4, "vision": "all-linear"}}}
    settings = config.check(tree, data=False)
    planned = {line.what: line.gb * 1e9 for line in budget.plan(settings, any_tiny, 1, device="cpu")[0]}
    learner, weights = make_learner(any_tiny, one_process, dtype=getattr(torch, dtype), lora=settings.model.lora)
    held, zero, parameters = {}, learner.optimizer.zero_grad, list(learner.policy.parameters())

    def bytes_of(tensors):
        return sum(parallel.local(t).numel() * t.element_size() for t in tensors)

    def measured(**options):
        held["gradients"] = bytes_of(p.grad for p in parameters if p.grad is not None)
        zero(**options)

    learner.optimizer.zero_grad = measured
    learner.step(*make_groups(any_tiny, photographs, seed))
    held["weights"] = bytes_of(parameters)
    states = learner.optimizer.state.values()
    held["AdamW's moments"] = bytes_of(s[m] for s in states for m in ("exp_avg", "exp_avg_sq"))
    theirs = {parallel.local(p).data_ptr() for p in parameters}
    held["sampler's weights"] = bytes_of(p for p in weights.model.parameters() if p.data_ptr() not in theirs)
    for what, size in held.items():
        assert size == pytest.approx(planned[what], rel=1e-9), what
    two = {line.what: line.gb * 1e9 for line in budget.plan(settings, any_tiny, 2, device="cpu")[0]}
    trained = sum(parallel.local(p).numel() for p in parameters if p.requires_grad)
    assert two["weights"] == pytest.approx(planned["weights"] - trained * 4 / 2)  # the base is whole on each rank
    tree["loss"] = {"kl_coef": 0.1}
    near = {line.what: line.gb * 1e9 for line in budget.plan(config.check(tree, data=False), any_tiny, 1)[0]}
    assert near["reference's adapters"] == trained * 4


@pytest.mark.parametrize(
    "asked, keeps",
    [
        ({}, False),
        ({"frozen": "vision"}, True),
        ({"lora": {"rank": 2}}, True),
        ({"lora": {"rank": 2, "vision": "all-linear"}}, False),
    ],
)
def test_what_a_tower_saw_is_kept_unless_it_is_trained(tiny, scenes, one_process, asked, keeps):
    tree = {"model": {"path": str(tiny), **asked}, "data": {"path": str(scenes), "min_side": 112}}
    settings = config.check(tree)
    built = build.build(settings, one_process)
    planned = {line.what: line.gb for line in budget.plan(settings, tiny, 1, device="cpu")[0]}
    assert built.engine.keeps_seen == (built.keep_seen is not None) == (planned["visual tokens"] > 0) == keeps


@pytest.mark.parametrize(
    "any_tiny, vision",
    [
        ("qwen2_5_vl", None),
        pytest.param("qwen2_5_vl", "all-linear", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", None, marks=pytest.mark.slow),
        ("qwen3_vl", "all-linear"),
        pytest.param("qwen3_5", None, marks=pytest.mark.slow),
        ("qwen3_5", "all-linear"),
    ],
    indirect=["any_tiny"],
)
def test_activations_with_adapters_are_what_a_forward_pass_keeps(any_tiny, photographs, seed, vision):
    asked = Lora(rank=4, vision=vision)
    outline = model.skeleton(any_tiny)
    lora.add(outline, lora.chosen(outline, asked), torch.float32)
    of_token, of_patch = budget.activations(outline, torch.bfloat16)
    assert (of_patch == 0) == (vision is None)
    network = model.skeleton(any_tiny)
    lora.add(network, lora.chosen(network, asked), torch.bfloat16)
    parallel.materialize(network, "cpu")
    network.tie_weights()
    model.load_weights(network, any_tiny)
    lora.begin(network, 0)
    network.bfloat16()  # as FSDP2 hands adapters to layers
    assert_planned(network, make_groups(any_tiny, photographs, seed)[0], of_token, of_patch)


def assert_planned(network, groups, of_token, of_patch):
    """What a forward pass keeps, within 5 %, with attention as flash kernels have it (the CPU's also keeps masks and
    each key and value once a query head)."""
    policy, inner, text = model.Policy(network), network.model, network.config.text_config
    for tower in (inner.language_model, inner.visual):
        tower.config._attn_implementation_internal = budget.ATTENTION
    packed = model.pack(groups, **policy.pack_options)
    with budget.kept_bytes(network) as kept:
        policy(packed, lambda hidden, head: (hidden.sum(),))
    tokens = len(packed.input_ids)
    planned = of_token * tokens * len(inner.language_model.layers)
    planned += of_patch * sum(len(p.pixel_values) for p in packed.prompts) * len(inner.visual.blocks)
    if linear := gated_delta_net.linear_layers(text):
        # they keep a state for 64 tokens of a prompt and none for completions; the plan counts all as one prompt's
        states = len(packed.state_layout.prompts.rows) - tokens / ops.state_layout.CHUNK
        planned += states * len(linear) * gated_delta_net.state_size(text) * 4
    assert planned == pytest.approx(sum(kept.values()), rel=0.05)


# (recipe, its size, GB of the card that the plan may take, CUDA's own context, of up to 1 GB, included)
ADAPTED = [
    ("qwen2.5-vl-3b-lora-24gb", "qwen2.5-vl-3b", 22),
    ("qwen2.5-vl-7b-lora-48gb", "qwen2.5-vl-7b", 36),
    ("qwen3.5-4b-lora-24gb", "qwen3.5-4b", 22),
]


@pytest.mark.parametrize("recipe, size, most", ADAPTED)
def test_recipes_with_adapters_fit(recipe, size, most):
    c = config.load(ROOT / "configs" / f"{recipe}.yaml", [f"model.path={size}"], data=False)
    asked = c.model.lora
    assert (asked.rank, asked.targets, asked.vision) == (64, "all-linear", "all-linear")
    assert (c.train.token_budget, c.train.recompute) == (4096 if size == "qwen3.5-4b" else 8192, 1)
    memory, traffic = budget.plan(c, size, 1)
    assert budget.peak(memory) + 1 <= most and not any(line.gb for line in traffic)
    network = model.outline(size)
    count, bytes_each = sum(p.numel() for p in network.parameters()), 2
    planned = {line.what: line.gb * 1e9 for line in memory}
    trained = planned["gradients"] / 4
    assert planned["weights"] == pytest.approx(bytes_each * count + 4 * trained) and 0.02 < trained / count < 0.06
    card_of = {"qwen2.5-vl-3b": "rtx4090", "qwen2.5-vl-7b": "l40s", "qwen3.5-4b": "rtx4090"}[size]
    assert "  fits: " in card.report(c, size, 1, card_of)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_step_of_adapters_takes_a_third_of_the_full_ones_memory(tmp_path):
    """What processes take for a step at a tenth of the 3B's size, in bfloat16 with every layer recomputed."""
    text = dict(hidden_size=640, intermediate_size=3440, num_hidden_layers=36, num_attention_heads=10)
    text |= dict(vocab_size=48_000, initializer_range=0.02, rope_parameters=HEADS_OF_64)
    vision = dict(depth=32, hidden_size=400, intermediate_size=1080, num_heads=10, out_hidden_size=640)
    vision |= dict(fullatt_block_indexes=[7, 15, 23, 31], initializer_range=0.02)
    folder = build_tiny(tmp_path / "tenth", text=text, vision=vision, max_pixels=320 * 320, dtype="bfloat16")
    found = []
    for rank in (64, 0):
        done = launch_anew("tests.setup.step_memory", folder, rank, timeout=3000)
        found.append(json.loads(done.stdout))
        for what in ("weights", "gradients", "AdamW's moments"):
            assert found[-1][what] == pytest.approx(found[-1]["planned"][what], rel=0.05), what
        held, planned = found[-1]["inputs"]
        assert held == pytest.approx(planned, rel=0.2)
    adapted, full = found
    print(adapted["peak"], full["peak"])
    assert adapted["peak"] <= 0.35 * full["peak"]


HEADS_OF_64 = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_a_forward_pass_keeps(any_tiny, photographs, seed, dtype):
    of_token, of_patch = budget.activations(model.skeleton(any_tiny), dtype)
    network = model.load_model(any_tiny, dtype)
    assert_planned(network, make_groups(any_tiny, photographs, seed)[0], of_token, of_patch)
    model.freeze(frozen := model.skeleton(any_tiny), "vision")
    assert budget.activations(frozen, dtype) == (of_token, 0)


def test_shares_add_up(tiny):
    settings = {"model": {"path": "m"}, "data": {"path": "d"}, "rollout": {"prompts": 16}}
    one = {line.what: line.gb for line in budget.plan(config.check(settings), tiny, 1)[0]}
    eight, traffic = budget.plan(config.check(settings), tiny, 8)
    eight = {line.what: line.gb for line in eight}
    for what in ("weights", "gradients", "AdamW's moments"):
        assert eight[what] == pytest.approx(one[what] / 8)
    assert eight["sampler's weights"] == one["sampler's weights"] > 0
    network, line = (
        model.skeleton(tiny),
        next(x for x in budget.plan(config.check(settings), tiny, 1)[0] if "activ" in x.what),
    )
    tokens, layers, patches, blocks = (int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", line.how)[:4])
    of_token, of_patch = budget.activations(network, torch.bfloat16)
    assert (tokens, layers, blocks) == (16384, 2, 2)
    assert line.gb * 1e9 == pytest.approx(tokens * layers * of_token + patches * blocks * of_patch)
    copies, between = budget.plan(config.check(settings | {"train": {"replicate": 2}}), tiny, 8)
    assert {line.what: line.gb for line in copies}["weights"] == pytest.approx(one["weights"] / 4)
    assert [line.gb for line in traffic if "copies" in line.what] == [0]
    assert next(line.gb for line in between if "copies" in line.what) > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_on_eight_gpus(tmp_path, tiny, name):
    folder, count = published(tmp_path / "model", tiny, name)
    settings = config.load(ROOT / "configs" / f"{name}.yaml")
    memory, traffic = budget.plan(settings, folder, 8)
    found = {line.what: line.gb * 1e9 for line in [*memory, *traffic]}
    assert found["weights"] == pytest.approx(4 * count / 8)
    assert found["sampler's weights"] == pytest.approx(2 * count)
    assert found["weights gathered, a micro-batch"] == pytest.approx(2 * 2 * count * 7 / 8)
    assert budget.peak(memory) < 80
    assert "at most" in budget.report(settings, folder, 8)


def test_one_gpu_is_enough_for_3b(tmp_path, tiny):
    folder, count = published(tmp_path / "model", tiny, "qwen2.5-vl-3b")
    settings = config.load(ROOT / "configs" / "qwen2.5-vl-3b-one-gpu.yaml")
    memory, _ = budget.plan(settings, folder, 1)
    assert {line.what: line.gb for line in memory}["AdamW's moments"] == pytest.approx(2 * 2 * count / 1e9)
    assert budget.peak(memory) < 0.85 * 80


def test_what_excludes_each_other_is_not_added(tiny):
    settings = config.check({"model": {"path": "m"}, "data": {"path": "d"}})
    memory, _ = budget.plan(settings, tiny, 2)
    of = {when: sum(line.gb for line in memory if line.when == when) for when in {line.when for line in memory}}
    assert set(of) == {"always", "learner", "forward", "reduce", "rollout"}
    assert budget.peak(memory) == pytest.approx(of["always"] + of["learner"] + max(of["forward"], of["reduce"]))
    whole = next(line.gb * 1e9 for line in memory if line.what == "whole gradients of the rest")
    network = model.skeleton(tiny).model
    blocks = [p for b in (*network.visual.blocks, *network.language_model.layers) for p in b.parameters()]
    rest = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in blocks)
    assert whole == pytest.approx(
        rest * (4 + max(2, 4 / 2))
    )  # a float32 input, and the bfloat16 gradients or the float32 half


def test_buffers_that_stay_are_always_there(tiny):
    """By their planned size, or by what is held; of an evaluation, too, where it has more prompts than a rank's
    share."""
    settings = config.check({"model": {"path": "m"}, "data": {"path": "d"}})
    memory, _ = budget.plan(settings, tiny, 16)
    by_name = {line.what: line for line in memory}
    a_token = bytes_a_token(model.outline(tiny).config.text_config, 2)
    prompt = int(by_name["rollout's cache"].how.split()[-1])
    assert prompt % 256 == 0 and by_name["rollout's cache"].gb * 1e9 == 4 * (prompt + 8 * 512) * a_token
    assert by_name["evaluation's share of it"].gb * 1e9 == 21 * prompt * a_token  # 25 puzzles; 32 samples have room
    (whole,) = (x for x in budget.plan(settings, tiny, 1)[0] if x.what == "evaluation's share of it")
    assert whole.gb == 0  # 64 of one rank's 64
    rollout = sum(line.gb for line in memory if line.when == "rollout")
    together = budget.peak(budget.kept(memory))
    assert together == pytest.approx(budget.peak(memory) + rollout) and "rollout" not in {
        line.when for line in budget.kept(memory)
    }
    assert budget.stays(memory, together + 1e-9) and not budget.stays(memory, together - 1e-9)
    assert budget.stays(memory, together + 1 + 1e-9, rollout + 1) and not budget.stays(memory, together, rollout + 1)
    assert f"{together:9.2f}  where 90% of a GPU hold this much" in budget.report(settings, tiny, 16)


def test_room_is_made_for_the_learner_where_it_is_short(tiny, monkeypatch):
    """Of what is free or torch's, a tenth aside; decided anew each step, by what is really held."""
    settings = config.check({"model": {"path": "m"}, "data": {"path": "d"}})
    turn = budget.peak([line for line in budget.plan(settings, tiny, 1)[0] if line.when != "rollout"]) * 1e9
    released, allocated = [], 10**8
    engine = SimpleNamespace(kept_bytes=0, release=lambda: released.append(True))
    made = session.Session(
        **dict.fromkeys(("folder", "tokenizer", "spec", "images", "evaluation", "policy", "weights")),
        config=settings,
        world=SimpleNamespace(device=torch.device("cuda", 0), size=1),
        model_path=tiny,
        engine=engine,
    )
    made.make_room()  # nothing is held, so nothing is asked
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    for held, room, short in ((10**9, turn + 1.01e9, False), (10**9, turn + 0.99e9, True), (1, turn + 1e3, False)):
        engine.kept_bytes = held
        monkeypatch.setattr(budget, "free_bytes", lambda device, room=room: room / 0.9 - allocated)
        released.clear()
        made.make_room()
        assert bool(released) == short


def test_room_is_made_between_rollout_and_learner(monkeypatch):
    calls = mock.MagicMock()
    calls.run.begin.return_value, calls.run.stopping.return_value = 0, False
    calls.session.config = config.check({"model": {"path": "m"}, "data": {"path": "d"}, "train": {"steps": 2}})
    for name in ("roll_out", "resample", "learnable"):
        monkeypatch.setattr(train, name, getattr(calls, name))
    calls.run.step = calls.run.best_step = 1
    train.train(calls.session, calls.run)
    order = [name for name, *_ in calls.mock_calls if name in ("resample", "session.make_room", "run.learner.step")]
    assert order == ["resample", "session.make_room", "run.learner.step"] * 2


def test_height_is_what_the_loss_takes(monkeypatch):
    seen = []
    inner = ops.row_loss.row_loss
    monkeypatch.setattr(
        ops.row_loss, "row_loss", lambda logits, *rest: seen.append(len(logits)) or inner(logits, *rest)
    )
    N = 300
    hidden, head = torch.randn(N, 8, requires_grad=True), torch.randn(11, 8)
    tokens = torch.randint(0, 11, (N,))
    ops.grpo_loss(hidden, head, tokens, torch.arange(N) // 100, torch.tensor([[0.0, 1.0, 0.5]]), entropy_coef=0.1)
    assert set(seen) == {default_height(N, 8, "cpu")}


def test_no_weights_are_needed(tmp_path, tiny):
    """config.json is enough, and what is planned is what is planned of the whole folder."""
    settings = config.check({"model": {"path": "m"}}, data=False)
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    assert budget.plan(settings, tmp_path, 2) == budget.plan(settings, tiny, 2)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"half")  # a download that goes on
    assert budget.report(settings, tmp_path, 2) == budget.report(settings, tiny, 2)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="it has no config"):
        budget.plan(settings, tmp_path, 2)


@pytest.mark.parametrize(
    "name, whole",
    [
        *((name, name in PUBLISHED) for name in model.SIZES),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in model.SIZES if name not in PUBLISHED),
    ],
)
def test_a_published_name_is_enough(name, whole, monkeypatch):
    if not whole:  # activations, the slow part, have no part in what is compared
        monkeypatch.setattr(budget, "activations", lambda network, dtype: (1, 1))
    settings = config.check({"model": {"path": name}}, data=False)
    planned = {line.what: line.gb * 1e9 for line in budget.plan(settings, name, 8)[0]}
    assert planned["weights"] == pytest.approx(4 * COUNTS[name] / 8)
    text = model.outline(name).config.text_config
    assert text.vocab_size % 64 == 0 and text.hidden_size % 128 == 0


def test_every_recipe_has_its_size():
    """README's recipes can all be planned from a name."""
    for path in (ROOT / "configs").glob("*.yaml"):
        if path.stem not in ("tiny", "proof", "photos"):
            assert any(path.stem.startswith(name) for name in model.SIZES), path.stem


def test_what_makes_it_fit():
    """The first settings that do, taken back as far as they can be; the plan with them is within the card's memory."""
    c = config.check({"model": {"path": "m"}}, data=False)
    network = model.outline("qwen2.5-vl-3b")
    first, second = card.fit(c, network, 1, cost.CARDS["H100"])
    assert re.fullmatch(r"  does not fit: 160.9 GB; 90% of its memory are 72.0 GB", first)
    assert second == "  it would with train.recompute=1, optim.moments=bfloat16: 70.2 GB"
    settings = {"train.recompute": 1, "optim.moments": "bfloat16"}
    (said,) = card.fit(card.changed(c, settings), network, 1, cost.CARDS["H100"])
    assert said.startswith("  fits: 70.2 GB") and said.endswith("the rollout's buffers are made anew in each step")
    (said,) = card.fit(card.changed(c, settings), network, 1, cost.CARDS["H200"])
    assert said.endswith("the rollout's buffers stay during the learner's turn")
    assert "would with 2 GPUs" in card.fit(c, network, 1, cost.CARDS["L40S"])[1]
    assert "sampler's weights, 7.5 GB" in card.fit(c, network, 1, replace(cost.CARDS["L40S"], memory=8e9))[1]
    steps = {"a": [4, 2], "b": [1], "c": [8, 4, 2]}
    tried = card.mended(steps, lambda got: got.get("c", 9) <= 4 and got.get("a", 9) <= 4)
    assert tried == {"a": 4, "c": 4} and card.mended(steps, lambda got: False) is None


def test_time_follows_from_the_card():
    """Twice the card is half the time, and the learner's operations are those that the step's metrics count."""
    settings = {"rollout": {"prompts": 16}, "train": {"recompute": 1, "token_budget": 8192}}
    c, own = config.check({"model": {"path": "m"}} | settings, data=False), cost.CARDS["A100"]
    network = model.outline("qwen3-vl-2b")
    twice = cost.Card(*(2 * number for number in (own.flops, own.memory, own.bandwidth, own.link)))
    for (what, taken, _), (_, less, _) in zip(*(card.times(c, network, 8, each) for each in (own, twice)), strict=True):
        assert taken == pytest.approx(2 * less) and taken > 0, what
    learner = {what: taken for what, taken, _ in card.times(c, network, 8, own)}["learner"]
    network.requires_grad_(True)
    shapes, counted = budget.shapes_of(c, network, 8), cost.cost_of(network)
    prompt = counted.prompt(shapes.prompt, (shapes.prompt - budget.TEXT) * 4, 1)
    step = 2 * (prompt + 8 * counted.completion(shapes.prompt, 512))
    assert learner * card.OF_PEAK * own.flops == pytest.approx(step * 4 / 3)  # a third again, for recomputed layers
    found = card.report(c, "qwen3-vl-2b", 8, "a100")
    assert "estimated by arithmetic, not measured" in found and found.count("measured") == 1
    assert all(cost.peak_flops(f"NVIDIA {name}") == entry.flops for name, entry in cost.CARDS.items())


def test_a_name_in_place_of_a_folder(monkeypatch, capsys):
    """With and without a configuration, settings after either; what isn't listed is named."""
    for arguments, said in (
        (["--plan", "4", "--size", "qwen3-vl-2b", "rollout.prompts=8", "--card", "h100pcie"], "H100 PCIe ("),
        ([str(ROOT / "configs" / "qwen3-vl-4b.yaml"), "--plan", "8", "--size", "qwen3-vl-8b"], "8,767,123,696"),
    ):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        train.main()
        assert said in capsys.readouterr().out
    for arguments, said in (
        (["--plan", "8", "--size", "qwen3-vl-9b"], "error: --size qwen3-vl-9b is not listed; did you mean qwen3-vl-"),
        (["--plan", "8", "--size", "qwen3-vl-8b", "--card", "h1000"], "did you mean h100? Known: "),
        (["--size", "qwen3-vl-8b"], "--size and --card go with --plan"),
        (["--plan", "8"], "a configuration is needed, or --plan with --size"),
    ):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        with pytest.raises(SystemExit) as ended:
            train.main()
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    done = launch("sslr1.train", "configs/tiny.yaml", "--plan", 8, f"log.dir={tmp_path}")
    assert "at most" in done.stdout and not list(tmp_path.glob("*/metrics.jsonl"))
    with pytest.raises(SystemExit) as ended:
        entry.plan(ROOT / "configs" / "tiny.yaml", [], 7)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: --plan 7")


def test_the_rollouts_buffers_are_what_is_planned(any_tiny):
    rollout = {"prompts": 24, "group_size": 4, "wave_rows": 18, "max_tokens": 7}
    settings = config.check({"model": {"path": "m"}, "data": {"path": "d"}, "rollout": rollout})
    planned = {line.what: line for line in budget.plan(settings, any_tiny, 2, device="cpu")[0]}
    line = planned["rollout's cache"]
    longest = int(line.how.split()[-1])
    groups = 6  # half as many again as the 4 whose rows decode together; this rank has 12
    assert f"{groups * 4} samples x 7 tokens, {groups} prompts" in line.how
    text = model.skeleton(any_tiny).config.text_config
    shape = Shape(places=groups, longest=longest, group_size=4, max_tokens=7, rows=16)
    held = GroupCache(text, shape, torch.float32, "meta")
    size = sum(x.nbytes for x in (held.prompt_k, held.prompt_v, held.own_k, held.own_v))
    assert line.gb * 1e9 == pytest.approx(size, rel=1e-9)
    assert planned["rollout's logits"].gb * 1e9 == pytest.approx(2 * 16 * text.vocab_size * 4)
