"""A language model learns to compare before it sees: which of four things is the reference's? The things are words
first, two tokens each; then words and random vectors, of more tokens and more noise. The prompt is the puzzle
similarity's, and what is asked for is its letter in a box. It goes on until both are learnt: of five seeds one fell
back to chance where noise comes in, and was there still when the others were through (bench/NOTES.md).

A small language model that is shown pictures at once has to find two things together, what its visual tokens tell and
that it is to compare them, and doesn't (bench/NOTES.md).

python bench/matching.py MODEL OUT [--steps N] [--seed N]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from slices import RISE, Deadline, train
from tower import write

from sslr1 import model
from sslr1.model.packing import IMAGE_PAD, question_ids

STEPS, BATCH, RATE = 160, 8, 1e-4
LEARNT, WINDOW = 0.7, 10  # share of right answers over so many steps, of words and of vectors, at which it is learnt
LONGEST = 3  # times its steps, until it is
FIRST = 0.5  # share of the steps with words alone, of two tokens
TOKENS, NOISE = (1, 4, 9), (0.2, 1.0)  # afterwards; noise of this length beside a thing's own
LETTERS = "ABCD"
QUESTION = "Reference: <image>\n{}\nWhich candidate shows the same scene as the reference?".format(
    "\n".join(f"{letter}: <image>" for letter in LETTERS)
)
RARE = 1000  # the first of a vocabulary are bytes, signs and pieces of words


class Matches:
    """Batches of matches, for a network whose word embeddings things are made of."""

    def __init__(self, network, tokenizer, *, seed, steps, batch):
        self.language, self.seed, self.first, self.batch = network.model.language_model, seed, FIRST * steps, batch
        self.words = self.language.embed_tokens.weight
        self.length = self.words.detach().norm(dim=1).mean()
        ids = torch.tensor(question_ids(QUESTION, tokenizer, False) + tokenizer.encode(r"\boxed{"))
        self.ids, self.places = ids, (ids == tokenizer.convert_tokens_to_ids(IMAGE_PAD)).nonzero().flatten().tolist()
        self.letters = torch.tensor([tokenizer.encode(letter)[0] for letter in LETTERS])

    def draw(self, step):
        """(embeddings [batch, L, D], numbers of the right letters [batch]) of a step."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        plain = step < self.first
        tokens = 2 if plain else TOKENS[int(torch.randint(len(TOKENS), (), generator=rng))]
        low, high = (0.3, 0.3) if plain else NOISE
        noise = low + (high - low) * torch.rand((), generator=rng)
        prompt, width = self.words.detach()[self.ids], self.words.shape[1]
        count, rows = len(LETTERS), []
        rights = torch.randint(count, (self.batch,), generator=rng)
        for right in rights.tolist():
            if plain or step % 2:
                chosen = torch.randint(min(RARE, len(self.words) // 2), len(self.words), (count,), generator=rng)
                things = self.words.detach()[chosen]
            else:
                things = F.normalize(torch.randn(count, width, generator=rng), dim=1) * self.length
            seen = things[[right, *range(count)]][:, None].expand(-1, tokens, -1)
            noises = torch.randn(seen.shape, generator=rng) * self.length / width**0.5
            seen = (seen + noise * noises) / (1 + noise**2) ** 0.5
            parts, before = [], 0
            for place, own in zip(self.places, seen):
                parts += [prompt[before:place], own]
                before = place + 1
            rows.append(torch.cat([*parts, prompt[before:]]))
        return torch.stack(rows), rights

    def loss_at(self, step):
        embeddings, rights = self.draw(step)
        last = self.language(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, -1]
        logits = last @ self.words.T
        right = (logits[:, self.letters].argmax(1) == rights).float().mean().item()
        return F.cross_entropy(logits, self.letters[rights]), {"right": right}


def match(folder, out, *, seed, steps=STEPS, batch=BATCH, kept, deadline) -> dict:
    """Train the language model of the model in `folder` for `steps` steps, and until it is learnt or has had LONGEST
    times as many; write the model to `out`, and return what it took and the share of right answers in the last steps of
    words and of vectors. Raises `slices.OutOfTime`."""
    network, tokenizer = model.load_model(folder), model.load_tokenizer(folder)
    matches = Matches(network, tokenizer, seed=seed, steps=steps, batch=batch)
    notes = {"steps": 0, "words": [], "vectors": []}

    def loss_at(step):
        loss, told = matches.loss_at(step)
        rights = notes["words" if step % 2 else "vectors"]
        rights.append(told["right"])
        del rights[:-WINDOW]
        notes["steps"] = step + 1
        return loss, told

    def shares() -> dict:
        return {name: sum(notes[name]) / len(notes[name]) for name in ("words", "vectors") if notes[name]}

    def over() -> bool:
        return notes["steps"] >= steps and all(share >= LEARNT for share in shares().values())

    parameters = {f"language.{name}": p for name, p in matches.language.named_parameters()}
    made_by = dict(seed=seed, steps=steps, batch=batch, rate=RATE, first=FIRST, tokens=TOKENS, noise=NOISE)
    made_by |= dict(learnt=LEARNT, window=WINDOW, longest=LONGEST)
    options = dict(kept=kept, made_by=made_by, deadline=deadline, every=10, falls=False)
    options |= dict(rise=round(RISE * steps), notes=notes, over=over)
    seconds = train(parameters, dict.fromkeys(parameters, RATE), loss_at, LONGEST * steps, **options)
    write(network, folder, out)
    told = {name: round(share, 3) for name, share in shares().items()}
    return {"steps": notes["steps"], "batch": batch, "rate": RATE, "seconds": round(seconds), "right": told}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python bench/matching.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    kept = Path(a.out).with_suffix(".matching.safetensors")
    print(match(a.model, a.out, seed=a.seed, steps=a.steps, kept=kept, deadline=Deadline()))
