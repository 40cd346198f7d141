"""The engine against `generate`, the learner's log-probs, and its own promises about keys, stops and suppressed ids."""

import gc
import weakref

import pytest
import torch

from sslr1 import model, ops
from sslr1.errors import UserError
from sslr1.model import Group, Sample
from sslr1.puzzles import Answer, score
from sslr1.rollout import Engine, wave
from sslr1.rollout import engine as host
from tests.model.test_packing import some_prompts, spec_of

# For what does not depend on the kind of model
one_family = pytest.mark.parametrize("any_tiny", ["qwen2_5_vl"], indirect=True)


@pytest.fixture(scope="module")
def engine(any_tiny):
    return Engine(model.load_model(any_tiny), model.load_tokenizer(any_tiny), max_tokens=20)


@pytest.fixture
def prompts(engine, any_tiny, photographs, seed):
    found = some_prompts(engine.tokenizer, photographs, spec_of(any_tiny), seed=seed)
    assert len({len(p.input_ids) for p in found}) > 1 and max(len(p.image_grid_thw) for p in found) > 1
    for i, prompt in enumerate(found):
        prompt.id = 7 * i + 3
    return found


def same(a, b):
    return [s.tokens.tolist() for g in a for s in g.samples] == [s.tokens.tolist() for g in b for s in g.samples]


def drawable(engine, prompt, sample, tokens, temperature, *address):
    """First and last token that a uniform within 1e-5 of this draw's picks behind the prompt and `tokens`, from the
    logits that the learner's forward gives. address: seed, step, attempt."""
    group = Group(prompt, [Sample(torch.tensor([*tokens, 0]), None, "", "")])
    packed = model.pack([group], **model.Policy(engine.model).pack_options)
    with torch.no_grad():
        hidden = model.shared_prefix.run(engine.model, packed)
    logits = ops.float_logits(hidden[packed.predictors[-1:]], engine.model.lm_head.weight)[0].double()
    logits[engine.suppressed] = -torch.inf
    cdf = (logits / temperature).softmax(0).cumsum(0)
    key = ops.fold_tensor(ops.fold("sample", *address, prompt.id, sample), torch.tensor([len(tokens)]))
    near = ops.uniform(key) + torch.tensor([-1e-5, 1e-5], dtype=torch.float64)
    return torch.searchsorted(cdf, near, right=True).tolist()


def assert_same_draws(engine, first, second, temperature, seed=0, step=0, attempt=0):
    """Sample by sample the same tokens, log-probs within 1e-5. A token may be another, which ends its sample's
    comparison, only where the draw's uniform lies within 1e-5 of both tokens' shares of the CDF: the prefix is replayed
    to see."""
    assert [len(g.samples) for g in first] == [len(g.samples) for g in second]
    for a, b in zip(first, second):
        for s, (x, y) in enumerate(zip(a.samples, b.samples)):
            pairs = list(zip(x.tokens.tolist(), y.tokens.tolist()))
            n = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
            assert n == 0 or (x.logprobs[:n] - y.logprobs[:n]).abs().max() <= 1e-5
            if n == len(x.tokens) == len(y.tokens):
                assert x.finish == y.finish and x.text == y.text
                continue
            least, most = drawable(engine, a.prompt, s, x.tokens.tolist()[:n], temperature, seed, step, attempt)
            assert least <= min(pairs[n]) and max(pairs[n]) <= most, (a.prompt.id, s, n)


@pytest.fixture
def many_stops(engine, seed, monkeypatch):
    """Some 60 more ids stop, so that samples end at many different places."""
    ids = {*engine.stop_ids, *torch.randperm(300)[:60].tolist()} - set(engine.suppressed)
    monkeypatch.setattr(engine, "stop_ids", sorted(ids))


@pytest.fixture
def many(engine, any_tiny, photographs, seed):
    """Eleven prompts of several lengths."""
    spec = spec_of(any_tiny)
    found = [
        p for i in range(3) for p in some_prompts(engine.tokenizer, photographs, spec, level=1 + i % 2, seed=seed + i)
    ]
    for i, prompt in enumerate(found):
        prompt.id = 100 + i
    return found[:11]


@pytest.mark.parametrize(
    "any_tiny, group_size, batch_invariant",
    [
        ("qwen2_5_vl", 1, False),
        pytest.param("qwen2_5_vl", 1, True, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", 16, False, marks=pytest.mark.slow),
        ("qwen2_5_vl", 16, True),
        pytest.param("qwen3_vl", 1, False, marks=pytest.mark.slow),
        ("qwen3_vl", 1, True),
        ("qwen3_vl", 16, False),
        pytest.param("qwen3_vl", 16, True, marks=pytest.mark.slow),
        ("qwen3_5", 1, False),
        pytest.param("qwen3_5", 1, True, marks=pytest.mark.slow),
        pytest.param("qwen3_5", 16, False, marks=pytest.mark.slow),
        ("qwen3_5", 16, True),
    ],
    indirect=["any_tiny"],
)
def test_greedy_is_transformers_generate(any_tiny, engine, prompts, group_size, batch_invariant, monkeypatch):
    monkeypatch.setattr(engine, "batch_invariant", batch_invariant)
    plain = model.load_model(any_tiny)
    groups = engine.generate(prompts, group_size=group_size, temperature=0)
    for prompt, group in zip(prompts, groups):
        out = plain.generate(
            input_ids=prompt.input_ids[None],
            attention_mask=torch.ones_like(prompt.input_ids)[None],
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            mm_token_type_ids=(prompt.input_ids == plain.config.image_token_id).int()[None],
            do_sample=False,
            max_new_tokens=20,
            repetition_penalty=1.0,
            suppress_tokens=engine.suppressed,
            eos_token_id=engine.stop_ids,  # Qwen3.5's configuration names one that ends no turn
        )[0, len(prompt.input_ids) :].tolist()
        assert len(group.samples) == group_size
        assert all(s.tokens.tolist() == out for s in group.samples)


def assert_the_learners(engine, prompts, bound):
    groups = engine.generate(prompts, group_size=6, temperature=0.8, seed=5)
    policy = model.Policy(engine.model)
    packed = model.pack(groups, **policy.pack_options)
    with torch.no_grad():
        (logprobs,) = policy(packed, lambda h, w: (ops.token_logprobs(h, w, packed.tokens, 0.8)[0],))
    drawn = torch.cat([s.logprobs for g in groups for s in g.samples])
    assert (logprobs - drawn).abs().max() <= bound


def test_sampled_logprobs_are_the_learners(engine, prompts):
    # Qwen3.5's states are sums over all that went before: either side is up to 9e-6 off what float64 gives
    assert_the_learners(engine, prompts, 2e-5 if engine.model.config.model_type == "qwen3_5" else 1e-5)


def test_in_float64_they_are_but_for_how_they_are_kept(any_tiny, prompts, exact_norms):
    """Log-probs are kept in float32, whose last digit at 10 is 1e-6."""
    wide = Engine(model.load_model(any_tiny).double(), model.load_tokenizer(any_tiny), max_tokens=20)
    for prompt in prompts:
        prompt.pixel_values = prompt.pixel_values.double()
    assert_the_learners(wide, prompts, 1e-6)


@pytest.mark.parametrize(
    "settings, gpu_buckets",
    [
        ({"wave_rows": 7}, False),  # one group at a time
        ({"wave_rows": 12, "wave_groups": 2}, False),
        ({"wave_rows": 12, "wave_groups": 4, "look_every": 3}, False),
        ({"wave_rows": 20, "look_every": 5}, True),
        ({"wave_rows": 20, "batch_invariant": True}, False),
    ],
)
@one_family
def test_waiting_prompts_take_freed_places(engine, many, many_stops, monkeypatch, settings, gpu_buckets):
    """… and give what they give alone; while some wait, others' samples end, and rows and places are used again."""
    options = {"group_size": 6, "temperature": 1.3, "seed": 5, "step": 2}
    prefills = []
    inner = wave.Wave.prefill
    monkeypatch.setattr(wave.Wave, "prefill", lambda self, p, at: prefills.append(at) or inner(self, p, at))
    if gpu_buckets:
        bucket = wave.bucket
        monkeypatch.setattr(wave, "bucket", lambda n, device_type: bucket(n, "cuda"))
    alone = [engine.generate([p], **options)[0] for p in many]
    prefills.clear()
    for name, value in settings.items():
        monkeypatch.setattr(engine, name, value)
    together = engine.generate(many, **options)
    places = [p for batch in prefills for p in batch]
    assert len(places) == len(many) and len(set(places)) < len(many) and [g.prompt for g in together] == many
    assert len({len(s.tokens) for g in together for s in g.samples}) > 5
    assert_same_draws(engine, alone, together, 1.3, seed=5, step=2)
    tokens = together[0].samples[2].tokens.tolist()
    for n, token in enumerate(tokens):  # the replay finds what was drawn
        least, most = drawable(engine, many[0], 2, tokens[:n], 1.3, 5, 2, 0)
        assert least <= token <= most < least + 20
    other = [Sample(s.tokens.clone(), s.logprobs, s.text, s.finish) for s in together[0].samples]
    other[2].tokens[0] = (other[2].tokens[0] + 150) % 300
    with pytest.raises(AssertionError):  # what must not differ is seen
        assert_same_draws(engine, together[:1], [Group(many[0], other)], 1.3, seed=5, step=2)


def test_batch_invariant_is_bit_equal(engine, many, many_stops, monkeypatch):
    options = {"group_size": 6, "temperature": 1.3, "seed": 5, "top_p": 0.95}

    def generate(prompts, **settings):
        with monkeypatch.context() as patch:
            for name, value in {"batch_invariant": True, **settings}.items():
                patch.setattr(engine, name, value)
            return {
                g.prompt.id: [(s.tokens, s.logprobs) for s in g.samples] for g in engine.generate(prompts, **options)
            }

    whole = generate(many)
    for found in (
        generate(many[::-1]),
        generate(many[3:4]),
        generate(many[2:9], look_every=4),
        generate(many, wave_rows=6),
        generate(many, wave_rows=80),
        generate(many[4:], wave_rows=18, wave_groups=5, look_every=3),
    ):
        for number, samples in found.items():
            for one, other in zip(whole[number], samples, strict=True):
                assert all(map(torch.equal, one, other))


@one_family
def test_draws_are_keyed_and_nothing_else(engine, prompts):
    whole = engine.generate(prompts, group_size=6, seed=5, step=2)
    assert same(whole, engine.generate(prompts, group_size=6, seed=5, step=2))
    alone = [engine.generate([p], group_size=6, seed=5, step=2)[0] for p in prompts]
    assert same(whole, alone)
    fewer = engine.generate(prompts[::-1], group_size=3, seed=5, step=2)[::-1]
    assert same([Group(g.prompt, g.samples[:3]) for g in whole], fewer)
    for prompt in prompts:
        prompt.id += 1
    assert not same(whole, engine.generate(prompts, group_size=6, seed=5, step=2))
    for prompt in prompts:
        prompt.id -= 1
    engine.wave_rows, kept = 7, engine.wave_rows
    try:
        assert same(whole, engine.generate(prompts, group_size=6, seed=5, step=2))
    finally:
        engine.wave_rows = kept
    for change in ({"seed": 6}, {"step": 3}, {"attempt": 1}):
        assert not same(whole, engine.generate(prompts, **{"group_size": 6, "seed": 5, "step": 2, **change}))


@one_family
@pytest.mark.parametrize("special", [True, False])
def test_a_thought_is_told_whatever_kind_of_token_opens_it(any_tiny, special):
    """As an SFT cold start adds them: special tokens of the tokenizer, which decoding may drop."""
    tokenizer = model.load_tokenizer(any_tiny)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    engine = Engine(model.load_model(any_tiny), tokenizer)
    text = r"<think>hm</think>\boxed{B}"
    ids = tokenizer("<|image_pad|>" + text + "<|endoftext|>")["input_ids"] + [engine.stop_ids[-1]]
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    group = Group(None)
    engine._fill([group], (torch.tensor([[ids]]), torch.zeros(1, 1, len(ids)), torch.tensor([[len(ids)]])))
    (sample,) = group.samples
    assert (sample.text, sample.finish) == (text, "stop")
    assert score(Answer("choice", "B"), sample.text).reward == 1.0


def test_every_stop_id_stops_and_compaction_loses_nothing(engine, prompts):
    stops = set(engine.stop_ids)
    assert len(stops) == 2
    seen, lengths = set(), set()
    row = engine.model.lm_head.weight
    kept = row[engine.stop_ids].clone()
    try:
        for attempt in range(14):
            with torch.no_grad():  # make stops likely, so that samples of a group end at different places
                row[engine.stop_ids] = torch.randn_like(kept) * 0.2
            groups = engine.generate(prompts, group_size=8, attempt=attempt, temperature=2.0)
            for group in groups:
                for s in group.samples:
                    ids = s.tokens.tolist()
                    assert not set(ids[:-1]) & stops and len(ids) == len(s.logprobs) and (s.logprobs < 0).all()
                    assert s.finish == ("stop" if ids[-1] in stops else "length") and (
                        s.finish == "stop" or len(ids) == 20
                    )
                    told = [i for i in ids if i not in stops and i not in engine.suppressed]
                    assert s.text == engine.tokenizer.decode(told)
                    seen |= set(ids) & stops
                    lengths.add(len(ids))
            policy = model.Policy(engine.model)
            packed = model.pack(groups, **policy.pack_options)
            with torch.no_grad():
                (logprobs,) = policy(
                    packed, lambda h, w, packed=packed: (ops.token_logprobs(h, w, packed.tokens, 2.0)[0],)
                )
            assert (logprobs - torch.cat([s.logprobs for g in groups for s in g.samples])).abs().max() <= 1e-5
    finally:
        with torch.no_grad():
            row[engine.stop_ids] = kept
    assert seen == stops and len(lengths) > 5


@one_family
def test_vision_and_placeholder_ids_are_never_drawn(engine, prompts):
    names = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    never = {engine.tokenizer.convert_tokens_to_ids(n) for n in names} | set(
        range(len(engine.tokenizer), engine.model.config.text_config.vocab_size)
    )
    assert never <= set(engine.suppressed) and not set(engine.stop_ids) & set(engine.suppressed)
    drawn, attempt = [], 0
    while sum(map(len, drawn)) < 100_000:
        groups = engine.generate(prompts, group_size=256, temperature=2.0, attempt=attempt)
        drawn += [s.tokens for g in groups for s in g.samples]
        attempt += 1
    assert not never & set(torch.cat(drawn).tolist())


@one_family
def test_weights_that_diverged_are_reported(engine, prompts):
    weight = engine.model.lm_head.weight
    with torch.no_grad():
        kept = weight[5, 0].clone()
        weight[5, 0] = float("nan")
        try:
            with pytest.raises(FloatingPointError, match="not finite"):
                engine.generate(prompts, group_size=2)
        finally:
            weight[5, 0] = kept


@one_family
def test_sizes_below_one_are_errors(engine, prompts):
    for options in ({"group_size": 0}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            engine.generate(prompts, **options)


@one_family
def test_a_completion_cut_at_the_limit(engine, prompts):
    groups = engine.generate(prompts, group_size=2, max_tokens=1)
    assert all(len(s.tokens) == 1 for g in groups for s in g.samples)
    assert isinstance(groups[0].samples[0], Sample)


@one_family
def test_what_cannot_fit_is_refused_before_anything_runs(engine, prompts, monkeypatch):
    held = []
    inner = wave.Wave.__init__

    def build(self, *arguments, **options):
        inner(self, *arguments, **options)
        held.append(sum(getattr(self.cache, name).nbytes for name in ("prompt_k", "prompt_v", "own_k", "own_v")))

    monkeypatch.setattr(wave.Wave, "__init__", build)
    monkeypatch.setattr(engine, "wave_rows", 6)
    engine.generate(prompts, group_size=3)
    longest, rows = max(len(p.input_ids) for p in prompts), 6
    a_token = 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, their size, bytes
    assert held == [a_token * (3 * longest + 9 * 20)]  # three groups' buffers for two groups' rows
    needed = held[0] + 2 * rows * 768 * 4
    monkeypatch.setattr(host, "free_bytes", lambda device: needed)
    engine.generate(prompts, group_size=3)
    monkeypatch.setattr(host, "free_bytes", lambda device: needed - 1)
    words = (
        f"{a_token:,} bytes a token; 3 prompts x {longest} tokens .* 9 samples x 20 tokens .*Lower rollout.wave_rows"
    )
    with pytest.raises(UserError, match=words):
        engine.generate(prompts, group_size=3)
    assert len(held) == 2


@one_family
def test_buffers_are_given_back_at_once(engine, prompts, monkeypatch):
    """The learner's turn is next, and a cycle of references would keep them until Python looks for cycles."""
    waves = []
    inner = wave.Wave.prefill
    monkeypatch.setattr(wave.Wave, "prefill", lambda self, *rest: waves.append(weakref.ref(self)) or inner(self, *rest))
    gc.disable()
    try:
        engine.generate(prompts, group_size=2)
        assert waves and waves[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_buckets_are_few_and_hold_what_lives(device_type):
    found = [wave.bucket(n, device_type) for n in range(1, 1025)]
    assert all(n <= size and (device_type == "cuda" or n == size) for n, size in enumerate(found, 1))
    assert device_type == "cpu" or (len(set(found)) == 20 and all(size < 2 * n for n, size in enumerate(found, 1)))


def test_a_step_can_be_captured(engine, prompts, many_stops, monkeypatch):
    """Nothing in it makes the host wait or takes numbers from it, and buffers stay where they are. (That the attention
    does neither on a GPU is its own test's: on a CPU it looks at lengths in a way that isn't seen here.)"""
    forbidden = "_local_scalar_dense nonzero masked_select lift_fresh unique2 equal".split()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), options=None):
            assert op.overloadpacket.__name__ not in forbidden, op
            if "index" in op.overloadpacket.__name__ and isinstance(arguments[1], (list, tuple)):
                assert all(i is None or i.dtype != torch.bool for i in arguments[1]), op
            return op(*arguments, **(options or {}))

    steps, inner = [], wave.Wave.step

    def step(self, *kind):
        before = addresses(self)
        with Watch():
            inner(self, *kind)
        assert addresses(self) == before
        steps.append(kind)

    def addresses(w):
        known = {**vars(w), **{f"cache.{name}": x for name, x in vars(w.cache).items()}}
        per_step = "cache.among", "cache.decoded", "cache.written"  # made in a step for its layers
        return {k: x.data_ptr() for k, x in known.items() if isinstance(x, torch.Tensor) and k not in per_step}

    monkeypatch.setattr(wave.Wave, "step", step)
    monkeypatch.setattr(engine, "suppressed", [])  # whose range is checked where they lie on the CPU
    monkeypatch.setattr(engine, "wave_rows", 8)
    for options in ({}, {"temperature": 0}, {"top_p": 0.9, "top_k": 50}):
        engine.generate(prompts, group_size=4, **options)
    assert len({stop - start for start, stop, *_ in steps}) > 3


@pytest.mark.gpu
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_are_the_eager_ones(any_tiny, many, dtype, batch_invariant, monkeypatch):
    network, tokenizer = model.load_model(any_tiny, dtype).cuda(), model.load_tokenizer(any_tiny)
    replays = []
    inner = wave.Graphs.run
    monkeypatch.setattr(
        wave.Graphs, "run", lambda self, *step: inner(self, *step) or replays.append(len(self.captured))
    )
    found = []
    for cuda_graphs in (True, False):
        engine = Engine(
            network, tokenizer, max_tokens=40, wave_rows=20, batch_invariant=batch_invariant, cuda_graphs=cuda_graphs
        )
        engine.stop_ids += list(range(60))
        groups = engine.generate(many, group_size=6, temperature=1.3)
        found.append([(s.tokens, s.logprobs) for g in groups for s in g.samples])
        assert bool(replays and max(replays) > 0) == engine._captures()
        replays.clear()
    assert all(torch.equal(a, b) for one, other in zip(*found) for a, b in zip(one, other))
