"""Puzzles cut out of plain images, whose answers can be verified. Each is one file that returns a plan.

Names load on first use: `sslr1.puzzles.reward` and `sslr1.puzzles.prompts` import without torch.
"""

from importlib import import_module

_HOME = {
    "NAMES": "batch",
    "Address": "puzzle",
    "Form": "puzzle",
    "Puzzle": "puzzle",
    "PuzzleBatch": "puzzle",
    "make": "batch",
    "puzzle_at": "batch",
    "LEVELS": "batch",
    "START_LEVEL": "batch",
    "MIXTURE": "batch",
    "PAPER_LEVEL": "batch",
    "PAPER_MIXTURE": "batch",
    "describe": "batch",
    "Picture": "picture",
    "PoolError": "plan",
    "Plan": "plan",
    "Answer": "reward",
    "Score": "reward",
    "score": "reward",
    "random_answer_text": "reward",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"sslr1.puzzles.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sslr1.puzzles' has no attribute {name!r}")
