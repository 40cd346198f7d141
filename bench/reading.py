"""`python bench/reading.py MODEL IMAGES`: how soon a vision tower reads correspondence's marks. The tower of a model
folder is trained, anew for each size of canvas and marks, to say at each ring of view 2 which letter stands beside it:
the step that every answer begins with. No language model is run. bench/NOTES.md says what came of it."""

import argparse
import time
from contextlib import closing

import torch
import torch.nn.functional as F
from torch import nn
from tower import LEVELS, Seer

from sslr1.puzzles import correspondence
from sslr1.sums import plain_sum

NAME = "correspondence"
# (side of the canvas in px, marks' size as a multiple of the puzzle's own)
SIZES = ((112, 1.0), (168, 1.0), (168, 1.5), (224, 1.0))
BATCH, LAST = 16, 20  # puzzles a step; steps that the share is over
RATE = 6e-4
LABEL, RING = correspondence.LABEL, correspondence.RING


def read(folder, images, side, larger, steps, seed=0) -> dict:
    """Train and return what the last steps, on puzzles not seen before, came to."""
    correspondence.LABEL, correspondence.RING = LABEL * larger, RING * larger
    trial = Seer(folder, images, LEVELS, seed=seed, batch=BATCH, mixture={NAME: 1.0}, max_pixels=side * side)
    torch.manual_seed(seed)
    letter = nn.Linear(trial.words.shape[1], 4)
    optimizer = torch.optim.AdamW([*trial.visual.parameters(), *letter.parameters()], lr=RATE, weight_decay=0.0)
    began, rights, losses = time.process_time(), [], []
    with closing(trial.stream):
        for step in range(steps):
            drawn = trial.stream.get(step)
            for prompt in drawn.prompts:  # of view 2 alone
                half = len(prompt.pixel_values) // 2
                prompt.pixel_values, prompt.image_grid_thw = prompt.pixel_values[half:], prompt.image_grid_thw[1:]
            at = []
            for canvas, puzzle in zip(trial.see(drawn.prompts), drawn.puzzles):
                places = torch.from_numpy(puzzle.points[1])
                rows, columns = (places * torch.tensor(canvas.shape[:2])).long().unbind(1)
                at.append(canvas[rows, columns])
            logits, right = letter(F.layer_norm(torch.cat(at), at[0].shape[1:])), torch.arange(4).repeat(len(at))
            loss = F.cross_entropy(logits, right)
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 20)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trial.visual.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rights.append((logits.argmax(1) == right).float().mean().item())
            losses.append(loss.item())
            if step % LAST == LAST - 1:
                print(
                    f"{side} px x {larger}: step {step + 1}, letters read {plain_sum(rights[-LAST:]) / LAST:.1%}",
                    flush=True,
                )
    told = {"side": side, "larger": larger, "label_px": round(max(12, LABEL * larger * side), 1), "steps": steps}
    return told | {
        "read": round(plain_sum(rights[-LAST:]) / LAST, 3),
        "loss": round(plain_sum(losses[-LAST:]) / LAST, 3),
        "cpu_s": round(time.process_time() - began),
    }


def main():
    parser = argparse.ArgumentParser(prog="python bench/reading.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    for side, larger in SIZES:
        print(read(arguments.model, arguments.images, side, larger, arguments.steps), flush=True)


if __name__ == "__main__":
    main()
