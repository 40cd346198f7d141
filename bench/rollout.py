"""Sampling groups: the engine against transformers' `generate` on repeated prompts; and where the engine's time goes.
On a CPU one group of a small model, on a GPU 512 samples of one of the 3B shape, steps as CUDA graphs; sampling is then
part of a step and has no time of its own. There `generate` is timed on 64 samples only: its vision tower loops over
windows in Python, once for each repeated picture.
"""

import statistics
import time
from functools import partial
from unittest import mock

import torch
from grpo import LARGE, SMALL, TINY, Case
from row import Row, Sides, finish

from sslr1 import model, ops
from sslr1.rollout.cache import bytes_a_token
from sslr1.rollout.wave import Wave

# (sizes, whether there is a peer)
SHAPES = {
    "cpu": (SMALL, [(dict(visual=400, prompts=1, group_size=16, new=32), True)]),
    "cuda": (
        LARGE,
        [
            (dict(visual=31 * 31, prompts=32, group_size=16, new=64), False),
            (dict(visual=31 * 31, prompts=4, group_size=16, new=64), True),
        ],
    ),
    "dry": (
        TINY,
        [
            (dict(visual=16, prompts=3, group_size=4, new=6), False),
            (dict(visual=16, prompts=2, group_size=4, new=6), True),
        ],
    ),
}


def split(run, rounds=5):
    """Medians over some rounds of what `run` spends on each part, in seconds: one inside another counts for itself
    only, the host is what remains."""
    parts = {"prefill": (Wave, "prefill"), "decode": (Wave, "decode"), "sampling": (ops, "sample")}
    spent, open_parts = {}, []

    def clock(name, inner):
        def timed(*arguments, **options):
            open_parts.append(name)
            begin = now()
            out = inner(*arguments, **options)
            took = now() - begin
            open_parts.pop()
            spent[name] += took
            if open_parts:
                spent[open_parts[-1]] -= took
            return out

        return timed

    found = []
    for _ in range(rounds):
        spent = dict.fromkeys([*parts, "host"], 0.0)
        patches = [mock.patch.object(*at, clock(name, getattr(*at))) for name, at in parts.items()]
        for patch in patches:
            patch.start()
        clock("host", run)()
        for patch in patches:
            patch.stop()
        found.append(spent)
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def now():
    finish()
    return time.perf_counter()


def step_bytes(network, prompt_tokens, case):
    """What a decode step has to read, at least, halfway: the language model's weights and head, each prompt's keys and
    values once and each sample's own."""
    language, text = network.model.language_model, network.config.text_config
    weights = sum(p.nbytes for p in language.layers.parameters()) + network.lm_head.weight.nbytes
    kept = prompt_tokens + case.group_size * case.new // 2
    return weights + case.prompts * kept * bytes_a_token(text, network.dtype.itemsize)


def rows(mode):
    shape, cases = SHAPES[mode]
    found = []
    for sizes, peer in cases:
        P, G = sizes["prompts"], sizes["group_size"]
        called = f", {shape.called}" if mode != "cpu" else ""
        found.append(
            Row(
                what=f"rollout{called}: {P} prompt{'s' * (P > 1)} of {sizes['visual']:,} image tokens, G = {G}, "
                f"{sizes['new']} new tokens",
                against="model.generate on the repeated prompt" + "s" * (P > 1) if peer else "",
                goal=("4" if mode == "cpu" else "10") if peer else "",
                make=partial(sides, shape, sizes, peer),
            )
        )
    return found


def sides(shape, sizes, with_peer):
    case = Case(shape, **sizes)
    prompts = model.prompts(case.draw(), case.tokenizer)
    network = case.plain()
    engine = case.engine(network)

    def ours(**options):
        return engine.generate(prompts, group_size=case.group_size, **options)

    def facts(_):
        parts = split(ours, 2 if len(prompts) > 1 else 5)
        step = {
            "s": (parts["decode"] + parts["sampling"]) / (case.new - 1),
            "bytes": step_bytes(network, len(prompts[0].input_ids), case),
        }
        return {"split_s": parts, "step": step}

    if not with_peer:
        return Sides(ours=ours, facts=facts)
    plain = case.plain()
    peer = make_peer(case, plain, prompts, engine.suppressed)
    return Sides(ours=ours, peer=peer, check=lambda *_: check(case, plain, ours, peer, prompts[0]), facts=facts)


def make_peer(case, plain, prompts, suppressed):
    """`generate` on each prompt G times over, all in one call, which draws as many tokens and no suppressed ones."""
    plain.generation_config.eos_token_id = None
    G, device = case.group_size, case.shape.device
    ids = torch.cat([p.input_ids.repeat(G, 1) for p in prompts]).to(device)
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == plain.config.image_token_id).int(),
        pixel_values=torch.cat([p.pixel_values.repeat(G, 1) for p in prompts]).to(device),
        image_grid_thw=torch.cat([p.image_grid_thw.repeat(G, 1) for p in prompts]).to(device),
        max_new_tokens=case.new,
        min_new_tokens=case.new,
    )
    never = torch.zeros(plain.config.text_config.vocab_size, dtype=torch.bool, device=device)
    never[suppressed] = True

    def suppress(_, scores):  # transformers' own looks all of them up anew in each step
        return scores.masked_fill(never, float("-inf"))

    def peer(**options):
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, **options}
        return plain.generate(**inputs, logits_processor=[suppress], **options)

    return peer


def check(case, plain, ours, peer, prompt):
    """In float32 both take the same tokens where the largest logit is taken; in bfloat16, where products of other
    heights round to another one now and then, transformers gives what we drew the log-probs that we say it has."""
    if case.dtype == torch.float32:
        greedy = peer(do_sample=False, top_k=None, top_p=None)[:, -case.new :].cpu()
        tokens = [s.tokens for group in ours(temperature=0) for s in group.samples]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(tokens, greedy))
        return
    sample = ours()[0].samples[0]
    ids = torch.cat([prompt.input_ids, sample.tokens])[None].to(case.shape.device)
    with torch.no_grad():
        logits = plain(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            logits_to_keep=case.new + 1,
            mm_token_type_ids=(ids == plain.config.image_token_id).int(),
            pixel_values=prompt.pixel_values.to(case.shape.device),
            image_grid_thw=prompt.image_grid_thw.to(case.shape.device),
        ).logits[0, :-1]
    theirs = logits.float().log_softmax(-1).cpu().gather(-1, sample.tokens[:, None])[:, 0]
    assert (theirs - sample.logprobs).abs().mean() <= 0.02, (theirs - sample.logprobs).abs().mean()
