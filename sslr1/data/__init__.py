"""From image files to puzzles: bytes by index, decoding, and the prefetching puzzle stream."""

from sslr1.data.bad import BadImages
from sslr1.data.decode import Decoder
from sslr1.data.images import ImageFolder, ImageStore, Pool
from sslr1.data.stream import PuzzleStream, choose_held_out, make_held_out

__all__ = [
    "BadImages",
    "Decoder",
    "ImageFolder",
    "ImageStore",
    "Pool",
    "PuzzleStream",
    "choose_held_out",
    "make_held_out",
]
