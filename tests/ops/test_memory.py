"""Memory that is handed out again: never while somebody still holds it, and no more than a limit is kept."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sslr1.ops import backends, memory
from tests.conftest import ROOT

needs_extension = pytest.mark.skipif(backends._C is None, reason="the extension is not built")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_like_torch_empty(dtype):
    for shape in ((7,), (0, 3), (300, 1000), (5, 480, 640)):
        tensor = memory.empty(*shape, dtype=dtype)
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        tensor.fill_(1)
        assert tensor.sum(dtype=torch.float64) == tensor.numel()


@needs_extension
def test_handed_out_again_only_when_let_go():
    size = memory.SMALL * 33
    tensor = memory.empty(size, dtype=torch.uint8)
    address, view = tensor.data_ptr(), tensor[5:10]
    del tensor
    assert memory.empty(size, dtype=torch.uint8).data_ptr() != address  # a view still holds it
    del view
    again = memory.empty(size - 100, dtype=torch.uint8)
    assert again.data_ptr() == address
    arrays = [again.numpy()]
    del again
    assert memory.empty(size, dtype=torch.uint8).data_ptr() != arrays[0].ctypes.data  # so does an array


@needs_extension
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system doesn't tell a process's size there")
def test_what_is_kept_is_bounded():
    """In a process of its own: in one that has run other tests, what the system's allocator gives back varies."""
    code = (
        "import resource, torch; from pathlib import Path; from sslr1.ops import memory\n"
        "resident = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()\n"
        "held = [memory.empty(40 << 20, dtype=torch.uint8).fill_(1) for _ in range(8)]\n"
        "full = resident(); held.clear(); print(full - resident())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert int(done.stdout) > 180 << 20, done.stderr  # of 320 MiB, of which 128 may be kept


@needs_extension
def test_threads_never_share(draw):
    def fill(number):
        for size in draw_sizes:
            tensor = memory.empty(int(size), dtype=torch.uint8)
            tensor.numpy()[:] = number
            if (tensor.numpy() != number).any():
                return False
        return True

    draw_sizes = draw.integers(memory.SMALL, memory.SMALL * 4, 100)
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(fill, range(8)))
