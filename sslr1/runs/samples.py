"""samples.jsonl and samples/: some puzzles of each step with all their answers, and the pictures that the model was
given.

Pictures are read back from the model's own input and written when the step is recorded, not rendered again when
somebody looks: a run folder can then be looked at where its images aren't, and shows what was seen even if rendering
was wrong.
"""

import math
from pathlib import Path

import torch

from sslr1 import ops
from sslr1.files import unwritable
from sslr1.runs.records import JsonLines

MOST_PIXELS = 300_000  # of one puzzle's pictures together; larger ones are reduced
MOST_WIDTH = 16_383  # px, WebP's own limit
QUALITY = 75


class Samples:
    """The samples of one run folder; pictures in `samples/step-000001-slot-0.webp`, all of a puzzle's side by side."""

    def __init__(self, folder):
        self.lines = JsonLines(Path(folder) / "samples.jsonl")
        self.pictures = Path(folder) / "samples"

    def write(self, step, puzzles, prompts, groups, scores, advantages) -> None:
        """Record puzzles: PuzzleBatch, whose items are gone through as far as `prompts` goes, with their groups, lists
        of `Score` and advantages [P, G]."""
        for i, (prompt, group) in enumerate(zip(prompts, groups)):
            name = f"step-{step:06d}-slot-{prompt.id}.webp"
            canvases = ops.unpatchify(prompt.pixel_values, prompt.image_grid_thw, puzzles.spec)
            try:
                self.pictures.mkdir(exist_ok=True)
                sizes = write_strip(self.pictures / name, canvases)
            except OSError as error:
                raise unwritable(self.pictures / name, error) from None
            completions = [
                {
                    "text": sample.text,
                    "reward": score.reward,
                    "advantage": advantage,
                    "exact": score.exact,
                    "accuracy": score.accuracy,
                    "format": score.format_ok,
                    "finish": sample.finish,
                    "tokens": len(sample.tokens),
                }
                for sample, score, advantage in zip(group.samples, scores[i], advantages[i].tolist())
            ]
            self.lines.write(
                {
                    "step": step,
                    "puzzle": puzzles.names[i],
                    "level": puzzles.levels[i],
                    "slot": prompt.id,
                    "question": puzzles.questions[i],  # its k-th <image> is the k-th of "sizes", from the left
                    "answer": puzzles.answers[i].to_dict(),
                    "picture": f"samples/{name}",
                    "sizes": sizes,
                    "completions": completions,
                }
            )

    def cut(self, step: int) -> None:
        """Drop what lies beyond a step, for resuming."""
        self.lines.cut(step)
        for path in self.pictures.glob("step-*.webp"):
            if int(path.name.split("-")[1]) > step:
                path.unlink()


def write_strip(path, canvases, most_pixels=MOST_PIXELS) -> list:
    """Write pictures, uint8 [H, W, 3] each, side by side into one WebP file (a path, or a file opened to write), of so
    many pixels at most. Returns [height, width] of each as it is there."""
    from PIL import Image

    area, width = sum(c.shape[0] * c.shape[1] for c in canvases), sum(c.shape[1] for c in canvases)
    scale = min(1.0, math.sqrt(most_pixels / area), MOST_WIDTH / width)
    sizes = [[max(1, int(side * scale)) for side in canvas.shape[:2]] for canvas in canvases]
    strip = Image.new("RGB", (sum(w for _, w in sizes), max(h for h, _ in sizes)), "white")
    left = 0
    for canvas, (height, width) in zip(canvases, sizes):
        picture = Image.fromarray(torch.as_tensor(canvas).numpy())
        if scale < 1:
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        strip.paste(picture, (left, 0))
        left += width
    strip.save(path, "WEBP", quality=QUALITY, method=2)
    return sizes
