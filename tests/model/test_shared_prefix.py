"""The packed forward: equal to separate sequences, to transformers' own padded batch, and to itself however it is
cut."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from sslr1 import model, ops
from sslr1.model import parallel
from sslr1.model.shared_prefix import joined, run, vision_tables
from sslr1.model.tiny import FAMILIES, build_tiny
from sslr1.ops import attention, flash
from tests.model.test_packing import some_prompts, spec_of, with_samples

LENGTHS = [[3, 1, 4], [2, 5, 1], [1, 2, 6], [7, 1, 1]]


# Each family, with a tied head and with one of its own
ALL = [(family, tie) for family in FAMILIES for tie in (True, False)]
FEWER = ALL[0], ALL[3], ALL[4]  # each family, both kinds of heads


def named(p):
    return f"{p[0]}-{'un' * (not p[1])}tied"


@pytest.fixture(params=[p if p in FEWER else pytest.param(p, marks=pytest.mark.slow) for p in ALL], ids=named)
def folder(request, tmp_path):
    family, tie = request.param
    return build_tiny(tmp_path / "m", seed=3, tie=tie, family=family)


@pytest.fixture
def network(folder):
    return model.load_model(folder, torch.float64)


def loss_and_gradients(policy, batches, rewards, numbers=None, **options):
    """Sum of the loss over packed batches, every gradient, and what `summands` says; counts are the whole step's.
    numbers: each batch's groups."""
    policy.zero_grad()
    total, added = 0.0, {}
    tokens = sum(len(b.tokens) for b in batches)
    for i, packed in enumerate(batches):
        chosen = rewards if numbers is None else rewards[numbers[i]]

        def loss(hidden, lm_head, packed=packed, chosen=chosen):
            out = ops.grpo_loss(
                hidden,
                lm_head,
                packed.tokens,
                packed.sequence,
                chosen,
                entropy_coef=0.1,
                token_count=tokens,
                sequence_count=rewards.numel(),
                **options,
            )
            return (out.loss,)

        with summands(policy) as sums:
            (value,) = policy(packed, loss)
            value.backward()
        total += value.item()
        for name, own in sums.items():
            added[name] = added.get(name, 0) + own
    return total, {name: parallel.local(p.grad).clone() for name, p in policy.named_parameters()}, added


# Parameters of a few numbers, whose gradients sum what all tokens give them and all but cancel: rounding is to be held
# against what is summed, not against what is left
CANCELLING = "A_log", "dt_bias"


@contextmanager
def summands(network):
    """{name of one of CANCELLING: [H_v] what tokens give its gradient, absolute, summed over them}, filled by a
    backward pass. It is dt_bias' own; A_log's, times softplus over sigmoid of the same number, are larger."""
    sums, handles = {}, []
    for path, module in network.named_modules():
        if path.endswith("in_proj_a"):
            names = [f"{path.removesuffix('in_proj_a')}{name}" for name in CANCELLING]

            def listen(module, inputs, out, names=names):
                if out.requires_grad:
                    out.register_hook(
                        lambda grad: sums.update(
                            {name: sums.get(name, 0) + grad.abs().flatten(0, -2).sum(0) for name in names}
                        )
                    )

            handles.append(module.register_forward_hook(listen))
    yield sums
    for handle in handles:
        handle.remove()


def assert_equal(got, expected, bound):
    assert abs(got[0] - expected[0]) <= bound * abs(expected[0])
    for name, gradient in expected[1].items():
        size = expected[2].get(name, gradient).norm().clamp(min=1e-300)
        assert (got[1][name] - gradient).norm() <= bound * size, name


def make(folder, photographs, rewards_of=(4, 3)):
    prompts = some_prompts(model.load_tokenizer(folder), photographs, spec_of(folder))
    assert max(len(p.image_grid_thw) for p in prompts) > 1
    return with_samples(prompts, LENGTHS), torch.rand(*rewards_of, dtype=torch.float64)


def pack(groups, policy, **options):
    return model.pack(groups, group_size=3, **policy.pack_options, **options)


def transformers_loss(network, groups, rewards):
    """Separate sequences through transformers' own forward with its own SDPA and positions: one padded batch."""
    advantages = ops.advantages(rewards).reshape(-1)
    pad, tokens = 0, sum(len(s.tokens) for g in groups for s in g.samples)
    rows = [(g, torch.cat([g.prompt.input_ids, s.tokens]), len(s.tokens)) for g in groups for s in g.samples]
    longest = max(len(ids) for _, ids, _ in rows)
    input_ids = torch.stack([torch.cat([ids, torch.full((longest - len(ids),), pad)]) for _, ids, _ in rows])
    mask = torch.stack([(torch.arange(longest) < len(ids)).long() for _, ids, _ in rows])
    types = (input_ids == network.config.image_token_id).int() * mask.int()
    out = network(
        input_ids=input_ids,
        attention_mask=mask,
        mm_token_type_ids=types,
        use_cache=False,
        pixel_values=torch.cat([g.prompt.pixel_values for g, _, _ in rows]).double(),
        image_grid_thw=torch.cat([g.prompt.image_grid_thw for g, _, _ in rows]),
    ).logits
    loss = 0.0
    for s, (_, ids, C) in enumerate(rows):
        logprobs = out[s, len(ids) - C - 1 : len(ids) - 1].log_softmax(-1)
        picked = logprobs.gather(-1, ids[-C:, None])[:, 0]
        ratio = (picked - picked.detach()).exp()
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        loss = loss - (ratio * advantages[s] + 0.1 * entropy).sum() / tokens
    return loss


EXACT = {True: "dtype-preserving norms", False: "modules untouched"}


@pytest.mark.parametrize(
    "folder, exact",
    [
        pytest.param(p, exact, id=f"{named(p)}-{name}", marks=[pytest.mark.slow] * ((p in FEWER) != exact))
        for exact, name in EXACT.items()
        for p in ALL
    ],
    indirect=["folder"],
)
def test_shared_prefix_equals_separate_sequences_and_transformers(network, folder, photographs, seed, exact, request):
    if exact:
        request.getfixturevalue("exact_norms")
    # the gated delta rule computes in float32 there, and its rounding goes through every layer above
    bound = 1e-12 if exact else 1e-4 if network.config.model_type == "qwen3_5" else 1e-6
    groups, rewards = make(folder, photographs)
    with summands(network) as sums:
        theirs = transformers_loss(network, groups, rewards)  # transformers' own modules and attention, before ours
        theirs.backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
    expected = theirs.item(), *({f"model.{name}": own for name, own in found.items()} for found in (gradients, sums))
    policy = model.Policy(network)

    shared = loss_and_gradients(policy, [pack(groups, policy)], rewards)
    separate = loss_and_gradients(
        policy,
        [pack([g], policy, parts=[range(s, s + 1)]) for g in groups for s in range(3)],
        rewards,
        [[n] for n in range(len(groups)) for _ in range(3)],
    )
    assert_equal(shared, expected, bound)
    assert_equal(separate, expected, bound)
    assert_equal(shared, separate, bound)


def test_packing_order_and_cuts_change_nothing(network, folder, photographs, seed, exact_norms):
    groups, rewards = make(folder, photographs)
    policy = model.Policy(network)
    whole = loss_and_gradients(policy, [pack(groups, policy)], rewards)
    order = [2, 0, 3, 1]
    assert_equal(loss_and_gradients(policy, [pack([groups[i] for i in order], policy)], rewards[order]), whole, 1e-12)
    for budget in (180, 230, 400):
        cut = model.split(groups, budget)
        assert len(cut) > 1
        batches = [pack([groups[n] for n, _ in b], policy, parts=[r for _, r in b]) for b in cut]
        numbers = [[n for n, _ in b] for b in cut]
        assert_equal(loss_and_gradients(policy, batches, rewards, numbers), whole, 1e-12)


@pytest.fixture(params=FAMILIES)
def windowed(request, tmp_path):
    """A model of each family; where a family has windows, one block has them."""
    options = {"vision": {"fullatt_block_indexes": [1]}} if request.param == "qwen2_5_vl" else {}
    return build_tiny(tmp_path / "m", seed=3, family=request.param, **options)


def test_merged_parts_change_nothing(windowed, photographs, seed, exact_norms, monkeypatch):
    """What a GPU does, with CPU kernels for its parts: language model and vision tower, forward and backward."""
    groups, rewards = make(windowed, photographs)
    policy = model.Policy(model.load_model(windowed, torch.float64))
    results = []
    for backend in ("reference", "cpu"):
        for name in ("shared_prefix_attention", "varlen_attention"):
            monkeypatch.setattr(ops, name, partial(getattr(attention, name), backend=backend))
        results.append(loss_and_gradients(policy, [pack(groups, policy)], rewards))
    assert_equal(*results, 1e-12)


def test_the_vision_tower_is_told_what_it_would_find(windowed, photographs, seed, monkeypatch):
    """Places, windows and longest sequences from the CPU: the tower's output is what it is without them, bit for bit,
    and equals transformers' own attention."""
    network = model.load_model(windowed, torch.float64)
    groups, _ = make(windowed, photographs)
    packed = pack(groups, model.Policy(network))
    pixels = torch.cat([group.prompt.pixel_values for group in groups]).double()
    grid, visual = packed.image_grid_thw, network.model.visual
    told = []

    def varlen(q, k, v, boundaries, longest, scale):
        told.append((int(boundaries.diff().max()), longest))
        return attention.varlen_attention(q, k, v, boundaries, longest, scale)

    monkeypatch.setattr(ops, "varlen_attention", varlen)
    with torch.no_grad():
        tables = vision_tables(visual, grid, "cpu")
        of_each = joined([vision_tables(visual, group.prompt.image_grid_thw, "cpu") for group in groups])
        assert set(of_each) == set(tables)
        for name, x in tables.items():
            assert torch.equal(torch.as_tensor(of_each[name]), torch.as_tensor(x)), name
        got = visual(pixels, grid_thw=grid, **tables).pooler_output
        assert all(found == longest for found, longest in told) and len(told) == len(visual.blocks)
        assert len({longest for _, longest in told}) == sum(name.startswith("max_") for name in tables)
        assert torch.equal(got, visual(pixels, grid_thw=grid).pooler_output)
        visual.config._attn_implementation_internal = "sdpa"
        torch.testing.assert_close(got, visual(pixels, grid_thw=grid).pooler_output, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("completions", [True, False])
def test_nothing_waits_for_the_device(windowed, photographs, seed, monkeypatch, completions):
    """Forward and backward on a device that has no numbers: whatever needed one on the host would raise."""
    groups, _ = make(windowed, photographs)
    policy = model.Policy(model.load_model(windowed, torch.bfloat16))
    packed = pack(groups, policy, parts=None if completions else [()] * len(groups)).to("meta")
    assert packed.layout.own.is_meta and packed.image_rows.is_meta and not packed.image_grid_thw.is_meta
    policy.to("meta")
    monkeypatch.setattr(flash, "library", lambda: "torch")
    monkeypatch.setattr(flash, "supports", lambda q: True)
    hidden = run(policy.model, packed)
    assert hidden.shape == (len(packed.input_ids), policy.model.config.text_config.hidden_size)
    hidden.sum().backward()
    assert all(p.grad is not None for n, p in policy.model.model.named_parameters() if "lm_head" not in n)
    with pytest.raises((RuntimeError, NotImplementedError)):
        packed.input_ids.nonzero()


def test_a_completion_does_not_see_its_neighbours(network, folder, photographs, seed):
    groups, _ = make(folder, photographs)
    policy = model.Policy(network)
    with torch.no_grad():
        before = run(network, pack(groups, policy))
        groups[1].samples[0].tokens = (groups[1].samples[0].tokens + 1) % 300
        packed = pack(groups, policy)
        after = run(network, packed)
    start = len(packed.input_ids) - sum(p + sum(c) for p, c in packed.layout.groups[1:]) + packed.layout.groups[1][0]
    changed = ((before - after).abs().amax(-1) > 0).nonzero()[:, 0].tolist()
    assert changed and set(changed) <= set(range(start, start + 2))


@pytest.mark.parametrize("recompute", [0, 1])
def test_sharded_and_recomputed_layers_change_nothing(any_tiny, photographs, seed, exact_norms, one_process, recompute):
    groups, rewards = make(any_tiny, photographs)
    plain, sharded = (model.Policy(model.load_model(any_tiny, torch.float64)) for _ in range(2))
    parallel.shard(sharded, one_process, torch.float64, recompute=recompute)
    batch = pack(groups, plain)
    got, expected = (loss_and_gradients(policy, [batch], rewards) for policy in (sharded, plain))
    assert_equal(got, expected, 1e-12)


def test_the_model_stays_usable_as_any_other(any_tiny, photographs, exact_norms):
    """Plugged in, a plain transformers forward gives what it gave before."""
    network, tokenizer = model.load_model(any_tiny, torch.float64), model.load_tokenizer(any_tiny)
    prompt = some_prompts(tokenizer, photographs, spec_of(any_tiny))[1]
    inputs = dict(
        input_ids=prompt.input_ids[None],
        pixel_values=prompt.pixel_values.double(),
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=(prompt.input_ids == network.config.image_token_id).int()[None],
    )
    with torch.no_grad():
        before = network(**inputs).logits
        model.shared_prefix.plug_in(network)
        assert (network(**inputs).logits - before).abs().max() < 1e-11
