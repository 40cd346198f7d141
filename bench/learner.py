"""Forward, loss and backward of one group: shared prefix against the same model on separate padded sequences."""

import tempfile

import torch

from sslr1 import model, ops, puzzles
from sslr1.model.tiny import build_tiny

G, NEW, TEXT_HEADS = (
    16,
    32,
    {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8},
)
VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "out_hidden_size": 256,
    "fullatt_block_indexes": [1, 3],
}


def network_and_prompt():
    """A 6-layer, 256-wide model with a 4-layer, 128-wide vision tower, and a prompt of 400 visual tokens."""
    folder = tempfile.mkdtemp()
    build_tiny(folder, text=TEXT_HEADS, vision=VISION, max_pixels=560 * 560)
    network, tokenizer = model.load_model(folder), model.load_tokenizer(folder)
    image = torch.randint(0, 256, (575, 575, 3), dtype=torch.uint8)
    batch = puzzles.make(
        [image], "rotation", level=2, spec=ops.PatchSpec.from_pretrained(folder), thinking=False, wordings=1
    )
    (prompt,) = model.prompts(batch, tokenizer)
    assert int((prompt.input_ids == network.config.image_token_id).sum()) == 400
    return network, tokenizer, prompt


def rows():
    network, _, prompt = network_and_prompt()
    samples = [model.Sample(torch.randint(0, 300, (NEW,)), torch.zeros(NEW), "", "stop") for _ in range(G)]
    rewards = torch.rand(1, G)
    policy = model.Policy(network)
    packed = model.pack([model.Group(prompt, samples)], **policy.pack_options)

    def ours():
        policy.zero_grad()

        def loss(hidden, lm_head):
            return (ops.grpo_loss(hidden, lm_head, packed.tokens, packed.sequence, rewards).loss,)

        (value,) = policy(packed, loss)
        value.backward()
        return value.item()

    rows_ids = torch.stack([torch.cat([prompt.input_ids, s.tokens]) for s in samples])
    inputs = dict(
        input_ids=rows_ids,
        attention_mask=torch.ones_like(rows_ids),
        use_cache=False,
        logits_to_keep=NEW + 1,
        mm_token_type_ids=(rows_ids == network.config.image_token_id).int(),
        pixel_values=prompt.pixel_values.repeat(G, 1),
        image_grid_thw=prompt.image_grid_thw.repeat(G, 1),
    )
    advantages = ops.advantages(rewards).reshape(G, 1)

    def peer():
        policy.zero_grad()
        logprobs = network(**inputs).logits[:, :-1].log_softmax(-1)
        picked = logprobs.gather(-1, rows_ids[:, -NEW:, None])[..., 0]
        value = -((picked - picked.detach()).exp() * advantages).sum() / picked.numel()
        value.backward()
        return value.item()

    ours()
    gradients = [p.grad.clone() for p in policy.parameters()]
    peer()
    for a, p in zip(gradients, policy.parameters()):
        assert (a - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-8
    yield {
        "what": f"learner: 1 prompt of 400 image tokens, G = {G}, {NEW} new tokens",
        "against": "16 separate padded sequences, transformers' SDPA",
        "ours": ours,
        "peer": peer,
        "goal": "4",
    }
