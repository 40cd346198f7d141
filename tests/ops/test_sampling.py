"""Sampling: distribution, restriction, edges, keys, what a row may depend on; each backend, Triton interpreted."""

import contextlib
import itertools
import math
from unittest import mock

import pytest
import torch

from sslr1 import ops
from sslr1.ops import sampling
from tests.hopper import assert_no_spills
from tests.interpreter import interpret

BELOW_ONE = 1 - 2.0**-53  # the largest uniform
SIZES = [1, 2, 1023, 1024, 1025, 4097, 5000]
QWEN = 151_936
OPTIONS = [
    {},
    {"suppress": True},
    {"temperature": 0.7, "suppress": True},
    {"top_k": 20, "suppress": True},
    {"top_p": 0.8},
    {"top_k": 30, "top_p": 0.9, "temperature": 1.5, "suppress": True},
    {"temperature": 0.0, "suppress": True},
]


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small operations: where cores are shared, threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)


def keys_for(n, seed):
    return ops.fold_tensor(ops.fold("test", seed), torch.arange(n))


def probabilities(logits, temperature=1.0, top_p=1.0, top_k=0, suppress=None):
    """What `sample` promises, float64 [B, V]."""
    z = logits.double() / (temperature or 1.0)
    p = (z if suppress is None else z.index_fill(1, suppress, -math.inf)).softmax(1)
    order = p.argsort(dim=1, descending=True, stable=True)
    if temperature == 0:
        return torch.zeros_like(p).scatter(1, order[:, :1], 1.0)
    if top_k:
        p = p.scatter(1, order[:, top_k:], 0.0)
        p = p / p.sum(1, keepdim=True)
    ranked = p.gather(1, order)
    ranked[ranked.cumsum(1) - ranked >= top_p] = 0
    return torch.zeros_like(p).scatter(1, order, ranked / ranked.sum(1, keepdim=True))


def g_test(counts, p):
    """p-value of a G-test, tokens of expectation under 5 pooled."""
    from scipy.stats import chi2

    expected = p * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    observed, expected = observed[keep], expected[keep]
    if len(observed) == 1:  # one token has all the probability
        return 1.0
    g = 2 * torch.special.xlogy(observed, observed / expected).sum()
    return chi2.sf(g.item(), len(observed) - 1)


def check_distribution(options, seed, backend="auto", device="cpu"):
    V, n = 17, 1_000_000
    logits = 2 * torch.randn(V, device=device)
    options = {"suppress": torch.tensor([3, 11], device=device), **options}
    tokens, logprobs = ops.sample(logits.expand(n, V), keys_for(n, seed).to(device), backend=backend, **options)
    p = probabilities(logits[None], **options)[0].cpu()
    counts = tokens.bincount(minlength=V).cpu()
    assert (counts[p == 0] == 0).all()
    assert g_test(counts, p) > 1e-6
    z = logits.double() / options.get("temperature", 1.0)
    assert torch.allclose(logprobs, z.log_softmax(0)[tokens].float(), atol=1e-5)  # over the whole vocabulary


def check_direct(backend, device="cpu", sizes=(*SIZES, QWEN), rows=16, dtypes=(torch.float32, torch.bfloat16)):
    """Drawn tokens are those of a one-level inverse CDF in float64, but for uniforms within 1e-5 of an edge."""
    for V, dtype, spread in itertools.product(sizes, dtypes, (1.0, 6.0)):
        B = rows if V < QWEN else min(rows, 3)
        logits = (spread * torch.randn(B, V, device=device)).to(dtype)
        for options in OPTIONS if V < QWEN else OPTIONS[1::2]:
            if options.get("suppress"):
                likely = logits[0].argmax().repeat(2 if V > 1 else 0).cpu()  # twice
                options = {**options, "suppress": torch.cat([torch.randperm(V)[: V // 3], likely]).to(device)}
            if device == "cpu" and "suppress" in options and len(options["suppress"].unique()) == V:
                continue
            keys = torch.randint(-(2**62), 2**62, (B,), device=device)
            tokens, logprobs = ops.sample(logits, keys, backend=backend, **options)
            p = probabilities(logits, **options)
            cdf = p.cumsum(1)
            case = (V, dtype, spread, options)
            assert (p.gather(1, tokens[:, None]) > 0).all(), case
            if options.get("temperature") != 0:
                u = ops.uniform(keys)[:, None]
                upper = cdf.gather(1, tokens[:, None])
                assert (u < upper + 1e-5).all() and (u > upper - p.gather(1, tokens[:, None]) - 1e-5).all(), case
            exact = (logits.double() / (options.get("temperature") or 1.0)).log_softmax(1)
            assert (logprobs - exact.gather(1, tokens[:, None])[:, 0]).abs().max() < 1e-5, case
            assert (logprobs <= 0).all(), case


@contextlib.contextmanager
def drawing(uniforms):
    """uniforms(key) in place of each backend's own."""
    from sslr1.kernels import sample as kernel

    with mock.patch.object(sampling, "uniform", uniforms), mock.patch.object(kernel, "uniforms_of", uniforms):
        yield


def check_edges(backend, device="cpu", sizes=(*SIZES, 10_000), spots=(0, 1, 1022, 1023, 1024, 4095, 4096)):
    """The first and the last uniform never leave the tokens that have mass."""
    keys = torch.zeros(1, dtype=torch.int64, device=device)

    def drawn(logits, u, **options):
        constant = torch.tensor([u], dtype=torch.float64, device=device)
        with drawing(lambda key: constant.expand(key.shape).contiguous()):
            return ops.sample(logits, keys, backend=backend, **options)[0].item()

    for V, nothing in itertools.product(sizes, (-math.inf, -200.0)):  # e^-200 is 0 in float32
        for a in sorted({i for i in (*spots, V - 2, V - 1) if 0 <= i < V}):
            logits = torch.full((1, V), nothing, device=device)
            logits[0, a] = 3.0
            for u in (-1e-17, 0.0, 0.3, BELOW_ONE, 1.0):  # the outer two are where rounding might put the target
                assert drawn(logits, u) == a, (V, a, u)
            for b in {a - 1, a + 1, 0, V - 1} - {a, -1, V}:
                logits[:] = nothing
                logits[0, a], logits[0, b] = 3.0, -60.0  # e^-63 beside 1: some mass, but none that 1 + e^-63 shows
                assert drawn(logits, 0.0) == min(a, b), (V, a, b)
                assert drawn(logits, 0.5) == a
                assert drawn(logits, BELOW_ONE) == a
                huge = torch.tensor([a], device=device)
                for u in (0.0, 0.5, BELOW_ONE):
                    assert drawn(logits, u, suppress=huge) == b, (V, a, b, u)
                logits[0, b] = 3.0
                assert drawn(logits, 0.0) == min(a, b)
                assert drawn(logits, BELOW_ONE) == max(a, b)


def check_rounding(backend, device="cpu", rows=1000):
    """Uniforms on the CDF's edges and beside them, where only rounding decides, never lead to a token without mass."""
    V = 5000
    B = 3 * rows
    keys = torch.zeros(B, dtype=torch.int64, device=device)
    dtypes = (torch.float32, torch.float64) if backend == "reference" else (torch.float32,)
    for dtype, spread in itertools.product(dtypes, (0.0, 2.0, 12.0)):
        logits = spread * torch.randn(rows, V, dtype=dtype, device=device)
        logits[torch.rand(rows, V, device=device) < 0.5] = -math.inf
        for end in (1024, 2048, 4096, V):  # blocks that end, and that start, without mass
            logits[:, end - 3 : end + 3] = -math.inf
        e = (logits - logits.amax(1, keepdim=True)).exp().double()
        cdf = e.cumsum(1)
        edge = torch.randint(0, V, (rows,), device=device)
        for i, end in enumerate((1024, 2048, 4096)):
            edge[i::4] = end - 1
        u = (cdf.gather(1, edge[:, None]) / cdf[:, -1:])[:, 0]
        u = torch.cat([u.nextafter(0 * u), u, u.nextafter(0 * u + 2)]).clamp(0, BELOW_ONE)
        logits, cdf = logits.repeat(3, 1), cdf.repeat(3, 1)
        with drawing(lambda key, u=u: u):
            tokens = ops.sample(logits, keys, backend=backend)[0][:, None]
        assert logits.gather(1, tokens).isfinite().all()
        share = (cdf / cdf[:, -1:]).gather(1, tokens)[:, 0]
        assert (share - u > -1e-5).all() and (
            share - u - (e.repeat(3, 1) / cdf[:, -1:]).gather(1, tokens)[:, 0] < 1e-5
        ).all()
    u = torch.arange(8, device=device) / 8  # an interval holds its lower end
    with drawing(lambda key: u.double()):
        tokens = ops.sample(torch.zeros(8, 8, device=device), keys[:8], backend=backend)[0]
    assert tokens.tolist() == list(range(8))


def check_rows(backend, V, B, device="cpu", options=({}, {"suppress": True}, {"top_k": 5}, {"top_p": 0.6})):
    """A row's results are the same bits alone, shuffled, and however it lies in memory."""
    logits, keys = 3 * torch.randn(B, V, device=device), torch.randint(-(2**62), 2**62, (B,), device=device)
    for choice in options:
        chosen = {"suppress": torch.randperm(V)[: V // 4].to(device)} if choice.get("suppress") else choice

        def draw(logits, keys):
            return torch.stack([x.double() for x in ops.sample(logits, keys, backend=backend, **chosen)], 1)

        together = draw(logits, keys)
        assert together.isfinite().all()
        order = torch.randperm(B, device=device)
        assert torch.equal(draw(logits[order], keys[order]), together[order])
        assert torch.equal(torch.cat([draw(logits[i : i + 1], keys[i : i + 1]) for i in range(B)]), together)
        assert torch.equal(draw(logits.T.contiguous().T, keys), together)
        wider = torch.cat([logits, logits[:, :1]], 1)
        assert torch.equal(draw(wider[:, :V], keys), together)
        assert torch.equal(draw(logits[-1].expand(B, V), keys[-1].expand(B)), together[-1].expand(B, -1))


def check_repeats(backend, device="cpu", B=3, G=4):
    """As of rows that are there G times."""
    for V in (17, 1030, 5000):
        logits, keys = 3 * torch.randn(B, V, device=device), keys_for(B * G, V).to(device)
        for options in ({}, {"temperature": 0}, {"suppress": torch.tensor([1, 5], device=device)}, {"top_k": 5}):
            found = ops.sample(logits, keys, repeats=G, backend=backend, **options)
            expected = ops.sample(logits.repeat_interleave(G, 0), keys, backend=backend, **options)
            assert all(torch.equal(a, b) for a, b in zip(found, expected)), (V, options)


def check_bad_rows(backend, device="cpu"):
    V = 1500
    keys = keys_for(7, 0).to(device)
    for options in OPTIONS:
        logits = torch.randn(7, V, device=device)
        logits[1, 2] = math.nan
        logits[2, 1400] = -math.nan
        logits[3] = math.nan
        logits[4, 1025] = math.inf
        logits[5] = -math.inf
        ids = torch.tensor([1025, 1400], device=device)  # what may not be drawn makes the log-prob NaN all the same
        for suppress in (None, ids):
            tokens, logprobs = ops.sample(logits, keys, backend=backend, **{**options, "suppress": suppress})
            assert logprobs.isnan().tolist() == [False, True, True, True, True, True, False], options
            assert ((tokens >= 0) & (tokens < V)).all()
        nothing = ops.sample(logits, keys, backend=backend, suppress=torch.arange(V, device=device))
        assert nothing[1].isnan().all() and ((nothing[0] >= 0) & (nothing[0] < V)).all()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8, "temperature": 1.5}]
)
def test_distribution(seed, options):
    check_distribution(options, seed)


@pytest.mark.parametrize("backend", ["reference", "auto"])  # C++ where it takes them
def test_tokens_are_those_of_a_direct_inverse_cdf(seed, backend):
    check_direct(backend, dtypes=(torch.float32, torch.bfloat16, torch.float64))


@pytest.mark.parametrize("backend", ["reference", "auto"])  # C++ where it takes them
def test_edges(seed, backend):
    check_edges(backend)


@pytest.mark.parametrize("backend", ["reference", "auto"])  # C++ where it takes them
def test_rounding(seed, backend):
    check_rounding(backend)


def test_float64_logits_are_computed_in_float64(seed):
    logits = 1e-9 * torch.randperm(3)[None].double()  # equal to within float32
    best = logits.argmax(1)
    for options in ({"temperature": 0}, {"top_k": 1}, {"temperature": 1e-11}):
        keys = keys_for(100, seed)
        assert (ops.sample(logits.expand(100, 3), keys, **options)[0] == best).all()


@pytest.mark.parametrize("backend", ["reference", "auto"])  # C++ where it takes them
def test_a_row_depends_on_itself_alone(seed, one_thread, backend):
    for V in (1, 17, 301, 1024, 1025, 5000):
        check_rows(backend, V, 64)
    check_rows(backend, QWEN, 64, options=({}, {"suppress": True}))
    check_rows(backend, QWEN, 5, options=({"top_k": 5}, {"top_p": 0.6}))
    logits, keys = 3 * torch.randn(64, QWEN), keys_for(64, seed)
    before = ops.sample(logits, keys)
    torch.set_num_threads(max(3, one_thread))
    for ours, theirs in zip(before, ops.sample(logits, keys)):
        assert torch.equal(ours, theirs)


def test_greedy_and_certain_rows(seed):
    logits = torch.randn(5, 40)
    tokens, logprobs = ops.sample(logits, keys_for(5, seed), temperature=0, suppress=logits[2].argmax()[None])
    expected = logits.index_fill(1, logits[2].argmax()[None], -math.inf).argmax(1)
    assert torch.equal(tokens, expected)
    assert torch.allclose(logprobs, logits.log_softmax(1).gather(1, expected[:, None])[:, 0])
    certain = torch.full((1000, 9), -math.inf)
    certain[:, 4] = 0
    assert (ops.sample(certain, keys_for(1000, seed))[0] == 4).all()


def test_rows_that_are_not_numbers_say_so(seed):
    logits = torch.randn(3, 7)
    logits[1, 2] = math.nan
    logprobs = ops.sample(logits, keys_for(3, seed))[1]
    assert logprobs.isnan().tolist() == [False, True, False]
    nothing = ops.sample(logits[:1], keys_for(1, seed), suppress=torch.arange(7))[1]
    assert nothing.isnan().all()
    check_bad_rows("reference")
    check_bad_rows("auto")
    check_repeats("reference")
    check_repeats("auto")


@pytest.mark.parametrize("V", [10, 1030, 3000])
def test_which_tokens_are_kept(seed, V):
    """Ties go to lower ids; top-p keeps the smallest set that reaches p, and no more where it is reached exactly."""
    n = 300
    logits = torch.full((V,), -3.0)
    eight = torch.randperm(V - 1)[:8].sort().values  # equal tokens, spread over the vocabulary
    logits[eight] = 2.0
    only = torch.full((V,), -math.inf)
    only[eight] = 2.0

    def drawn(logits, **options):
        return ops.sample(logits.expand(n, V), keys_for(n, seed), **options)[0].unique().tolist()

    eight = eight.tolist()
    assert drawn(logits, top_k=3) == eight[:3]
    assert drawn(logits, top_k=3, suppress=torch.tensor(eight[1:3])) == [eight[0], *eight[3:5]]
    assert drawn(logits, top_k=8) == eight
    rest = [i for i in range(V) if i not in eight]
    assert set(drawn(logits, top_k=10, temperature=50.0)) == {*eight, *rest[:2]}
    assert drawn(only, top_k=V) == drawn(only, top_k=V + 5) == drawn(only) == eight
    for k in range(1, 8):
        assert drawn(only, top_p=k / 8) == eight[:k]
        assert drawn(only, top_p=k / 8 + 1e-12) == eight[: k + 1]
    assert drawn(only, top_p=1e-9) == eight[:1]
    assert drawn(only, top_p=0.5, top_k=6) == eight[:3]
    assert drawn(only, top_p=0.5, suppress=torch.tensor(eight[:2])) == eight[2:5]
    assert drawn(only, top_p=BELOW_ONE) == eight
    halves = torch.full((V,), -math.inf, dtype=torch.float64)
    halves[-3:] = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()  # largest in the middle
    assert drawn(halves, top_p=0.5 - 1e-12) == [V - 2]
    assert drawn(halves, top_p=0.5 + 1e-12) == [V - 3, V - 2]
    assert drawn(halves, top_p=0.75 + 1e-12) == [V - 3, V - 2, V - 1]


def test_suppressed_tokens_are_never_drawn(seed):
    V, n = 1500, 20_000
    logits = torch.randn(V)
    ids = torch.tensor([0, 7, 1023, 1024, 1499])
    logits[ids] += 8  # nearly all the mass
    logits[7] = 300.0  # beside which the others underflow
    tokens, logprobs = ops.sample(logits.expand(n, V), keys_for(n, seed), suppress=ids)
    assert not torch.isin(tokens, ids).any()
    assert torch.allclose(logprobs.double(), logits.double().log_softmax(0)[tokens], rtol=1e-6)
    allowed = logits.index_fill(0, ids, -math.inf)
    again = ops.sample(allowed.expand(n, V), keys_for(n, seed))[0]
    assert torch.equal(tokens, again)
    shuffled = ops.sample(logits.expand(n, V), keys_for(n, seed), suppress=ids.repeat(3)[torch.randperm(15)])
    assert torch.equal(shuffled[0], tokens) and torch.equal(shuffled[1], logprobs)
    empty = ops.sample(allowed[None], keys_for(1, seed), suppress=ids[:0])
    assert empty[0] == tokens[0]


def test_op_is_registered_as_it_behaves(seed):
    logits, keys = torch.randn(4, 1100), keys_for(4, seed)
    options = {"temperature": 0.9, "top_p": 1.0, "top_k": 0, "suppress": torch.tensor([3, 5]), "backend": "auto"}
    for changes in ({}, {"suppress": None}, {"top_k": 7, "top_p": 0.9}, {"temperature": 0.0}):
        kwargs = {**options, **changes}
        torch.library.opcheck(
            torch.ops.sslr1.sample, (logits, keys), kwargs, test_utils=("test_schema", "test_faketensor")
        )
        for ours, theirs in zip(ops.sample(logits, keys, **kwargs), torch.ops.sslr1.sample(logits, keys, **kwargs)):
            assert torch.equal(ours, theirs)


def test_no_rows():
    tokens, logprobs = ops.sample(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert tokens.shape == logprobs.shape == (0,) and tokens.dtype == torch.int64 and logprobs.dtype == torch.float32


def test_errors():
    logits, keys = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    for arguments, options, words in (
        ((logits[0], keys), {}, "logits"),
        ((logits[:, :0], keys), {}, "logits"),
        ((logits.long(), keys), {}, "logits must be floating"),
        ((logits, keys[:1]), {}, "key"),
        ((logits, keys.int()), {}, "key"),
        ((logits, keys), {"temperature": -1}, "temperature"),
        ((logits, keys), {"temperature": math.nan}, "temperature"),
        ((logits, keys), {"top_p": 0}, "top_p"),
        ((logits, keys), {"top_k": -1}, "top_k"),
        ((logits, keys), {"suppress": torch.tensor([[1]])}, "suppress"),
        ((logits, keys), {"suppress": torch.tensor([1.0])}, "suppress"),
        ((logits, keys), {"suppress": torch.tensor([1, 5])}, "suppress holds ids from 1 to 5"),
        ((logits, keys), {"suppress": torch.tensor([-1])}, "suppress"),
        ((logits, keys), {"backend": "dice"}, "backend"),
        ((logits, keys), {"backend": "triton"}, "backend .triton. takes CUDA tensors"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.sample(*arguments, **options)


def test_keys_of_tensors_are_keys_of_numbers(draw):
    for _ in range(50):
        parts = [int(x) for x in draw.integers(-(2**40), 2**40, 4)]
        whole = ops.fold("a name", *parts)
        for cut in range(4):
            tensor = ops.fold_tensor(ops.fold("a name", *parts[:cut]), *[torch.tensor([x]) for x in parts[cut:]])
            assert tensor.item() % 2**64 == whole
            assert ops.fold_tensor(tensor, torch.tensor([cut])).item() % 2**64 == ops.fold("a name", *parts, cut)
    u = ops.uniform(keys_for(100_000, 0))
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.005 and abs((u**2).mean() - 1 / 3) < 0.005


INTERPRETED = """
few = {few}
import warnings
import pytest
from sslr1 import ops
from tests.ops.test_sampling import check_bad_rows, check_direct, check_edges, check_repeats, check_rounding, check_rows

warnings.simplefilter("ignore")  # NumPy's, of rows that hold NaN on purpose
if few:  # either type over several blocks, float32 within one too
    check_direct("triton", sizes=(1, 1023), rows=3, dtypes=(torch.float32,))
    check_direct("triton", sizes=(4100,), rows=2)
else:
    check_direct("triton", sizes=(1, 1023, 5000), rows=3)
check_direct("triton", sizes=(151_936,), dtypes=(torch.float32,), rows=1)
check_edges("triton", sizes=(1, 4097) if few else (1, 5000), spots=(4095,))
check_rounding("triton", rows=8 if few else 20)
check_rows("triton", 4100 if few else 5000, 3)
check_bad_rows("triton")
check_repeats("triton")
with pytest.raises(ValueError, match="float64"):
    ops.sample(torch.zeros(1, 2).double(), torch.zeros(1, dtype=torch.int64), backend="triton")
"""


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "all"])
def test_triton_in_the_interpreter(seed, few):
    interpret(INTERPRETED.format(few=few), seed)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_compiles_for_hopper_without_spills(tmp_path, dtype):
    import triton
    from sslr1.kernels import sample as module
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"blocks": "*fp32", "uniforms": "*fp64", "tokens": "*i64", "logprobs": "*fp32", "suppressed": "*u8"}
    types |= {
        "logits": f"*{dtype}",
        "allowed": f"*{dtype}",
        "inverse_temperature": "fp32",
        "vocabulary": "i32",
        "n": "i32",
        "repeats": "i32",
    }
    types |= {"stride": "i64", "allowed_stride": "i64", "keys": "*i64", "out": "*fp64"}
    kernels = itertools.product((module.statistics, module.pick), ("RESTRICTED", "GREEDY", None), (False, True))
    for kernel, flag, suppressed in [(module.draw_uniforms, None, False), *kernels]:
        constants = {
            "RESTRICTED": False,
            "GREEDY": False,
            "SUPPRESSED": suppressed,
            "BLOCK": module.KEYS if kernel is module.draw_uniforms else module.BLOCK,
            "BLOCKS": 64,
        }
        constants[flag] = True
        if flag and flag not in kernel.arg_names:
            continue
        aligned = [n for n, t in types.items() if t[0] == "*" or n in ("vocabulary", "stride", "allowed_stride")]
        where = {name: (i,) for i, name in enumerate(kernel.arg_names)}
        source = ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in kernel.arg_names},
            {where[n]: value for n, value in constants.items() if n in where},
            {where[n]: [["tt.divisibility", 16]] for n in aligned if n in where},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=module.OPTIONS)
        assert kernel is module.draw_uniforms or "ld.global.v4" in compiled.asm["ptx"]  # 16 bytes a load
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        assert_no_spills(cubin)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_on_the_gpu(seed, backend):
    for options in ({}, {"temperature": 0.5}, {"top_k": 6, "top_p": 0.8, "temperature": 1.5}):
        check_distribution(options, seed, backend, "cuda")
    check_direct(backend, "cuda")
    check_edges(backend, "cuda")
    check_rounding(backend, "cuda")
    for V in (1, 17, 301, 1024, 1025, 5000):
        check_rows(backend, V, 64, "cuda")
    check_rows(backend, QWEN, 64, "cuda")
    check_bad_rows(backend, "cuda")
