"""The engine against `generate`, the learner's log-probs, and its own promises about keys, stops and suppressed ids."""

import pytest
import torch

from sslr1 import model, ops
from sslr1.model import Group, Sample
from sslr1.rollout import Engine
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


@pytest.mark.parametrize("group_size", [1, 16])
def test_greedy_is_transformers_generate(any_tiny, engine, prompts, group_size):
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
        )[0, len(prompt.input_ids) :].tolist()
        assert len(group.samples) == group_size
        assert all(s.tokens.tolist() == out for s in group.samples)


def test_sampled_logprobs_are_the_learners(engine, prompts):
    groups = engine.generate(prompts, group_size=6, temperature=0.8, seed=5)
    policy = model.Policy(engine.model)
    packed = model.pack(groups, **policy.pack_options)
    with torch.no_grad():
        (logprobs,) = policy(packed, lambda h, w: (ops.token_logprobs(h, w, packed.tokens, 0.8)[0],))
    drawn = torch.cat([s.logprobs for g in groups for s in g.samples])
    assert (logprobs - drawn).abs().max() <= 1e-5


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
                    assert s.text == engine.tokenizer.decode(ids, skip_special_tokens=True)
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
    while sum(map(len, drawn)) < 20_000:
        groups = engine.generate(prompts, group_size=64, temperature=2.0, attempt=attempt)
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
