"""SSL-R1: self-supervised visual reinforcement post-training for multimodal language models.

Subpackages load on first use, so `import sslr1.puzzles.reward` costs nothing but that file.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["data", "integrations", "model", "ops", "puzzles", "rollout"]


def __getattr__(name):
    if name in __all__:
        return import_module(f"sslr1.{name}")
    raise AttributeError(f"module 'sslr1' has no attribute {name!r}")
