"""A language model that compares (bench/matching.py) learns quarter turns before it sees any: by how much was the first
grid of words turned to become the second? The lessons, one after the other: of a turned grid of four it sees the last
word alone; all four; grids of up to sixteen, whose words have something in common and noise; and those in the puzzle
rotation's own prompt, of which a prompt has more and more. Between them it goes on with what it could before.

In the first lessons a prompt asks several times, and shows the answers between: more of them for the same tokens. What
was learnt without that, without the lessons before or with the whole prompt at once is in bench/NOTES.md: nothing.

python bench/turning.py MODEL OUT [--seed N]
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from matching import RARE, Matches
from slices import Deadline, train
from tower import write

from sslr1 import model
from sslr1.model.packing import IMAGE_PAD, mrope_positions, question_ids

LESSONS = {"last": 300, "small": 200, "large": 150, "puzzle": 160}  # steps of each at most; the last has all
LEARNT = {"last": 0.8, "small": 0.75, "large": 0.7}  # share of right answers over LAST of its own steps
LAST = 10
BATCH, RATE = 16, 1e-4
BEFORE = 6  # every so many steps are of what it could before, and half as many again of the lesson before
PLAIN = 0.5  # share of the last lesson without what makes grids hard, while its prompts become long
ANSWERS = ("0", "90", "180", "270")
QUESTION = (
    "<image><image>\nThe second picture is the first one turned clockwise by 0, 90, 180 or 270 degrees. By how many?\n"
    r"Answer in \boxed{}."
)
PICTURE = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"


class Turns:
    """Batches of the lessons, for a network whose word embeddings the grids are made of."""

    def __init__(self, network, tokenizer, *, seed, lessons, batch):
        self.language, self.seed, self.batch, self.lessons = network.model.language_model, seed, batch, lessons
        self.words = self.language.embed_tokens.weight
        self.length = self.words.detach().norm(dim=1).mean()
        self.merge = network.config.vision_config.spatial_merge_size
        self.pad = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self.picture, self.colon = tokenizer.encode(PICTURE), tokenizer.encode(":")
        self.asked, self.box = question_ids(QUESTION, tokenizer, False), tokenizer.encode(r"\boxed{")
        # an answer's first token says which it is: digits are tokens of their own
        self.signs = torch.tensor([tokenizer.encode(answer)[0] for answer in ANSWERS])
        self.notes = {"lesson": 0, "since": 0, "steps": {}, "right": {}}
        self.matches = Matches(network, tokenizer, seed=seed, steps=0, batch=max(1, batch // 2))

    def lesson(self, step) -> str:
        """What a step is about: the lesson that it has come to, the one before, or "matches"."""
        if step % BEFORE == BEFORE - 1:
            return "matches"
        again = step % (BEFORE // 2) == BEFORE // 2 - 1
        return list(self.lessons)[max(0, self.notes["lesson"] - again)]

    def over(self) -> bool:
        return self.notes["lesson"] == len(self.lessons)

    def note(self, step, lesson, right):
        """What a step's share of right answers says of where the lessons stand."""
        name = list(self.lessons)[self.notes["lesson"]]
        rights = self.notes["right"].setdefault(lesson, [])
        rights.append(right)
        del rights[:-LAST]
        learnt = len(rights) == LAST and sum(rights) / LAST >= LEARNT.get(name, math.inf) and lesson == name
        if learnt or step + 1 - self.notes["since"] >= self.lessons[name]:
            self.notes |= {"lesson": self.notes["lesson"] + 1, "since": step + 1}
            self.notes["steps"][name] = step + 1

    def draw(self, step):
        """(embeddings [batch, L, D], positions [3, L], places [answers] of the tokens after which an answer comes,
        which of ANSWERS each is [batch, answers])"""
        lesson, rng = self.lesson(step), torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        count = {"last": 4, "small": 3, "large": 2, "puzzle": 1}[lesson]
        hard = lesson == "large" or (lesson == "puzzle" and self.done(step) > PLAIN)
        side = 2 if count > 2 else 2 + int(torch.randint(3 if hard else 2, (), generator=rng))
        noise = 0.2 + 0.5 * torch.rand((), generator=rng) if hard else 0.3
        common = torch.rand((), generator=rng) if hard else 0.0
        vectors = hard and bool(torch.randint(4, (), generator=rng))
        batch = max(1, self.batch if count > 2 else 5 * self.batch // 8)
        asked, rows, rights = self.prompt(step, rng), [], []
        for _ in range(batch):
            grid, turns = self.grid(side, common, vectors, rng), torch.randint(4, (count,), generator=rng)
            if lesson == "last":
                turns = torch.randperm(4, generator=rng)  # no word twice
            ids, grids = [], [grid]
            for turn in turns.tolist():
                turned = torch.rot90(grid, -turn, (0, 1))
                grids.append(turned[-1:, -1:] if lesson == "last" else turned)
                ids += [*self.picture, *self.colon, int(self.signs[turn])]
            ids = asked if lesson == "puzzle" else self.picture + ids[:-1]
            rows.append(self.filled(ids, [self.noisy(own, noise, rng) for own in grids]))
            rights.append(turns)
        ids = torch.tensor(ids)
        thw = torch.tensor([[1, self.merge * len(own), self.merge * own.shape[1]] for own in grids])
        ids = ids.repeat_interleave(self.lengths(ids, grids))
        shown = torch.isin(ids, self.signs) if count > 1 else ids < 0  # a puzzle's prompt has digits of its own
        places = torch.cat([shown.nonzero().flatten() - 1, torch.tensor([len(ids) - 1])])
        return torch.stack(rows), mrope_positions(ids, thw, self.pad, self.merge), places, torch.stack(rights)

    def done(self, step) -> float:
        """How much of the last lesson is over, from 0 to 1."""
        here = list(self.lessons)[self.notes["lesson"]] == "puzzle"
        return (step - self.notes["since"]) / self.lessons["puzzle"] if here else 0.0

    def prompt(self, step, rng) -> list:
        """The puzzle's prompt up to its answer: of the text after the pictures as many tokens as are drawn, up to what
        a step of the last lesson may have; the text before them where half of it is there."""
        pictures = [place for place, id in enumerate(self.asked) if id in self.picture]
        first, end = pictures[0], pictures[-1] + 1
        tail = len(self.asked) - end
        shown = min(tail, int(torch.randint(2 + round(2 * tail * self.done(step)), (), generator=rng)))
        before = self.asked[:first] if 2 * shown >= tail else []
        after = self.asked[end : end + shown // 2] + self.asked[len(self.asked) - (shown + 1) // 2 :]
        return before + self.asked[first:end] + (after if shown else []) + self.box

    def grid(self, side, common, vectors, rng):
        """[side, side, D] words, or with `vectors` what no word is, each with `common` times one that is in all."""
        count = side * side + 1
        if vectors:
            things = F.normalize(torch.randn(count, self.words.shape[1], generator=rng), dim=1) * self.length
        else:
            chosen = torch.randint(min(RARE, len(self.words) // 2), len(self.words), (count,), generator=rng)
            things = self.words.detach()[chosen]
        return ((things[1:] + common * things[0]) / (1 + common**2) ** 0.5).unflatten(0, (side, side))

    def noisy(self, grid, noise, rng):
        noises = torch.randn(grid.shape, generator=rng) * self.length / grid.shape[-1] ** 0.5
        return (grid + noise * noises) / (1 + noise**2) ** 0.5

    def lengths(self, ids, grids):
        """How many tokens each of ids becomes."""
        lengths = torch.ones(len(ids), dtype=torch.long)
        lengths[ids == self.pad] = torch.tensor([own.shape[0] * own.shape[1] for own in grids])
        return lengths

    def filled(self, ids, grids):
        """Embeddings of a prompt, its pictures' those of the grids."""
        ids = torch.tensor(ids)
        ids = ids.repeat_interleave(self.lengths(ids, grids))
        embeddings = self.words.detach()[ids].clone()
        embeddings[ids == self.pad] = torch.cat([own.flatten(0, 1) for own in grids])
        return embeddings

    def loss_at(self, step):
        lesson = self.lesson(step)
        loss, right = self.asked_at(step, lesson)
        self.note(step, lesson, right)
        return loss, {lesson: right}

    def asked_at(self, step, lesson):
        """(loss, share of right answers) of a step."""
        if lesson == "matches":
            loss, told = self.matches.loss_at(step)
            return loss, told["right"]
        embeddings, positions, places, rights = self.draw(step)
        positions = positions[:, None].expand(-1, len(embeddings), -1)
        out = self.language(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
        logits = out[:, places] @ self.words.T
        right = logits[..., self.signs].argmax(-1) == rights
        right = right[:, :1] if lesson == "last" else right  # the others are told by what is left over, too
        return F.cross_entropy(logits.flatten(0, 1), self.signs[rights].flatten()), right.float().mean().item()


def turn(folder, out, *, seed, lessons=None, batch=BATCH, kept, deadline) -> dict:
    """Train the language model of the model in `folder`, write the model to `out`, and return what it took, the steps
    at which lessons ended, and the share of right answers in each one's last steps. Raises `slices.OutOfTime`."""
    lessons = lessons or LESSONS
    network, tokenizer = model.load_model(folder), model.load_tokenizer(folder)
    turns = Turns(network, tokenizer, seed=seed, lessons=lessons, batch=batch)
    parameters = {f"language.{name}": p for name, p in turns.language.named_parameters()}
    made_by = dict(seed=seed, lessons=lessons, learnt=LEARNT, last=LAST, batch=batch, rate=RATE, plain=PLAIN)
    options = dict(kept=kept, made_by=made_by, deadline=deadline, every=5, falls=False)
    options |= dict(notes=turns.notes, over=turns.over)
    steps = sum(lessons.values())
    seconds = train(parameters, dict.fromkeys(parameters, RATE), turns.loss_at, steps, **options)
    write(network, folder, out)
    told = {name: round(sum(own) / len(own), 3) for name, own in turns.notes["right"].items()}
    ended = {"lessons": lessons, "ended": turns.notes["steps"], "right": told}
    return {**ended, "batch": batch, "rate": RATE, "seconds": round(seconds)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python bench/turning.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    kept = Path(a.out).with_suffix(".turning.safetensors")
    print(turn(a.model, a.out, seed=a.seed, kept=kept, deadline=Deadline()))
