"""The Triton and CUDA kernels of `row_loss` against float64: Triton interpreted, both compiled, both on a GPU."""

import itertools
import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sslr1.ops import backends
from sslr1.ops import row_loss as dispatch
from sslr1.ops.row_loss import Coefficients, row_gradient, row_logprobs, row_loss
from tests.hopper import assert_no_spills
from tests.interpreter import interpret

ROOT = Path(__file__).parent.parent.parent
VOCABULARIES = (1, 37, 4096, 5003)
# What the CUDA kernel spreads over 2, 4 and 8 blocks, over 8 with large pieces, and what it reads twice.
LONG_VOCABULARIES = (25_000, 60_001, 151_936, 152_064, 300_003, 500_000)
TEMPERATURE = 0.9
BROKEN = [1, 2, 5]  # rows with NaN, with inf, of -inf only
MASKED, CERTAIN = 4, 6  # rows whose token has no and almost all probability


def functions(backend):
    """The three functions of a backend."""
    modes = (row_logprobs, row_loss, row_gradient)
    return SimpleNamespace(**{mode.__name__: partial(mode, backend=backend) for mode in modes})


def draw_rows(V, offset, device):
    """Rows of all kinds, of a wider buffer: (buffer, logits, tokens). Rows 1 to 6 are unlike the others."""
    n = 9
    buffer = torch.randn(n, V + 5, device=device) * torch.tensor([[1.0, 10.0, 10.0]], device=device).T.repeat(3, 1)
    logits = buffer[:, offset : offset + V]
    tokens = torch.randint(0, V, (n,), device=device)
    logits[1, torch.randint(0, V, (1,)).item()] = torch.nan
    logits[2, torch.randint(0, V, (1,)).item()] = torch.inf
    logits[3, torch.rand(V, device=device) < 0.5] = -torch.inf
    logits[3, tokens[3]] = 0.0
    logits[MASKED, tokens[MASKED]] = -torch.inf
    logits[5] = -torch.inf
    logits[CERTAIN, tokens[CERTAIN]] = logits[CERTAIN].max() + 20
    return buffer, logits, tokens


def draw_coefficients(logprobs, old, ref, cispo, bonus):
    """Ratios are on either side of the clipping bounds, none near; logprobs [n] float64."""
    n, device = len(logprobs), logprobs.device
    uniform = partial(torch.rand, n, device=device)

    def about(shifts):
        shift = torch.tensor(shifts, device=device)[torch.randint(0, len(shifts), (n,), device=device)]
        return torch.where(logprobs.isfinite(), logprobs, -1.0).float() + shift

    return Coefficients(
        advantage=torch.randn(n, device=device),
        policy=uniform(),
        kl=uniform(),
        bonus=uniform() if bonus else torch.zeros(n, device=device),
        old=about([-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0]) if old else None,
        ref=about([-0.7, 0.0, 0.6]) if ref else None,
        clip_low=0.2,
        clip_high=0.3,
        cispo=cispo,
    )


def assert_near(found, exact, name, tolerance=1e-5):
    message = lambda text: f"{name}: {text}"  # noqa: E731
    torch.testing.assert_close(found.double(), exact, rtol=max(tolerance, 1e-5), atol=1e-5, equal_nan=True, msg=message)


def assert_statistics(found, exact, name):
    """found, exact: (logprobs, entropy)."""
    for values, expected in zip(found, exact):
        assert values.dtype == torch.float32
        assert_near(values, expected, name)
        assert values[BROKEN].isnan().all()
    assert not (found[0] > 0).any()
    torch.testing.assert_close(found[0][CERTAIN].double(), exact[0][CERTAIN], rtol=1e-4, atol=0)


def draw_target(buffer, logits, turn):
    """Where a gradient goes, of the shape of logits: (tensor it is in, gradient)."""
    first, V = logits.storage_offset(), logits.shape[1]
    if turn % 4 == 0:
        return buffer, logits
    dtype, margin = [(torch.float32, 0), (torch.bfloat16, first), (torch.bfloat16, 0)][turn % 4 - 1]
    apart = torch.full((len(logits), margin + -(-V // 8) * 8), 7.0, dtype=dtype, device=logits.device)
    return apart, apart[:, margin : margin + V]


def check_gradient(run, buffer, logits, before, exact, rows, turn, name):
    """run(out) writes the gradient of logits to `out`; logits and what lies between rows stay."""
    buffer.copy_(before)
    whole, out = draw_target(buffer, logits, turn)
    beside = torch.ones_like(whole, dtype=torch.bool)
    beside[:, out.storage_offset() : out.storage_offset() + out.shape[1]] = False
    kept = whole[beside]
    run(out)
    assert_near(out[rows], exact[rows], f"{name} {out.dtype}", torch.finfo(out.dtype).eps)
    assert torch.equal(whole[beside], kept)
    assert whole is buffer or torch.equal(buffer.nan_to_num(1e9), before.nan_to_num(1e9))


def check(kernels, device="cpu", vocabularies=VOCABULARIES, combinations=range(16)):
    """kernels: an object with the three functions, less `backend`; combinations: which of the 16 of flags."""
    reference = functions("reference")
    for number, V in enumerate(vocabularies):
        buffer, logits, tokens = draw_rows(V, number % 4 + 1, device)
        wide, before, masked = logits.double(), buffer.clone(), logits[3] == -torch.inf
        statistics = reference.row_logprobs(wide, tokens, TEMPERATURE)
        assert_statistics(kernels.row_logprobs(logits, tokens, TEMPERATURE), statistics, V)
        assert torch.equal(buffer.nan_to_num(1e9), before.nan_to_num(1e9))

        flags = list(itertools.product((False, True), repeat=4))
        for i in combinations:
            old, ref, cispo, bonus = flags[i]
            name = f"{V} {old=} {ref=} {cispo=} {bonus=}"
            c = draw_coefficients(statistics[0], old, ref, cispo, bonus)
            exact = torch.empty_like(wide)
            reference.row_loss(wide, tokens, c.each(torch.Tensor.double), TEMPERATURE, out=exact)

            def run(out):
                found = kernels.row_loss(logits, tokens, c, TEMPERATURE, out=out)
                assert_statistics(found, statistics, name)
                assert out[BROKEN].isnan().all()
                assert not out[3][masked].any()
                if not (bonus or ref or V == 1):
                    own = (CERTAIN, tokens[CERTAIN].item())
                    torch.testing.assert_close(out[own].double(), exact[own], rtol=1e-2, atol=0)

            # with ref, a log-prob of -inf makes an infinite slope
            rows = [i for i in range(len(logits)) if not (ref and i == MASKED)]
            check_gradient(run, buffer, logits, before, exact, rows, number + i + i // 4, name)

        for bonus in (False, True):
            g, b = torch.randn(2, len(logits), device=device)
            known = (statistics[0].float(), statistics[1].float(), g, b * bonus)
            exact = torch.empty_like(wide)
            reference.row_gradient(wide, tokens, *(x.double() for x in known), TEMPERATURE, out=exact)
            run = lambda out: kernels.row_gradient(logits, tokens, *known, TEMPERATURE, out=out)  # noqa: E731
            rows = [i for i in range(len(logits)) if i != MASKED]  # its log-prob tells nothing of the others
            check_gradient(run, buffer, logits, before, exact, rows, number + bonus, f"{V} given logprobs {bonus=}")

        none = torch.empty(0, device=device)
        c = Coefficients(none, none, none, none)
        assert kernels.row_logprobs(logits[:0], tokens[:0], TEMPERATURE)[0].shape == (0,)
        assert kernels.row_loss(logits[:0], tokens[:0], c, TEMPERATURE, out=logits[:0])[1].shape == (0,)
        kernels.row_gradient(logits[:0], tokens[:0], none, none, none, none, TEMPERATURE, out=logits[:0])


INTERPRETED = """
few = {few}
from tests.ops.test_row_loss_kernels import check, functions
torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
if few:  # over several blocks each flag on and off, and each target of a gradient
    check(functions("triton"), vocabularies=(1, 37))
    check(functions("triton"), vocabularies=(4096, 5003), combinations=(0, 6, 11, 15))
else:
    check(functions("triton"))
"""


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "all"])
def test_triton_in_the_interpreter(seed, few):
    interpret(INTERPRETED.format(few=few), seed)


FUSED = [
    dict(MEASURE=True, WRITE=True, CISPO=cispo, old=old, ref=ref, out="*bf16" if ref else "*fp32")
    for cispo, old, ref in itertools.product((False, True), repeat=3)
]


@pytest.mark.parametrize("flags", [dict(MEASURE=True), dict(WRITE=True), *FUSED], ids=str)
def test_triton_compiles_for_hopper_without_spills(tmp_path, flags):
    import triton
    from sslr1.kernels import row_loss as module
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    measure, write = flags.get("MEASURE", False), flags.get("WRITE", False)
    coefficients = dict.fromkeys(("advantage", "policy", "kl"), measure and write)
    present = {"bonus": write, **coefficients, "old": flags.get("old"), "ref": flags.get("ref"), "g": not measure}
    constants = {name: None for name, given in present.items() if not given}
    constants |= dict(MEASURE=measure, WRITE=write, CISPO=flags.get("CISPO", False), BLOCK=module.BLOCK)
    types = dict(out=flags.get("out", "*fp32"), tokens="*i64", vocabulary="i32", stride="i64", out_stride="i64")
    types |= dict.fromkeys(("inverse_temperature", "inverse_rest", "clip_low", "clip_high"), "fp32")
    names = module.kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name][0] in "*i"]
    source = ASTSource(
        module.kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 32})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    assert_no_spills(cubin)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_cuda_compiles_for_hopper_without_spills(tmp_path):
    cubin = tmp_path / "row_loss.cubin"
    source = ROOT / "csrc" / "cuda" / "row_loss.cu"
    flags = ["-O3", "-std=c++17", "-cubin", "-gencode", "arch=compute_90a,code=sm_90a"]
    subprocess.run(["nvcc", *flags, str(source), "-o", str(cubin)], check=True)
    assert_no_spills(cubin)


def extension_where(nvcc, monkeypatch, folder):
    """Arguments of the extension that setup.py would build with this `nvcc`, a program's text."""
    (folder / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
    (folder / "nvcc").chmod(0o755)
    asked = {}
    helpers = SimpleNamespace(
        ParallelCompile=lambda name, default: SimpleNamespace(install=lambda: None),
        Pybind11Extension=lambda name, sources, **options: asked.update(options),
        build_ext=object,
    )
    monkeypatch.setitem(sys.modules, "pybind11.setup_helpers", helpers)
    setuptools = SimpleNamespace(setup=lambda **options: None, find_packages=lambda **options: [])
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    runpy.run_path(str(ROOT / "setup.py"))
    return asked


def test_cuda_without_its_static_runtime_leaves_the_rest(tmp_path, monkeypatch, capsys):
    """C++ is built, and it is said: here, and when the loss first meets a GPU."""
    says = f"echo '#$ TOP={tmp_path}/bin/..' >&2"
    (tmp_path / "bin").mkdir()
    asked = extension_where(says, monkeypatch, tmp_path)
    assert not asked["define_macros"] and not asked["libraries"] and "WITHOUT its CUDA part" in capsys.readouterr().err
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    asked = extension_where(says, monkeypatch, tmp_path)
    assert asked["define_macros"] and asked["library_dirs"] == [str(tmp_path / "lib64")]
    assert not capsys.readouterr().err
    backends._say_what_is_missing.cache_clear()
    for found, words in ((None, "not installed"), (SimpleNamespace(has_cuda=False), "without its CUDA part")):
        monkeypatch.setattr(backends, "_C", found)
        with pytest.warns(UserWarning, match=words):
            assert dispatch.choose_backend("auto", torch.float32, torch.device("cuda")) == "triton"
        backends._say_what_is_missing.cache_clear()
    monkeypatch.setattr(backends, "_C", SimpleNamespace(has_cuda=True))
    assert dispatch.choose_backend("auto", torch.float32, torch.device("cuda")) == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_the_gpu(seed, backend):
    check(functions(backend), "cuda", VOCABULARIES + LONG_VOCABULARIES)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_offsets_beyond_32_bits_on_the_gpu(seed, backend):
    n, V = 14_200, 151_936
    logits = torch.randn(n, V, device="cuda")
    tokens = torch.randint(0, V, (n,), device="cuda")
    c = Coefficients(*torch.rand(4, n, device="cuda"))
    some = [0, n // 2, n - 1]
    expected = logits[some].double()
    exact = row_loss(expected, tokens[some], c.each(lambda x: x[some].double()), TEMPERATURE, "reference")
    logprobs, entropy = row_loss(logits, tokens, c, TEMPERATURE, backend)
    assert_near(logprobs[some], exact[0], "logprobs")
    assert_near(entropy[some], exact[1], "entropy")
    assert_near(logits[some], expected, "gradient")
