"""Adapters: against PEFT's on transformers' own model, and against matrices merged by hand; what they may be put on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from sslr1 import config, model, ops
from sslr1.config.inputs import Lora
from sslr1.errors import UserError
from sslr1.model import cost, lora, parallel
from sslr1.rollout import Engine
from tests.learner.test_learner import make_groups, make_learner
from tests.model.test_packing import some_prompts, spec_of

BOTH = Lora(rank=4, alpha=6, rslora=True, vision="all-linear")


@pytest.mark.parametrize("shape, rank", [((2, 7, 33), 5), ((1, 16), 1), ((0, 8), 3), ((300, 64), 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_op_is_its_reference(seed, shape, rank, bias):
    x, weight, own = torch.randn(shape), torch.randn(20, shape[-1]), torch.randn(20) if bias else None
    lora_a, lora_b, weights = torch.randn(rank, shape[-1]), torch.randn(20, rank), torch.randn(*shape[:-1], 20)
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float64, "auto"), (torch.float32, "auto")):
        leaves = [t.to(dtype).requires_grad_() for t in (x, lora_a, lora_b)]
        fixed = [None if t is None else t.to(dtype) for t in (weight, own)]
        out = ops.lora_linear(leaves[0], *fixed, *leaves[1:], 0.7, backend=backend)
        found.append([out, *torch.autograd.grad((out * weights.to(dtype)).sum(), leaves)])
    for exact, same, near in zip(*found):
        assert exact.shape == same.shape == near.shape
        assert (same - exact).norm() <= 1e-13 * exact.norm() and (near - exact).norm() <= 1e-5 * exact.norm()
    assert torch.equal(ops.lora_linear(x, weight, own, lora_a, 0 * lora_b, 0.7), F.linear(x, weight, own))
    with pytest.raises(ValueError, match="are frozen"):
        ops.lora_linear(x, weight.requires_grad_(), own, lora_a, lora_b, 0.7)


def test_the_op_keeps_its_input_once_and_forms_no_gradient_of_the_matrix(seed):
    x, weight = torch.randn(50, 32, requires_grad=True), torch.randn(48, 32)
    parts = [(torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True)) for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outs = [ops.lora_linear(x, weight, None, a, b, 1.0) for a, b in parts]
    others = {t.data_ptr() for t in kept} - {t.data_ptr() for t in (weight, *(p for pair in parts for p in pair))}
    assert others - {x.data_ptr()} == {t.data_ptr() for t in kept if t.shape == (50, 4)}
    sizes = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), options=None):
            out = op(*arguments, **(options or {}))
            if op.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
                sizes.append(tuple(out.shape))
            return out

    with Products():
        sum(outs).sum().backward()
    assert (48, 32) not in sizes and sizes.count((50, 32)) == 6


def test_the_op_compiles_whole(seed):
    x, weight, lora_a, lora_b = (torch.randn(s) for s in ((5, 8), (6, 8), (2, 8), (6, 2)))
    call = torch.compile(lambda *t: ops.lora_linear(*t, 0.5), backend="aot_eager", fullgraph=True)
    a, b = (t.clone().requires_grad_() for t in (lora_a, lora_b))
    call(x, weight, None, a, b).square().sum().backward()
    c, d = (t.clone().requires_grad_() for t in (lora_a, lora_b))
    ops.lora_linear(x, weight, None, c, d, 0.5, backend="reference").square().sum().backward()
    assert torch.allclose(a.grad, c.grad) and torch.allclose(b.grad, d.grad)


class ByHand(nn.Linear):
    """A linear with its adapter in its matrix."""

    def forward(self, x):
        return F.linear(x, self.weight + self.scale * self.lora_B @ self.lora_A, self.bias)


def by_hand(folder, found: lora.Lora, values):
    """transformers' own model in float64 with ByHand linears, and its adapters' parameters by our names."""
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)
    parameters = {}
    for name in found.names:
        module = network.get_submodule(name)
        module.__class__, module.scale = ByHand, found.scale
        for part in ("lora_A", "lora_B"):
            setattr(module, part, nn.Parameter(values[f"{name}.{part}.weight"].clone()))
            parameters[f"{name}.{part}.weight"] = getattr(module, part)
    return network, parameters


def by_peft(folder, found: lora.Lora, values):
    import peft

    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    asked = dict(r=found.rank, lora_alpha=found.alpha, use_rslora=found.rslora, target_modules=list(found.names))
    network = peft.get_peft_model(network, peft.LoraConfig(**asked), autocast_adapter_dtype=False)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    parameters = {name.removeprefix(lora.PREFIX).replace(".default.", "."): p for name, p in trained.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(values[name])
    return network, parameters


def separate_loss(network, groups, rewards):
    """Each completion with its own copy of its prompt through transformers' own forward, one a call."""
    advantages, tokens = ops.advantages(rewards), sum(len(s.tokens) for g in groups for s in g.samples)
    for own, group in zip(advantages, groups):
        for advantage, sample in zip(own, group.samples):
            ids = torch.cat([group.prompt.input_ids, sample.tokens])[None]
            out = network(
                input_ids=ids,
                mm_token_type_ids=(ids == network.config.image_token_id).int(),
                use_cache=False,
                pixel_values=group.prompt.pixel_values.double(),
                image_grid_thw=group.prompt.image_grid_thw,
            ).logits[0, -len(sample.tokens) - 1 : -1]
            picked = out.log_softmax(-1).gather(-1, sample.tokens[:, None])[:, 0]
            yield -((picked - picked.detach()).exp() * advantage).sum() / tokens


def some_values(network):
    """Adapters that do something, halves of one size."""
    return {name: torch.randn(p.shape, dtype=torch.float64) * 0.1 for name, p in lora.adapters(network)}


def put(network, values):
    for name, parameter in lora.adapters(network):
        parallel.fill(parameter, values[name].to(parameter.dtype))


@pytest.mark.parametrize("theirs", [by_hand, pytest.param(by_peft, marks=pytest.mark.peer)])
@pytest.mark.parametrize(
    "any_tiny, recompute",
    [
        pytest.param("qwen2_5_vl", 0, marks=pytest.mark.slow),
        ("qwen2_5_vl", 1),
        ("qwen3_vl", 0),
        pytest.param("qwen3_vl", 1, marks=pytest.mark.slow),
        pytest.param("qwen3_5", 0, marks=pytest.mark.slow),
        ("qwen3_5", 1),
    ],
    indirect=["any_tiny"],
)
def test_loss_and_gradients_are_theirs(any_tiny, photographs, seed, one_process, exact_norms, theirs, recompute):
    """In float64, packed in micro-batches that split groups, against separate sequences."""
    groups, rewards = make_groups(any_tiny, photographs, seed)
    rewards = rewards.double()
    tokens = max(len(g.prompt.input_ids) for g in groups) + 7
    learner, _ = make_learner(any_tiny, one_process, tokens, recompute=recompute, dtype=torch.float64, lora=BOTH)
    network, found = learner.policy.model, {}
    values = some_values(network)
    put(network, values)
    learner._update = lambda totals: found.update(loss=totals["loss"].item()) or {"grad_norm": 0.0}
    learner.step(groups, rewards)
    other, parameters = theirs(any_tiny, lora.lora_of(network), values)
    loss = 0.0
    for part in separate_loss(other, groups, rewards):
        part.backward()
        loss += part.item()
    assert abs(found["loss"] - loss) <= 1e-12
    mine = dict(lora.adapters(network))
    assert mine.keys() == parameters.keys() and any("visual.merger" in name for name in mine)
    for name, parameter in mine.items():
        expected = parameters[name].grad
        assert (parallel.local(parameter.grad) - expected).norm() <= 1e-12 * expected.norm(), name
    assert all(p.grad is None for name, p in network.named_parameters() if name not in mine)


@pytest.mark.parametrize(
    "any_tiny, dtype",
    [
        ("qwen2_5_vl", torch.float32),
        pytest.param("qwen2_5_vl", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", torch.float32, marks=pytest.mark.slow),
        ("qwen3_vl", torch.bfloat16),
        pytest.param("qwen3_5", torch.float32, marks=pytest.mark.slow),
        ("qwen3_5", torch.bfloat16),
    ],
    indirect=["any_tiny"],
)
def test_new_adapters_change_nothing(any_tiny, photographs, seed, one_process, dtype):
    """Bit for bit, in the learner and the sampler; and switched off, others don't either."""
    groups, _ = make_groups(any_tiny, photographs, seed)
    learner, weights = make_learner(any_tiny, one_process, dtype=dtype, lora=BOTH)
    plain = model.Policy(model.load_model(any_tiny, dtype))
    packed = model.pack(groups, **plain.pack_options)

    @torch.no_grad()
    def logprobs(policy):
        return policy(packed, lambda h, w: ops.token_logprobs(h, w, packed.tokens))[0]

    expected = logprobs(plain)
    assert torch.equal(logprobs(learner.policy), expected)
    assert torch.equal(logprobs(model.Policy(weights.model)), expected)
    put(learner.policy.model, some_values(learner.policy.model))
    weights.refresh(learner.policy)
    assert not torch.equal(logprobs(learner.policy), expected)
    assert torch.equal(logprobs(learner.policy), logprobs(model.Policy(weights.model)))
    with lora.switched_off(learner.policy.model):
        assert torch.equal(logprobs(learner.policy), expected)


@pytest.mark.parametrize(
    "any_tiny, dtype",
    [
        ("qwen2_5_vl", torch.float32),
        pytest.param("qwen2_5_vl", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", torch.float32, marks=pytest.mark.slow),
        ("qwen3_vl", torch.bfloat16),
        pytest.param("qwen3_5", torch.float32, marks=pytest.mark.slow),
        ("qwen3_5", torch.bfloat16),
    ],
    indirect=["any_tiny"],
)
def test_the_sampler_holds_no_second_base_and_follows(any_tiny, photographs, seed, one_process, dtype):
    """Of parameters that lie in the compute dtype the storage is the learner's; after steps the base's bits are what
    they were, and tokens drawn have the learner's log-probs."""
    learner, weights = make_learner(any_tiny, one_process, dtype=dtype, lora=BOTH)
    mine, theirs = dict(weights.model.named_parameters()), dict(learner.policy.model.named_parameters())
    own = {name for name in mine if mine[name].data_ptr() != parallel.local(theirs[name]).data_ptr()}
    assert own == ({name for name in mine if lora.is_adapter(name)} if dtype == torch.bfloat16 else set())
    assert all(p.dtype == torch.float32 for p in theirs.values() if p.requires_grad)
    assert theirs["model.language_model.layers.0.mlp.up_proj.weight"].dtype == dtype
    base = {name: p.detach().clone() for name, p in theirs.items() if not lora.is_adapter(name)}
    put(learner.policy.model, some_values(learner.policy.model))
    learner.step(*make_groups(any_tiny, photographs, seed))
    weights.refresh(learner.policy)
    assert all(torch.equal(mine[name], p) for name, p in base.items())
    assert all(
        torch.equal(mine[name], parallel.local(theirs[name]).to(dtype)) for name in mine if lora.is_adapter(name)
    )
    tokenizer = model.load_tokenizer(any_tiny)
    prompts = some_prompts(tokenizer, photographs, spec_of(any_tiny))
    groups = Engine(weights.model, tokenizer, max_tokens=5).generate(prompts, group_size=2)
    found = learner.step(groups, torch.rand(len(prompts), 2)).metrics
    assert found["sampling/logp_difference/max"] <= (1e-5 if dtype == torch.float32 else 0.1)
    assert found["ratio/mean"] == 1.0


def test_recomputed_layers_change_nothing(any_tiny, photographs, seed, one_process):
    """Not even in bfloat16, where the layers' gathered adapters are given up and gathered again."""
    found = []
    for recompute in (0, 1):
        learner, _ = make_learner(any_tiny, one_process, recompute=recompute, dtype=torch.bfloat16, lora=BOTH)
        metrics = learner.step(*make_groups(any_tiny, photographs, seed)).metrics
        found.append((metrics["loss"], metrics["grad_norm"], lora.gathered(learner.policy.model)))
    assert found[0][:2] == found[1][:2] and found[0][1] > 0
    assert all(torch.equal(a, found[1][2][name]) for name, a in found[0][2].items())


@pytest.mark.slow
def test_compiled_layers_change_nothing(tiny, photographs, seed, one_process, monkeypatch):
    inner = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **o: inner(module, backend="aot_eager", **o))
    found = []
    for compiled in (False, True):
        learner, _ = make_learner(tiny, one_process, recompute=2, compiled=compiled, lora=BOTH)
        metrics = learner.step(*make_groups(tiny, photographs, seed)).metrics
        found.append((metrics["loss"], metrics["grad_norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_operations_are_counted(tiny, seed):
    """A frozen matrix once forward and once for its input; of a tower without adapters the forward pass alone."""
    network = model.skeleton(tiny)
    full, forward = cost.cost_of(network), cost.cost_of(network, forward_only=True)
    assert (full.token, full.patch, full.row) == (3 * forward.token, 3 * forward.patch, 3 * forward.row)
    lora.add(network, lora.chosen(network, Lora(rank=4)), torch.float32)
    language = network.model.language_model.layers
    size = sum(p.numel() for name, p in language.named_parameters() if lora.is_adapter(name))
    found = cost.cost_of(network)
    assert found.token == 2 * forward.token + 3 * 2 * size and found.row == 2 * forward.row
    assert (found.patch, found.patch_pair, found.pair) == (forward.patch, forward.patch_pair, full.pair)
    assert cost.cost_of(network, forward_only=True).token == forward.token + 2 * size


# ------------------------------------------------------------------------------------------------ what gets one


@pytest.mark.parametrize(
    "words, vision",
    [
        ("all-linear", "all-linear"),
        ("All-Linear", None),
        (["q_proj", "mlp.down_proj"], ["attn.qkv", "merger.linear_fc1", "merger.mlp.0"]),
        (r".*layers\.\d+\.self_attn\.[qkv]_proj", r".*blocks\.1\..*(proj|fc1|gate_proj)"),
        (["model.language_model.layers.1.self_attn.o_proj"], None),
    ],
)
@pytest.mark.peer
def test_targets_are_pefts(any_tiny, words, vision):
    """Of each tower those that PEFT takes for the same words."""
    import peft

    for key, tower in lora.TOWERS.items():
        asked = {"targets": words, "vision": vision}[key]
        if isinstance(asked, list):  # a family has one of the two
            network = model.skeleton(any_tiny)
            asked = [w for w in asked if any(n.endswith(f".{w}") or n == w for n, _ in network.named_modules())]
        if not asked:
            continue
        network = model.skeleton(any_tiny)
        mine = lora.chosen(network, Lora(rank=2, **{"targets": None, key: asked})).names
        theirs = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=asked))
        ends = ".lora_A.default.weight"
        found = [n.removeprefix(lora.PREFIX) for n, _ in theirs.named_parameters() if n.endswith(ends)]
        assert [f"{n}{ends}" for n in mine] == sorted(name for name in found if name.startswith(tower)) and mine


REFUSED = {
    "lm_head": (dict(targets=["lm_head", "q_proj"]), "names lm_head, which can't have an adapter here"),
    "embeddings": (dict(targets=["embed_tokens"]), "embed_tokens, which can't have .*PEFT merges it into both"),
    "a convolution": (dict(vision=["proj"]), "names model.visual.patch_embed.proj, a Conv3d: adapters are for linears"),
    "a block": (
        dict(targets=["mlp"]),
        "names model.language_model.layers.0.mlp, a .*MLP: adapters are for linears only",
    ),
    "a word that is nowhere": (
        dict(targets=["qproj"]),
        "'qproj' is no module of model.language_model; its linears end in",
    ),
    "no expression": (dict(targets="(q_proj"), "is not a regular expression"),
    "a part of a name": (dict(targets="q_proj"), "'q_proj' is no module"),  # fullmatch, as PEFT
    "nothing": (dict(targets=None), "has no targets"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_have_one_is_refused_in_words(tiny, case):
    options, said = REFUSED[case]
    with pytest.raises(UserError, match=said):
        lora.chosen(model.skeleton(tiny), Lora(rank=2, **options))


def test_settings(tmp_path):
    tree = {"model": {"path": "m", "lora": {"rank": 2}}}
    c = config.check(tree, data=False).model.lora
    assert (c.targets, c.vision, c.alpha, c.rslora) == ("all-linear", None, None, False)
    assert config.check({"model": {"path": "m"}}, data=False).model.lora.rank == 0
    for given, said in (
        ({"dropout": 0.1}, "model.lora.dropout is 0.1: .*only 0: the loss takes the policy that drew"),
        ({"dora": True}, "model.lora.dora: DoRA is not supported, only plain LoRA"),
        ({"use_dora": True}, "model.lora.use_dora: DoRA"),
        ({"qlora": True}, "model.lora.qlora: QLoRA is not supported"),
        ({"load_in_4bit": True}, "model.lora.load_in_4bit: QLoRA"),
        ({"r": 2}, "model.lora.r is not a setting"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            config.check({"model": {"path": "m", "lora": {"rank": 2} | given}}, data=False)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"model.frozen=vision and model.lora.vision exclude each other"):
        config.check({"model": {"path": "m", "frozen": "vision", "lora": {"rank": 2, "vision": ["qkv"]}}}, data=False)
    file = tmp_path / "c.yaml"
    file.write_text("model: {path: m, lora: {rank: 2, targets: [q_proj, no], vision: '.*qkv'}}")
    read = config.load(file, data=False).model.lora
    assert read.targets == ["q_proj", "no"] and read.vision == ".*qkv"
    for value, expected in (
        ("[q_proj, o_proj]", ["q_proj", "o_proj"]),
        ("all-linear", "all-linear"),
        (r".*layers\.\d+\.mlp\.(up|gate)_proj", r".*layers\.\d+\.mlp\.(up|gate)_proj"),
        ("null", None),
    ):
        got = config.load(file, [f"model.lora.targets={value}"], data=False).model.lora.targets
        assert got == expected
