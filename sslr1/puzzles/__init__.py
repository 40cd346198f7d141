"""Puzzles cut out of plain images, whose answers can be verified. Each is one file that returns a plan.

Names load on first use: `sslr1.puzzles.reward` and `sslr1.puzzles.prompts` import without torch.
"""

from sslr1 import at_first_use

NAMES = (  # each is a file here
    "rotation",
    "similarity",
    "inpainting",
    "ordering",
    "correspondence",
)
__getattr__, __all__ = at_first_use(
    __name__,
    {
        "batch": "RULES LEVELS START_LEVEL MIXTURE PAPER_LEVEL PAPER_MIXTURE describe make most_pixels puzzle_at",
        "picture": "Picture",
        "plan": "Plan PoolError",
        "puzzle": "Address Form Puzzle PuzzleBatch",
        "reward": "Answer Score random_answer_text score",
    },
)
__all__ += ["NAMES"]
