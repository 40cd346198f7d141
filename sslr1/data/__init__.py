"""From image files to puzzles: bytes by index, decoding, and the prefetching puzzle stream.

Names load on first use: `sslr1.data.images` imports without transformers.
"""

from sslr1 import at_first_use

__getattr__, __all__ = at_first_use(
    __name__,
    {
        "bad": "BadImages",
        "decode": "Decoder",
        "images": "ImageFolder",
        "store": "ImageStore Pool",
        "stream": "PuzzleStream ask_held_out choose_held_out make_held_out",
    },
)
