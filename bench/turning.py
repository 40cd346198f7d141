"""Before it sees pictures, a language model that compares (bench/matching.py) learns quarter turns: by how much was a
grid of words turned to become a second one? Four lessons, each until it is learnt: of a turned grid of four the last
word alone; all four words; grids of up to sixteen, words or random vectors, with more noise and a part that all share;
the same in the puzzle rotation's own prompt, which grows from a few tokens to all. In between it repeats the lesson
before and the matches.

In the first three lessons a prompt asks several times and shows each answer before the next question: more answers for
the same tokens. With one answer a prompt, or the whole prompt at once, it stayed at chance (bench/NOTES.md).

python bench/turning.py MODEL OUT [--seed N]
"""

import argparse
import math
from pathlib import Path

import matching
import torch
import torch.nn.functional as F
from slices import Deadline, train
from tower import write

from sslr1 import model
from sslr1.model.packing import IMAGE_PAD, mrope_positions, question_ids

LESSONS = {"corner": 300, "small": 200, "large": 150, "puzzle": 160}  # steps of each at most; "puzzle" takes them all
LEARNT = {"corner": 0.8, "small": 0.75, "large": 0.7}  # a lesson is over at this share of right answers ...
WINDOW = 10  # ... over so many of its own steps
BATCH, RATE = 16, 1e-4
BEFORE = 6  # of so many steps one is of the matches, and one of the lesson before
PLAIN = 0.5  # share of "puzzle" in which grids stay easy, while prompts grow to their whole length
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
        self.matches = matching.Matches(network, tokenizer, seed=seed, steps=0, batch=max(1, batch // 2))

    def lesson(self, step) -> str:
        """What a step is about: the lesson that it has come to, the one before, or "matches"."""
        place = step % BEFORE
        if place == BEFORE - 1:
            return "matches"
        again = place == BEFORE // 2 - 1
        return list(self.lessons)[max(0, self.notes["lesson"] - again)]

    def over(self) -> bool:
        return self.notes["lesson"] == len(self.lessons)

    def note(self, step, lesson, right):
        """Keep a step's share of right answers; go on to the next lesson if this one is learnt or has had its steps."""
        name = list(self.lessons)[self.notes["lesson"]]
        rights = self.notes["right"].setdefault(lesson, [])
        rights.append(right)
        del rights[:-WINDOW]
        learnt = len(rights) == WINDOW and sum(rights) / WINDOW >= LEARNT.get(name, math.inf) and lesson == name
        if learnt or step + 1 - self.notes["since"] >= self.lessons[name]:
            self.notes |= {"lesson": self.notes["lesson"] + 1, "since": step + 1}
            self.notes["steps"][name] = step + 1

    def draw(self, step):
        """(embeddings [batch, L, D], positions [3, L], places [answers] of the tokens after which an answer comes,
        which of ANSWERS each is [batch, answers])"""
        lesson, rng = self.lesson(step), torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        count = {"corner": 4, "small": 3, "large": 2, "puzzle": 1}[lesson]
        hard = lesson == "large" or (lesson == "puzzle" and self.done(step) > PLAIN)
        side = 2 if count > 2 else 2 + int(torch.randint(3 if hard else 2, (), generator=rng))
        noise = 0.2 + 0.5 * torch.rand((), generator=rng) if hard else 0.3
        common = torch.rand((), generator=rng) if hard else 0.0
        vectors = hard and bool(torch.randint(4, (), generator=rng))
        batch = max(1, self.batch if count > 2 else 5 * self.batch // 8)
        asked, rows, rights = self.prompt(step, rng), [], []
        for _ in range(batch):
            grid, turns = self.grid(side, common, vectors, rng), torch.randint(4, (count,), generator=rng)
            if lesson == "corner":
                turns = torch.randperm(4, generator=rng)  # no word twice
            ids, grids = [], [grid]
            for turn in turns.tolist():
                turned = torch.rot90(grid, -turn, (0, 1))
                grids.append(turned[-1:, -1:] if lesson == "corner" else turned)
                ids += [*self.picture, *self.colon, int(self.signs[turn])]
            ids = self.spread(asked if lesson == "puzzle" else self.picture + ids[:-1], grids)
            rows.append(self.words.detach()[ids])
            rows[-1][ids == self.pad] = torch.cat([self.noisy(own, noise, rng).flatten(0, 1) for own in grids])
            rights.append(turns)
        thw = torch.tensor([[1, self.merge * len(own), self.merge * own.shape[1]] for own in grids])
        shown = torch.isin(ids, self.signs) if count > 1 else ids < 0  # a puzzle's prompt has digits of its own
        places = torch.cat([shown.nonzero().flatten() - 1, torch.tensor([len(ids) - 1])])
        return torch.stack(rows), mrope_positions(ids, thw, self.pad, self.merge), places, torch.stack(rights)

    def done(self, step) -> float:
        """How much of "puzzle" is over, from 0 to 1."""
        here = list(self.lessons)[self.notes["lesson"]] == "puzzle"
        return (step - self.notes["since"]) / self.lessons["puzzle"] if here else 0.0

    def prompt(self, step, rng) -> list:
        """The puzzle's prompt up to its answer. Of the text after the pictures it keeps some tokens from both ends,
        more as the lesson goes on; the text before the pictures comes with the longer half of these."""
        pictures = [place for place, id in enumerate(self.asked) if id in self.picture]
        first, end = pictures[0], pictures[-1] + 1
        tail = len(self.asked) - end
        shown = min(tail, int(torch.randint(2 + round(tail * self.done(step) / PLAIN), (), generator=rng)))
        before = self.asked[:first] if 2 * shown >= tail else []
        after = self.asked[end : end + shown // 2] + self.asked[len(self.asked) - (shown + 1) // 2 :]
        return before + self.asked[first:end] + after + self.box

    def grid(self, side, common, vectors, rng):
        """[side, side, D] words, or with `vectors` what no word is, each with `common` times one that is in all."""
        count = side * side + 1
        if vectors:
            things = F.normalize(torch.randn(count, self.words.shape[1], generator=rng), dim=1) * self.length
        else:
            chosen = torch.randint(min(matching.RARE, len(self.words) // 2), len(self.words), (count,), generator=rng)
            things = self.words.detach()[chosen]
        return ((things[1:] + common * things[0]) / (1 + common**2) ** 0.5).unflatten(0, (side, side))

    def noisy(self, grid, noise, rng):
        noises = torch.randn(grid.shape, generator=rng) * self.length / grid.shape[-1] ** 0.5
        return (grid + noise * noises) / (1 + noise**2) ** 0.5

    def spread(self, ids, grids):
        """ids as a tensor, each picture's mark as often as its grid has places."""
        ids = torch.tensor(ids)
        times = torch.ones_like(ids)
        times[ids == self.pad] = torch.tensor([own.shape[0] * own.shape[1] for own in grids])
        return ids.repeat_interleave(times)

    def loss_at(self, step):
        lesson = self.lesson(step)
        loss, right = self.asked_at(step, lesson)
        self.note(step, lesson, right)
        return loss, {lesson: right}

    def asked_at(self, step, lesson):
        """(loss, share of right answers) of a step."""
        if lesson == "matches":
            loss, told = self.matches.loss_at(matching.STEPS + step // BEFORE)  # words and vectors by turns, all new
            return loss, told["right"]
        embeddings, positions, places, rights = self.draw(step)
        positions = positions[:, None].expand(-1, len(embeddings), -1)
        out = self.language(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
        logits = out[:, places] @ self.words.T
        right = logits[..., self.signs].argmax(-1) == rights
        right = right[:, :1] if lesson == "corner" else right  # the others are told by what is left over, too
        return F.cross_entropy(logits.flatten(0, 1), self.signs[rights].flatten()), right.float().mean().item()


def turn(folder, out, *, seed, lessons=None, batch=BATCH, kept, deadline) -> dict:
    """Train the language model of the model in `folder`, write the model to `out`, and return what it took, the steps
    at which lessons ended, and the share of right answers in the last of each, repeats included. Raises
    `slices.OutOfTime`."""
    lessons = lessons or LESSONS
    network, tokenizer = model.load_model(folder), model.load_tokenizer(folder)
    turns = Turns(network, tokenizer, seed=seed, lessons=lessons, batch=batch)
    parameters = {f"language.{name}": p for name, p in turns.language.named_parameters()}
    made_by = dict(seed=seed, lessons=lessons, learnt=LEARNT, window=WINDOW, before=BEFORE, batch=batch, rate=RATE)
    made_by |= dict(plain=PLAIN, tokens=matching.TOKENS, noise=matching.NOISE)
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
