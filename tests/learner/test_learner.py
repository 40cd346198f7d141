"""The learner and the sampler's weights, on one process here; `tests/learner/test_ranks.py` runs the same on
several."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from sslr1 import config, model, ops
from sslr1.learner import Learner
from sslr1.model import lora as adapters
from sslr1.model import parallel, shared_prefix
from sslr1.rollout import Engine, SamplerWeights
from sslr1.rollout.cache import full_layers
from sslr1.runs import checkpoint
from tests.model.test_packing import some_prompts, spec_of, with_samples

OPTIONS = config.check(
    {"model": {"path": "m"}, "data": {"path": "d"}, "optim": {"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine"}}
)


def make_learner(
    tiny,
    world,
    token_budget=100_000,
    replicate=1,
    recompute=0,
    frozen="none",
    dtype=torch.float32,
    compiled=False,
    lora=None,
    **changes,
):
    """lora: a section `model.lora`, whose adapters then begin as a run's do."""
    network = model.skeleton(tiny)
    if lora is not None:
        adapters.add(network, adapters.chosen(network, lora), dtype)
    else:
        model.freeze(network.to(dtype), frozen)
    weights = SamplerWeights(network, dtype)
    policy = parallel.shard(model.Policy(network), world, dtype, replicate, recompute, compiled)
    parallel.materialize(policy, world.device)
    model.load_weights(policy.model, tiny)
    adapters.begin(policy.model, 0)
    weights.attach(policy, world)
    options = dict(
        optim=OPTIONS.optim,
        loss=OPTIONS.loss,
        temperature=1.0,
        max_tokens=10,
        token_budget=token_budget,
        steps=10,
        spec=spec_of(tiny),
    )
    return Learner(policy, world, **{**options, **changes}), weights


def make_groups(tiny, photographs, seed):
    torch.manual_seed(seed)
    tokenizer = model.load_tokenizer(tiny)
    lengths = [[3, 1, 4], [2, 5, 1], [1, 2, 6], [7, 1, 1]]
    return with_samples(some_prompts(tokenizer, photographs, spec_of(tiny), seed=seed), lengths), torch.rand(4, 3)


def parameters(learner):
    return {name: tensor.clone() for name, tensor in parallel.iter_full_params(learner.policy)}


@pytest.mark.parametrize("advantage", ["group", "batch"])
def test_micro_batches_change_nothing(tiny, photographs, seed, one_process, advantage):
    results = []
    groups, rewards = make_groups(tiny, photographs, seed)
    for budget in (
        100_000,
        max(len(g.prompt.input_ids) for g in groups) + 7,
    ):  # the longest prompt has more to complete it
        loss = OPTIONS.loss.model_copy(update={"advantage": advantage})
        learner, _ = make_learner(tiny, one_process, budget, loss=loss)
        found = learner.step(groups, rewards)
        results.append((found, parameters(learner)))
    (a, pa), (b, pb) = results
    for key in ("loss", "grad_norm", "entropy", "ratio/mean"):
        assert abs(a.metrics[key] - b.metrics[key]) <= 1e-5 * max(1, abs(a.metrics[key])), key
    assert a.tokens == b.tokens == 34
    assert a.reward_std == b.reward_std == pytest.approx(float(rewards.double().std()), rel=1e-6)
    prompts = sum(len(g.prompt.input_ids) for g in groups)
    assert a.computed == prompts + 34 < b.computed and a.flops < b.flops  # a prompt again for each of its parts
    assert a.unshared == b.unshared == 3 * prompts + 34
    for name in pa:
        assert (pa[name] - pb[name]).abs().max() < 2e-4  # Adam's first step is a sign: tiny gradients may differ in it


def test_a_frozen_tower_looks_once(any_tiny, photographs, seed, one_process, exact_norms):
    """What it saw in the rollout serves every micro-batch of both updates and the reference: loss and gradients are
    those of a learner that looks itself."""
    groups, rewards = make_groups(any_tiny, photographs, seed)
    looks, found = [], []
    loss = OPTIONS.loss.model_copy(update={"updates": 2, "kl_coef": 0.1})
    for keeps in (True, False):
        options = dict(frozen="vision", dtype=torch.float64, loss=loss)
        learner, weights = make_learner(any_tiny, one_process, 100_000 if keeps else 250, **options)
        for network in (learner.policy.model, weights.model):
            network.model.visual.register_forward_hook(lambda *_: looks.append(keeps))
        if keeps:
            learner.keep_seen = partial(shared_prefix.keep_seen, weights.model)
            prompts = [group.prompt for group in groups[:3]]  # the last one comes from elsewhere
            engine = Engine(weights.model, model.load_tokenizer(any_tiny), keeps_seen=True)
            engine.generate(prompts, group_size=1, max_tokens=1)
            assert len(looks) == 1
        learner.set_reference(learner.policy)
        grads = {}
        learner._update = lambda totals, grads=grads, learner=learner: (
            grads.update((n, p.grad.full_tensor()) for n, p in learner.policy.named_parameters() if p.grad is not None)
            or grads.update(loss=totals["loss"])
            or {"grad_norm": 0.0}
        )
        learner.step([replace(group, prompt=replace(group.prompt)) for group in groups], rewards)
        assert looks.count(True) == 2  # the engine for three, and for the last
        found.append(grads)
        for group in groups:
            group.prompt.seen = None
    assert looks.count(False) > 4 and set(found[0]) == set(found[1]) and len(found[0]) > 10
    for name, expected in found[1].items():
        assert (found[0][name] - expected).norm() <= 1e-12 * expected.norm().clamp(min=1e-3), name


def test_no_micro_batch_leaves_whole_gradients(tiny, photographs, seed, one_process, monkeypatch):
    """They are reduced as they come, so that with more ranks each keeps its own part only; and one rank doesn't copy
    all of them to divide them by one."""
    groups, rewards = make_groups(tiny, photographs, seed)
    learner, _ = make_learner(tiny, one_process, max(len(g.prompt.input_ids) for g in groups) + 7)
    trained = list(learner.policy.parameters())
    held, divided, inner = [], [], learner._backward

    class Divisions(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), options=None):
            out = op(*arguments, **(options or {}))
            if op.overloadpacket.__name__ == "div":
                divided.append(out.numel())
            return out

    def backward(*arguments, **options):
        with Divisions():
            found = inner(*arguments, **options)
        held.append(sum(parallel.local(p.grad).numel() for p in trained if p.grad is not None))
        return found

    monkeypatch.setattr(learner, "_backward", backward)
    learner.step(groups, rewards)
    assert len(held) > 1 and set(held) == {sum(parallel.local(p).numel() for p in trained)}
    assert max(divided) < max(p.numel() for p in trained)


def test_a_step_of_completions_that_were_all_cut_off(tiny, photographs, seed, one_process):
    """rollout.truncated=mask leaves nothing to learn from: no gradient, and no metric that isn't a number."""
    learner, _ = make_learner(tiny, one_process, max_logp_gap=0.1)
    groups, rewards = make_groups(tiny, photographs, seed)
    before = parameters(learner)
    for group in groups:
        group.samples = [replace(s, tokens=s.tokens[:0], logprobs=s.logprobs[:0]) for s in group.samples]
    found = learner.step(groups, rewards)
    assert found.tokens == 0 == found.metrics["grad_norm"]
    assert all(math.isfinite(x) for x in found.metrics.values()), found
    assert all(torch.equal(before[n], p) for n, p in parameters(learner).items())


def test_recomputed_layers_change_nothing(any_tiny, photographs, seed, one_process, monkeypatch):
    from sslr1.ops import attention

    calls = []
    inner = attention.shared_prefix_attention
    monkeypatch.setattr(ops, "shared_prefix_attention", lambda *a: calls.append(1) or inner(*a))
    results = []
    for recompute in (0, 1, 2):
        learner, _ = make_learner(any_tiny, one_process, recompute=recompute)
        calls.clear()
        found = learner.step(*make_groups(any_tiny, photographs, seed)).metrics
        results.append((found["loss"], found["grad_norm"], parameters(learner), len(calls)))
    text = learner.policy.model.config.text_config
    full = full_layers(text)  # the others are no attention
    assert [calls for *_, calls in results] == [len(full), 2 * len(full), len(full) + sum(n % 2 == 0 for n in full)]
    for loss, norm, after, _ in results[1:]:
        assert (loss, norm) == results[0][:2] and all(torch.equal(after[n], results[0][2][n]) for n in after)


@pytest.mark.slow
def test_compiled_layers_change_nothing(tiny, photographs, seed, one_process, monkeypatch):
    """Traced and differentiated as for Inductor, but run by PyTorch; and compiled at most anew for a second shape, not
    a third."""
    from torch._dynamo.utils import counters

    inner = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **o: inner(module, backend="aot_eager", **o))
    torch._dynamo.reset()
    counters.clear()
    groups, rewards = make_groups(tiny, photographs, seed)
    results, graphs = [], []
    for compiled in (False, True):
        learner, _ = make_learner(tiny, one_process, recompute=2, compiled=compiled)
        found = []
        for chosen in (slice(0, 4), slice(0, 3), slice(1, 4), slice(2, 4)):
            learner.optimizer.step = lambda: None  # gradients only
            found.append(learner.step(groups[chosen], rewards[chosen]).metrics)
            graphs.append(counters["stats"]["unique_graphs"])
        results.append([(f["loss"], f["grad_norm"]) for f in found])
    assert results[1] == [pytest.approx(pair, rel=1e-5) for pair in results[0]]
    assert graphs[3] == 0 < graphs[4] and graphs[6] == graphs[7]


def test_a_frozen_vision_tower_stays(tmp_path, any_tiny, photographs, seed, one_process):
    learner, weights = make_learner(any_tiny, one_process, frozen="vision")
    before = parameters(learner)
    learner.step(*make_groups(any_tiny, photographs, seed))
    now = parameters(learner)
    moved = {name for name in now if not torch.equal(before[name], now[name])}
    assert moved and not any(name.startswith("model.visual") for name in moved)
    assert {name for name in now if not name.startswith("model.visual")} - moved == set()
    options = dict(tokenizer=model.load_tokenizer(any_tiny), source=any_tiny, world=one_process)
    path = checkpoint.save(tmp_path, 1, learner=learner, sampler=weights.model, trainer={}, **options)
    other, _ = make_learner(any_tiny, one_process, frozen="vision")
    checkpoint.load(path, learner=other)
    again = parameters(other)
    assert all(torch.equal(again[name], now[name]) for name in now) and other.step_number == 1
    for p, q in zip(learner.optimizer.param_groups[0]["params"], other.optimizer.param_groups[0]["params"]):
        a, b = learner.optimizer.state[p]["exp_avg"], other.optimizer.state[q]["exp_avg"]
        assert torch.equal(parallel.local(a), parallel.local(b))


def test_sampler_shares_storage_and_follows(any_tiny, photographs, seed, one_process):
    learner, weights = make_learner(any_tiny, one_process)
    assert weights.shared
    mine = dict(weights.model.named_parameters())
    before = {name: p.clone() for name, p in mine.items()}
    learner.step(*make_groups(any_tiny, photographs, seed))
    weights.refresh(learner.policy)
    now = parameters(learner)
    assert set(mine) == set(now) and all(torch.equal(mine[n], now[n]) for n in now)
    assert any(not torch.equal(before[n], now[n]) for n in now)
    assert weights.model.lm_head.weight is weights.model.model.language_model.embed_tokens.weight


def test_gradient_that_is_not_finite_skips_the_step(tiny, photographs, seed, one_process):
    learner, _ = make_learner(tiny, one_process)
    groups, rewards = make_groups(tiny, photographs, seed)
    before = parameters(learner)
    learner.step(groups, rewards, advantages=torch.full((4, 3), float("nan")))
    assert (learner.skipped, learner.skipped_in_a_row) == (1, 1)
    assert all(torch.equal(before[n], p) for n, p in parameters(learner).items())
    learner.step(groups, rewards)
    assert (learner.skipped, learner.skipped_in_a_row) == (1, 0)
    assert all(torch.isfinite(p).all() for p in parameters(learner).values())


def test_rewards_move_probabilities(tiny, photographs, seed, one_process):
    """After some steps the rewarded completion of each group is likelier than before, the others less so."""
    learner, weights = make_learner(tiny, one_process)
    groups, _ = make_groups(tiny, photographs, seed)
    rewards = torch.tensor([[1.0, 0, 0]] * 4)
    policy = model.Policy(weights.model)

    def logprobs():
        from sslr1 import ops

        packed = model.pack(groups, **policy.pack_options)
        with torch.no_grad():
            (found,) = policy(packed, lambda h, w: (ops.token_logprobs(h, w, packed.tokens)[0],))
        return torch.zeros(12).index_add(0, packed.sequence, found).view(4, 3)

    before = logprobs()
    for _ in range(15):
        learner.step(groups, rewards)
    change = logprobs() - before
    assert (change[:, 0] > 0).all() and change[:, 1:].mean() < 0


def test_schedule(tiny, one_process):
    rates = {}
    for kind in ("constant", "linear", "cosine"):
        learner, _ = make_learner(tiny, one_process, optim=OPTIONS.optim.model_copy(update={"schedule": kind}))
        rates[kind] = []
        for learner.step_number in range(11):
            rates[kind].append(learner.learning_rate() * 1e3)
    assert rates["constant"] == [0.5] + [1.0] * 10
    assert rates["linear"][2:] == [1 - k / 8 for k in range(9)]
    assert abs(rates["cosine"][6] - 0.5) < 1e-12 and abs(rates["cosine"][10]) < 1e-12


def test_a_folder_of_transformers_trains_and_goes_back(tmp_path, any_tiny, photographs, seed, one_process):
    """Loaded, trained for three steps, saved: transformers computes the trained policy's log-probs from the folder."""
    learner, weights = make_learner(any_tiny, one_process)
    groups, rewards = make_groups(any_tiny, photographs, seed)
    before = parameters(learner)
    for _ in range(3):
        learner.step(groups, rewards)
    weights.refresh(learner.policy)
    checkpoint.save_hf(tmp_path / "hf", weights.model, model.load_tokenizer(any_tiny), any_tiny)
    now = parameters(learner)
    assert any(not torch.equal(before[name], now[name]) for name in now)
    network = model.load_model(tmp_path / "hf")
    for group in groups:
        packed = model.pack([group], **learner.policy.pack_options)
        with torch.no_grad():
            (mine,) = learner.policy(packed, lambda h, w: (h @ w.T,))
        theirs = []
        for sample in group.samples:
            ids = torch.cat([group.prompt.input_ids, sample.tokens])[None]
            with torch.no_grad():
                logits = network(
                    input_ids=ids,
                    pixel_values=group.prompt.pixel_values,
                    image_grid_thw=group.prompt.image_grid_thw,
                    mm_token_type_ids=(ids == network.config.image_token_id).int(),
                    use_cache=False,
                ).logits[0]
            theirs.append(logits[len(group.prompt.input_ids) - 1 : -1])
        theirs = torch.cat(theirs)
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_tokens_that_the_sampler_drew_otherwise_are_weighted(tiny, photographs, seed, one_process, monkeypatch):
    """Past the gap by min(ratio, cap), within it by 1; and with the gap switched off nothing is weighted."""
    groups, rewards = make_groups(tiny, photographs, seed)
    seen = []
    inner = ops.grpo_loss

    def spy(*arguments, token_weights=None, **options):
        out = inner(*arguments, token_weights=token_weights, **options)
        seen.append((token_weights, out.logprobs))
        return out

    monkeypatch.setattr(ops, "grpo_loss", spy)
    learner, _ = make_learner(tiny, one_process)
    learner.step(groups, rewards)
    assert seen[0][0] is None
    shifts = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5, 3.0, -3.0]).repeat(5)[: len(seen[0][1])]
    parts = iter((seen[0][1] - shifts).split([len(s.tokens) for g in groups for s in g.samples]))
    for group in groups:
        for sample in group.samples:
            sample.logprobs = next(parts)
    learner, _ = make_learner(tiny, one_process, max_logp_gap=0.3)
    found = learner.step(groups, rewards).metrics
    expected = torch.where(shifts.abs() > 0.3, shifts.exp().clamp(max=2.0), 1.0)
    assert (seen[1][0] - expected).abs().max() < 1e-4
    assert found["sampling/capped"] == (shifts == 3.0).sum() / len(shifts)
    assert abs(found["sampling/logp_difference/max"] - 3.0) < 1e-4
