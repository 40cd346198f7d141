"""Memory that is handed out again: never while somebody still holds it, and no more than a limit is kept."""

import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sslr1.ops import backends, memory

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
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    held = [memory.empty(40 << 20, dtype=torch.uint8).fill_(1) for _ in range(8)]
    full = resident()
    held.clear()  # 320 MiB, of which 128 may be kept
    assert full - resident() > 180 << 20


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
