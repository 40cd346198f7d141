"""`make`: addresses, answer balance, errors, wording."""

import collections

import numpy as np
import pytest
import torch

from sslr1 import ops, puzzles
from sslr1.puzzles import prompts
from sslr1.puzzles.ordering import tile_size

SPEC = ops.PatchSpec(max_pixels=112 * 112)


@pytest.fixture(scope="module")
def images():
    from sslr1.data.scenes import scene

    return [torch.from_numpy(scene(i)) for i in range(8)]


def fingerprint(batch):
    return [
        (q, a, tuple(c.numpy().tobytes() for c in row))
        for q, a, row in zip(batch.questions, batch.answers, batch.render())
    ]


@pytest.mark.parametrize("name", puzzles.NAMES)
@pytest.mark.parametrize("level", [1, 2])
def test_a_puzzle_has_an_address(images, name, level):
    base = dict(puzzle=name, level=level, spec=SPEC, pool=images, seed=3, epoch=1)
    whole = fingerprint(puzzles.make(images, index=range(10, 18), **base))
    backwards = fingerprint(puzzles.make(images[::-1], index=range(17, 9, -1), **base))
    assert whole == backwards[::-1]
    alone = fingerprint(puzzles.make([images[4]], index=[14], **base))
    assert alone == whole[4:5]
    mixed = puzzles.make(
        [images[0], images[4]], index=[10, 14], **{**base, "puzzle": ["rotation", name], "level": [2, level]}
    )
    assert fingerprint(mixed)[1] == whole[4]
    for change in ({"seed": 4}, {"epoch": 2}, {"attempt": 1}, {"index": range(8)}):
        other = fingerprint(puzzles.make(images, **{"index": range(10, 18), **base, **change}))
        assert all(a != b for a, b in zip(whole, other)) or name == "ordering", change
        assert sum(a != b for a, b in zip(whole, other)) >= 5, change


@pytest.mark.parametrize("name, level", [(n, k) for n in puzzles.NAMES for k in (1, 2)])
def test_answers_are_uniform(images, name, level):
    counts = collections.defaultdict(collections.Counter)
    big = ops.PatchSpec()
    for epoch in range(250):
        batch = puzzles.make(images, name, level=level, epoch=epoch, spec=big if name == "ordering" else SPEC)
        for answer, chance in zip(batch.answers, batch.chance):
            counts[round(1 / chance)][answer.value] += 1
    for possible, found in counts.items():
        n = sum(found.values())
        expected = n / possible
        if expected < 5:
            continue
        chi2 = sum((c - expected) ** 2 / expected for c in found.values()) + (possible - len(found)) * expected
        from scipy.stats import chi2 as law

        assert law.sf(chi2, possible - 1) > 1e-6, found


def test_decidable_refuses_what_can_not_be_told():
    flat = torch.full((128, 128, 3), 90, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    quarter = rng.integers(0, 256, (7, 7, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    top = np.concatenate([quarter, np.rot90(quarter, 3)], 1)
    symmetric = torch.from_numpy(np.concatenate([top, np.rot90(top, 2)], 0).copy())  # the same after quarter turns
    cell = rng.integers(0, 256, (10, 10, 3)).repeat(6, 0).repeat(6, 1).astype(np.uint8)
    twice = torch.from_numpy(np.tile(cell, (2, 2, 1)))  # 60 px is the pitch of a 56 px tile: all tiles are the same
    for image in (flat, symmetric):  # 112 px: the crop has no choice of place
        assert puzzles.make([image], "rotation", level=2, spec=SPEC).decidable == [False]
    for image in (flat, twice):
        assert not any(puzzles.make([image], "ordering", level=1, spec=SPEC, seed=s).decidable[0] for s in range(4))


def test_errors_say_what_is_wrong(images):
    for change, words in (
        ({"puzzle": "chess"}, "chess"),
        ({"level": 9}, "no level 9"),
        ({"puzzle": ["rotation"]}, "1 entries"),
        ({"index": [1, 2]}, "2 entries"),
        ({"composed": True}, "composed"),
        ({"preset": "paper"}, "preset"),
    ):
        with pytest.raises(ValueError, match=words):
            puzzles.make(images, **{"puzzle": "rotation", **change})
    with pytest.raises(ValueError, match=r"images\[0\]"):
        puzzles.make([images[0].float()], "rotation")
    with pytest.raises(ValueError, match="too few"):
        puzzles.make([images[0]] * 8, "similarity", spec=SPEC)


def test_questions_hold_one_placeholder_a_canvas(images):
    for name in puzzles.NAMES:
        for level in (1, 2):
            batch = puzzles.make(images, name, level=level, spec=SPEC)
            for question, count, row in zip(batch.questions, batch.canvas_counts, batch.render()):
                assert question.count("<image>") == count == len(row)
                assert "\\boxed{}" in question and "<think>" in question and "{direction}" not in question
    assert all(len(set(wordings)) >= 6 for wordings in prompts.QUESTIONS.values())
    direct = puzzles.make(images, "rotation", thinking=False, spec=SPEC)
    assert not any("think" in q for q in direct.questions)
    plain = puzzles.make(images, "rotation", wordings=1, spec=SPEC)
    assert len(set(plain.questions)) == 1 and "counter" not in plain.questions[0]


def test_canvases_keep_the_spec(images):
    for spec in (SPEC, ops.PatchSpec(), ops.PatchSpec(patch=16, min_pixels=64 * 64, max_pixels=128 * 128)):
        for name in puzzles.NAMES:
            for level in (1, 2):
                for row in puzzles.make(images, name, level=level, spec=spec).render():
                    for c in row:
                        h, w = c.shape[:2]
                        assert h % spec.unit == w % spec.unit == 0 and spec.min_pixels <= h * w <= spec.max_pixels
                    assert len({c.shape for c in row}) == 1


def test_prompt_budget_of_a_coco_image():
    """At most 2,048 visual tokens for 640x480, leaving no puzzle without room."""
    image = torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8)
    pool = [torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8) // (i + 1) for i in range(6)]
    for name in puzzles.NAMES:
        for level in (1, 2):
            _, grid = puzzles.make([image], name, level=level, pool=pool).render_patches()
            assert int(grid.prod(1).sum()) // 4 <= 1000


def test_tiles_are_resized_only_where_the_bounds_demand_it():
    spec = ops.PatchSpec()
    assert tile_size(240, 213, spec) == (224, 196, 1.0)
    height, width, step = tile_size(43, 43, spec)  # 28x28 tiles would be under min_pixels: the image is enlarged
    assert height * width >= spec.min_pixels and step < 1
    assert (height + 2 * round(0.03 * height)) * step <= 43
    height, width, step = tile_size(3000, 3000, ops.PatchSpec(max_pixels=500 * 500))
    assert height * width <= 500 * 500 and step > 1
