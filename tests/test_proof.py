"""bench/proof.py trains, goes on and collects; bench/learning.py says what it found, as the definitions have it."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from tests.forks import launch


@pytest.fixture
def bench(monkeypatch):
    """Import a file of bench/."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module
    for name in ("proof", "learning", "machine", "curve"):
        sys.modules.pop(name, None)


def fork(command, stdout, stderr, env):
    """`subprocess.run` of `python -m …`, less its imports."""
    assert command[:2] == [sys.executable, "-m"] and stdout is stderr
    done = launch(*command[2:], check=False, cwd=Path.cwd(), **env)
    stdout.write(done.stdout + done.stderr)
    return done


def test_a_run_is_made_once_and_collected(bench, tmp_path, scenes, monkeypatch):
    pytest.importorskip("pydantic")  # the runs that it starts need it, and say so in files
    proof, learning = bench("proof"), bench("learning")
    monkeypatch.chdir(tmp_path)
    small = ["train.steps=2", "eval.count=8", "rollout.prompts=4", "rollout.group_size=2", "log.tensorboard=false"]
    share = "puzzles.mixture={rotation: 1, ordering: 0}"
    monkeypatch.setattr(proof, "FORMS", {"direct": [share, f"data.path={scenes}", *small]})
    monkeypatch.setattr(proof, "RUNS", {"only-rotation": ("direct", [])})
    monkeypatch.setattr(proof, "FORMAT_ONLY", ["train.warmup.steps=2", "train.warmup.batch=2"])
    monkeypatch.setattr(proof, "WARMUPS", {})
    monkeypatch.setattr(proof, "SEEDS", (5,))
    monkeypatch.setattr(proof, "write_scenes", lambda *_, **__: None)
    monkeypatch.setattr(proof, "write_disks", lambda *_: None)
    monkeypatch.setattr(proof, "results_file", lambda kind, found: tmp_path / f"{kind}.json")
    monkeypatch.setattr(sys, "argv", ["proof.py", "--jobs", "1"])
    monkeypatch.setattr(proof, "subprocess", SimpleNamespace(run=fork))
    assert not proof.finished("only-rotation-seed-5")
    proof.main()
    found = json.loads((tmp_path / "proof.json").read_text())
    (run,) = found["runs"]
    assert (run["run"], run["seed"], run["warmed_up_for"]) == ("only-rotation", 5, 2)
    assert (run["steps"], len(run["entropy"])) == (2, 2)
    assert [set(when) for when in run["held_out"]] == [{"rotation", "ordering"}] * 2
    assert run["held_out"][0]["rotation"]["n"] == 8 and len(run["sampled"]["rotation"]) == 2
    monkeypatch.setattr(proof, "call", lambda *_, **__: pytest.fail("trained again"))
    proof.main()
    assert json.loads((tmp_path / "proof.json").read_text())["runs"] == [run]
    assert learning.TABLES["accuracy"](found)[1][0][-1].endswith(", of one seed's puzzles")
    assert "rotation, 2 steps" in learning.svg(learning.panels(found))


def test_results_stay_while_their_settings_do(bench, tmp_path):
    """`make proof` on a machine without the run folders of before adds to the results that are there."""
    proof = bench("proof")
    now = {
        "config": {"optim": {"lr": 1.0}},
        "forms": {"direct": ["a"], "levels": ["b"]},
        "warmups": {"": ["c"], "levels": ["d"]},
        "further": ["e"],
        "until": {},
        "models": {},
        "overrides": {"one": ("direct", ["f"]), "two": ("levels", [])},
    }
    path = tmp_path / "proof.json"
    assert proof.recorded(path, now) == {}
    runs = [{"run": "one", "seed": 0}, {"run": "two", "seed": 0}, {"run": "two", "seed": 1}, {"run": "gone", "seed": 0}]
    for changes, kept in (
        ({}, {"one-seed-0", "two-seed-0", "two-seed-1"}),
        ({"overrides": {**now["overrides"], "one": ("direct", ["g"])}}, {"two-seed-0", "two-seed-1"}),
        ({"warmups": {**now["warmups"], "": ["h"]}}, {"two-seed-0", "two-seed-1"}),
        ({"warmups": {"": ["c"]}}, {"one-seed-0"}),
        ({"forms": {**now["forms"], "levels": ["i"]}}, {"one-seed-0"}),
        ({"models": {"levels": {}}}, {"one-seed-0"}),
        ({"until": {"direct": [["rotation"], 0.5]}}, {"two-seed-0", "two-seed-1"}),
        ({"config": {"optim": {"lr": 2.0}}}, set()),
    ):
        path.write_text(json.dumps({**now, **changes, "runs": runs}))
        assert set(proof.recorded(path, now)) == kept, changes


def made_up(before, after, name="only-rotation"):
    """Three runs of a puzzle with these held-out shares."""
    return {
        "warmups": {"": []},
        "overrides": {name: ["direct", []]},
        "runs": [
            {
                "run": name,
                "seed": seed,
                "steps": 9,
                "warmed_up_for": 120,
                "mixture": {"rotation": 1},
                "levels": {"rotation": 2},
                "held_out": [
                    {"rotation": {"exact": p, "accuracy": p, "format": 1.0, "chance": 0.25, "n": 400}} for p in shares
                ],
                "sampled": {"rotation": [0.2, 0.9]},
                "drawn": 0,
                "elapsed_s": 1,
            }
            for seed, shares in enumerate(zip(before, after))
        ],
    }


def test_intervals_are_students_and_never_narrower_than_wilsons(bench):
    learning = bench("learning")
    from scipy import stats

    for values in ([0.2, 0.3, 0.4], [0.1, 0.5, 0.6]):
        p, low, high = learning.interval(values, 400)
        expected = stats.t.interval(0.95, 2, p, stats.sem(values))
        assert (low, high) == pytest.approx([max(expected[0], 0), min(expected[1], 1)], abs=1e-3)
    p, low, high = learning.interval([0.25] * 3, 400)  # a constant answer to as many puzzles of each
    assert (low, high) == pytest.approx(stats.binomtest(300, 1200).proportion_ci(0.95, "wilson"), abs=1e-3)
    _, *alone = learning.interval([0.25], 400)
    assert alone == pytest.approx(stats.binomtest(100, 400).proportion_ci(0.95, "wilson"), abs=1e-3)
    assert learning.STUDENT == pytest.approx({n: stats.t.ppf(0.975, n - 1) for n in learning.STUDENT}, abs=1e-3)


def test_what_is_told_apart(bench):
    learning = bench("learning")
    for before, after, said in (
        ([0.25, 0.25, 0.25], [0.9, 0.95, 1.0], "**yes**"),
        ([0.25, 0.25, 0.25], [0.27, 0.24, 0.26], "no"),
        ([0.2, 0.25, 0.3], [0.3, 0.9, 0.5], "no"),  # on the mean alone it would be
        ([0.25], [0.9], "**yes**, of one seed's puzzles"),
        ([0.25], [0.3], "no, of one seed's puzzles"),
    ):
        found = made_up(before, after)
        assert learning.TABLES["accuracy"](found)[1][0][-1] == said
    row = learning.together("only-rotation", {"rotation": "turns"})(made_up([0.2, 0.3, 0.25], [0.9, 0.95, 1.0]))[1][0]
    assert row[:4] == ["turns", "100%", "9", "25.0%"] and row[-1] == "**yes**"
    rows = learning.transfer(made_up([0.2, 0.3, 0.25], [0.5, 0.6, 0.55]))[1]
    assert rows[0][1].startswith("**+30.0 ±") and rows[0][2] == "–"


def test_a_warm_up_goes_on_until_enough_is_right(bench, tmp_path, monkeypatch):
    proof = bench("proof")
    started, shares = [], iter([[0.2, 0.5], [0.6, 0.3], [0.4, 0.5]])
    cold = {}

    def build(folder, seed, text=None):
        cold[folder] = text
        return folder

    def call(module, config, *options, log):
        if module == "sslr1.evaluate":
            assert "puzzles.mixture={rotation: 1}" in options  # of those that it is taught, no others
            cells = [{"accuracy": share} for share in next(shares)]
            return Path(options[options.index("--out") + 1]).write_text(json.dumps({"cells": cells}))
        out, *options = options
        started.append(options)
        (tmp_path / out).mkdir()
        (tmp_path / out / "preprocessor_config.json").touch()

    monkeypatch.setattr(proof, "FOLDER", tmp_path)
    monkeypatch.setattr(proof, "FORMS", {"seen": [], "unseen": []})
    monkeypatch.setattr(proof, "WARMUPS", {"seen": ["train.warmup.steps=9"]})
    monkeypatch.setattr(proof, "UNTIL", {"seen": (("rotation",), 0.4)})
    monkeypatch.setattr(proof, "MODELS", {"seen": {"text": {"num_hidden_layers": 5}}})
    monkeypatch.setattr(proof, "build_tiny", build)
    monkeypatch.setattr(proof, "call", call)
    folder = proof.warmed_up("seen", 7)
    assert proof.complete(folder) and len(started) == 3
    models, seeds = zip(*((options[0], options[1]) for options in started))
    assert seeds == ("train.seed=7", "train.seed=1007", "train.seed=2007")  # other puzzles each time …
    assert models[1:] == tuple(f"model.path={folder}-part-{n}" for n in (0, 1))  # … to the model of the time before
    assert [options[-1] for options in started] == ["train.warmup.steps=9", proof.ON, proof.ON]
    assert proof.warmed_up("seen", 7) == folder and len(started) == 3
    assert proof.warmed_up_for("seen", 7) == 9 + 2 * 50 and proof.warmed_up_for("unseen", 7) == 120
    assert proof.complete(proof.warmed_up("unseen", 7)) and len(started) == 4
    assert list(cold.values()) == [{"num_hidden_layers": 5}, None]
    started.clear()
    shares = iter([[1.0, 0.39]] * proof.MOST)
    assert proof.complete(proof.warmed_up("seen", 8)) and len(started) == proof.MOST
