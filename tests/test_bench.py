"""Benchmarks: what runs on a GPU only is run here on a small model, and all of it imports where little is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sslr1 import config
from sslr1.model import parallel
from tests.conftest import ROOT
from tests.model.test_load import PUBLISHED

# What a machine lent for its GPU may lack
LACKED = (
    "pydantic",
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


@pytest.fixture
def bench(monkeypatch):
    """Import a file of bench/."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    before = set(sys.modules)

    def load(name):
        if name != "__main__":
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location("bench_main", ROOT / "bench" / "__main__.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(ROOT / "bench") in sys.modules[name].__file__:
            del sys.modules[name]
    parallel.stop()


@pytest.fixture
def case(bench):
    """A function that makes a Case of a small model in GPU's manner: some groups, vision and text of two layers."""
    grpo = bench("grpo")
    two = dict(num_hidden_layers=2, hidden_size=128, intermediate_size=128)
    small = replace(grpo.SMALL, text=two, vision=dict(depth=2, out_hidden_size=128), recompute=1, token_budget=200)
    return lambda **changes: grpo.Case(small, **{**dict(visual=16, prompts=3, group_size=4, new=6), **changes})


def test_options_are_the_configurations(case):
    """But for what bench/grpo.py says."""
    made = case()
    default = config.check({"model": {"path": "m"}, "data": {"path": "d"}})
    assert vars(made.loss) == default.loss.model_dump()
    assert vars(made.optim) == default.optim.model_dump()
    own = dict(prompts=3, group_size=4, max_tokens=6)
    assert vars(made.rollout) == {name: own.get(name, getattr(default.rollout, name)) for name in vars(made.rollout)}


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


def test_the_learners_row(bench, case):
    """The same update from shared prompts and from separate sequences, which its own assertions compare."""
    (row,) = bench("learner").updates(case())
    assert row["flops"] > 0 and row["ours"]()["computed"] < row["peer"]()["computed"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rollouts_row(bench, case, dtype):
    rollout = bench("rollout")
    made = case()
    if dtype == "bfloat16":
        made = bench("grpo").Case(replace(made.shape, dtype=dtype), 16, 3, 4, 6)
    row = rollout.row(made)
    assert len(row["ours"]()) == 3 and row["step"]["bytes"] > 0
    assert "3 prompts" in row["what"] and [len(ids) for ids in row["peer"]()] == [12]


def test_the_steps_row(bench, case, monkeypatch):
    step = bench("step")

    def absent(name):
        raise step.PackageNotFoundError(name)

    monkeypatch.setattr(step, "version", absent)
    made = case(prompts=4)
    row = step.row(made)
    assert row["peer"] is None and "trl" in row["why_not"]
    groups, learned = row["ours"]()
    assert len(groups) == 4 and learned["tokens"] == 4 * 4 * 6
    assert 0 < made.planned_gb() < 1


def test_the_kernels_rows(bench):
    for row in (
        bench("sampling").row(3, torch.bfloat16, "cpu"),
        bench("render").on_gpu(2, "cpu"),
        bench("loss").row_kernel(1000, torch.float32, "cpu"),
    ):
        assert row["bytes"] > 0
        row["ours"](), row["peer"]()


def test_bounds_and_rows_without_a_peer(bench, monkeypatch, tmp_path, capsys):
    """A row's bytes and operations become shares of what the machine was measured to do; ours alone is timed too."""
    main = bench("__main__")
    rows = [
        {"what": "a", "against": "b", "goal": "", "ours": lambda: 1, "peer": None, "why_not": "no peer here"},
        {
            "what": "c",
            "against": "d",
            "goal": "2",
            "ours": lambda: 1,
            "peer": lambda: 2,
            "bytes": 10**6,
            "flops": 10**9,
        },
        {"what": "e", "against": "f", "goal": "", "ours": None, "peer": None, "why_not": "needs a GPU"},
    ]
    shares = main.shares(
        {"bytes": 3e9, "flops": 4e12, "device": "cuda"}, 2.0, {"cuda_copy_gb_s": 3.0, "cuda_matrix_bf16_gflop_s": 8e3}
    )
    assert shares == {"share_of_copy": 0.5, "share_of_products": 0.25}
    monkeypatch.setattr(main, "BENCHES", {"made up": type("Bench", (), {"rows": staticmethod(lambda: iter(rows))})})
    monkeypatch.setattr(main, "results_file", lambda kind, found: tmp_path / "found.json")
    monkeypatch.setattr(sys, "argv", ["bench", "--seconds", "0"])
    main.main()
    printed = capsys.readouterr().out
    assert "no peer here" in printed and "needs a GPU" in printed
    alone, both, none = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert alone["ours_s"] > 0 and "ratio" not in alone and "peer_s" not in alone
    assert both["ratio"] > 0 and both["share_of_copy"] > 0 and not {"bytes", "flops"} & set(both)
    assert "ours_s" not in none


def test_a_lacking_package_is_named(bench, monkeypatch):
    main = bench("__main__")

    def rows():
        import no_such_package  # noqa: F401

        yield {}

    monkeypatch.setattr(main, "BENCHES", {"made up": type("Bench", (), {"rows": staticmethod(rows)})})
    (row,) = main.rows_of("made up")
    assert row["why_not"] == "needs no_such_package" and row["ours"] is row["peer"] is None


def test_everything_imports_where_little_is_installed():
    names = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem != "__main__")
    code = BLOCKED + "import importlib\nfor name in " + repr([*names, "__main__"]) + ": "
    code += "importlib.import_module(name) if name != '__main__' else __import__('runpy').run_path('bench/__main__.py')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_gpus_tests_are_found_where_little_is_installed(tmp_path):
    """bench/gpu.sh runs files by name: one that can't be imported there would keep all others from running."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    files = subprocess.run(
        ["bench/gpu.sh", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    marked = [p for p in (ROOT / "tests").rglob("test_*.py") if "\n@pytest.mark.gpu" in p.read_text()]
    assert sorted(files) == sorted(str(p.relative_to(ROOT)) for p in marked)
    found = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *files]
    done = subprocess.run(found, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(file in done.stdout for file in files)
