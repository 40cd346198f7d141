"""What goes from the host to the device, on a device that is none (bench/standin.py): every copy is counted there, who
ever asked for it. In processes of their own, where it stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ATLAS = 64 * 64 * 20 * 3  # bytes, once a process


def on_a_standin(*command, **env):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'bench'}{os.pathsep}{ROOT}", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_steps(found, tables):
    """tables: bytes beside pictures and ids, as a share of the pictures, that a step may copy."""
    first, *others = found
    for step in found:
        by, sent = step["by"], step["sent"]
        assert 0 < sent["images"] <= step["pictures"]  # each once, and no larger than shown
        assert "patches" not in sent and "moved" not in sent
        assert set(by) == {"sslr1/ops/transfer.py:upload", "sslr1/ops/transfer.py:upload_together"}, by
        assert sum(by.values()) == sum(size for name, size in sent.items() if name != "weights")
        copied = step["copied"] - ATLAS * (step is first)
        assert copied - step["ids"] <= (1 + tables) * step["pictures"]
        assert step["before"] > 4 * copied
    for step in others:  # more updates; completions may have other lengths
        assert step["sent"]["images"] == first["sent"]["images"] and step["copied"] <= first["copied"]


def test_a_steps_pictures_are_copied_once_whatever_the_updates():
    check_steps(on_a_standin("bench/transfers.py", "--prompts", "5", "--side", "112", "--updates", "1", "3"), 0.1)


@pytest.mark.slow
def test_a_step_of_64_puzzles_of_448_px_copies_little_more_than_its_pictures():
    check_steps(on_a_standin("bench/transfers.py"), 0.1)


RENDERED = """
import json, tempfile
from collections import Counter
from pathlib import Path
from tests import interpreter
interpreter.mend()
import standin, torch, transfers
from sslr1 import ops
from sslr1.ops.render import NEAREST

device = standin.start()
with tempfile.TemporaryDirectory() as folder:
    built = transfers.session(device, Path(folder), 10, 112, model={"dtype": "float32"})
    standin.render_by_triton()
    stream = built.stream()
    batch = stream.build(0)
    stream.close()
assert all(prompt.pixel_values.device == device for prompt in batch.prompts)
expected, grids = batch.puzzles.render_patches(backend="cpp")
found = ops.patch_bytes(torch.cat([prompt.pixel_values.cpu() for prompt in batch.prompts]), built.spec)
apart = (found.int() - ops.patch_bytes(expected, built.spec).int()).abs()
modes = [set() for _ in grids]
for (canvas, *_, mode), _ in batch.puzzles.plan.tiles:
    modes[canvas].add(mode)
moved = [of_canvas == {NEAREST} for of_canvas in modes]
largest = [int(part.max()) for part in apart.split(grids.prod(1).tolist())]
names = Counter(batch.puzzles.names)
print(json.dumps({"names": names, "moved": moved, "largest": largest, "changed": float((apart > 0).float().mean())}))
"""


@pytest.mark.slow
def test_tritons_kernels_render_a_steps_prompts_as_cpp_does():
    """Of all puzzles, through the stream, whose images go to the device; by Triton's interpreter."""
    (found,) = on_a_standin("-c", RENDERED, TRITON_INTERPRET="1")
    assert len(found["names"]) == 5
    exact = [largest for largest, moved in zip(found["largest"], found["moved"]) if moved]
    assert exact and not any(exact)
    assert max(found["largest"]) <= 1 and found["changed"] < 0.01


ON_A_GPU = """
import json, tempfile
from pathlib import Path
import torch, transfers
from sslr1 import ops
from sslr1.ops import transfer

device = torch.device("cuda", 0)
for x in (torch.randn(3, 5), torch.arange(7), torch.zeros(0), torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)):
    one, (other, _) = transfer.upload(x, device, "a"), transfer.upload_together([x, x.double()], device, "b")
    assert torch.equal(one.cpu(), x) and torch.equal(other.cpu(), x) and one.device == other.device == device
transfer.sent.clear()
with tempfile.TemporaryDirectory() as folder:
    built = transfers.session(device, Path(folder), 10, 224, model={"dtype": "float32"})
    transfer.sent.clear()
    batch, learned = transfers.step(built, 2)
assert all(prompt.pixel_values.device == device for prompt in batch.prompts)
expected, _ = batch.puzzles.render_patches(backend="cpp")
found = ops.patch_bytes(torch.cat([prompt.pixel_values for prompt in batch.prompts]), built.spec).cpu()
apart = (found.int() - ops.patch_bytes(expected, built.spec).int()).abs()
pictures = sum(x.nbytes for x in batch.puzzles.images)
print(json.dumps({"sent": transfer.sent, "pictures": pictures, "largest": int(apart.max()), **learned.metrics}))
"""


@pytest.mark.gpu
def test_a_step_on_a_gpu():
    """Out of pinned memory, rendered there, rolled out and learnt from: the same patches as the CPU's within a grey
    level, each picture copied once."""
    (found,) = on_a_standin("-c", ON_A_GPU)
    assert found["largest"] <= 1 and found["grad_norm"] > 0
    assert found["sent"]["images"] <= 1.01 * found["pictures"] and "patches" not in found["sent"]
