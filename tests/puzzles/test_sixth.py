"""docs/adding-a-puzzle.md works as it stands: its one file and its one line, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "adding-a-puzzle.md").read_text(encoding="utf-8")


def block(start):
    """The page's code block that begins with `start`."""
    (found,) = (text for _, text in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.S | re.M) if text.startswith(start))
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository in which what the page says has been done."""
    folder = tmp_path_factory.mktemp("sixth")
    for name in ("sslr1", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "sslr1" / "puzzles" / "mirror.py").write_text(block('"""Mirror'))
    listing = folder / "sslr1" / "puzzles" / "__init__.py"
    text = listing.read_text()
    assert text.count('    "correspondence",\n') == 1
    listing.write_text(text.replace('    "correspondence",\n', '    "correspondence",\n' + block('    "mirror"')))
    return folder


def test_the_page_works(copy):
    """The page's own lines, all that asks for puzzles by name (configuration, curriculum, probes, preview), and the
    tests that come for free: seven, at two of the four levels."""
    command = next(line for line in block("python -m pytest").splitlines() if "pytest" in line)
    path, chosen = re.fullmatch(r"python -m pytest (\S+) -k (\w+)", command).groups()
    code = (
        block("import torch")
        + """
import re
import sys

import pytest

assert sslr1.__file__.startswith(FOLDER), sslr1.__file__
from sslr1 import config, preview, puzzles
from sslr1.evaluate import probes
from sslr1.puzzles.curriculum import Curriculum, chance_reward

loaded = config.load("configs/tiny.yaml", ["puzzles.mixture={mirror: 1}", "puzzles.levels={mirror: 1}"])
assert loaded.puzzles.levels["mirror"] == 1
default = config.check({"model": {"path": "m"}, "data": {"path": "d"}}).puzzles
assert default.mixture["mirror"] == 0.1 and default.levels["mirror"] == 2
paper = config.check({"model": {"path": "m"}, "data": {"path": "d"}, "puzzles": {"preset": "paper"}}).puzzles
assert "mirror" not in paper.mixture
Curriculum("adaptive", puzzles.LEVELS, puzzles.START_LEVEL, 0).level(0, 0, "mirror")
for level, count in zip(puzzles.LEVELS["mirror"], (3, 4, 6, 8)):
    made = puzzles.make(images, "mirror", level=level)
    assert all(made.decidable) and set(made.chance) == {1 / count} and set(made.canvas_counts) == {count}
    for canvases, answer in zip(made.render(), made.answers):
        # a quarter turn of any picture is any other, up to rounding, but never the answer's
        odd = "ABCDEFGH".index(answer.value)
        for i in range(count):
            for j in range(i):
                turned = [torch.rot90(canvases[i], k).float() - canvases[j] for k in range(4)]
                nearest = min(float(gap.abs().max()) for gap in turned)
                assert nearest > 20 if odd in (i, j) else nearest <= 1, (i, j, odd, nearest)
    assert abs(chance_reward(made.answers[0]) - (0.1 + 0.9 / count)) < 1e-12
even = torch.full((288, 288, 3), 90, dtype=torch.uint8)
stripes = torch.arange(288, dtype=torch.uint8)[:, None, None].expand(288, 288, 3).contiguous()
assert not any(puzzles.make([even, stripes], "mirror", level=1).decidable)  # the same in a mirror
found = probes.probe([torch.from_numpy(scene(i, 288)) for i in range(20)], "mirror", 2, 100)
assert {f.probe for f in found} == {"constant", "random"}
assert preview.picture(puzzles.make(images[:1], "mirror")[0]).mode == "RGB"
assert len(puzzles.make(images[:1], "mirror", composed=True).render()[0]) == 1
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", PATH, "-k", f"{CHOSEN} and (1 or 4)"]))
"""
    )
    for name, value in (("FOLDER", str(copy)), ("PATH", path), ("CHOSEN", chosen)):
        code = code.replace(name, repr(value))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) == 14, done.stdout
