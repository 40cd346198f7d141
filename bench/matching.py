"""A language model learns to compare before it sees. Two questions, by turns: which of four things is the reference's,
and which of two tiles comes first, where one's far border is the other's near border, as with dominoes. Tokens of
things and borders are words first, and prompts short; then words and random vectors, more of them, with more noise,
asked for in the words of the puzzles similarity and ordering.

A small language model that is shown pictures at once has to find two things together, what its visual tokens tell and
that it is to compare them, and doesn't (bench/NOTES.md).

python bench/matching.py MODEL OUT [--steps N] [--seed N]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from slices import Deadline, train
from tower import write

from sslr1 import model
from sslr1.model.packing import IMAGE_PAD, mrope_positions, question_ids

STEPS, BATCH, RATE = 200, 8, 1e-4
FIRST = 0.5  # share of the steps with short prompts, which are three and six times as many to a batch
NOISE = 0.3  # length of the noise on a token, beside its own; afterwards between these:
NOISES = (0.2, 0.8)
THINGS = ((1, 1), (2, 2), (3, 3))  # rows and columns of visual tokens, afterwards
TILES = ((1, 2), (1, 3), (2, 2), (2, 4), (3, 2), (2, 3))
SHARED = 1.0  # at most, what all tokens of a question have in common, beside each one's own
LETTERS, DIGITS = "ABCD", "12"
SAME = "Reference: <image>\n{}\nWhich candidate shows the same scene as the reference?".format(
    "\n".join(f"{letter}: <image>" for letter in LETTERS)
)
CHAIN = (
    "1: <image>\n2: <image>\nThese tiles were cut from one picture of {} rows and {} columns. For each place in "
    "reading order, give the number of its tile."
)
BOX = r"\boxed{"
RARE = 1000  # the first of a vocabulary are bytes, signs and pieces of words


class Matches:
    """Batches of questions, for a network whose word embeddings things are made of."""

    def __init__(self, network, tokenizer, *, seed, steps, batch):
        self.language, self.seed, self.first, self.batch = network.model.language_model, seed, FIRST * steps, batch
        self.words = self.language.embed_tokens.weight
        self.length = self.words.detach().norm(dim=1).mean()
        self.pad = tokenizer.convert_tokens_to_ids(IMAGE_PAD)

        def asked(question):
            return torch.tensor(question_ids(question, tokenizer, False) + tokenizer.encode(BOX))

        def short(marks):
            picture = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>\n"
            return torch.tensor(tokenizer.encode("".join(f"{mark}: {picture}" for mark in marks) + BOX))

        self.same, self.short_same = asked(SAME), short(["Reference", *LETTERS])
        self.across, self.down, self.short_chain = asked(CHAIN.format(1, 2)), asked(CHAIN.format(2, 1)), short(DIGITS)
        self.letters, self.digits = (torch.tensor([tokenizer.encode(x)[0] for x in xs]) for xs in (LETTERS, DIGITS))

    def kind(self, step) -> str:
        return "chain" if step % 2 else "same"

    def things(self, shape, plain, rng):
        """Vectors [*shape, width] of a word's length: words, or half of the time random ones."""
        width = self.words.shape[1]
        if plain or torch.rand((), generator=rng) < 0.5:
            first = min(RARE, len(self.words) // 2)
            return self.words.detach()[torch.randint(first, len(self.words), shape, generator=rng)]
        return F.normalize(torch.randn(*shape, width, generator=rng), dim=-1) * self.length

    def scene(self, step, plain, rng):
        """(ids of the prompt, a placeholder a picture; the answers' possible tokens; numbers of the right ones [n];
        pictures' tokens [n, pictures, rows, columns, width])"""
        kind, across = self.kind(step), True
        count = self.batch * ({"same": 3, "chain": 6}[kind] if plain else 1)
        if kind == "same":
            ids, tokens = (self.short_same if plain else self.same), self.letters
            sides = (1, 2) if plain else THINGS[int(torch.randint(len(THINGS), (), generator=rng))]
        else:
            across = plain or torch.rand((), generator=rng) < 0.5
            ids, tokens = (self.short_chain if plain else self.across if across else self.down), self.digits
            sides = (1, 2) if plain else TILES[int(torch.randint(len(TILES), (), generator=rng))]
            sides = sides if across else sides[::-1]
        rights = torch.randint(len(tokens), (count,), generator=rng)
        if kind == "same":
            things = self.things((count, len(tokens)), plain, rng)
            things = torch.cat([things[torch.arange(count), rights][:, None], things], 1)
            return ids, tokens, rights, things[:, :, None, None].expand(-1, -1, *sides, -1)
        tiles = self.things((count, 2, *sides), plain, rng).clone()
        if across:
            tiles[:, 1, :, 0] = tiles[:, 0, :, -1]
        else:
            tiles[:, 1, 0] = tiles[:, 0, -1]
        return ids, tokens, rights, torch.where(rights.view(-1, 1, 1, 1, 1) == 0, tiles, tiles.flip(1))

    def draw(self, step):
        """(embeddings [n, L, D], positions [3, L], the answers' possible tokens, numbers of the right ones [n]) of a
        step."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        plain = step < self.first
        ids, tokens, rights, seen = self.scene(step, plain, rng)
        _, pictures, rows, columns, _ = seen.shape
        seen = self.blurred(seen.flatten(2, 3), plain, rng).flatten(1, 2)
        repeats = torch.where(ids == self.pad, rows * columns, 1)
        ids = ids.repeat_interleave(repeats)
        embeddings = self.words.detach()[ids].expand(len(rights), -1, -1).clone()
        embeddings[:, ids == self.pad] = seen
        grids = torch.tensor([[1, 2 * rows, 2 * columns]] * pictures)
        return embeddings, mrope_positions(ids, grids, self.pad, 2), tokens, rights

    def blurred(self, seen, plain, rng):
        """Tokens [count, pictures, n, width] with something in common and noise of their own, of a word's length."""
        low, high = (NOISE, NOISE) if plain else NOISES
        noise = low + (high - low) * torch.rand((), generator=rng)
        shared = 0.0 if plain else SHARED * torch.rand((), generator=rng)
        size = self.length / seen.shape[-1] ** 0.5
        seen = seen + shared * size * torch.randn(len(seen), 1, 1, seen.shape[-1], generator=rng)
        seen = seen + noise * size * torch.randn(seen.shape, generator=rng)
        return F.normalize(seen, dim=-1) * self.length

    def loss_at(self, step):
        embeddings, positions, tokens, rights = self.draw(step)
        positions = positions[:, None].expand(-1, len(rights), -1)
        last = self.language(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state[:, -1]
        logits = last @ self.words.T
        right = (logits[:, tokens].argmax(1) == rights).float().mean().item()
        return F.cross_entropy(logits, tokens[rights]), {self.kind(step): right}


def match(folder, out, *, seed, steps=STEPS, batch=BATCH, kept, deadline) -> dict:
    """Train the language model of the model in `folder`, write the model to `out`, and return what it took and the
    shares of right answers in the last steps. Raises `slices.OutOfTime`."""
    network, tokenizer = model.load_model(folder), model.load_tokenizer(folder)
    matches, rights = Matches(network, tokenizer, seed=seed, steps=steps, batch=batch), {"same": [], "chain": []}

    def loss_at(step):
        loss, told = matches.loss_at(step)
        for kind, right in told.items():
            rights[kind].append(right)
        return loss, {kind: sum(last := own[-5:]) / len(last) for kind, own in rights.items() if own}

    parameters = {f"language.{name}": p for name, p in matches.language.named_parameters()}
    made_by = dict(seed=seed, steps=steps, batch=batch, rate=RATE, first=FIRST, noises=NOISES, shared=SHARED)
    options = dict(kept=kept, made_by=made_by, deadline=deadline, every=10, falls=False)
    seconds = train(parameters, dict.fromkeys(parameters, RATE), loss_at, steps, **options)
    write(network, folder, out)
    told = {kind: round(sum(own[-10:]) / max(1, len(own[-10:])), 3) for kind, own in rights.items()}
    return {"steps": steps, "batch": batch, "rate": RATE, "seconds": round(seconds), "right": told}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python bench/matching.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    kept = Path(a.out).with_suffix(".matching.safetensors")
    print(match(a.model, a.out, seed=a.seed, steps=a.steps, kept=kept, deadline=Deadline()))
