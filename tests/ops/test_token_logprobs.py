"""Forward-only log-probs and entropy: each backend against float64; Triton in the interpreter; both GPU kernels compiled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sslr1 import ops

ROOT = Path(__file__).parent.parent.parent
SHAPES = [(1, 1), (3, 37), (5, 4096), (4, 5003), (2, 151_936)]


def check(backend, device="cpu"):
    for N, V in SHAPES:
        for spread in (1.0, 20.0):
            D = 16
            hidden = torch.randn(N, D, device=device)
            head = spread * torch.randn(V, D, device=device) / D**0.5
            tokens = torch.randint(0, V, (N,), device=device)
            logprobs, entropy = ops.token_logprobs(hidden, head, tokens, 0.9, backend=backend, chunk=2)
            exact = (hidden.double() @ head.double().T / 0.9).log_softmax(-1)
            expected = exact.gather(-1, tokens[:, None])[:, 0]
            bound = 1e-4 * max(1.0, spread / 5)
            assert (logprobs - expected).abs().max() <= bound, (N, V, spread)
            assert (entropy - -(exact.exp() * exact).sum(-1)).abs().max() <= bound
            assert (logprobs <= 0).all()


def test_reference(seed):
    check("reference")


INTERPRETED = """
import torch, sys
torch.manual_seed(int(sys.argv[1]))
from tests.ops.test_token_logprobs import check
check("triton")
print("interpreted")
"""


def test_triton_in_the_interpreter(seed):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(seed)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "interpreted\n", done.stderr[-3000:]


def test_triton_compiles_for_hopper_without_spills(tmp_path):
    import triton
    from sslr1.kernels import row_logprobs as module
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(
        logits="*fp32",
        tokens="*i64",
        logprobs="*fp32",
        entropy="*fp32",
        vocabulary="i32",
        stride="i64",
        inverse_temperature="fp32",
        BLOCK="constexpr",
    )
    source = ASTSource(
        module.kernel, signature, {(7,): module.BLOCK}, {(i,): [["tt.divisibility", 16]] for i in range(6)}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    assert_no_spills(cubin)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_cuda_sources_compile_for_hopper_without_spills(tmp_path):
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        cubin = tmp_path / (source.stem + ".cubin")
        subprocess.run(
            [
                "nvcc",
                "-O3",
                "-std=c++17",
                "-cubin",
                "-gencode",
                "arch=compute_90a,code=sm_90a",
                str(source),
                "-o",
                str(cubin),
            ],
            check=True,
        )
        assert_no_spills(cubin)


def assert_no_spills(cubin):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [str(tool), "--dump-resource-usage", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    assert "REG:" in report and "STACK:" in report, report
    assert all(word.split(":")[1] == "0" for word in report.split() if word.startswith(("STACK:", "LOCAL:"))), report


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_on_the_gpu(seed, backend):
    check(backend, "cuda")


def test_cuda_backend_says_what_it_needs():
    with pytest.raises(ValueError, match="CUDA"):
        ops.token_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), backend="cuda")
    with pytest.raises(ValueError, match="backend"):
        ops.token_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), backend="abacus")
