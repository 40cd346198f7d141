"""A vision tower's own training, before a language model sees through it.

Its patch embedding begins as the photographs' principal components, so that what tells patches apart is there from the
first step. Then it learns, from the puzzles similarity and inpainting, that each visual token of a picture should tell
the picture from all others of the step, whatever is cut out of it; and from rotation, that it should tell its own place
of the picture from the others, however the picture is turned: a language model finds what is alike token by token.

python bench/tower.py MODEL IMAGES OUT [--steps N] [--seed N]
"""

import argparse
import shutil
from contextlib import closing
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from slices import Deadline, train

from sslr1 import model, ops, puzzles
from sslr1.data import Decoder, ImageFolder, ImageStore, PuzzleStream, choose_held_out, make_held_out
from sslr1.files import open_to_all
from sslr1.model import shared_prefix
from sslr1.model.folder import weight_files

SHARES = {"similarity": 0.34, "inpainting": 0.33, "rotation": 0.33}
HOLDOUT, MIN_SIDE, MAX_SIDE, CACHE_MB = 0.2, 112, 448, 1024
LEVELS = {"rotation": 1, "ordering": 1, "similarity": 1, "inpainting": 1, "correspondence": 1}
STEPS, BATCH = 120, 8  # puzzles a step
RATE = 1e-3
COOL = 0.1  # what cosines are divided by
PLACES = 5.0  # weight of rotation's loss: at 1 all tokens of a picture become nearly alike
KEEP = 0.25  # a component begins with this power of its share of the variance, not with as much as the first
BRANCH = 0.3  # of what the last matrix of a block's branches would begin with
SAMPLE = 20  # batches whose patches are taken apart
LAST = "preprocessor_config.json"


def images_of(path):
    """(store, numbers to train on, held out) as a run of bench/photos.py has them."""
    store = ImageStore(ImageFolder.scan(path), Decoder(max_side=MAX_SIDE), MIN_SIDE, CACHE_MB << 20)
    return store, *store.folder.hold_out(HOLDOUT)


def stream_of(store, numbers, tokenizer, spec, levels, *, seed, batch, mixture):
    form = puzzles.Form(spec=spec, thinking=False, wordings=1)
    options = dict(mixture=mixture, levels=lambda step, slot, name: levels[name], batch=batch, seed=seed, form=form)
    return PuzzleStream(store, numbers, tokenizer, **options)


class Seer:
    """A model's tower, its words, and puzzles of photographs to look at."""

    def __init__(self, folder, images, levels, *, seed, batch, mixture):
        self.network, self.tokenizer = model.load_model(folder), model.load_tokenizer(folder)
        shared_prefix.plug_in(self.network)
        self.visual = self.network.model.visual
        self.words = self.network.model.language_model.embed_tokens.weight.detach()
        self.spec, self.levels = ops.PatchSpec.from_pretrained(folder), levels
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


@torch.no_grad()
def first_weights(visual, patches, seed):
    """A tower's matrices anew: the patch embedding's rows are the principal components of patches [n, inputs], each
    divided by its deviation to the power 1 - 2 KEEP; the others are random, of 1 / sqrt(inputs)."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in visual.named_parameters():
        if p.dim() == 2:
            last = ".blocks." in f".{name}" and name.endswith(("attn.proj.weight", "mlp.down_proj.weight"))
            p.normal_(0, (BRANCH if last else 1.0) / p.shape[1] ** 0.5, generator=rng)
    weight = visual.patch_embed.proj.weight
    patches = (patches - patches.mean(0)).double()
    values, vectors = torch.linalg.eigh(patches.mT @ patches / len(patches))
    values, vectors = values.flip(0)[: len(weight)].clamp_min(1e-6 * values[-1]), vectors.flip(1)[:, : len(weight)]
    lengths = (values / values[0]) ** KEEP
    rows = (vectors * lengths / values.sqrt() / lengths.square().mean().sqrt()).mT
    weight.copy_(rows.reshape(weight.shape))


class Trial(Seer):
    """What a step of the tower costs and says."""

    def __init__(self, folder, images, levels, *, seed, batch):
        super().__init__(folder, images, levels, seed=seed, batch=batch, mixture=SHARES)
        patches = torch.cat([p.pixel_values[::3] for step in range(SAMPLE) for p in self.stream.get(step).prompts])
        first_weights(self.visual, patches.float(), seed)

    def parameters(self) -> dict:
        return {f"visual.{name}": p for name, p in self.visual.named_parameters()}

    def looks(self, prompts) -> list:
        """A canvas's visual tokens as directions from the mean of all, each [rows, columns, features]."""
        canvases = self.see(prompts)
        middle = torch.cat([canvas.flatten(0, 1) for canvas in canvases]).detach().mean(0)
        return [F.normalize(canvas - middle, dim=2) for canvas in canvases]

    def loss_at(self, step):
        drawn = self.stream.get(step)
        looks = self.looks(drawn.prompts)
        means, loss, first, rights = torch.stack([own.mean((0, 1)) for own in looks]), 0.0, 0, []
        for puzzle, count in zip(drawn.puzzles, drawn.puzzles.canvas_counts):
            own = looks[first : first + count]
            if puzzle.address.puzzle == "rotation":
                loss = loss + PLACES * places_apart(puzzle, *own)
            else:
                pair = first, first + 1 + right_of(puzzle)
                for one, other in (pair, pair[::-1]):
                    like = looks[one].flatten(0, 1) @ means.T / COOL
                    like = like.index_fill(1, torch.tensor([one]), -torch.inf)
                    loss = loss + F.cross_entropy(like, torch.full((len(like),), other)) / 2
            rights.append(solved(puzzle, own))
            first += count
        return loss / len(drawn.puzzles), {"right": sum(rights) / len(rights)}

    @torch.no_grad()
    def held_out_shares(self, count) -> dict:
        """{puzzle: share of `count` held-out ones that `solved` says are right}"""
        form, out = puzzles.Form(spec=self.spec, thinking=False, wordings=1), {}
        for name in SHARES:
            at = choose_held_out(self.store, self.held_out, name, self.levels[name], count, seed=0, form=form)
            rights = []
            for made in make_held_out(self.store, self.held_out, at, form=form):
                looks = self.looks(model.prompts(made, self.tokenizer))
                rights += [solved(*each) for each in zip(made, split(looks, made.canvas_counts))]
            out[name] = sum(rights) / len(rights)
        return out

    @torch.no_grad()
    def settle(self):
        """Let visual tokens lie around zero, and be as long as words are: the merger's last linear is moved and
        scaled."""
        drawn = [self.see(self.stream.get(step).prompts) for step in range(4)]
        seen = torch.cat([canvas.flatten(0, 1) for own in drawn for canvas in own])
        last, middle = self.visual.merger.mlp[-1], seen.mean(0)
        factor = self.words.norm(dim=1).mean() / (seen - middle).norm(dim=1).mean()
        last.bias.sub_(middle).mul_(factor)
        last.weight.mul_(factor)


def right_of(puzzle) -> int:
    """Of the answers that it offers, the number of the right one."""
    _, answer = puzzle.readings[0]
    return answer.choices.index(answer.value)


def places_apart(puzzle, upright, turned):
    """Cross-entropy of finding each token's place in the other picture, both ways; the upright one's tokens are to be
    told from each other, too."""
    # undoes the clockwise turn: rot90 turns counter-clockwise
    back = torch.rot90(turned, right_of(puzzle), (0, 1)).flatten(0, 1)
    tokens = upright.flatten(0, 1)
    own = (tokens @ tokens.T / COOL).fill_diagonal_(-torch.inf)
    like, places = tokens @ back.T / COOL, torch.arange(len(tokens))
    return (F.cross_entropy(torch.cat([like, own], 1), places) + F.cross_entropy(like.T, places)) / 2


def solved(puzzle, looks) -> bool:
    """Whether the candidate that is nearest to the reference, the first, by their tokens' mean is the right one; of a
    turned picture whether its last token is nearest to that of the right corner."""
    if puzzle.address.puzzle == "rotation":
        upright, turned = looks
        corners = torch.stack([torch.rot90(upright, -turn, (0, 1))[-1, -1] for turn in range(4)])
        return int((corners @ turned[-1, -1]).argmax()) == right_of(puzzle)
    means = torch.stack([own.mean((0, 1)) for own in looks])
    return int(F.cosine_similarity(means[:1], means[1:]).argmax()) == right_of(puzzle)


def split(items, counts) -> list:
    ends = list(accumulate(counts))
    return [items[end - count : end] for end, count in zip(ends, counts)]


def fit(folder, images, out, levels, *, seed, steps=STEPS, batch=BATCH, kept, deadline, count=200):
    """Train the tower of the model in `folder`, write the model to `out`, and return what it took and came to. Raises
    `slices.OutOfTime`."""
    trial = Trial(folder, images, levels, seed=seed, batch=batch)
    with closing(trial.stream):
        parameters = trial.parameters()
        settings = dict(rate=RATE, cool=COOL, keep=KEEP, branch=BRANCH, sample=SAMPLE, places=PLACES, shares=SHARES)
        made_by = dict(seed=seed, steps=steps, batch=batch, levels=levels, **settings)
        rates = dict.fromkeys(parameters, RATE)
        seconds = train(parameters, rates, trial.loss_at, steps, kept=kept, made_by=made_by, deadline=deadline)
        shares = trial.held_out_shares(count)
        trial.settle()
    write(trial.network, folder, out)
    return {"steps": steps, "batch": batch, "rate": RATE, "seconds": round(seconds), "held_out": shares, "n": count}


def write(network, like, out):
    """A model as a folder beside its state, with the files of the folder that it was loaded from."""
    out = Path(out)
    shutil.copytree(like, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", LAST))
    network.save_pretrained(out)
    open_to_all(weight_files(out), out)
    shutil.copy(Path(like) / LAST, out / LAST)  # its presence says that the folder is complete


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python bench/tower.py", description=__doc__.split("\n\n")[0])
    for name in ("model", "images", "out"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    kept = Path(a.out).with_suffix(".tower.safetensors")
    print(fit(a.model, a.images, a.out, LEVELS, seed=a.seed, steps=a.steps, kept=kept, deadline=Deadline()))
