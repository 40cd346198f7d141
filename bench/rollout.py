"""Sampling one group: the engine against transformers' `generate` on the repeated prompt."""

import torch
from learner import NEW, G, network_and_prompt

from sslr1 import model
from sslr1.rollout import Engine


def rows():
    network, tokenizer, prompt = network_and_prompt()
    plain = model.load_model(network.config.name_or_path)
    network.generation_config.eos_token_id = None  # both sides draw exactly NEW tokens
    engine = Engine(network, tokenizer, max_tokens=NEW)
    engine.stop_ids = [-1]
    ids = prompt.input_ids.repeat(G, 1)
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == network.config.image_token_id).int(),
        pixel_values=prompt.pixel_values.repeat(G, 1),
        image_grid_thw=prompt.image_grid_thw.repeat(G, 1),
    )

    def ours(**options):
        return engine.generate([prompt], group_size=G, **options)[0]

    def peer(**options):
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, **options}
        return plain.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, suppress_tokens=engine.suppressed, **options
        )

    plain.generation_config.eos_token_id = None
    greedy = peer(do_sample=False, top_k=None, top_p=None)[:, -NEW:]
    assert all(torch.equal(s.tokens, row) for s, row in zip(ours(temperature=0).samples, greedy))
    yield {
        "what": f"rollout: 1 prompt of 400 image tokens, G = {G}, {NEW} new tokens",
        "against": "model.generate on the repeated prompt",
        "ours": ours,
        "peer": peer,
        "goal": "4",
    }
