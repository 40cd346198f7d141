"""Who may import what: the floors of the layout, and which packages the lower ones do without."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"_C", "kernels", "errors", "interrupt", "pixels", "processors", "sums"},
    {"files"},
    {"ops"},
    {"puzzles", "model"},
    {"data", "rollout", "learner", "integrations", "alarms"},
    {
        "checkpoint",
        "metrics",
        "glossary",
        "progress",
        "budget",
        "charts",
        "records",
        "trackers",
        "intervals",
        "textures",
    },
    {"probes", "samples", "report", "scoring"},
    {"benchmarks", "tables"},
    {"build", "entry", "run", "train", "warmup", "evaluate", "preview", "export", "torchrun", "__main__"},
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
    for other in set(imported(path)) - {mine}:
        if other == "config":  # beside them all, seen by entry points, the learner and checkpoints
            assert FLOOR[mine] == len(FLOORS) - 1 or mine in ("learner", "checkpoint")
        elif mine == "config":
            assert other == "settings"
        elif mine == "settings":
            assert other in ("errors", "puzzles")
        elif path.name == "tiny.py" and other == "puzzles":
            continue  # its tokenizer learns its vocabulary from the questions
        elif mine != "__init__":
            assert FLOOR[other] < FLOOR[mine] or FLOOR[mine] == len(FLOORS) - 1, f"{mine} imports {other}"
            assert mine != "puzzles" or other in ("ops", "errors", "sums")
            assert mine != "integrations" or other in ("puzzles", "errors", "pixels")


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


def test_a_report_is_written_without_torch():
    """Of a run folder that was copied to a machine that can't train."""
    code = "import sys; sys.modules['torch'] = sys.modules['PIL'] = None; import sslr1.report; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "fine\n", done.stderr
