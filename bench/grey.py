"""`python bench/grey.py train CONFIG …`: any command of sslr1 with each picture replaced by grey. What a model then
learns is in the words alone: a control of runs that see. Pictures keep their sizes, and so prompts their lengths; every
pixel has the value of the image processor's mean colour, 0.
"""

import runpy
import sys

import torch

from sslr1.puzzles.batch import PuzzleBatch

COMMANDS = ("train", "warmup", "evaluate")
PATCHES = PuzzleBatch.render_patches


def blind(batch, *arguments, **options):
    """`PuzzleBatch.render_patches`, of grey."""
    pixel_values, grid_thw = PATCHES(batch, *arguments, **options)
    return torch.zeros_like(pixel_values), grid_thw


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    PuzzleBatch.render_patches = blind
    del sys.argv[0]
    runpy.run_module(f"sslr1.{sys.argv[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
