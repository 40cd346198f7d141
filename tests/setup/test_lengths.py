"""How long prompts can get: never longer than what is said at the start, and not much shorter."""

import random

import pytest
import torch

from sslr1 import model, ops, puzzles
from sslr1.puzzles import prompts, series
from sslr1.setup import lengths

SPECS = [
    ops.PatchSpec(),
    ops.PatchSpec(patch=16),
    ops.PatchSpec(patch=16, min_pixels=112 * 112, max_pixels=336 * 336),
    ops.PatchSpec(min_pixels=200 * 200, max_pixels=224 * 224),
]
KINDS = [(name, level) for name in puzzles.NAMES for level in puzzles.LEVELS[name]]


@pytest.mark.parametrize("composed", [False, True], ids=["apart", "composed"])
def test_no_puzzle_shows_more_than_its_bound(seed, composed):
    """Of images of many shapes; and of square ones that are large enough the bound is what is shown, or on a sheet at
    most 1.6 times that, which has room for every shape of tile."""
    rng, tight = random.Random(seed), {}
    for trial in range(16):
        spec, side = SPECS[trial % 4], rng.choice((112, 252, 300, 448))
        side = 448 if trial % 12 in (0, 3) else side  # square ones, so that the bound is met whatever else is drawn
        shape = side, side if trial % 3 == 0 else rng.randint(84, side)
        images = torch.randint(0, 256, (10, *shape[:: rng.choice((1, -1))], 3), dtype=torch.uint8)
        for name, level in KINDS:
            options = dict(level=level, spec=spec, composed=composed, seed=seed, attempt=trial)
            try:
                (puzzle,) = puzzles.make(images[:1], name, pool=images, **options)
            except ValueError:  # no sheet for so narrow bounds
                continue
            shown = sum(height * width for height, width in puzzle.plan.sizes)
            bound = puzzles.most_pixels(name, level, spec, side, composed)
            assert shown <= bound, (name, level, shape, spec, puzzle.plan.sizes)
            assert bound <= puzzles.most_pixels(name, level, spec, None, composed)
            if side == 448 and shape == (448, 448):
                tight[name, level] = max(tight.get((name, level), 0), shown / bound)
    for kind, share in tight.items():
        assert share > (0.6 if composed else 0.7 if kind[0] == "ordering" else 0.95), (kind, share)


def test_every_way_to_ask_is_found_once():
    def ask(choose):
        first = choose(3)
        return first, choose(2) if first != 1 else None, choose(1)

    assert sorted(prompts.every(ask), key=str) == sorted(
        [(0, 0, 0), (0, 1, 0), (1, None, 0), (2, 0, 0), (2, 1, 0)], key=str
    )


@pytest.mark.parametrize("thinking, wordings, composed", [(True, None, False), (False, 2, True)])
def test_no_prompt_is_longer_than_its_bound(tiny, photographs, seed, thinking, wordings, composed):
    tokenizer, spec = model.load_tokenizer(tiny), ops.PatchSpec.from_pretrained(tiny, max_pixels=448 * 448)
    form = puzzles.puzzle.Form(spec=spec, thinking=thinking, wordings=wordings, composed=composed)
    examples = series.check(KINDS, spec, composed)
    side = max(max(image.shape[:2]) for image in photographs)
    found = {(b.puzzle, b.level): b for b in lengths.bounds(examples, tokenizer, form, side)}
    assert list(found) != KINDS and set(found) == set(KINDS)
    assert [b.tokens for b in found.values()] == sorted((b.tokens for b in found.values()), reverse=True)
    pool = [*photographs, *torch.randint(0, 256, (8, 300, 300, 3), dtype=torch.uint8)]
    for name, level in KINDS:
        made = puzzles.make(
            photographs,
            name,
            pool=pool,
            level=level,
            spec=spec,
            thinking=thinking,
            wordings=wordings,
            composed=composed,
            seed=seed,
        )
        bound = found[name, level]
        for puzzle in made:
            ids = model.question_ids(puzzle.question, tokenizer, thinking)
            assert len(ids) - puzzle.question.count("<image>") <= bound.words, puzzle.question
        assert max(len(prompt.input_ids) for prompt in model.prompts(made, tokenizer)) <= bound.tokens, (name, level)
