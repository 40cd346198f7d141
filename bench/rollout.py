"""Sampling one group: the engine against transformers' `generate` on the repeated prompt; and where the engine's time goes.

With a GPU both run there, the engine's steps as CUDA graphs; sampling is then part of a step and has no time of its own.
"""

import statistics
import time
from unittest import mock

import torch
from learner import NEW, G, network_and_prompt

from sslr1 import model, ops
from sslr1.rollout import Engine
from sslr1.rollout.cache import bytes_a_token
from sslr1.rollout.wave import Wave


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


def step_bytes(network, prompt_tokens):
    """What a decode step has to read, at least, halfway: the language model's weights and head, the prompt's keys and values
    once and each sample's own."""
    language, text = network.model.language_model, network.config.text_config
    weights = sum(p.nbytes for p in language.layers.parameters()) + network.lm_head.weight.nbytes
    return weights + (prompt_tokens + G * NEW // 2) * bytes_a_token(text, network.dtype.itemsize)


def rows():
    network, tokenizer, prompt = network_and_prompt()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = model.load_model(network.config.name_or_path).to(device)
    network.to(device)
    network.generation_config.eos_token_id = None  # both sides draw exactly NEW tokens
    engine = Engine(network, tokenizer, max_tokens=NEW)
    engine.stop_ids = [-1]
    ids = prompt.input_ids.repeat(G, 1).to(device)
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == network.config.image_token_id).int(),
        pixel_values=prompt.pixel_values.repeat(G, 1).to(device),
        image_grid_thw=prompt.image_grid_thw.repeat(G, 1).to(device),
    )

    def ours(**options):
        return engine.generate([prompt], group_size=G, **options)[0]

    def peer(**options):
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, **options}
        return plain.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, suppress_tokens=engine.suppressed, **options
        )

    plain.generation_config.eos_token_id = None
    greedy = peer(do_sample=False, top_k=None, top_p=None)[:, -NEW:].cpu()
    assert all(torch.equal(s.tokens, row) for s, row in zip(ours(temperature=0).samples, greedy))
    parts = split(ours)
    yield {
        "what": f"rollout: 1 prompt of 400 image tokens, G = {G}, {NEW} new tokens",
        "against": "model.generate on the repeated prompt",
        "ours": ours,
        "peer": peer,
        "goal": "4",
        "device": device,
        "split_s": parts,
        "step": {
            "s": (parts["decode"] + parts["sampling"]) / (NEW - 1),
            "bytes": step_bytes(network, len(prompt.input_ids)),
        },
    }
