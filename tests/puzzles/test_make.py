"""`make`: addresses, answer balance, errors, wording."""

import collections

import numpy as np
import pytest
import torch

from sslr1 import ops, puzzles
from sslr1.errors import UserError
from sslr1.ops.render import FILL
from sslr1.puzzles import sheet
from sslr1.puzzles.batch import QUESTIONS
from sslr1.puzzles.inpainting import HOLE
from sslr1.puzzles.plan import canvas_size
from sslr1.puzzles.series import check, kinds
from tests import fuzz
from tests.fuzz import shape

BIG = ops.PatchSpec()
SPEC = ops.PatchSpec(max_pixels=112 * 112)
EVERY = [(name, level) for name in puzzles.NAMES for level in puzzles.LEVELS[name]]


@pytest.fixture(scope="module")
def images():
    from sslr1.data.scenes import scene

    return [torch.from_numpy(scene(i)) for i in range(16)]


def fingerprint(batch):
    return [
        (q, a, tuple(c.numpy().tobytes() for c in row))
        for q, a, row in zip(batch.questions, batch.answers, batch.render())
    ]


def test_every_puzzle_has_four_levels():
    shares = dict(rotation=0.25, similarity=0.15, inpainting=0.1, ordering=0.3, correspondence=0.2)
    assert puzzles.NAMES[:5] == tuple(shares) and shares.items() <= puzzles.MIXTURE.items()
    assert set(puzzles.LEVELS.values()) == {(1, 2, 3, 4)}
    assert all(puzzles.describe(name, level) for name, level in EVERY)


@pytest.mark.parametrize("name, level", EVERY)
def test_a_puzzle_has_an_address(images, name, level):
    base = dict(puzzle=name, level=level, spec=SPEC, pool=images, seed=3, epoch=1)
    shown = images[:5]
    whole = fingerprint(puzzles.make(shown, index=range(10, 15), **base))
    backwards = fingerprint(puzzles.make(shown[::-1], index=range(14, 9, -1), **base))
    assert whole == backwards[::-1]
    alone = fingerprint(puzzles.make([shown[4]], index=[14], **base))
    assert alone == whole[4:5]
    each = [puzzles.make([image], index=[i], **base) for i, image in enumerate(shown, 10)]
    assert fingerprint(puzzles.PuzzleBatch([batch[0] for batch in each], each[0].form)) == whole
    measured = [puzzles.Picture(image) for image in images]
    assert fingerprint(puzzles.make(measured[:5], index=range(10, 15), **{**base, "pool": measured})) == whole
    mixed = puzzles.make(
        [shown[0], shown[4]], index=[10, 14], **{**base, "puzzle": ["rotation", name], "level": [2, level]}
    )
    assert fingerprint(mixed)[1] == whole[4]
    changes = [{"seed": 4}, {"epoch": 2}, {"attempt": 1}, {"index": range(5)}, {"level": level % 4 + 1}]
    changes += [
        {"spec": ops.PatchSpec(max_pixels=112 * 112 - 1)},
        {"spec": ops.PatchSpec(patch=7, merge=4, max_pixels=112 * 112)},
    ]
    if name == "similarity" or (name, level) == ("inpainting", 1):  # the others show nothing of the pool
        changes.append({"pool": images[::-1]})
    for change in changes:
        other = fingerprint(puzzles.make(shown, **{"index": range(10, 15), **base, **change}))
        assert sum(a == b for a, b in zip(whole, other)) <= 1, change  # 1x2 has few answers and cuts


def test_pools_are_named_by_their_images(images):
    """Similarity draws from the pool by position: another pool, another puzzle; another object of the same images, the
    same."""
    made = [
        fingerprint(puzzles.make(images[:2], "similarity", spec=SPEC, pool=pool))
        for pool in (images, list(images), [i.clone() for i in images], images[1:])
    ]
    assert made[0] == made[1] == made[2]
    assert all(a != b for a, b in zip(made[0], made[3]))


class Recorded:
    """Pictures that are measured once, for thousands of draws."""

    def __init__(self, images):
        from sslr1.puzzles.picture import Pictures

        self.pool = Pictures(images)
        self.pictures = [self.pool[i] for i in range(len(images))]


@pytest.fixture(scope="module")
def recorded(images, photographs):
    return Recorded([*images, *photographs])


@pytest.mark.parametrize("name, level", EVERY)
def test_answers_are_uniform(recorded, name, level):
    answers_are_uniform(recorded, name, level, 200)


@pytest.mark.slow
@pytest.mark.parametrize("name, level", EVERY)
def test_answers_are_uniform_at_every_level(recorded, name, level):
    answers_are_uniform(recorded, name, level, 5000)


def answers_are_uniform(recorded, name, level, count):
    """Chi-square over draws, decidable ones only, for each number of possible answers."""
    from scipy.stats import chi2 as law

    from sslr1.ops import keys
    from sslr1.puzzles.batch import _PUZZLES

    counts = collections.defaultdict(collections.Counter)
    drawn = 0
    for i in range(20 * count):
        rng = keys.generator("balance", name, level, i)
        picture = recorded.pictures[i % len(recorded.pictures)]
        made = _PUZZLES[name].build(
            rng, picture, level, SPEC if name in ("similarity", "rotation") else BIG, recorded.pool
        )
        if made.decidable:
            drawn += 1
            answer = made.readings[drawn % len(made.readings)][1]
            counts[round(1 / made.chance)][answer.value if made.chance > 1e-3 else answer.value[:2]] += 1
        if drawn == count:
            break
    assert drawn == count
    for possible, found in counts.items():
        possible = possible if possible < 1000 else 72  # of 3x3, the first two places
        n = sum(found.values())
        expected = n / possible
        chi2 = sum((c - expected) ** 2 / expected for c in found.values()) + (possible - len(found)) * expected
        assert expected < 1 or law.sf(chi2, possible - 1) > 1e-6, found


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
    pool = [torch.from_numpy(rng.integers(0, 256, (128, 128, 3)).astype(np.uint8)) // (i + 1) for i in range(9)]
    for name, level in EVERY:  # what is asked for is built all the same
        made = puzzles.make([flat], name, level=level, spec=SPEC, pool=pool)
        assert made.decidable == [False] and len(made.render()[0]) == made.canvas_counts[0]
    for side, levels in ((9, (1, 2, 3, 4)), (15, (4,))):  # in larger tiles, places of one can be told from each other
        tiled = torch.from_numpy(np.tile(cell[:side, :side], (15, 15, 1))[:128, :128].copy())
        for level in levels:
            made = [puzzles.make([tiled], "correspondence", level=level, spec=SPEC, seed=s) for s in range(4)]
            assert not any(batch.decidable[0] for batch in made)


def test_angles_that_would_have_to_be_enlarged_are_not_decidable(images):
    """Under 1.25 source px a canvas px, sharpness would tell which angles meet the grid."""
    spec = ops.PatchSpec(min_pixels=112 * 112)  # the inscribed square of 128 px has 87
    assert not any(puzzles.make(images, "rotation", level=3, spec=spec).decidable)
    assert all(puzzles.make(images, "rotation", level=2, spec=spec).decidable)


def test_the_papers_preset_is_a_choice_of_levels(images):
    made = puzzles.make(images[:1] * 5, list(puzzles.NAMES), preset="paper", spec=BIG, pool=images)
    assert dict(zip(made.names, made.levels)) == puzzles.PAPER_LEVEL and puzzles.PAPER_LEVEL["ordering"] == 3
    assert set(puzzles.PAPER_MIXTURE.values()) == {0.2} and tuple(puzzles.PAPER_MIXTURE) == puzzles.NAMES[:5]


@pytest.mark.parametrize("name, level", EVERY)
def test_composed_puzzles_are_one_canvas(photographs, images, name, level):
    made = puzzles.make(photographs[:2], name, level=level, pool=images, composed=True)
    for puzzle, canvases in zip(made, made.render()):
        question, marks = puzzle.question, puzzle.marks
        h, w = canvases[0].shape[:2]
        assert len(canvases) == 1 and h % 28 == w % 28 == 0 and made.spec.min_pixels <= h * w <= made.spec.max_pixels
        assert question.count("<image>") == 1 and "{" not in question.replace("\\boxed{}", "")
        assert len(marks) == 1 or "(" in question


@pytest.mark.parametrize("name, level", EVERY)
def test_a_sheet_shows_every_picture_under_its_mark(images, name, level):
    made = puzzles.make(images[:1], name, level=level, pool=images, spec=SPEC)
    marks, rows = made[0].marks, made[0].sheet
    assert sorted(i for row in rows for i in row) == list(range(len(marks)))
    if len(marks) == 1:
        return
    plan = sheet.compose(made.plan, marks, rows, BIG)
    (whole,) = ops.render(made.images, plan)
    y, found = 0, 0
    for row in filter(None, rows):
        tall, x = 0, sheet.GAP
        for i in row:
            canvas = made.render()[0][i]
            h, w = canvas.shape[:2]
            top = y + sheet.GAP + sheet.MARK
            assert torch.equal(whole[top : top + h, x : x + w], canvas)
            above = whole[y + sheet.GAP : top, x : x + sheet.MARK].float()
            assert above.min() < 100 and above.std() > 10  # a mark
            found += 1
            x, tall = x + w + sheet.GAP, max(tall, h)
        y += tall + sheet.MARK + sheet.GAP
    assert found == len(marks) and (whole[-sheet.GAP :] == 255).all() and (whole[:, : sheet.GAP] == 255).all()


def test_pictures_are_no_smaller_than_their_sheet_demands(photographs, images):
    """Nine of 84 px and their marks take 142,688 px, of 56 px 78,400."""
    for most, sides in ((142_688, (364, 392)), (142_687, (280, 280)), (78_399, (196, 168))):
        spec = ops.PatchSpec(max_pixels=most)
        made = puzzles.make(photographs[:1], "similarity", level=4, pool=images, composed=True, spec=spec)
        assert made.render()[0][0].shape[:2] == sides


def test_a_sheet_that_does_not_fit_is_an_error(images):
    with pytest.raises(ValueError, match="max_pixels"):
        puzzles.make(images, "similarity", composed=True, spec=ops.PatchSpec(max_pixels=84 * 84))


def test_errors_say_what_is_wrong(images):
    for change, words in (
        ({"puzzle": "chess"}, "chess"),
        ({"level": 9}, "no level 9"),
        ({"puzzle": ["rotation"]}, "1 entries"),
        ({"index": [1, 2]}, "2 entries"),
        ({"preset": "papers"}, "preset"),
    ):
        with pytest.raises(ValueError, match=words):
            puzzles.make(images, **{"puzzle": "rotation", **change})
    with pytest.raises(ValueError, match=r"images\[0\]"):
        puzzles.make([images[0].float()], "rotation")
    with pytest.raises(ValueError, match="too few"):
        puzzles.make([images[0]] * 8, "similarity", spec=SPEC)
    with pytest.raises(ValueError, match="no pixels"):
        puzzles.make([images[0][:0]], "rotation")


@pytest.mark.parametrize("name, level", EVERY)
def test_questions_hold_one_placeholder_a_canvas(images, name, level):
    batch = puzzles.make(images, name, level=level, spec=SPEC)
    for question, count, row in zip(batch.questions, batch.canvas_counts, batch.render()):
        assert question.count("<image>") == count == len(row)
        assert "\\boxed{}" in question and "<think>" in question and "{direction}" not in question
    assert len(set(QUESTIONS[name][level])) >= 6


def test_wordings_are_chosen(images):
    direct = puzzles.make(images, "rotation", thinking=False, spec=SPEC)
    assert not any("think" in q for q in direct.questions)
    plain = puzzles.make(images, "rotation", wordings=1, spec=SPEC)
    assert len(set(plain.questions)) == 1 and "counter" not in plain.questions[0]


@pytest.mark.parametrize("name, level", EVERY)
def test_canvases_keep_the_spec(images, name, level):
    for spec in (SPEC, ops.PatchSpec(), ops.PatchSpec(patch=16, min_pixels=64 * 64, max_pixels=128 * 128)):
        for row in puzzles.make(images, name, level=level, spec=spec).render():
            for c in row:
                h, w = c.shape[:2]
                assert h % spec.unit == w % spec.unit == 0 and spec.min_pixels <= h * w <= spec.max_pixels
            competing = row[1:] if name == "inpainting" else row
            assert len({c.shape for c in competing}) == 1


BOUNDS = (
    ops.PatchSpec(),
    SPEC,
    ops.PatchSpec(min_pixels=256 * 784, max_pixels=256 * 784),  # 256 tokens and no other number
    ops.PatchSpec(min_pixels=7 * 784, max_pixels=45 * 784),
)


@pytest.mark.parametrize("name, level", EVERY)
def test_images_of_any_shape_and_bounds_of_any_width_make_puzzles(draw, name, level):
    """None raises, hangs or leaves the image; separate and, where a sheet has room, composed."""
    for spec in BOUNDS:
        short = int(draw.integers(112, 300))
        sides = (short, min(3000, int(short * draw.uniform(1, 3) ** 4)))[:: int(draw.choice((1, -1)))]
        image = shape.of_shape(int(draw.integers(0, 16)), *sides)
        for composed in (False, True) if spec.max_pixels > SPEC.max_pixels else (False,):
            shape.check(image, name, level, spec, composed, int(draw.integers(0, 1000)))


def test_fuzz(seed):
    """A second's worth; `python -m tests.fuzz shape --minutes 10` for more."""
    assert fuzz.run(shape.CHECKS, seconds=1, seed=seed) >= 20


def test_pieces_of_a_panorama_lie_everywhere_in_it(draw, seed):
    """A shorter image is one piece, and so is one of 3 to 1."""
    for pixels in (torch.zeros(60, 180, 3), torch.zeros(90, 70, 3)):
        picture = puzzles.Picture(pixels)
        assert picture.piece(draw) is picture
    ramp = torch.arange(200, dtype=torch.uint8)[:, None, None].expand(200, 50, 3)
    for turned in (False, True):
        starts = []
        for _ in range(500):
            pixels = puzzles.Picture(ramp.transpose(0, 1) if turned else ramp).piece(draw).pixels
            pixels = pixels.transpose(0, 1) if turned else pixels
            starts.append(int(pixels[0, 0, 0]))
            assert torch.equal(pixels, ramp[starts[-1] : starts[-1] + 150])
        assert min(starts) < 5 and max(starts) in range(46, 51) and len(set(starts)) > 40


@pytest.mark.parametrize("level", (1, 2, 3, 4))
def test_patches_are_shown_at_the_holes_scale(photographs, level):
    for made in puzzles.make(photographs, "inpainting", level=level, pool=photographs):
        shown, *patches = made.render()
        hole, side = int((shown == FILL).all(2).sum(0).max()), len(patches[0])
        assert hole == side + 2 * round(0.03 * side)
        assert abs(hole / min(shown.shape[:2]) / HOLE[level] - 1) < 0.3
        steps = [floats[0] * 2 ** made.plan.sources_int[ints[5], 1] for ints, floats in made.plan.tiles if ints[0]]
        truth = "ABCDEFGH".index(made.answer.value)
        assert abs(steps[truth]) == pytest.approx(1.0)


def test_bounds_that_leave_no_canvas_are_found_without_an_image():
    for spec in BOUNDS:
        check(kinds(), spec)
    check(EVERY, ops.PatchSpec(min_pixels=64 * 784, max_pixels=64 * 784), composed=True)
    check([("rotation", 2)], SPEC, composed=True)
    with pytest.raises(UserError, match=r"rotation, level 1: no square canvas .* has 5000 to 4000"):
        check(EVERY, ops.PatchSpec(min_pixels=5000, max_pixels=4000))
    with pytest.raises(UserError, match=r"inpainting, level 2: a sheet .* max_pixels = 12544"):
        check([("inpainting", 2)], SPEC, composed=True)


def test_prompt_budget_of_a_coco_image():
    """At most 2,048 visual tokens for 640x480, leaving no puzzle without room."""
    image = torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8)
    pool = [torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8) // (i + 1) for i in range(9)]
    for name in puzzles.NAMES:
        for level in puzzles.LEVELS[name]:
            _, grid = puzzles.make([image], name, level=level, pool=pool).render_patches()
            assert int(grid.prod(1).sum()) // 4 <= 1000


def test_tiles_are_resized_only_where_the_bounds_demand_it():
    spec = ops.PatchSpec()
    assert canvas_size(240, 213, spec, 0.03) == (224, 196, 1.0)
    height, width, step = canvas_size(
        43, 43, spec, 0.03
    )  # 28x28 tiles would be under min_pixels: the image is enlarged
    assert height * width >= spec.min_pixels and step < 1
    assert (height + 2 * round(0.03 * height)) * step <= 43
    height, width, step = canvas_size(3000, 3000, ops.PatchSpec(max_pixels=500 * 500), 0.03)
    assert height * width <= 500 * 500 and step > 1
    one = ops.PatchSpec(min_pixels=7 * 784, max_pixels=7 * 784)  # 1x7 or 7x1: a strip of the cell
    height, width, step = canvas_size(280, 300, one)
    assert (height, width) == (28, 196) and step == pytest.approx(300 / 196)
    assert canvas_size(300, 280, one)[:2] == (196, 28)
    with pytest.raises(ValueError, match="no canvas"):
        canvas_size(280, 280, ops.PatchSpec(min_pixels=1000, max_pixels=1100))
