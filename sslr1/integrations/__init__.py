"""The puzzles and their reward in other people's trainers: a file a trainer, with a row of its data and its reward.

The rewards import neither torch nor the trainer, and nothing of this package but `puzzles`.
"""

from importlib import import_module

__all__ = ["easyr1", "ms_swift", "trl", "verl"]


def __getattr__(name):
    if name in __all__:
        return import_module(f"sslr1.integrations.{name}")
    raise AttributeError(f"module 'sslr1.integrations' has no attribute {name!r}")
