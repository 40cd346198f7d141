"""Puzzles cut out of plain images, whose answers can be verified. Each is one file that returns a plan.

Names load on first use: `sslr1.puzzles.reward` and `sslr1.puzzles.prompts` import without torch.
"""

from importlib import import_module

_HOME = {
    name: home
    for home, names in {
        "batch": "NAMES RULES LEVELS START_LEVEL MIXTURE PAPER_LEVEL PAPER_MIXTURE describe make puzzle_at",
        "picture": "Picture",
        "plan": "Plan PoolError",
        "puzzle": "Address Form Puzzle PuzzleBatch",
        "reward": "Answer Score random_answer_text score",
    }.items()
    for name in names.split()
}
__all__ = list(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"sslr1.puzzles.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sslr1.puzzles' has no attribute {name!r}")
