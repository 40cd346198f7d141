"""Blind solvers: bounded on the puzzles, and able to find a shortcut where there is one."""

import json
import math

import numpy as np
import pytest
import torch

from sslr1 import puzzles
from sslr1.evaluate import blind, probes
from sslr1.evaluate.textures import Textures, texture
from sslr1.puzzles import correspondence, rotation
from tests.forks import launch

CASES = [(name, level) for name in puzzles.NAMES for level in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def images():
    from sslr1.data.scenes import scene

    return [torch.from_numpy(scene(i, 320)) for i in range(200)]


@pytest.fixture(scope="module")
def textures():
    return [texture(i) for i in range(200)]


def bounded(findings, errors=0.0):
    for f in findings:
        room = errors * math.sqrt(f.chance * (1 - f.chance) / f.n)
        assert f.bound is None or f.limit <= f.bound + room, f


@pytest.mark.parametrize("name", puzzles.NAMES)
@pytest.mark.parametrize("level", [pytest.param(n, marks=[pytest.mark.slow] * (n != 3)) for n in (1, 2, 3, 4)])
def test_bounds(images, textures, seed, name, level):
    """On 200 puzzles, with room for their scatter, and where chance has those go wrong on 1,000 others; the thousands
    are for `make test-slow`."""
    shown = textures if name == "rotation" else images
    try:
        bounded(probes.probe(shown, name, level, 200, seed, only_bounded=True), errors=4)
    except AssertionError:
        shown = probes.shown(name, images, 1000)
        bounded(probes.probe(shown, name, level, 1000, seed + 1, only_bounded=True), errors=4)


@pytest.mark.slow
@pytest.mark.parametrize("name, level", CASES)
def test_bounds_on_thousands(name, level, seed):
    shown = probes.shown(name, probes.pictures(), 2000)
    bounded(probes.probe(shown, name, level, 2000, seed, only_bounded=True))


def test_probes_find_the_shortcuts_they_are_for(images, textures, monkeypatch):
    """Without what keeps a puzzle honest, its probe finds out."""

    def score(shown, name, level, probe, count=300):
        (found,) = (f for f in probes.probe(shown, name, level, count) if f.probe == probe)
        return found

    monkeypatch.setattr(rotation, "OFFSETS", ((0.0, 0.0),))  # the pixel grid's pattern shows
    assert score(textures, "rotation", 3, "grid phase", 600).verdict == "broken"
    monkeypatch.setattr(correspondence, "_assign", nearest_assign)
    assert score(images, "correspondence", 2, "nearest position").exact > 0.6


def nearest_assign(rng, spots, places, image, first):
    """As if view 1 were put anywhere: REF stands where its point does in view 2."""
    truth = int(rng.integers(0, len(spots)))
    return truth, places[truth].clip(0.1, 0.9), spots, places


def test_limits_are_over_images(draw):
    """400 puzzles of 400 images have the binomial's limit; of 40 images that are each guessed alike, that of 40
    draws."""
    answers = [puzzles.Answer("choice", "A", tuple("AB"))] * 400
    right = draw.integers(0, 2, 40).repeat(10)
    guesses = ["BA"[hit] for hit in right]
    alone, alike = (
        probes._finding("rotation", 1, "made up", guesses, answers, [0.5] * 400, sources, True)
        for sources in (range(400), [n // 10 for n in range(400)])
    )
    p, n = alone.exact, alone.n
    assert (p, n, alone.images, alike.images) == (right.mean(), 400, 400, 40)
    assert alone.limit == pytest.approx(p + 1.645 * math.sqrt(p * (1 - p) / 400))
    assert alike.limit == pytest.approx(p + 1.645 * math.sqrt(p * (1 - p) / 40))


@pytest.mark.parametrize(
    "exact, n, verdict",
    [
        (0.25, 2000, ""),
        (0.20, 50, ""),
        (0.25, 100, "undecided: too few"),
        (0.34, 100, "undecided: too few"),
        (0.29, 2000, "undecided: at the bound"),
        (0.45, 100, "broken"),
    ],
)
def test_too_few_is_not_broken(exact, n, verdict):
    """A bound is broken where the whole interval is above it."""
    found = finding(exact, n, n // 2)
    assert found.verdict == verdict and found.holds == (verdict == "")


def finding(exact, n, images):
    limit = exact + 1.645 * math.sqrt(exact * (1 - exact) / n)
    about = dict(puzzle="rotation", level=1, probe="made up", chance=0.25, accuracy=exact, bound=0.3)
    return probes.Finding(exact=exact, n=n, images=images, limit=limit, **about)


def test_what_is_called_enough_decides_about_who_guesses(draw):
    n, images = finding(0.25, 100, 50).enough()
    assert (n, images) == (812, 406)
    guessed = draw.binomial(n, 0.25, 10_000) / n
    share = np.mean([finding(p, n, images).holds for p in guessed])
    assert 0.93 < share < 0.97


def test_the_report_counts_and_goes_on(monkeypatch, capsys):
    """Progress, how many hold and how many would decide; what the images give too few of is named and left out."""
    seen = []

    def probe(images, name, level, count, told):
        seen.extend(told() for _ in range(probes.halves(name) * count))
        if name == "similarity":
            raise ValueError("the images give 1 of 3 similarity puzzles of level 1")
        about = dict(puzzle=name, level=level, n=count, images=3, chance=0.25, accuracy=0.3, bound=0.3)
        return [probes.Finding(probe="made up", exact=exact, limit=exact + 0.2, **about) for exact in (0.0, 0.2, 0.6)]

    monkeypatch.setattr(probes, "pictures", lambda folder: [])
    monkeypatch.setattr(probes, "probe", probe)
    assert blind.report("photos", 3, ("rotation", "similarity")) == 1
    out, total = capsys.readouterr().out, 4 * 3 * (2 + 1)
    assert len(seen) == total and f"blind solvers {total}/{total}" in out
    assert "12 stated bounds: 4 hold, 4 broken, 4 undecided" in out and "30.0% undecided: too few" in out
    assert "--count 192, of up to 192 images, decides" in out and "30.0% broken" in out
    assert "not probed: the images give 1 of 3 similarity" in out
    monkeypatch.setattr(probes, "probe", lambda *_, **__: [])
    assert blind.report("photos", 3, ("rotation",)) == 0


def test_textures_are_drawn_when_asked_for():
    some = Textures(range(10))[1::2]
    assert len(some) == 5 and torch.equal(some[2], texture(5)) and not torch.equal(some[1], some[2])
    through = [Textures(range(9), jpeg)[3] for jpeg in (None, "4:4:4", "4:2:0")]
    assert torch.equal(through[0], texture(3))
    apart = [(a.float() - b.float()).abs().mean() for a, b in ((through[0], through[1]), (through[1], through[2]))]
    assert all(0 < difference < 10 for difference in apart), apart


def test_visible_copies_and_edges_are_found(images):
    assert next(f for f in probes.probe(images, "ordering", 1, 100) if f.probe == "edge continuity").exact > 0.5
    case = probes.Case([np.zeros((84, 84, 3), np.float32)] * 5, tuple("ABCD"), (), [], np.random.default_rng(0))
    assert probes.visible_copy(case) in "ABCD"


def test_the_command_says_so_when_images_do_not_do(tmp_path):
    done = launch("sslr1.evaluate", "--probes", tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "holds no images" in done.stderr
    assert json.dumps(done.stdout).count("Traceback") == 0
