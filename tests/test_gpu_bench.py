"""bench/gpu.py on a CPU: limits, parts that die, what is kept and collected; its kit; and both runs, dry, with all that
they start."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

CEILINGS = {"copy_gb_s": 4000.0, "matrix_gflop_s": 700_000.0}


@pytest.fixture
def gpu(bench, tmp_path, monkeypatch):
    """bench/gpu.py, whose work is in tmp_path and whose changes to the environment end with the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    module = bench("gpu")
    monkeypatch.setattr(module.kit, "WORK", tmp_path / "work")
    monkeypatch.setattr(module.kit, "KIT", tmp_path / ".kit")
    monkeypatch.setattr(module.kit, "ARCHIVE", tmp_path / ".kit" / "kernels.tar.xz")
    return module


def script(code):
    return (sys.executable, "-S", "-E", "-c", code)


def rows_in(gpu, path):
    return {row["what"]: row for row in gpu.journal.gather(gpu.journal.read(path))["rows"]}


def test_a_part_over_its_limit_ends_with_all_that_it_started(gpu, tmp_path, capfd):
    rows, log = tmp_path / "rows.jsonl", tmp_path / "log.txt"
    code = f"""
import subprocess, sys, time
print("started", flush=True)
open({str(rows)!r}, "a").write('{{"begin": ["a", "slow", ""]}}\\n')
subprocess.run([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
"""
    status = gpu.carry_out(gpu.Part("a", 9, script(code), rows=True), 1.5, rows, log)
    assert status == "ended after its 2 s" and log.read_text() == "started\n" and "started" in capfd.readouterr().out
    assert rows_in(gpu, rows)["slow"]["failed"] == status


def test_a_part_whose_process_dies_goes_on_behind_the_row(gpu, tmp_path):
    """By a signal, and by a device that answers no more; an ordinary failure is not tried again."""
    rows, log = tmp_path / "rows.jsonl", tmp_path / "log.txt"
    code = f"""
import json, os
path = {str(rows)!r}
text = open(path).read() if os.path.exists(path) else ""
kept = open(path, "a", buffering=1)
if "dead" not in text:
    print('{{"begin": ["a", "dead", ""]}}', file=kept)
    os.kill(os.getpid(), 11)
if "lost" not in text:
    print('{{"begin": ["a", "lost", ""]}}', file=kept)
    print('{{"row": {{"bench": "a", "what": "lost", "against": "", "failed": "illegal address"}}}}', file=kept)
    os._exit(75)
print('{{"row": {{"bench": "a", "what": "last", "against": "", "ours_s": 1}}}}', file=kept)
"""
    assert gpu.carry_out(gpu.Part("a", 30, script(code), rows=True), 30, rows, log) == "done"
    found = rows_in(gpu, rows)
    assert found["dead"]["failed"] == "its process died of SIGSEGV" and found["lost"]["failed"] == "illegal address"
    assert found["last"]["ours_s"] == 1
    code = f"open({str(log)!r} + '.times', 'a').write('x'); raise SystemExit(3)"
    assert gpu.carry_out(gpu.Part("a", 30, script(code), rows=True), 30, rows, log) == "exit status 3"
    assert (tmp_path / "log.txt.times").read_text() == "x"


def test_a_run_keeps_to_its_time_and_says_how_each_part_ended(gpu, tmp_path, monkeypatch, capsys):
    parts = [
        gpu.Part("build", 9, script("print('built')")),
        gpu.Part("slow", 60, script("import time; time.sleep(60)")),
        gpu.Part("late", 60, script("")),
    ]
    monkeypatch.setattr(gpu, "parts", lambda *_: parts)
    monkeypatch.setattr(gpu, "say_card", lambda: "a card")
    gpu.main(["run1", "--out", str(tmp_path / "out"), "--limit", "3.5"])
    lines = gpu.journal.read(tmp_path / "out" / "rows.jsonl")
    ended = {line["part"]["name"]: line["part"]["status"] for line in lines if "part" in line}
    assert ended["build"] == "done" and re.match("ended after its [12] s", ended["slow"])
    assert ended["late"] == "not run: no time was left" and gpu.kit.is_built()
    assert {"card": "a card"} in lines and "late: 0 of 60 s, not run" in capsys.readouterr().out
    files = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(files) == ["build.txt", "rows.jsonl", "slow.txt"]


def test_the_parts(gpu, tmp_path):
    """Their limits, what is repeated, and that at most eight files come of a run."""
    for run, names in (("run1", "build tests step kernels"), ("run2", "build tests models counters")):
        made = gpu.parts(run, "python", tmp_path / "rows.jsonl", False, ["tests/test_a.py::test_b"])
        assert [part.name for part in made] == names.split() and len(made) < 7
        assert 30 + sum(part.limit_s for part in made[1:-1]) < gpu.LIMITS[run], (
            "behind a build of 30 s, the last part gets its turn"
        )
    assert made[1].command[-1] == "tests/test_a.py::test_b" and made[1].limit_s == 90
    gpu.kit.WORK.mkdir()
    gpu.kit.note_build()
    assert [part.name for part in gpu.parts("run2", "python", "rows", False, [])] == ["models", "counters"]
    asked = {name for part in made for name in part.command} | {"step", "sampling", "decode", "delta", "render", "loss"}
    listed = {bench for bench, _ in importlib.import_module("benches").rows_of("cuda")}
    assert listed <= asked


def test_without_a_gpu_a_run_says_so(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main(["run1", "--out", str(tmp_path)])
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H100, 580.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert gpu.say_card() == "NVIDIA H100, 580.1"


def cuda_lines(**other):
    machine = {"mode": "cuda", "gpu": "NVIDIA H100", "cpu": "one", "cores": 16, "python": "3.12.1"}
    machine |= {"versions": dict.fromkeys(("torch", "triton", "transformers"), "1")} | other
    row = {
        "bench": "sampling",
        "what": "a row",
        "against": "torch",
        "goal": "2",
        "device": "cuda",
        "ceilings": CEILINGS,
    }
    step = {
        "bench": "step",
        "what": "a step",
        "against": "",
        "goal": "",
        "device": "cuda",
        "ceilings": CEILINGS,
        "ours_s": 9.0,
    }
    step |= {"peak_gb": 70.0, "peak_gb_generate": 60.0, "planned_gb": 71.2, "phases_s": {"generate": 3.0, "learn": 6.0}}
    step |= {"learn": {"s": 6.0, "flops": 2.1e15}, "tokens_s": {"drawn, of the step": 11_000.0}}
    return [
        {"card": "NVIDIA H100, 580.1"},
        {"process": machine},
        {"tests": ["a", "b", "c"]},
        {"test": "a", "outcome": "passed", "reason": ""},
        {"test": "b", "outcome": "failed", "reason": "assert 2 == 3"},
        {"row": {**row, "ours_s": 0.001, "peer_s": 0.004, "ratio": 4.0, "share_of_copy": 0.7, "extra_mb": [1, 2000]}},
        {"row": step},
        {"begin": ["loss", "another", "TRL"]},
    ]


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_what_was_found_is_collected_and_shown(gpu, bench, tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernels-nvidia-h100.json"
    monkeypatch.setattr(gpu, "results_file", lambda kind, found: path)
    first = write(tmp_path / "one", cuda_lines())
    again = [*cuda_lines(cpu="another")[:2], {"test": "b", "outcome": "passed", "reason": ""}]
    gpu.main(["collect", first, write(tmp_path / "two", again)])
    found = json.loads(path.read_text())
    assert found["gpu"] == "NVIDIA H100" and len(found["rows"]) == 3 and found["card"] == "NVIDIA H100, 580.1"
    assert found["tests"] == {"passed": 2, "others": {"c": "not run: "}}
    assert "failed: loss, another: its process ended while it was measured" in capsys.readouterr().out
    tables = bench("tables")
    none = tables.gpu()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    shown = tables.gpu()
    assert "| a row | torch (1 / 2,000 MB) | 1.00 | 4.00 | **4.00** | 2 | 70% of the copy rate |" in shown
    assert "70.0 GB at most (60.0 up to learn), 71.2 planned; generate 33%, learn 67%" in shown
    assert (
        "11,000 drawn, of the step; MFU of learn 50% of the product rate" in shown
        and "2 tests marked gpu passed" in shown
    )
    rows = len(bench("benches").rows_of("cuda")) + 1
    assert none.count("| not run |") == shown.count("| not run |") == rows, "what was not measured says so"
    for other, words in (({"python": "3.13"}, "two machines"), ({"mode": "dry"}, "two machines")):
        with pytest.raises(SystemExit, match=words):
            gpu.main(["collect", first, write(tmp_path / "two", cuda_lines(**other))])
    with pytest.raises(SystemExit, match="hold dry rows, none of a GPU"):
        gpu.main(["collect", write(tmp_path / "two", cuda_lines(mode="dry"))])


def surroundings():
    """The environment, of a process that isn't a worker of xdist."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def test_tests_are_kept_as_they_end(gpu, bench, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.fixture\ndef broken(): raise ValueError('no')\ndef test_c(broken): pass\n"
    )
    for dry in ("", "1"):
        rows.unlink(missing_ok=True)
        environment = {
            **surroundings(),
            "PYTHONPATH": str(ROOT / "bench"),
            "SSLR1_BENCH_ROWS": str(rows),
            "SSLR1_BENCH_DRY": dry,
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_tests", "-p", "no:cacheprovider", "test_it.py"]
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        found = {test.split("::")[1]: how for test, how in gpu.tests_of(gpu.journal.read(rows)).items()}
        if dry:
            assert found == dict.fromkeys(("test_a", "test_b", "test_c"), ("skipped", "Skipped: needs a GPU"))
        else:
            assert found["test_a"] == ("passed", "") and found["test_b"] == ("failed", "assert 1 == 2")
            assert found["test_c"] == ("failed", "ValueError: no")
    monkeypatch.setenv("SSLR1_BENCH_ROWS", str(rows))
    plugin, exits = bench("gpu_tests"), []

    def lost():
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(plugin, "WORKER", "gw1")
    monkeypatch.setattr(os, "_exit", exits.append)
    plugin.pytest_runtest_logfinish("a")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    plugin.pytest_runtest_logfinish("b")
    assert exits == [1]


NCU = """==PROF== Connected to process 1
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    DRAM Throughput                   %        87.52
    Duration                         us     1,021.30
    L2 Hit Rate                       %        11.00
"""


def test_counters(bench, tmp_path, monkeypatch):
    counters, journal, kept = bench("counters"), bench("journal"), tmp_path / "rows.jsonl"
    monkeypatch.setenv("PATH", str(tmp_path))

    def found(*options):
        status = counters.main(["--keep", str(kept), *options])
        return status, journal.gather(journal.read(kept))["rows"][-1]

    status, row = found("--dry")
    assert status == 0 and row["why_not"] == "needs ncu" and row["dry"] == "needs a GPU"
    kept.unlink()
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!/bin/sh\n/bin/cat <<'E'\n{NCU}E\n")
    ncu.chmod(0o755)
    status, row = found()
    assert status == 0 and row["counters"] == {"DRAM Throughput": "87.52 %", "Duration": "1,021.30 us"}
    ncu.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM: no permission'; exit 1\n")
    status, row = found()
    assert status == 1 and "ERR_NVGPUCTRPERM" in row["failed"]


def test_the_kit_is_made_and_unpacked_elsewhere(gpu, tmp_path, monkeypatch, capsys):
    """The cache's files name each other by their places, which are others there."""
    kit = gpu.kit

    def compile_kernels(cache, driver):
        folder = cache / "KEY"
        folder.mkdir(parents=True)
        for name in ("k.cubin", "k.json", "k.ptx"):
            (folder / name).write_text(name)
        paths = {name: str(folder / name) for name in ("k.cubin", "k.json", "k.ptx")}
        (folder / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
        assert (driver / "libcuda.so.1").exists()

    monkeypatch.setattr(kit, "compile_kernels", compile_kernels)
    monkeypatch.setattr(kit, "collect_wheels", lambda: (kit.KIT / "a-1-py3-none-any.whl").write_text("no wheel"))
    gpu.main(["prepare"])
    assert "1 kernels, a-1-py3-none-any.whl, kernels.tar.xz: 0.0 MB" in capsys.readouterr().out
    asked, inner = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command))
    kit.unpack("python")
    monkeypatch.setattr(subprocess, "run", inner)
    assert kit.kernels() == 1 and str(kit.KIT / "a-1-py3-none-any.whl") in asked[0]
    folder = kit.WORK / "kernels" / "KEY"
    assert sorted(path.name for path in folder.iterdir()) == ["__grp__k.json", "k.cubin", "k.json"]
    there = json.loads((folder / "__grp__k.json").read_text())["child_paths"]
    assert there == {name: str(folder / name) for name in ("k.cubin", "k.json", "k.ptx")}
    monkeypatch.setattr(kit, "MOST", 10)
    with pytest.raises(SystemExit, match="don't carry this"):
        kit.prepare()


def test_a_device_is_pretended(bench):
    """What bench/pretend.py tells the code that launches kernels."""
    mode = bench("pretend").OnGpu()
    with mode:
        x = torch.empty(3, device="cuda").cuda()
        assert x.is_cuda and x.device.type == "cuda" and x.cpu() is x and (x == 0).all()
        assert torch.zeros(2, device=x.device).is_cuda and x.to("cuda", torch.float64).dtype == torch.float64
        narrow = torch.ones(2, 2, dtype=torch.bfloat16)
        assert torch.mm(narrow, narrow, out_dtype=torch.float32).dtype == torch.float32
    assert x.device.type == "cpu"


@pytest.mark.slow
def test_compiled_kernels_serve_elsewhere(gpu, tmp_path, monkeypatch, capsys):
    """What a GPU's test and the benchmarks launch is compiled by `prepare`, and by no process that has its cache."""
    monkeypatch.setattr(gpu, "marked", lambda: ["tests/ops/test_token_logprobs.py"])
    monkeypatch.setattr(gpu.kit, "collect_wheels", lambda: None)
    gpu.main(["prepare"])
    told = capsys.readouterr().out
    variants = [int(n) for n in re.findall(r"(\d+) variants", told)]
    assert len(variants) == 2 and all(n > 3 for n in variants), told
    gpu.kit.unpack(sys.executable)
    cache, before = gpu.kit.WORK / "kernels", gpu.kit.kernels()
    kept = {path.name for path in cache.iterdir()}
    assert before >= max(variants)
    gpu.kit.compile_kernels(cache, gpu.kit.stand_in(tmp_path))
    assert {path.name for path in cache.iterdir()} == kept


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_runs_dry(gpu, tmp_path):
    """As programs: every row is written and says that it needs a GPU, every test is listed."""
    environment = {**surroundings(), "SSLR1_GPU_WORK": str(tmp_path / "work")}
    found = {}
    for run, tests in (("run1", []), ("run2", ["tests/ops/test_token_logprobs.py"])):
        command = [sys.executable, "bench/gpu.py", run, *tests, "--dry", "--limit", "800", "--out", str(tmp_path / run)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        lines = gpu.journal.read(tmp_path / run / "rows.jsonl")
        assert {line["part"]["status"] for line in lines if "part" in line} <= {
            "done",
            "not run: a dry run builds nothing",
        }
        tested = gpu.tests_of(lines)
        assert len(tested) >= (30 if run == "run1" else 3) and {how for how, _ in tested.values()} == {"skipped"}
        found |= {(r["bench"], r["what"], r["against"]): r for r in gpu.journal.gather(lines)["rows"]}
        assert len(list((tmp_path / run).iterdir())) <= 8
    dry = {(name, row.what, row.against) for name, row in importlib.import_module("benches").rows_of("dry")}
    assert dry <= set(found) and len(found) == len(dry) + 1
    assert all("needs a GPU" in row["dry"] and "failed" not in row for row in found.values())
