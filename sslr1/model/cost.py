"""What a learner's step costs, in floating-point operations: by it groups are dealt to ranks, and a GPU's use (MFU) is
measured.

Counted are the matrix products of forward and backward pass, 2 a weight and token forward and twice that backward (what
is frozen: once, for its input's gradient; a tower in and before which nothing is trained: forward only), attention's,
4 * heads * head size a query and key that meet, and of a linear layer 6 * a state's numbers a token (read, corrected,
read again). Work done again (recomputed blocks) is not.
"""

from dataclasses import dataclass

from torch import nn

from sslr1.model.gated_delta_net import linear_layers, state_size
from sslr1.sums import plain_sum


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of one packed token, of one pair of query and key in all decoder layers, of one token
    projected to the vocabulary, of one image patch, and of one pair of patches in all vision blocks that see a whole
    image.

    window: patches that the other vision blocks see, and the share of blocks that are such."""

    token: float
    pair: float
    row: float
    patch: float
    patch_pair: float
    window: int = 0
    windowed: float = 0.0

    def prompt(self, length: int, patches: int, images: int) -> float:
        """Of a prompt of `length` tokens with `patches` patches in `images` images of about one size."""
        seen = patches / max(1, images) * (1 - self.windowed) + self.window * self.windowed
        return length * self.token + length * length / 2 * self.pair + patches * (self.patch + seen * self.patch_pair)

    def completion(self, prompt_length: int, length: int) -> float:
        """Of a completion of `length` tokens after its prompt."""
        return length * (self.token + self.row + (prompt_length + length / 2) * self.pair)


def cost_of(model, forward_only=False) -> Cost:
    """The Cost of a Hugging Face model of a supported family, with adapters or not, read off its modules' shapes."""
    inner, text, vision = model.model, model.config.text_config, model.config.vision_config
    layers, blocks = inner.language_model.layers, inner.visual.blocks
    seen = not forward_only and any(p.requires_grad for p in inner.visual.parameters())
    read = seen or (not forward_only and any(p.requires_grad for p in inner.language_model.parameters()))
    seeing, passes = 3 if seen else 1, 3 if read else 1

    def products(weight, backward):
        """Operations a token."""
        return 2.0 * weight.numel() * (1 if not backward else 3 if weight.requires_grad else 2)

    patch = 0.0
    for name, module in inner.visual.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            patch += products(module.weight, seen) / (vision.spatial_merge_size**2 if "merger" in name else 1)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    window = getattr(vision, "window_size", None)
    whole = len(vision.fullatt_block_indexes) if window else len(blocks)
    linear = linear_layers(text)
    state = len(linear) and 6.0 * len(linear) * state_size(text)
    return Cost(
        token=plain_sum(products(m.weight, read) for m in layers.modules() if isinstance(m, nn.Linear))
        + passes * state,
        pair=4.0 * passes * (len(layers) - len(linear)) * text.num_attention_heads * head_size,
        row=products(model.lm_head.weight, read),
        patch=patch,
        patch_pair=4.0 * seeing * len(blocks) * vision.hidden_size,
        window=(window // vision.patch_size) ** 2 if window else 0,
        windowed=1 - whole / len(blocks),
    )


@dataclass(frozen=True)
class Card:
    """A GPU as its vendor's data sheet has it: dense bfloat16 operations a second with float32 sums, bytes of memory,
    and bytes a second from its memory and, one way, to the other GPUs of its machine (NVLink, or PCIe where it has
    none)."""

    flops: float
    memory: float
    bandwidth: float
    link: float


# By a part of their device's name, the first that fits; of several editions the SXM one, of the A100 that of 80 GB
CARDS = {
    "H100 PCIe": Card(756e12, 80e9, 2.0e12, 64e9),
    "H100": Card(989e12, 80e9, 3.35e12, 450e9),
    "H200": Card(989e12, 141e9, 4.8e12, 450e9),
    "A100": Card(312e12, 80e9, 2.039e12, 300e9),
    "B200": Card(2250e12, 180e9, 8.0e12, 900e9),
    "L40S": Card(362e12, 48e9, 0.864e12, 32e9),
    "RTX 4090": Card(165e12, 24e9, 1.008e12, 32e9),
}


def peak_flops(device_name: str) -> float | None:
    """Of a GPU by its name, None for one that isn't listed."""
    return next((card.flops for name, card in CARDS.items() if name in device_name), None)
