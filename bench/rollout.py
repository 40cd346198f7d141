"""Sampling groups: the engine against transformers' `generate` on repeated prompts; and where the engine's time goes. On a CPU one
group of a small model, on a GPU 512 samples of one of the 3B shape, steps as CUDA graphs; sampling is then part of a step and
has no time of its own.
"""

import statistics
import time
from unittest import mock

import torch
from grpo import SMALL, Case, shape

from sslr1 import model, ops
from sslr1.rollout.cache import bytes_a_token
from sslr1.rollout.wave import Wave

PEER_ROWS = 64  # sequences of one call of `generate`


def split(run, rounds=5):
    """Medians over some rounds of what `run` spends on each part, in seconds: one inside another counts for itself only, the
    host is what remains."""
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
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def step_bytes(network, prompt_tokens, case):
    """What a decode step has to read, at least, halfway: the language model's weights and head, each prompt's keys and values
    once and each sample's own."""
    language, text = network.model.language_model, network.config.text_config
    weights = sum(p.nbytes for p in language.layers.parameters()) + network.lm_head.weight.nbytes
    kept = prompt_tokens + case.group_size * case.new // 2
    return weights + case.prompts * kept * bytes_a_token(text, network.dtype.itemsize)


def rows():
    if shape() is SMALL:
        yield row(Case(SMALL, visual=400, prompts=1, group_size=16, new=32))
    else:
        yield row(Case(shape(), visual=31 * 31, prompts=32, group_size=16, new=64))


def row(case):
    device, G, NEW = case.shape.device, case.group_size, case.new
    prompts = model.prompts(case.draw(), case.tokenizer)
    plain, network = case.plain(), case.plain()
    plain.generation_config.eos_token_id = None  # both sides draw exactly NEW tokens
    engine = case.engine(network)
    one, length = prompts[0], len(prompts[0].input_ids)
    calls = []  # of equally many groups
    groups_a_call = max(1, PEER_ROWS // G)
    for first in range(0, len(prompts), groups_a_call):
        part = prompts[first : first + groups_a_call]
        ids = torch.cat([p.input_ids.repeat(G, 1) for p in part]).to(device)
        calls.append(
            dict(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == network.config.image_token_id).int(),
                pixel_values=torch.cat([p.pixel_values.repeat(G, 1) for p in part]).to(device),
                image_grid_thw=torch.cat([p.image_grid_thw.repeat(G, 1) for p in part]).to(device),
            )
        )

    def ours(**options):
        return engine.generate(prompts, group_size=G, **options)

    def peer(**options):
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "suppress_tokens": engine.suppressed, **options}
        return [plain.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, **options) for inputs in calls]

    check(case, plain, ours, peer, one)
    many = len(prompts) > 1
    parts = split(ours, 2 if many else 5)
    called = f", {case.shape.called}" if many else ""
    return {
        "what": f"rollout{called}: {len(prompts)} prompt{'s' * many} of {case.visual} image tokens, G = {G}, {NEW} new tokens",
        "against": "model.generate on the repeated prompt" + f"s, {groups_a_call * G} sequences a call" * many,
        "ours": ours,
        "peer": peer,
        "goal": "10" if many else "4",
        "device": device,
        "split_s": parts,
        "step": {"s": (parts["decode"] + parts["sampling"]) / (NEW - 1), "bytes": step_bytes(network, length, case)},
    }


def check(case, plain, ours, peer, prompt):
    """In float32 both take the same tokens where the largest logit is taken; in bfloat16, where products of other heights round
    to another one now and then, transformers gives what we drew the log-probs that we say it has."""
    if case.dtype == torch.float32:
        greedy = torch.cat(peer(do_sample=False, top_k=None, top_p=None))[:, -case.new :].cpu()
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
