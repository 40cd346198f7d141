"""Benchmarks: a GPU's rows are tried at small shapes, a row that fails costs no other, a run that is stopped keeps what
it has, and all of it imports where little is installed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from sslr1 import config, model
from tests.conftest import ROOT
from tests.model.test_load import PUBLISHED

# What a machine lent for its GPU may lack
LACKED = (
    "pydantic",
    "rich",
    "nvidia.dali",
    "flash_attn",
    "simplejpeg",
    "trl",
    "datasets",
    "liger_kernel",
    "cut_cross_entropy",
    "quack",
)
BLOCKED = f"import sys; sys.modules.update(dict.fromkeys({LACKED}))\n"
QUICK = ("--seconds", "0", "--rounds", "1")
CEILINGS = {"copy_gb_s": 3.0, "matrix_gflop_s": 8e3}


@pytest.fixture
def main(bench, monkeypatch, tmp_path):
    """bench/__main__.py, whose results go to tmp_path; main.rows: those of its one benchmark, a list to be filled."""
    module = bench("__main__")
    module.rows = []
    monkeypatch.setattr(module, "BENCHES", {"made up": lambda mode: list(module.rows)})
    monkeypatch.setattr(module, "rows_of", lambda mode, names: [("made up", row) for row in module.rows])
    monkeypatch.setattr(module, "results_file", lambda kind, found: tmp_path / "found.json")
    monkeypatch.setattr(module, "ceilings_of", lambda device: CEILINGS)
    return module


def a_row(bench, what, ours=lambda: 1, **sides):
    row = bench("row")
    return row.Row(what=what, against="b", make=lambda: row.Sides(ours=ours, **sides))


def test_options_are_the_configurations(bench):
    """But for what bench/grpo.py says."""
    grpo = bench("grpo")
    made = grpo.Case(grpo.TINY, visual=16, prompts=3, group_size=4, new=6)
    default = config.check({"model": {"path": "m"}, "data": {"path": "d"}})
    assert vars(made.loss) == default.loss.model_dump()
    assert vars(made.optim) == default.optim.model_dump()
    own = dict(prompts=3, group_size=4, max_tokens=6)
    assert vars(made.rollout) == {name: own.get(name, getattr(default.rollout, name)) for name in vars(made.rollout)}
    other = grpo.Case(grpo.TINY, visual=64, prompts=1, group_size=1, new=1)
    weights, others = (next(case.folder.glob("*.safetensors")) for case in (made, other))
    assert made.spec.max_pixels == 112**2 and other.spec.max_pixels == 224**2 and weights.samefile(others)


def test_the_large_model_is_the_published_one(bench, monkeypatch):
    """By the number of parameters that `build_tiny` would draw."""
    from transformers import AutoModelForImageTextToText

    from sslr1.model import tiny

    class Enough(Exception):
        pass

    def build(settings):
        with torch.device("meta"):
            network = inner(settings)
        raise Enough(sum(p.numel() for p in network.parameters()), settings)

    inner = AutoModelForImageTextToText.from_config
    monkeypatch.setattr(AutoModelForImageTextToText, "from_config", build)
    large = bench("grpo").LARGE
    with pytest.raises(Enough) as found:
        tiny.build_tiny("unused", text=large.text, vision=large.vision)
    number, settings = found.value.args
    assert number == PUBLISHED["qwen2.5-vl-3b"][1]
    published = PUBLISHED["qwen2.5-vl-3b"][0]
    assert settings.vision_config.window_size == published["vision_config"]["window_size"]
    assert settings.text_config.rope_parameters["mrope_section"] == published["rope_scaling"]["mrope_section"]


@pytest.mark.slow
def test_every_row_of_a_gpu_is_tried_on_the_cpu(bench, monkeypatch, tmp_path, capsys):
    """With their own checks; peers that are not there are named, and each row says that it needs a GPU."""
    main, journal, benches = bench("__main__"), bench("journal"), bench("benches")
    for name in LACKED:
        monkeypatch.setitem(sys.modules, name, None)

    def absent(name):
        raise bench("step").PackageNotFoundError(name)

    monkeypatch.setattr(bench("step"), "version", absent)
    monkeypatch.setattr(main, "ceilings_of", lambda device: CEILINGS)
    kept = tmp_path / "rows.jsonl"
    assert main.main(["--dry", "--keep", str(kept), *QUICK]) == 0, capsys.readouterr()
    rows = journal.gather(journal.read(kept))["rows"]
    assert [(r["bench"], r["what"], r["against"]) for r in rows] == [
        (name, row.what, row.against) for name, row in benches.rows_of("dry")
    ]
    assert all("needs a GPU" in row["dry"] and "failed" not in row for row in rows)
    lacking = {row["why_not"] for row in rows if "why_not" in row}
    assert lacking == {f"needs {name}" for name in ("trl", "liger_kernel", "cut_cross_entropy", "quack")}
    by_name = {row["bench"]: row for row in rows}
    phases = by_name["step"]["phases_s"]
    assert list(phases) == list(bench("step").PHASES) and by_name["step"]["ours_s"] >= sum(phases.values()) > 0
    assert 0 < by_name["step"]["planned_gb"] < 1 and by_name["step"]["learn"]["flops"] > 0
    assert by_name["rollout"]["step"]["bytes"] > 0 and by_name["learner"]["ratio"] > 0
    assert capsys.readouterr().out.count("needs a GPU") == len(rows)
    listed = [name for name, _ in benches.rows_of("cuda")]
    assert set(listed) == set(by_name) and len(listed) > len(rows)


def test_a_rollout_in_bfloat16(bench):
    """Its check is another one: transformers' log-probs of what we drew."""
    grpo, rollout = bench("grpo"), bench("rollout")
    sizes = dict(visual=16, prompts=2, group_size=4, new=6)
    sides = rollout.sides(replace(grpo.TINY, dtype="bfloat16"), sizes, True)
    mine, theirs = sides.ours(), sides.peer()
    assert [len(group.samples) for group in mine] == [4, 4] and theirs.shape[0] == 8
    sides.check(mine, theirs)


def test_the_rollouts_peer_draws_as_many_tokens_and_none_that_is_suppressed(bench):
    grpo, rollout = bench("grpo"), bench("rollout")
    case = grpo.Case(grpo.TINY, visual=16, prompts=2, group_size=4, new=6)
    prompts = model.prompts(case.draw(), case.tokenizer)
    drawn = rollout.make_peer(case, case.plain(), prompts, list(range(5, 768)))()
    assert drawn.shape == (8, len(prompts[0].input_ids) + 6) and (drawn[:, -6:] < 5).all()


def test_memory_on_the_gpu_is_a_calls_own(bench, monkeypatch):
    peaks = iter([3_000_000, 5_000_000])
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: next(peaks))
    assert bench("loss").cuda_peak(lambda: 1) == 2


def test_what_a_row_says(bench):
    """Every way to end: each is the row's own."""
    row = bench("row")

    def fail(problem):
        raise problem

    def found(ours=lambda: 1, device="cpu", limit_s=0, **sides):
        return row.measure(a_row(bench, "a", ours, **sides), device, CEILINGS, seconds=0, rounds=2, limit_s=limit_s)

    both = found(peer=lambda: 2, bytes=10**6, memory=lambda run: run() * 10, facts=lambda mine: {"mine": mine})
    assert both["ratio"] == both["peer_s"] / both["ours_s"] and both["share_of_copy"] > 0 and both["rounds"] == 2
    assert both["extra_mb"] == [10, 20] and both["mine"] == 1 and not {"bytes", "flops", "failed"} & set(both)
    assert found(facts=lambda mine: {"flops": 1e9}, device="cuda")["share_of_products"] > 0
    broken = found(lambda: fail(AssertionError("2 is not 3")))
    assert broken["failed"] == "AssertionError: 2 is not 3" and "ours_s" not in broken
    full = found(peer=lambda: fail(torch.OutOfMemoryError("CUDA out of memory.\nTried")), bytes=1)
    assert full["why_not"] == "OutOfMemoryError: CUDA out of memory." and full["ours_s"] > 0 and "failed" not in full
    lacking = found(peer=lambda: fail(ModuleNotFoundError(name="trl")), alone=False)
    assert lacking["why_not"] == "needs trl" and "ours_s" not in lacking
    none = found(lambda: fail(ModuleNotFoundError(name="DALI")))
    assert none["why_not"] == "needs DALI" and "failed" not in none
    wrong = found(peer=lambda: 2, check=lambda mine, theirs: fail(AssertionError(f"{mine} {theirs}")))
    assert wrong["failed"] == "AssertionError: 1 2" and wrong["ratio"] > 0
    assert "not done within 0.05 s" in found(lambda: time.sleep(3), limit_s=0.05)["failed"]
    late = found(peer=lambda: time.sleep(3), limit_s=0.05)
    assert "not done within 0.05 s" in late["why_not"] and late["ours_s"] > 0
    calls = []
    assert found(lambda: calls.append(1), once=True)["rounds"] == len(calls) == 1
    slow = iter([0, 0, 3])
    assert found(lambda: time.sleep(next(slow)), limit_s=0.05)["rounds"] == 1, "rounds that were made are kept"


def test_a_stopped_run_keeps_its_rows_and_goes_on(bench, main, monkeypatch, tmp_path, capsys):
    results, kept, calls = tmp_path / "found.json", tmp_path / "found.jsonl", []

    def rows():
        return json.loads(results.read_text())["rows"]

    def stop():
        raise KeyboardInterrupt

    def fail():
        raise AssertionError("wrong")

    main.rows += [a_row(bench, "one", lambda: calls.append(1)), a_row(bench, "two", stop), a_row(bench, "three", fail)]
    with pytest.raises(KeyboardInterrupt):
        main.main([*QUICK])
    assert [row["what"] for row in rows()] == ["one"] and rows()[0]["ours_s"] > 0 and len(calls) == 2
    assert "made up" in capsys.readouterr().out
    main.rows[1] = a_row(bench, "two", peer=lambda: 1)
    assert main.main([*QUICK, "--resume"]) == 1, "a row failed"
    assert [row["what"] for row in rows()] == ["one", "two", "three"] and len(calls) == 2
    assert rows()[2]["failed"] == "AssertionError: wrong" and "AssertionError: wrong" in capsys.readouterr().out
    assert not kept.exists(), "the run has come to its end"
    main.rows[:] = [a_row(bench, "one", lambda: calls.append(1)), a_row(bench, "other")]
    assert main.main([*QUICK]) == 0 and len(calls) == 4
    assert [row["what"] for row in rows()] == ["one", "other"], "what is a row no more is gone"


def test_a_row_that_was_kept_and_not_written_is_written_when_nothing_is_left_to_measure(bench, main, tmp_path):
    results, kept = tmp_path / "found.json", tmp_path / "found.jsonl"
    main.rows += [a_row(bench, "one")]
    assert main.main([*QUICK, "--keep", str(kept)]) == 0 and not results.exists()
    assert main.main([*QUICK, "--resume"]) == 0
    assert [row["what"] for row in json.loads(results.read_text())["rows"]] == ["one"] and not kept.exists()


def test_versions_do_not_mix(bench, main, monkeypatch, tmp_path):
    main.rows += [a_row(bench, "one")]
    here = main.machine()
    assert main.main([*QUICK]) == 0
    newer = {**here, "versions": {**here["versions"], "torch": "99.0"}}
    monkeypatch.setattr(main, "machine", lambda: newer)
    with pytest.raises(SystemExit, match=r"other versions \(torch .*, now 99.0\).*--anew"):
        main.main([*QUICK])
    assert main.main([*QUICK, "--anew"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["versions"]["torch"] == "99.0"
    main.journal.add(tmp_path / "rows.jsonl", process={**here, "mode": "cpu"})
    main.journal.add(tmp_path / "rows.jsonl", row={"bench": "made up", "what": "one", "against": "b"})
    with pytest.raises(SystemExit, match=r"--resume: .* other versions"):
        main.main([*QUICK, "--keep", str(tmp_path / "rows.jsonl"), "--resume"])


def test_a_lost_device_ends_the_process_behind_its_row(bench, main, monkeypatch, tmp_path):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    main.rows += [a_row(bench, "one"), a_row(bench, "two")]
    monkeypatch.setattr(main, "finish", lost)
    kept = tmp_path / "rows.jsonl"
    assert main.main([*QUICK, "--keep", str(kept)]) == main.DEVICE_LOST == 75
    monkeypatch.undo()
    with open(kept, "a") as file:
        file.write('{"row": {"bench": "made')  # cut off
    assert [row["what"] for row in main.journal.gather(main.journal.read(kept))["rows"]] == ["one"]


@pytest.mark.parametrize("arguments, words", [(["loos"], "no benchmark 'loos'"), (["--dry"], "--keep")])
def test_arguments_are_checked(bench, capsys, arguments, words):
    with pytest.raises(SystemExit):
        bench("__main__").main(arguments)
    assert words in capsys.readouterr().err


def test_everything_imports_where_little_is_installed():
    names = sorted(p.stem for p in (ROOT / "bench").glob("*.py") if p.stem not in ("__main__", "pretend", "gpu_tests"))
    code = BLOCKED + "import importlib\nfor name in " + repr([*names, "__main__"]) + ": "
    code += "importlib.import_module(name) if name != '__main__' else __import__('runpy').run_path('bench/__main__.py')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_gpus_tests_are_found_where_little_is_installed(tmp_path, bench):
    """bench/gpu.py runs files by name: one that can't be imported there would keep all others from running."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    files = bench("gpu").marked()
    found = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(found, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(files) > 8 and all(file in done.stdout for file in files)
