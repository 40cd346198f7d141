"""Who may import what: the floors of the layout, and which packages the lower ones do without."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"_C", "kernels", "errors", "sums", "at_first_use", "__main__"},  # of `sslr1` itself, the last
    {"distributed", "files"},
    {"ops"},
    {"puzzles"},
    {"config", "model"},
    {"data", "learner", "rollout"},
    {"integrations", "runs"},
    {"report", "setup"},
    {"evaluate", "export", "preview", "warmup"},
    {"run"},
    {"train", "torchrun"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sslr1":
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("sslr1.")]


@pytest.mark.parametrize("path", sorted((ROOT / "sslr1").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_import_from_floors_below(path):
    mine = path.relative_to(ROOT / "sslr1").with_suffix("").parts[0]
    if mine in ("__init__", "__main__"):  # what begins a program
        return
    others = set(imported(path)) - {mine}
    for other in others:
        assert FLOOR[other] < FLOOR[mine], f"{mine} imports {other}"
    if mine == "puzzles":
        assert others <= {"ops", "errors", "sums", "_C", "at_first_use"}
    if mine == "integrations":
        assert others <= {"puzzles", "errors", "data"}


def test_rooms_are_few():
    """At most ten modules are loose, and every folder is a package that an installation has."""
    loose = {p.stem for p in (ROOT / "sslr1").glob("*.py")} - {"__init__", "__main__"}
    assert len(loose) <= 10, sorted(loose)
    folders = {p.parent for p in (ROOT / "sslr1").rglob("*.py")}
    assert [str(p) for p in folders if not (p / "__init__.py").exists()] == []


def test_lower_floors_do_without_optional_packages():
    code = (
        "import sys\n"
        "for name in ('pydantic', 'nvidia', 'nvidia.dali', 'flash_attn', 'rich'): sys.modules[name] = None\n"
        "import sslr1.ops, sslr1.model, sslr1.rollout, sslr1.puzzles.batch, sslr1.data\n"
        "assert sslr1.data.Decoder().backend == 'pillow'\n"
        "print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "fine\n", done.stderr


REFUSED = {
    "optim.lrr=1": "optim.lrr is not a setting",
    "puzzles.levels.rotation=9": "puzzles.levels.rotation is 9",
    "data.path={empty}": "holds no images",
    "eval.path={empty}/no": "eval.path '",
    "model.path={empty}/no": "does not exist",
    "model.path={other}": "'llama' model; supported",
}


def test_what_a_start_refuses_is_said_before_the_large_imports(tmp_path, scenes):
    """Which take most of a start: transformers, torch's compiler and FSDP, the loop itself. Nothing is left behind."""
    places = {"empty": tmp_path / "empty", "other": tmp_path / "other"}
    for place in places.values():
        place.mkdir()
    (places["other"] / "config.json").write_text('{"model_type": "llama"}')
    overrides = [override.format(**places) for override in REFUSED]
    code = (
        "import sys\n"
        "for name in ('transformers', 'torch._dynamo', 'torch.distributed.fsdp', 'sslr1.run'):\n"
        "    sys.modules[name] = None\n"
        "from sslr1.train import main\n"
        f"for override in {overrides}:\n"
        f"    given = ['data.path={scenes}', {f'log.dir={tmp_path}/runs'!r}, override]\n"
        "    sys.argv = ['train', 'configs/tiny.yaml', *given]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert end.code == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said = done.stderr.splitlines()
    assert len(said) == len(REFUSED) and all(map(str.__contains__, said, REFUSED.values())), done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_report_is_written_without_torch():
    """Of a run folder that was copied to a machine that can't train."""
    code = "import sys; sys.modules['torch'] = sys.modules['PIL'] = None; import sslr1.report.__main__; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "fine\n", done.stderr
