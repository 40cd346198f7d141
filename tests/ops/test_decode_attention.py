"""The decode step's attention against separate SDPA in float64: the plain form, Triton interpreted, compiled, on a
GPU."""

import itertools
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from sslr1 import ops
from sslr1.ops import attention
from tests.hopper import assert_no_spills
from tests.interpreter import interpret

LONGEST = 135  # of the prompts in most cases, longer than a block by far and no multiple of one
SCALE = 0.11
# Programs that a wave is said to hold: with few, nothing is cut into pieces; with many, everything is.
WAVES = (1, 132)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw_case(G, times, d, dtype, poison, own, heads_kv=2, lengths=(1, LONGEST, 64), device="cpu"):
    """Arguments of `decode_attention`, laid out as the engine's: K/V of one layer of a buffer, q as heads before
    tokens. own: room for own keys and how many there are, a number for all or None for one drawn a sample. Behind
    lengths: `poison`."""
    P, L = len(lengths), max(lengths) + 3
    C, filled = own
    q = torch.randn(heads_kv * times, P * G, d, device=device).to(dtype).transpose(0, 1).view(P, G, heads_kv * times, d)
    prompt_k, prompt_v = torch.randn(2, 2, P, heads_kv, L, d, device=device).to(dtype)[1]
    own_k, own_v = torch.randn(2, 2, P, G, heads_kv, C, d, device=device).to(dtype)[1]
    prompt_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    if filled is None:
        own_lengths = torch.randint(1, C + 1, (P, G), device=device)
    else:
        own_lengths = torch.tensor([filled], dtype=torch.int32, device=device)
    behind = torch.arange(L, device=device) >= prompt_lengths[:, None]
    own_behind = torch.arange(C, device=device) >= own_lengths.expand(P, G)[..., None]
    for k, where in ((prompt_k, behind), (prompt_v, behind), (own_k, own_behind), (own_v, own_behind)):
        k.masked_fill_(where[..., None, :, None], poison)
    return q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths


def separate(q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths):
    """Each sample by itself, its keys one behind the other, heads repeated: float64 [P, G, H, d]."""
    P, G, H, d = q.shape
    times = H // prompt_k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for (p, g), t in zip(itertools.product(range(P), range(G)), own_lengths.expand(P, G).flatten().tolist()):
        n = int(prompt_lengths[p])
        k, v = (
            torch.cat([a[p, :, :n], b[p, g, :, :t]], 1).double().repeat_interleave(times, 0)
            for a, b in ((prompt_k, own_k), (prompt_v, own_v))
        )
        out[p, g] = F.scaled_dot_product_attention(q[p, g, :, None].double(), k, v, scale=SCALE)[:, 0]
    return out


def check(backend, case, name):
    """Near the float64 result, and the arguments are left as they were."""
    before = [x.clone() for x in case]
    out = ops.decode_attention(*case, SCALE, backend=backend)
    assert out.dtype == case[0].dtype and out.is_contiguous()
    tolerance = TOLERANCES[out.dtype]
    message = lambda text: f"{name}: {text}"  # noqa: E731
    torch.testing.assert_close(out.double(), separate(*case), rtol=tolerance, atol=tolerance, msg=message)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(case, before))
    return out


@contextmanager
def waves_of(programs):
    """What the cutting into pieces takes a wave of programs to be."""
    from sslr1.kernels import decode as kernel

    with mock.patch.object(kernel, "PROCESSORS", programs):
        yield


def check_shapes(backend, dtype, poison, device="cpu", every=1, first=0):
    """Every group size with every ratio of heads (or one in `every`, from `first` on); head sizes, own lengths and cuts
    in turn."""
    owns = [(9, 1), (40, 40), (70, None), (33, 17)]
    for i, (G, times) in list(enumerate(itertools.product((1, 3, 16, 32), (1, 2, 4, 8))))[first::every]:
        d, own, programs = (64, 128)[(i + i // 4) % 2], owns[(i // 2 + i // 4) % 4], WAVES[(i // 2 + i // 8) % 2]
        lengths, heads_kv = ((1, LONGEST, 64), 2) if G < 16 else ((LONGEST, 1)[: 32 // G], 1)
        case = draw_case(G, times, d, dtype, poison, own, heads_kv, lengths, device)
        with waves_of(programs):
            check(backend, case, f"{dtype} {G=} {times=} {d=} {own=} waves of {programs}")
    for programs, (d, G, times) in itertools.product(WAVES, ((64, 3, 7), (128, 17, 8), (64, 1, 1))[first::every]):
        with waves_of(programs):  # an odd ratio, more queries than a tile, keys of one kind only
            name = f"{dtype} {G=} {times=} {d=} waves of {programs}"
            check(backend, draw_case(G, times, d, dtype, poison, (5, 3), 1, (17, 1), device), name)
            case = draw_case(G, times, d, dtype, poison, (20, None), 1, (0, 20), device)
            check(backend, case, f"{name}, no prompt")
            case[-1][1:] = 0
            check(backend, case, f"{name}, no prompt, and a prompt without own keys")


def check_layouts(backend, device="cpu"):
    """Columns that are not contiguous, int64 lengths, an own length for each prompt."""
    q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, _ = draw_case(
        2, 2, 64, torch.float32, 0.0, (20, 20), device=device
    )
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, prompt_k, prompt_v, own_k, own_v)]
    own_lengths = torch.tensor([[5], [20], [1]], device=device)
    check(backend, (*turned[:3], prompt_lengths.long(), *turned[3:], own_lengths), "turned")
    empty = draw_case(0, 2, 64, torch.float32, 0.0, (20, 20), device=device)
    assert ops.decode_attention(*empty, SCALE, backend=backend).shape == (3, 0, 4, 64)


def check_neighbours(backend, poison, dtype=torch.float32, device="cpu", every=1):
    """A row is the same bits whatever other prompts and other samples hold, and however long they are."""
    for programs, (G, times) in list(itertools.product(WAVES, ((3, 4), (8, 8))))[::every]:
        one = draw_case(G, times, 64, dtype, poison, (40, None), 1, (LONGEST, 99, 10), device)
        other = draw_case(G, times, 64, dtype, poison, (40, None), 1, (1, LONGEST, LONGEST), device)
        for i in (1, 2, 3):  # the prompt in the middle
            other[i][1] = one[i][1]
        for i in (0, 4, 5, 6):  # of its samples the second
            other[i][1, 1] = one[i][1, 1]
        with waves_of(programs):
            first, second = (ops.decode_attention(*case, SCALE, backend=backend) for case in (one, other))
        assert torch.equal(first[1, 1], second[1, 1])
        assert not torch.equal(first[1, 0], second[1, 0]) and not torch.equal(first[0, 1], second[0, 1])


def check_batch_invariance(backend, dtype=torch.float32, device="cpu", heads_kv=2, every=1):
    """Asked for, a group is the same bits alone as among others, in buffers of other lengths, and near what is
    right."""
    for programs, (G, times) in list(itertools.product(WAVES, ((1, 4), (3, 4), (16, 2))))[::every]:
        case = draw_case(G, times, 64, dtype, 0.0, (40, None), heads_kv, (LONGEST, 900, 10), device)
        q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths = case
        with waves_of(programs):
            whole = ops.decode_attention(*case, SCALE, batch_invariant=True, backend=backend)
            tolerance = TOLERANCES[dtype]
            torch.testing.assert_close(whole.double(), separate(*case), rtol=tolerance, atol=tolerance)
            for p, length in enumerate(prompt_lengths.tolist()):
                one, longest = slice(p, p + 1), int(own_lengths[p].max())
                prompt = prompt_k[one, :, :length], prompt_v[one, :, :length], prompt_lengths[one]
                own = own_k[one, ..., :longest, :], own_v[one, ..., :longest, :], own_lengths[one]
                alone = ops.decode_attention(q[one], *prompt, *own, SCALE, batch_invariant=True, backend=backend)
                assert torch.equal(whole[one], alone)


def check_offsets(backend, device="cpu"):
    """Prompts, samples and heads whose places times strides, each below 2^31, are beyond it. One buffer serves all:
    only the pages of a few keys are ever touched."""
    stride, d, L = 1_100_000_000, 64, 20
    near = L * d
    q, _, _, prompt_lengths, _, _, own_lengths = draw_case(
        3, 2, d, torch.bfloat16, 0.0, (L, L), heads_kv=3, lengths=(L, 3, L - 1)
    )
    buffer = torch.empty(2 * stride + 40 * near, dtype=torch.bfloat16, device=device)
    for prompt, sample, head in ((stride, 3 * near, near), (3 * near, stride, near), (near, 3 * near, stride)):

        def spread(shape, strides, offset):
            view = buffer.as_strided(shape, (*strides, d, 1), offset)
            return view.copy_(torch.randn(shape))

        prompt_k, prompt_v = (
            spread((3, 3, L, d), (stride, near) if prompt == stride else (near, stride), offset)
            for offset in (0, 9 * near)
        )
        own_k, own_v = (spread((3, 3, 3, L, d), (prompt, sample, head), offset) for offset in (18 * near, 28 * near))
        case = (q, prompt_k, prompt_v, prompt_lengths, own_k, own_v, own_lengths)
        check(backend, tuple(x.to(device) for x in case), f"far apart {prompt=} {sample=} {head=}")


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small operations: where cores are shared, threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_plain_form(seed):
    for dtype in (torch.float64, torch.float32):
        check_shapes("reference", dtype, poison=7e3)
    check_layouts("reference")
    check_batch_invariance("reference")


def test_the_plain_form_does_not_ask_a_device_for_lengths(seed, monkeypatch):
    monkeypatch.setattr(attention, "_extent", lambda name, lengths, room: (0, room))  # as it does for CUDA tensors
    check_shapes("reference", torch.float64, poison=7e3)


INTERPRETED = """
few = {few}
from tests.ops import test_decode_attention as test
torch.set_num_threads(1)
test.check_offsets("triton")
torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
# few: of both together every group size, ratio of heads, head size, own length and cut
test.check_shapes("triton", torch.float32, float("nan"), every=3 if few else 1, first=1 if few else 0)
test.check_shapes("triton", torch.bfloat16, float("nan"), every=3)
if few:
    test.check_shapes("triton", torch.float32, float("nan"), every=16, first=2)
test.check_layouts("triton")
test.check_neighbours("triton", float("nan"), every=3 if few else 1)
test.check_batch_invariance("triton", heads_kv=1, every=2 if few else 1)
"""


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "all"])
def test_triton_in_the_interpreter(seed, few):
    """bfloat16 is multiplied as float32 there, which its products on tensor cores are only in the sums, and its results
    are cut, not rounded; float32 is the tight test."""
    interpret(INTERPRETED.format(few=few), seed)


def kernels(dtype, d):
    """Each kernel as it is launched, for tiles of all heights: name, constants, options."""
    from sslr1.kernels import decode as module

    _, block, options = module.layout(dtype, 1, d)
    for rows in (16, 32, 64, 128):
        height, block, options = module.layout(dtype, rows, d)
        if height == rows:
            yield "prompt_part", dict(TIMES=8, ROWS=rows, BLOCK=block), options
    yield "prompt_part", dict(TIMES=7, ROWS=height, BLOCK=block), options
    _, block, options = module.layout(dtype, 1, d)
    for times, whole in itertools.product((1, 8), (True, False)):
        yield "own_part", dict(TIMES=times, ROWS=16, BLOCK=block, JOIN=whole), options
    yield "join", dict(ROWS=16), {}


@pytest.mark.parametrize("d", attention.KERNEL_HEAD_SIZES)
@pytest.mark.parametrize("dtype", attention.KERNEL_DTYPES, ids=str)
def test_triton_compiles_for_hopper_without_spills(tmp_path, dtype, d):
    import triton
    from sslr1.kernels import decode as module
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = dict.fromkeys(("q", "keys", "values", "result"), pointer) | dict(parts="*fp32", lses="*fp32", scale="fp32")
    types |= dict(lengths="*i32", prompt_lengths="*i32", length_prompt_stride="i32", length_sample_stride="i32")
    for name, constants, options in kernels(dtype, d):
        kernel = getattr(module, name)
        names = kernel.arg_names
        constants = {k: v for k, v in {**constants, "D": d, "WIDE": False}.items() if k in names}
        signature = {
            n: "constexpr" if n in constants else types.get(n, "i64" if n.endswith("prompt_stride") else "i32")
            for n in names
        }
        strides = {n for n in names if n.endswith("stride") and not n.startswith("length")}
        aligned = [i for i, n in enumerate(names) if signature[n][0] == "*" or n in strides]
        source = ASTSource(
            kernel,
            signature,
            {(names.index(n),): value for n, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= 227 * 1024, (name, constants)
        if dtype == torch.bfloat16 and name != "join":
            tensor_core = "wgmma.mma_async" if constants["ROWS"] >= 64 else "mma.sync"
            assert tensor_core in compiled.asm["ptx"], (name, constants)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        # Triton 3.6 has two registers' worth of one variant on the stack: stored before its loop, loaded behind it
        known = (name, dtype, d, constants["ROWS"]) == ("prompt_part", torch.float32, 128, 16)
        assert_no_spills(cubin, stack=8 if known and triton.__version__.startswith("3.6.") else 0)


def test_pieces_cover_the_keys_and_fill_the_chip():
    from sslr1.kernels.decode import pieces

    for length, block, programs in itertools.product(
        (0, 1, 63, 64, 65, 1000, 30_000), (16, 64), (1, 7, 64, 132, 133, 2000)
    ):
        piece, count = pieces(length, block, programs, 132)
        assert piece % block == 0 and piece * count >= length and piece * (count - 1) < max(length, 1)
    assert pieces(1000, 64, 64, 132) == (512, 2)  # 32 prompts, 2 kv heads: 128 programs for 132 multiprocessors
    assert pieces(200, 64, 1024, 132) == (256, 1)  # plenty of programs: uncut
    assert pieces(32_768, 64, 2, 132)[1] == 64


def test_registered_op(seed):
    case = draw_case(3, 2, 64, torch.float32, 0.0, (9, 4))
    op, options = torch.ops.sslr1.decode_attention, dict(scale=SCALE, backend="auto")
    torch.library.opcheck(op, case, options, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(op(*case, **options), ops.decode_attention(*case, SCALE))
    traced = torch.compile(lambda *a: 2 * ops.decode_attention(*a, SCALE), backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(*case), 2 * ops.decode_attention(*case, SCALE))


def test_one_place_decides():
    def chosen(backend, dtype, d, device):
        return attention._choose_backend(
            backend, SimpleNamespace(dtype=dtype, shape=(1, 1, 2, d), device=torch.device(device))
        )

    for d in (64, 128):
        assert chosen("auto", torch.bfloat16, d, "cuda") == chosen("auto", torch.float32, d, "cuda") == "triton"
        assert chosen("auto", torch.bfloat16, d, "cpu") == "reference"
    for dtype, d in ((torch.bfloat16, 80), (torch.float32, 32), (torch.float64, 64), (torch.float16, 128)):
        assert chosen("auto", dtype, d, "cuda") == "reference"
        with pytest.raises(ValueError, match="use backend 'reference'"):
            chosen("triton", dtype, d, "cuda")
    assert chosen("reference", torch.bfloat16, 64, "cuda") == "reference"


def test_errors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, prompt_k, prompt_v, lengths, own_k, own_v, own_lengths = draw_case(2, 2, 64, torch.float32, 0.0, (9, 4))
    good = dict(q=q, prompt_k=prompt_k, prompt_v=prompt_v, prompt_lengths=lengths)
    good |= dict(own_k=own_k, own_v=own_v, own_lengths=own_lengths)
    for change, words in (
        (dict(prompt_v=prompt_v[:, :, 1:]), r"prompt_v must be torch.float32 \[3, 2, 138, 64\]"),
        (dict(own_k=own_k.double()), "own_k must be torch.float32 .* got torch.float64"),
        (dict(own_v=own_v[:, :1]), r"own_v must be .* got torch.float32 \[3, 1, 2, 9, 64\]"),
        (dict(q=q[:, :, :3]), "3 query heads can't share 2 key heads"),
        (dict(prompt_lengths=lengths[:2]), r"prompt_lengths must be \[3\], got \[2\]"),
        (dict(own_lengths=own_lengths.float()), "own_lengths must be int32 or int64"),
        (dict(prompt_lengths=lengths + 4), "prompt_lengths are 5 to 139, there is room for 0 to 138"),
        (dict(own_lengths=own_lengths - 5), "own_lengths are -1 to -1, there is room for 0 to 9"),
        (dict(backend="cpp"), "decode_attention has no backend 'cpp'"),
        (dict(backend="triton"), "backend 'triton' takes CUDA tensors, these are on cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.decode_attention(**{**good, **change}, scale=SCALE)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_on_the_gpu(seed, backend):
    if backend == "reference":
        dtypes, poison = (torch.float64, torch.float32), 7e3
    else:
        dtypes, poison = (torch.float32, torch.bfloat16), float("nan")
        check_offsets(backend, "cuda")
    for dtype in dtypes:
        check_shapes(backend, dtype, poison, "cuda")
        if backend == "triton":
            check_neighbours(backend, poison, dtype, "cuda")
            check_batch_invariance(backend, dtype, "cuda")
    check_layouts(backend, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_one_captured_graph_serves_every_step(seed, backend):
    case = draw_case(16, 8, 128, torch.float32, 0.0, (100, 1), device="cuda")
    own_lengths = case[-1]
    for own in case[4:6]:
        own.normal_()
    ops.decode_attention(*case, SCALE, backend=backend)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.decode_attention(*case, SCALE, backend=backend)
    for length in (1, 2, 64, 65, 100):
        own_lengths.fill_(length)
        graph.replay()
        torch.testing.assert_close(out.double(), separate(*case), rtol=1e-5, atol=1e-5)
