"""Buffers and captured steps that outlive a call, with `bench/captures.py`'s stand-in for CUDA graphs: what it replays
it runs again, and fails where a step would touch other memory than it did, or draw by other numbers."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from sslr1 import model
from sslr1.errors import UserError
from sslr1.rollout import Engine, wave
from sslr1.rollout import engine as host
from sslr1.rollout.cache import Shape
from sslr1.rollout.kept import Kept, rounded
from tests.model.test_packing import some_prompts, spec_of
from tests.rollout.test_engine import assert_same_draws

OPTIONS = {"group_size": 4, "temperature": 1.1, "seed": 3}


@pytest.fixture
def captures(bench):
    module = bench("captures")
    with module.stand_in():
        yield module


@pytest.fixture(scope="module")
def network(tiny):
    return model.load_model(tiny).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return model.load_tokenizer(tiny)


@pytest.fixture
def engine(network, tokenizer):
    """One that stops early now and then."""
    return make(copy.deepcopy(network), tokenizer)


def make(network, tokenizer, **options):
    engine = Engine(network, tokenizer, **{"max_tokens": 14, "wave_rows": 24, "look_every": 3, **options})
    engine.stop_ids = sorted({*engine.stop_ids, *range(0, 300, 7)} - {*engine.suppressed})
    return engine


@pytest.fixture
def prompts(tokenizer, tiny, photographs, seed):
    found = [p for i in (0, 1) for p in some_prompts(tokenizer, photographs, spec_of(tiny), seed=seed + i)]
    for i, prompt in enumerate(found):
        prompt.id = i
    return sorted(found, key=lambda p: len(p.input_ids))


def anew(engine, prompts, **options):
    """What an engine gives that has neither buffers nor captured steps of anything before."""
    other = make(engine.model, engine.tokenizer, max_tokens=engine.max_tokens)
    return other.generate(prompts, **OPTIONS | options)


def assert_as_anew(engine, prompts, **options):
    mine, fresh = engine.generate(prompts, **OPTIONS | options), anew(engine, prompts, **options)
    address = ({"seed": 3, "step": 0, "attempt": 0} | options)["seed"], options.get("step", 0), 0
    assert_same_draws(engine, fresh, mine, options.get("temperature", OPTIONS["temperature"]), *address)
    assert [s.tokens.tolist() for g in mine for s in g.samples] == [s.tokens.tolist() for g in fresh for s in g.samples]


def captured(engine):
    return {G: len(w.graphs.captured) for G, w in engine.kept.waves.items()}


def test_a_run_captures_each_bucket_once(bench, capsys):
    """20 steps and two evaluations, with updates and resampled puzzles between."""
    module = bench("captures")
    found = list(module.facts(None)["counters"].values())
    print(f"captured: {found[0]}, buckets: {found[1]}, captured up to commit 96c2c70: {found[2]}")
    assert found == [9, 9, 35]  # 96c2c70 itself, with the same stand-in, captures 35


def test_a_captured_step_serves_other_weights_and_every_length(captures, engine, prompts):
    """After an update in place, after a release, after a longer prompt, in a smaller call and for other lengths."""
    short, long = prompts[:3], prompts[3:]
    assert_as_anew(engine, short)
    first, before = captures.Recorded.made, set(engine.kept.waves[4].graphs.captured)
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    mine = engine.generate(short, **OPTIONS)
    met = set(engine.kept.waves[4].graphs.captured)  # before, and perhaps some more
    assert before <= met and captures.Recorded.made - first == len(met - before)
    at = engine.kept.storage.prompts[0].data_ptr()
    assert_as_anew(engine, short)
    assert_as_anew(engine, short[:1], step=2)
    assert_as_anew(engine, short, max_tokens=5)
    assert_as_anew(engine, short, top_k=20, temperature=0.7)
    assert engine.kept.storage.prompts[0].data_ptr() == at
    engine.release()
    assert_as_anew(engine, short)
    longer = replace(long[-1], input_ids=torch.cat([torch.full((rounded(1),), 5), long[-1].input_ids]))
    assert len(longer.input_ids) > engine.kept.waves[4].shape.longest
    assert_as_anew(engine, [*short, longer])
    assert engine.kept.waves[4].shape.longest >= len(longer.input_ids)
    assert_as_anew(engine, short)
    assert [g.prompt for g in mine] == short


def test_a_smaller_call_captures_nothing_again(captures, engine, prompts):
    engine.expect(len(prompts), 4, max(len(p.input_ids) for p in prompts))
    engine.generate(prompts[:2], **OPTIONS | {"group_size": 1, "temperature": 0})  # an evaluation before the first step
    storage, evaluation = engine.kept.storage, engine.kept.waves[1]
    for step in range(3):
        engine.generate(prompts, **OPTIONS, step=step)
    before, kept = captured(engine), engine.kept.waves[4]
    for step in range(2):
        engine.generate(prompts, **OPTIONS, step=step)
        engine.generate(prompts[::3], **OPTIONS, step=step, attempt=1, max_tokens=9)
        engine.generate(prompts[:2], **OPTIONS | {"group_size": 1, "temperature": 0})
    assert engine.kept.storage is storage and engine.kept.waves == {1: evaluation, 4: kept}
    assert captured(engine)[4] <= len({wave.bucket(n, "cuda") for n in range(1, 25)})
    again = {bucket for w in engine.kept.waves.values() for bucket in w.graphs.captured}
    assert before[4] > 1 and len(again) == sum(captured(engine).values())


def poison(w):
    """What an earlier call may have left at worst, as long as it is finite."""
    keys_and_values = (getattr(w.cache, name) for name in ("prompt_k", "prompt_v", "own_k", "own_v"))
    for x in (*keys_and_values, w.logprobs):
        x.copy_(torch.randn_like(x) * 1e4)
    for x in (w.tokens, w.counts, w.addresses, w.first_position):
        x.copy_(torch.randint(0, w.max_tokens, x.shape))
    w.live.fill_(True)
    w.lengths.fill_(w.shape.longest)
    w.cache.prompt_lengths.fill_(w.shape.longest)
    w.cache.own_lengths.fill_(w.max_tokens)
    if not w.batch_invariant:  # where nothing ever changes it
        w.order.copy_(w.order.flip(0))
    w.most.fill_(1)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_what_an_earlier_call_left_does_not_matter(captures, network, tokenizer, prompts, batch_invariant):
    engine = make(network, tokenizer, batch_invariant=batch_invariant)
    engine.generate(prompts, **OPTIONS)
    with torch.inference_mode():
        poison(engine.kept.waves[4])
    made = engine.kept.waves[4]
    for some, options in ((prompts[2:4], {}), (prompts[:5], {"max_tokens": 6}), (prompts[:3], {"group_size": 1})):
        assert_as_anew(engine, some, **options)
        with torch.inference_mode():
            poison(engine.kept.waves[4])
    assert engine.kept.waves[4] is made and engine.kept.storage.own[0].data_ptr() == made.cache.own_k.data_ptr()


def test_what_is_not_finite_is_not_kept(captures, engine, prompts):
    weight = engine.model.lm_head.weight
    engine.generate(prompts[:2], **OPTIONS)
    with torch.no_grad():
        was = engine.model.model.language_model.layers[0].self_attn.v_proj.weight
        kept = was.clone()
        was.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        engine.generate(prompts[:2], **OPTIONS)
    assert not engine.kept_bytes and weight is engine.model.lm_head.weight
    with torch.no_grad():
        was.copy_(kept)
    assert_as_anew(engine, prompts[:2])


def test_weights_that_moved_are_seen(captures, engine, prompts, monkeypatch):
    engine.generate(prompts[:2], **OPTIONS)
    head = engine.model.lm_head
    head.weight = torch.nn.Parameter(head.weight * 1.5, requires_grad=False)
    with pytest.warns(UserWarning, match="weights have moved .*lm_head.weight among"):
        moved = engine.generate(prompts[:2], **OPTIONS)
    assert_same_draws(engine, anew(engine, prompts[:2]), moved, 1.1, 3)
    monkeypatch.setattr(Kept, "_look_for_changes", lambda self, *_: None)
    head.weight = torch.nn.Parameter(head.weight * 1.5, requires_grad=False)
    with pytest.raises(AssertionError, match="not what it was"):  # what nobody looked for, the stand-in sees
        engine.generate(prompts[:2], **OPTIONS)


@pytest.mark.parametrize("fault", ["a buffer that moves", "sampling that isn't compared", "a limit in the step"])
def test_the_stand_in_sees_a_fault(captures, engine, prompts, monkeypatch, fault):
    if fault == "a limit in the step":
        draw = wave.Wave.draw

        def one_more(self, *given):
            draw(self, *given)
            self.live &= self.counts < self.begun

        begin = wave.Wave.begin
        monkeypatch.setattr(wave.Wave, "draw", one_more)
        monkeypatch.setattr(
            wave.Wave, "begin", lambda self, *given: setattr(self, "begun", given[-1]) or begin(self, *given)
        )
    if fault == "sampling that isn't compared":
        run = wave.Graphs.run
        monkeypatch.setattr(wave.Graphs, "run", lambda self, step, block, sampling: run(self, step, block, ()))
    engine.generate(prompts[:2], **OPTIONS)
    made = engine.kept.waves[4]
    if fault == "a buffer that moves":
        made.counts = made.counts.clone()
    other = {"sampling that isn't compared": {"temperature": 0.7}, "a limit in the step": {"max_tokens": 13}}
    with pytest.raises(AssertionError, match="not what it was"):
        engine.generate(prompts[:2], **OPTIONS | other.get(fault, {}))


def test_other_stops_and_suppressed_ids_begin_anew(captures, engine, prompts):
    engine.generate(prompts[:2], **OPTIONS)
    engine.stop_ids = engine.stop_ids[:2]
    found = engine.generate(prompts[:2], **OPTIONS)
    other = Engine(engine.model, engine.tokenizer, max_tokens=14)
    other.stop_ids = engine.stop_ids
    assert_same_draws(engine, other.generate(prompts[:2], **OPTIONS), found, 1.1, 3)


def test_room_is_taken_as_far_as_there_is_any(captures, engine, prompts, monkeypatch):
    """For what is expected, or else for what is asked for; a call that can't have that either is refused, and leaves
    nothing."""
    longest = max(len(p.input_ids) for p in prompts)
    engine.expect(len(prompts), 4, longest)
    expected = engine.kept.shapes[4]
    assert expected == Shape(places=8, longest=rounded(longest), group_size=4, max_tokens=14, rows=24)
    engine.generate(prompts[:1], **OPTIONS)
    assert engine.kept.storage.extent == expected.extent and engine.kept_bytes == engine.kept.storage.nbytes
    alone = replace(expected, places=1, longest=rounded(len(prompts[0].input_ids)), rows=4)
    small = sum(host.needed(engine.model, alone, alone.extent))
    monkeypatch.setattr(host, "free_bytes", lambda device: small)
    engine.expect(len(prompts), 4, longest)
    engine.generate(prompts[:1], **OPTIONS)
    assert engine.kept.storage.extent == alone.extent
    with pytest.raises(UserError, match=r"Lower rollout\.wave_rows"):
        engine.generate(prompts, **OPTIONS)
    assert not engine.kept_bytes
    assert_as_anew(engine, prompts[:1])


def test_release_gives_everything_back_at_once(captures, engine, prompts):
    engine.generate(prompts[:2], **OPTIONS)
    held = [weakref.ref(x) for w in engine.kept.waves.values() for x in (w, w.cache, *w.graphs.captured.values())]
    held.append(weakref.ref(engine.kept.storage))
    gc.collect()
    gc.disable()
    try:
        engine.release()
        assert len(held) > 3 and not any(ref() for ref in held) and engine.kept_bytes == 0
    finally:
        gc.enable()


def test_without_captured_steps_nothing_is_kept(network, tokenizer, prompts):
    engine = make(network, tokenizer)
    engine.expect(len(prompts), 4)
    engine.generate(prompts[:2], **OPTIONS)
    assert not engine.kept.waves and engine.kept_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_graphs_on_a_gpu(tiny, tokenizer, prompts, dtype, batch_invariant, monkeypatch):
    """Bit-equal to eager steps in buffers of the same shape, after updates, smaller calls, a longer prompt and a
    release; each bucket captured once; memory given back."""
    network, made, inner = model.load_model(tiny, dtype).cuda().requires_grad_(False), [], wave.capture
    monkeypatch.setattr(wave, "capture", lambda *given: made.append(given[1]) or inner(*given))
    graphs, eager = (make(network, tokenizer, batch_invariant=batch_invariant) for _ in range(2))
    monkeypatch.setattr(eager, "_captures", lambda: True)  # in kept buffers, too, whose steps are run as they are
    if not graphs._captures():
        pytest.skip("this model's attention waits for the device where results are batch-invariant")

    def both(prompts, **options):
        captured = graphs.generate(prompts, **OPTIONS | options)
        with monkeypatch.context() as patch:
            patch.setattr(wave.Graphs, "run", lambda self, step, block, sampling: step(*block))
            plain = eager.generate(prompts, **OPTIONS | options)
        for a, b in zip((s for g in captured for s in g.samples), (s for g in plain for s in g.samples), strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs)

    both(prompts[:3])
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    both(prompts[:3])
    both(prompts[:1], step=2, max_tokens=5)
    both(prompts[:3], group_size=1, temperature=0)
    both(prompts)
    before = len(made)
    both(prompts)
    assert len(made) == before > 2 and captured(graphs)[4] > 1
    storage, held = graphs.kept.storage.nbytes, torch.cuda.memory_allocated()
    assert graphs.kept_bytes > storage  # what captured steps compute in
    graphs.release()
    assert held - torch.cuda.memory_allocated() >= storage
    both(prompts[:3])
