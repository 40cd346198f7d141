"""Attention in merged parts against the masked square in float64, and what it hands to GPU libraries, without one."""

import itertools
import logging
import sys
from itertools import pairwise
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from sslr1 import ops
from sslr1.ops import backends, flash, packed_attention

SCALE = 0.3


def draw_groups(draw, lengths=(1, 2, 7, 65, 130), completions=(0, 1, 3, 9, 70), groups=3):
    """Groups without completions, empty completions and prompts of one token among them."""
    return [
        (int(draw.choice(lengths)), tuple(draw.choice(completions, draw.choice([0, 1, 4])).tolist()))
        for _ in range(draw.integers(1, groups + 1))
    ]


def draw_heads(T, heads_kv, times, d, dtype=torch.float64, device="cpu"):
    """q, k, v and the output's gradient, laid out as transformers': tokens before heads in memory."""
    qkv = [
        torch.randn(1, T, heads, d, dtype=torch.float64, device=device).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (heads_kv * times, heads_kv, heads_kv)
    ]
    return qkv, torch.randn(1, T, heads_kv * times, d, device=device).to(dtype)


def with_gradients(out, qkv, grad):
    return out, *torch.autograd.grad(out, qkv, grad)


def largest_gap(got, expected):
    """Relative to the largest number of each tensor, or to 1 where that is less: with a single key, dQ and dK are 0."""
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(got, expected))


def separate(q, k, v, groups):
    """Every completion behind its own copy of the prompt, alone."""
    out, row, times = [], 0, q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    for prompt, completions in groups:
        start, row = row, row + prompt
        ids = torch.arange(start, row)
        out.append(F.scaled_dot_product_attention(*(x[:, :, ids] for x in (q, k, v)), is_causal=True, scale=SCALE))
        for c in completions:
            both = torch.cat([ids, torch.arange(row, row + c)])
            o = F.scaled_dot_product_attention(*(x[:, :, both] for x in (q, k, v)), is_causal=True, scale=SCALE)
            out.append(o[:, :, prompt:])
            row += c
    return torch.cat(out, 2).transpose(1, 2)


def test_merged_parts_equal_the_masked_square_and_separate_sequences(draw):
    special = [[(1, ())], [(1, (1,)), (1, (0, 1))], [(5, (0, 0)), (3, (2, 0, 4)), (1, ())]]
    for groups in [*special, *(draw_groups(draw) for _ in range(25))]:
        layout, times = ops.Layout(groups), int(draw.choice([1, 2, 3, 8]))
        qkv, grad = draw_heads(layout.tokens, int(draw.choice([1, 2])), times, int(draw.choice([4, 20, 64])))
        expected = with_gradients(separate(*qkv, groups), qkv, grad)
        for backend in ("cpu", "reference", "auto"):
            got = with_gradients(ops.shared_prefix_attention(*qkv, layout, SCALE, backend=backend), qkv, grad)
            assert largest_gap(got, expected) <= 1e-12, (groups, times, backend)


@pytest.mark.parametrize("backend", ["cpu", "cpp"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_in_lower_precision(draw, dtype, bound, backend):
    for _ in range(8):
        layout, times, d = (
            ops.Layout([(100, (30, 1, 70)), *draw_groups(draw)]),
            int(draw.choice([1, 2, 4])),
            draw_size(draw),
        )
        qkv, grad = draw_heads(layout.tokens, 2, times, d, dtype)
        got = with_gradients(ops.shared_prefix_attention(*qkv, layout, d**-0.5, backend=backend), qkv, grad)
        assert all(x.dtype == dtype and x.isfinite().all() for x in got)
        wide = [x.detach().double().requires_grad_() for x in qkv]
        out = ops.shared_prefix_attention(*wide, layout, d**-0.5, backend="reference")
        expected = with_gradients(out, wide, grad.double())
        gaps = [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected)]
        assert max(gaps) <= bound, (layout.groups, times, d, gaps)


def draw_size(draw):
    return int(draw.choice([4, 20, 32, 64, 80]))


def test_the_compiled_one_is_auto_on_a_cpu_and_takes_no_float64():
    (q, k, v), _ = draw_heads(5, 1, 1, 8, torch.float32)
    with mock.patch.object(backends._C, "attention", side_effect=RuntimeError("called")):
        for call in (
            lambda **options: ops.shared_prefix_attention(q, k, v, [(5, ())], SCALE, **options),
            lambda **options: ops.varlen_attention(q, k, v, torch.tensor([0, 5]).int(), 5, SCALE, **options),
        ):
            with pytest.raises(RuntimeError, match="called"):
                call()
            call(backend="reference")
    with pytest.raises(ValueError, match="takes float32 and shorter numbers, got float64"):
        ops.shared_prefix_attention(q.double(), k.double(), v.double(), [(5, ())], SCALE, backend="cpp")


def test_what_would_be_read_past_its_end_or_left_out_is_refused():
    """And the compiled one writes float32 whatever the default is."""
    (q, k, v), _ = draw_heads(6, 2, 1, 8, torch.float32)
    bounds = torch.tensor([0, 2, 6])  # int64, too
    for wrong in (dict(k=k[:, :, :5]), dict(v=v[..., :4]), dict(k=k[:, :0], v=v[:, :0]), dict(q=q[:, :1])):
        for backend in ("cpp", "cpu"):
            with pytest.raises(ValueError, match="don't fit together"):
                ops.varlen_attention(*({"q": q, "k": k, "v": v} | wrong).values(), bounds, 4, SCALE, backend=backend)
    two = [torch.cat([x, x]) for x in (q, k, v)]
    for backend in ("cpp", "cpu", "reference"):
        with pytest.raises(ValueError, match="a single row, got 2, 2 and 2"):
            ops.varlen_attention(*two, bounds, 4, SCALE, backend=backend)
        with pytest.raises(ValueError, match="a single row, got 1, 1 and 2"):
            ops.shared_prefix_attention(q, k, two[2], [(2, (4,))], SCALE, backend=backend)
    for wrong in ([0, 2, 7], [1, 6], [0, 4, 2, 6], [0, 5]):
        with pytest.raises(ValueError, match="boundaries must rise from 0 to 6"):
            ops.varlen_attention(q, k, v, torch.tensor(wrong), 6, SCALE, backend="cpp")
    expected = ops.varlen_attention(q, k, v, bounds, 4, SCALE, backend="reference")
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = ops.varlen_attention(q, k, v, bounds, 4, SCALE, backend="cpp")
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, expected)


def test_a_number_that_is_none_is_seen_by_whoever_sees_its_token():
    """And in the output that it reaches by nobody else's softmax; the compiled one says so as torch does."""
    layout = ops.Layout([(70, (3, 20)), (9, ())])
    for place, name in itertools.product((10, 71, 80), "qkv"):
        (q, k, v), _ = draw_heads(layout.tokens, 1, 2, 20, torch.float32)
        with torch.no_grad():
            {"q": q, "k": k, "v": v}[name][:, :, place] = torch.nan
        got, expected = (
            ops.shared_prefix_attention(q, k, v, layout, SCALE, backend=b).isnan().any(-1).any(-1)[0]
            for b in ("cpp", "reference")
        )
        assert got[place] and (expected | ~got).all() and (got.sum() > 1) == (name != "q"), (place, name)


def test_threads_change_no_bit():
    layout = ops.Layout([(700, (200, 60)), (90, (64, 65))])
    qkv, grad = draw_heads(layout.tokens, 2, 2, 32, torch.float32)
    before, got = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            got.append(with_gradients(ops.shared_prefix_attention(*qkv, layout, SCALE, backend="cpp"), qkv, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*got))


def test_neighbours_change_no_bit_of_a_completion():
    """What other groups and other completions hold, and what the loss says of them, is nothing to it."""
    layout = ops.Layout([(33, (20, 70)), (40, (17, 3, 9)), (64, (1, 9)), (2, ())])
    mine = torch.tensor([*range(123, 163), *range(180, 183)])  # the second prompt and its second completion
    (*first, first_grad), (*second, second_grad) = (
        (*qkv, grad) for qkv, grad in (draw_heads(layout.tokens, 2, 2, 16, torch.float32) for _ in range(2))
    )
    with torch.no_grad():
        for x, y in zip(second, first):
            x[:, :, mine] = y[:, :, mine]
        for x in (first_grad, second_grad):  # a prompt's gradient is its completions': let the others have none
            x[:, 163:180] = x[:, 183:192] = 0
        second_grad[:, mine] = first_grad[:, mine]
    for backend in ("cpu", "cpp", "reference"):
        got = []
        for qkv, grad in ((first, first_grad), (second, second_grad)):
            out, *gradients = with_gradients(
                ops.shared_prefix_attention(*qkv, layout, SCALE, backend=backend), qkv, grad
            )
            got.append([x[mine] for x in (out[0], *(g[0].transpose(0, 1) for g in gradients))])
        assert all(torch.equal(a, b) for a, b in zip(*got)), backend


def test_sequences_without_a_prompt(draw):
    for _ in range(10):
        lengths = draw.choice([1, 4, 9, 64], draw.integers(1, 9)).tolist()
        boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
        qkv, grad = draw_heads(sum(lengths), 3, 1, 20)
        got, expected = (
            with_gradients(ops.varlen_attention(*qkv, boundaries, max(lengths), SCALE, backend=backend), qkv, grad)
            for backend in ("cpu", "reference")
        )
        alone = [
            F.scaled_dot_product_attention(*(x[:, :, a:b] for x in qkv), scale=SCALE).transpose(1, 2)
            for a, b in pairwise(boundaries.tolist())
        ]
        assert largest_gap(got, expected) <= 1e-12
        assert largest_gap(got, with_gradients(torch.cat(alone, 1), qkv, grad)) <= 1e-12
        short = [x.detach().float().requires_grad_() for x in qkv]
        out = ops.varlen_attention(*short, boundaries, max(lengths), SCALE, backend="cpp")
        assert largest_gap(with_gradients(out, short, grad.float()), expected) <= 1e-5


def test_a_layout_of_what_there_is():
    layout = ops.Layout([(3, (2, 0, 4)), (1, ()), (2, (0,)), (5, (1,))])
    assert layout.groups == [(3, (2, 0, 4)), (1, ()), (2, (0,)), (5, (1,))] and layout.tokens == 18
    assert layout.own.tolist() == [0, 3, 5, 9, 10, 12, 17, 18]  # no empty sequence
    assert layout.queries.tolist() == [0, 6, 7] and layout.keys.tolist() == [0, 3, 8]
    assert layout.query_rows.tolist() == [3, 4, 5, 6, 7, 8, 17]
    assert layout.key_rows.tolist() == [0, 1, 2, 12, 13, 14, 15, 16]
    assert (layout.longest, layout.longest_queries, layout.longest_keys) == (5, 6, 5)
    moved = layout.to("meta")
    assert moved.own.is_meta and moved.key_rows.is_meta and not layout.own.is_meta and moved.groups == layout.groups
    assert layout.own.dtype == layout.queries.dtype == layout.keys.dtype == torch.int32


def test_errors():
    (q, k, v), _ = draw_heads(5, 1, 1, 8)
    with pytest.raises(ValueError, match="prompt has 0 tokens"):
        ops.Layout([(0, (3,))])
    with pytest.raises(ValueError, match="cover 4 tokens, q has 5"):
        ops.shared_prefix_attention(q, k, v, [(4, ())], SCALE)
    with pytest.raises(ValueError, match="no backend 'fast'"):
        ops.shared_prefix_attention(q, k, v, [(5, ())], SCALE, backend="fast")
    with pytest.raises(ValueError, match="takes float16 and bfloat16 on CUDA"):
        ops.shared_prefix_attention(q, k, v, [(5, ())], SCALE, backend="flash")


def test_one_graph_serves_every_layout():
    """Compiled, a layer is one graph with the operation in it; a second one, with sizes left open, serves all layouts
    after."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def layer(q, k, v, layout):
        return ops.shared_prefix_attention(q * 2, k, v, layout, SCALE, backend="cpu").tanh()

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for n in range(2, 7):
        layout = ops.Layout([(20 + n, (3, 2 * n) * n)] * n)
        qkv, grad = draw_heads(layout.tokens, 2, 2, 16)
        got, expected = (with_gradients(f(*qkv, layout), qkv, grad) for f in (compiled, layer))
        assert largest_gap(got, expected) <= 1e-12
    assert counter.frame_count == 2


@pytest.mark.parametrize("groups", [[(20, (3, 5)), (4, ()), (1, (1,))], [(9, ()), (3, ())]], ids=["both", "own"])
def test_the_operation_is_registered_as_torch_wants_it(groups):
    layout = ops.Layout(groups)
    q, k, v = (torch.randn(layout.tokens, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    tables = layout.own, layout.queries, layout.keys, layout.query_rows, layout.key_rows
    longest = layout.longest, layout.longest_queries, layout.longest_keys
    operation = torch.ops.sslr1.packed_attention.default
    torch.library.opcheck(operation, (q, k, v, *tables, *longest, True, SCALE, "cpu"))
    q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    torch.library.opcheck(operation, (q, k, v, *tables, *longest, True, SCALE, "cpp"))


def fake_tables(layout):
    tables = (layout.own, layout.queries, layout.keys, layout.query_rows, layout.key_rows)
    return [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in tables]


@pytest.mark.parametrize("groups", [[(30, (5, 9)), (4, ()), (1, (1,))], [(30, ()), (7, ())]], ids=["both", "own"])
@pytest.mark.parametrize("causal", [True, False])
def test_torch_kernels_take_what_they_are_handed(groups, causal):
    """With tensors that have everything but memory, on a GPU that isn't there: torch checks names, kinds and number of
    arguments, and an `.item()` on the way would raise."""
    layout = ops.Layout(groups)
    T, longest = layout.tokens, (layout.longest, layout.longest_queries, layout.longest_keys)
    with FakeTensorMode():
        q, grad = (torch.empty(T, 8, 80, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        k, v = (torch.empty(T, 2, 80, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        rest = *fake_tables(layout), *longest, causal, SCALE, "torch"
        out, lse = packed_attention.forward(q, k, v, *rest)
        assert out.shape == q.shape and out.dtype == q.dtype and out.is_cuda
        assert lse.shape == (8, T) and lse.dtype == torch.float32
        found = packed_attention.backward(grad, q, k, v, out, lse, *rest)
        assert all(a.shape == b.shape and a.dtype == b.dtype and a.is_cuda for a, b in zip(found, (q, k, v)))
        assert all(x.is_contiguous() for x in (out, lse, *found))


# flash-attn 2.8.0.post2's arguments, as published; 2.7.0's differ in `zero_tensors`, which came later.


def published_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes=None,
    return_softmax: bool = False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors: bool = False,
):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_q) == len(cu_seqlens_k)
    for boundaries, x, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        assert boundaries[0] == 0 and boundaries[-1] == len(x)
        assert 1 <= boundaries.diff().min() and max(2, boundaries.diff().max()) == longest
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and dropout_p == 0.0
    bounds = flash.Bounds(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
    return *flash.PARTS["cpu"].forward(q, k, v, bounds), torch.empty(0), torch.empty(2)


def published_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes,
    deterministic: bool,
    rng_state=None,
    zero_tensors: bool = False,
):
    assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
    assert softmax_lse.shape == (q.shape[1], len(q)) and all(x.is_contiguous() for x in (dout, out, softmax_lse))
    bounds = flash.Bounds(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
    for into, x in zip((dq, dk, dv), flash.PARTS["cpu"].backward(dout, q, k, v, out, softmax_lse, bounds)):
        into.copy_(x)
    return torch.empty(0)


@pytest.fixture
def flash_attn(monkeypatch):
    """A flash-attn of the published arguments, with CPU kernels inside."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__version__, package.flash_attn_interface = "2.8.0", interface
    interface._flash_attn_varlen_forward = published_forward
    interface._flash_attn_varlen_backward = published_backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return interface


def test_flash_attn_takes_what_it_is_handed(draw, flash_attn):
    for groups in [[(1, (1,))], *(draw_groups(draw) for _ in range(6))]:
        layout = ops.Layout(groups)
        qkv, grad = draw_heads(layout.tokens, 2, 2, 16)
        got, expected = (
            with_gradients(ops.shared_prefix_attention(*qkv, layout, SCALE, backend=backend), qkv, grad)
            for backend in ("flash_attn", "reference")
        )
        assert largest_gap(got, expected) <= 1e-12
    boundaries = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    qkv, grad = draw_heads(12, 2, 1, 16)
    got, expected = (
        with_gradients(ops.varlen_attention(*qkv, boundaries, 7, SCALE, backend=backend), qkv, grad)
        for backend in ("flash_attn", "reference")
    )
    assert largest_gap(got, expected) <= 1e-12


@pytest.mark.parametrize(
    "capability, installed, built, expected, said",
    [
        (None, True, True, "none", "8.0 or more"),
        ((7, 5), True, True, "none", "8.0 or more"),
        ((9, 0), True, True, "flash_attn", "flash-attn 2.8.0"),
        ((9, 0), "other arguments", True, "torch", "takes other arguments"),
        ((8, 0), False, True, "torch", "no flash-attn"),
        ((8, 0), False, False, "none", "built without flash kernels"),
    ],
)
def test_the_library_is_chosen_once_and_said(
    capability, installed, built, expected, said, flash_attn, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    if installed == "other arguments":
        flash_attn._flash_attn_varlen_forward = lambda q, k, v, window_size: None
    elif not installed:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash._library.cache_clear()
    with caplog.at_level(logging.INFO, "sslr1.ops.flash"):
        assert flash.library() == expected == flash.library()
    flash._library.cache_clear()
    assert len(caplog.records) == 1 and said in caplog.text and expected in caplog.text


def test_arguments_are_found_behind_torchs_wrapper():
    """flash-attn's functions are custom operations, whose own signature says nothing."""

    def function(q: torch.Tensor, causal: bool) -> torch.Tensor:
        return q.clone()

    wrapped = torch.library.custom_op("sslr1_test::wrapped", function, mutates_args=())
    assert flash._takes(wrapped, ("q", "causal")) and not flash._takes(wrapped, ("q", "window_size"))


def test_what_flash_kernels_do_not_take_goes_the_plain_way():
    with FakeTensorMode(), mock.patch.object(flash, "library", lambda: "torch"):
        for dtype, d, expected in [
            (torch.bfloat16, 128, "torch"),
            (torch.float16, 72, "torch"),
            (torch.float32, 128, "reference"),
            (torch.bfloat16, 36, "reference"),
            (torch.bfloat16, 512, "reference"),
        ]:
            assert ops.attention._choose_parts("auto", torch.empty(1, 2, 3, d, dtype=dtype, device="cuda")) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "flash_attn"])
@pytest.mark.parametrize("d, times", [(64, 1), (80, 1), (128, 8)])
def test_on_a_gpu(draw, backend, d, times):
    """bfloat16 against float64 of the same numbers: output and gradients, ragged groups; no worse than masked SDPA by
    half."""
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    for groups in ([(700, (130, 1, 64, 257))], [(300, (40, 9)), (1, (1,)), (129, ()), (64, (65, 0, 128))], [(500, ())]):
        layout = ops.Layout(groups).to("cuda")
        qkv, grad = draw_heads(layout.tokens, 2, times, d, torch.bfloat16, "cuda")
        wide = [x.detach().double().requires_grad_() for x in qkv]
        expected = with_gradients(
            ops.shared_prefix_attention(*wide, layout, d**-0.5, backend="reference"), wide, grad.double()
        )
        errors = []
        for name in (backend, "reference"):
            got = with_gradients(ops.shared_prefix_attention(*qkv, layout, d**-0.5, backend=name), qkv, grad)
            errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(got, expected)])
        assert all(ours <= max(1.5 * plain, 4e-3) for ours, plain in zip(*errors)), (groups, errors)


@pytest.mark.gpu
def test_sequences_on_a_gpu_without_waiting():
    lengths = [4, 64, 64, 16, 700]
    boundaries = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    layout = ops.Layout([(300, (40, 9)), (64, (65, 128))]).to("cuda")
    for d in (72, 80):
        qkv, grad = draw_heads(sum(lengths), 4, 1, d, torch.bfloat16, "cuda")
        wide = [x.detach().double().requires_grad_() for x in qkv]
        expected = with_gradients(ops.varlen_attention(*wide, boundaries, 700, SCALE / 3), wide, grad.double())
        packed, packed_grad = draw_heads(layout.tokens, 2, 4, d, torch.bfloat16, "cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = with_gradients(ops.varlen_attention(*qkv, boundaries, 700, SCALE / 3), qkv, grad)
            with_gradients(ops.shared_prefix_attention(*packed, layout, SCALE / 3), packed, packed_grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(((a - b).norm() / b.norm()).item() <= 1e-2 for a, b in zip(got, expected))
