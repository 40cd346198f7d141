"""The gated delta rule and the convolution before it over packed groups against transformers' own on separate sequences
in float64; and one step of either."""

import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from sslr1 import ops
from sslr1.ops import delta_chunks, delta_rule, short_conv  # noqa: F401 (registers its operations)
from tests.hopper import assert_no_spills
from tests.interpreter import interpret

# Borders of chunks (64) for prompts and completions; uneven and empty ones; G = 1 and 16; short prompts
BORDERS = [(63, (64, 0, 1)), (64, (65,)), (65, (127, 63)), (127, (128,)), (128, (129,)), (129, (2,))]
LAYOUTS = (
    BORDERS,
    [(70, tuple(range(1, 17)))],
    [(1, (3,)), (2, ()), (3, (0, 0)), (40, (33, 1))],
    [(5, ()), (130, ())],
)
BACKENDS = {"reference": torch.float64, "products": torch.float64, "cpp": torch.float32}
# relative Frobenius distance to float64
BOUNDS = {torch.float64: 1e-12, torch.float32: 5e-6}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Float64:
    """`torch` for transformers' module, whose rule computes in float32 whatever it is given."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def theirs(monkeypatch):
    """transformers' chunked rule in float64: q, k, v, g, beta of one sequence [T, heads, …] -> out, final state."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as module

    monkeypatch.setattr(module, "torch", Float64())
    rule = module.torch_chunk_gated_delta_rule
    rule = getattr(rule, "__wrapped__", rule)

    def run(q, k, v, g, beta):
        q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
        inputs = (x[None] for x in (q, k, v, g, beta))
        out, state = rule(*inputs, output_final_state=True, use_qk_l2norm_in_kernel=True)
        return out[0], state[0]

    return run


def draw_inputs(T, key_heads=2, times=2, d_k=8, d_v=6, dtype=torch.float64, device="cpu", strong=False):
    """q, k, v, g, beta and out's gradient. strong: decays from none to complete, beta at 0 and 1 and close to them."""
    heads = key_heads * times
    options = dict(dtype=torch.float64, device=device)
    q, k = torch.randn(2, T, key_heads, d_k, **options)
    v, grad = torch.randn(2, T, heads, d_v, **options)
    g, beta = -torch.rand(T, heads, **options), torch.rand(T, heads, **options)
    if strong:
        k[1:] = torch.where(torch.rand(T - 1, 1, 1, device=device) < 0.5, k[:-1], k[1:])  # the same key again
        g = torch.tensor([0.0, -1e-7, -1e-3, -1, -30, -200], **options)[torch.randint(6, (T, heads), device=device)]
        beta = torch.tensor([0.0, 1e-8, 0.5, 1 - 1e-7, 1], **options)[torch.randint(5, (T, heads), device=device)]
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, beta)], grad.to(dtype)


def widened(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def separate(run, inputs, groups):
    """Each completion behind its own copy of the prompt, alone. run: one sequence's tensors [T, …] -> out, state."""
    out, states, row = [], [], 0
    for prompt, completions in groups:
        rows = list(range(row, row + prompt))
        found, state = run(*(x[rows] for x in inputs))
        out.append(found), states.append(state)
        row += prompt
        for length in filter(None, completions):
            both = [*rows, *range(row, row + length)]
            out.append(run(*(x[both] for x in inputs))[0][prompt:])
            row += length
    return torch.cat(out), torch.stack(states)


def with_gradients(out, inputs, grad):
    return [out, *torch.autograd.grad(out, inputs, grad)]


def distances(got, expected):
    """Relative, or absolute where what is expected is next to nothing."""
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in zip(got, expected)]


@pytest.mark.parametrize("groups", LAYOUTS, ids=["borders", "sixteen", "short", "prompts"])
def test_packed_equals_separate_sequences(seed, theirs, groups):
    layout = ops.StateLayout(groups)
    for strong in (False, True):
        inputs, grad = draw_inputs(layout.tokens, strong=strong)
        out, states = separate(theirs, inputs, groups)
        expected = [*with_gradients(out, inputs, grad), states]
        for backend, dtype in BACKENDS.items():
            mine = [x.detach().to(dtype).requires_grad_() for x in inputs]
            out, states = ops.gated_delta_rule(*mine, layout, return_states=True, backend=backend)
            assert out.dtype == states.dtype == dtype and not states.requires_grad
            found = distances([*with_gradients(out, mine, grad.to(dtype)), states], expected)
            # Decays of e^-200 sum up to thousands in a chunk, and float32 rounds their differences: so does
            # transformers' own form in float32, by as much (1e-5 to 4e-5)
            bound = BOUNDS[dtype] * (20 if strong and dtype == torch.float32 else 1)
            assert max(found) <= bound, (backend, strong, found)


def test_heads_of_any_size(seed):
    """Key heads that serve one and several value heads, sizes that fill no vector, without norm, another scale; inputs
    that are slices of one tensor as a model has them."""
    layout = ops.StateLayout([(70, (20, 66)), (9, (1,))])
    T = layout.tokens
    for key_heads, times, d_k, d_v, l2norm in ((1, 1, 1, 1, True), (3, 1, 33, 20, False), (1, 3, 20, 65, True)):
        mixed = torch.randn(T, key_heads * (2 * d_k + times * d_v), dtype=torch.float64, requires_grad=True)
        sizes = key_heads * d_k, key_heads * d_k, key_heads * times * d_v
        _, _, _, g, beta = draw_inputs(T, key_heads, times)[0]
        grad = torch.randn(T, key_heads * times, d_v, dtype=torch.float64)
        found = []
        for backend, dtype in BACKENDS.items():
            leaves = [x.detach().to(dtype).requires_grad_() for x in (mixed, g, beta)]
            q, k, v = (x.view(T, -1, d) for x, d in zip(leaves[0].split(sizes, 1), (d_k, d_k, d_v)))
            k = k if l2norm else k * d_k**-0.5
            out = ops.gated_delta_rule(q, k, v, *leaves[1:], layout, scale=0.7, l2norm=l2norm, backend=backend)
            found.append(with_gradients(out, leaves, grad.to(dtype)))
        for got, dtype in zip(found[1:], (torch.float64, torch.float32)):
            assert max(distances(got, found[0])) <= BOUNDS[dtype], (key_heads, times, d_k, d_v)


def test_half_precision_costs_no_more_than_rounding_does(seed):
    """Of bfloat16 inputs the only error is that of the results' own rounding."""
    layout = ops.StateLayout([(130, (40, 65)), (20, (7,))])
    inputs, grad = draw_inputs(layout.tokens, 2, 2, 32, 32, torch.bfloat16)
    wide = widened(inputs)
    exact = with_gradients(ops.gated_delta_rule(*wide, layout, backend="products"), wide, grad.double())
    rounded = distances([x.bfloat16() for x in exact], exact)
    for backend in ("products", "cpp"):
        got = with_gradients(ops.gated_delta_rule(*inputs, layout, backend=backend), inputs, grad)
        assert all(x.dtype == torch.bfloat16 for x in got)
        assert all(a <= 1.05 * b for a, b in zip(distances(got, exact), rounded)), backend


def test_neighbours_and_threads_change_no_bit(seed):
    """What other groups and completions hold, NaN too, is nothing to a completion."""
    groups = [(33, (20, 70)), (80, (17, 3, 9)), (2, ())]
    layout = ops.StateLayout(groups)
    mine = [*range(123, 203), *range(220, 223)]  # the second prompt and its second completion
    first, grad = draw_inputs(layout.tokens, dtype=torch.float32)
    second = [torch.full_like(x, torch.nan) for x in first]
    for x, y in zip(second, first):
        x.data[mine] = y.data[mine]
        x.requires_grad_()
    silent = torch.zeros_like(grad)
    silent[mine] = grad[mine]
    got = []
    for inputs, threads in ((first, 1), (first, 3), (second, 2)):
        torch.set_num_threads(threads)
        out = ops.gated_delta_rule(*inputs, layout, backend="cpp")
        got.append([x[mine] for x in (out, *torch.autograd.grad(out[mine], inputs, silent[mine]))])
        assert got[-1][0].isfinite().all()
    for other in got[1:2]:
        assert all(torch.equal(a, b) for a, b in zip(got[0], other))
    assert torch.equal(got[0][0], got[2][0])


def test_between_forward_and_backward_there_are_prompt_states_only(seed):
    """One for each 64 tokens of a prompt, none of completions: their inputs and where they start are enough."""
    groups = [(130, (70, 65, 3)), (64, (9,) * 16), (5, ())]
    layout = ops.StateLayout(groups)
    for backend, dtype in list(BACKENDS.items())[1:]:
        inputs, _ = draw_inputs(layout.tokens, dtype=dtype)
        known = {x.data_ptr() for x in (*inputs, *delta_chunks.tables(layout))}
        kept = {}

        def keep(x):
            if x.data_ptr() not in known and x.numel():
                kept[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = ops.gated_delta_rule(*inputs, layout, backend=backend)
        assert sum(kept.values()) == (3 + 1 + 1) * 4 * 8 * 6, backend
        out.sum().backward()


def rule_tables(layout, backend):
    return *delta_chunks.tables(layout), 0.3, True, backend


@pytest.mark.parametrize("groups", [[(70, (3, 65)), (4, ()), (1, (1,))], [(9, ()), (3, ())]], ids=["both", "prompts"])
def test_the_operations_are_registered_as_torch_wants_them(seed, groups):
    layout = ops.StateLayout(groups)
    inputs, _ = draw_inputs(layout.tokens)
    torch.library.opcheck(torch.ops.sslr1.gated_delta_rule.default, (*inputs, *rule_tables(layout, "products")))
    single = [x.detach().float().requires_grad_() for x in inputs]
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    arguments = (*single, *rule_tables(layout, "cpp"))
    torch.library.opcheck(torch.ops.sslr1.gated_delta_rule.default, arguments, test_utils=checks)
    x, weight = torch.randn(layout.tokens, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    arguments = x, weight, layout.context, layout.followers, layout.follower_bounds, "cpp"
    torch.library.opcheck(torch.ops.sslr1.causal_conv.default, arguments, test_utils=checks)
    states, tails, samples = torch.randn(7, 4, 8, 6), torch.randn(7, 5, 3), torch.tensor([4, 0, 6])
    rows = [y.detach()[:3] for y in single]
    checks = checks[:2]
    for backend in ("cpp", "reference"):
        arguments = states, *rows, samples, 0.3, True, backend
        torch.library.opcheck(torch.ops.sslr1.gated_delta_step.default, arguments, test_utils=checks)
        arguments = tails, x.detach()[:3], weight.detach(), samples, backend
        torch.library.opcheck(torch.ops.sslr1.causal_conv_step.default, arguments, test_utils=checks)


def test_one_graph_serves_every_layout(seed):
    """Compiled, a layer is one graph with the operations in it; a second one, with sizes left open, serves all layouts
    after."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x, weight, g, beta, layout):
        q, k, v = ops.causal_conv(x, weight, layout).view(len(x), 6, 8).split([1, 1, 4], 1)
        return ops.gated_delta_rule(q, k, v, g, beta, layout).tanh()

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for n in range(2, 6):
        layout = ops.StateLayout([(20 + 70 * n, (3, 70 * n) * n)] * n)
        x, weight = torch.randn(layout.tokens, 48, requires_grad=True), torch.randn(48, 4, requires_grad=True)
        g, beta = (y.detach().float().requires_grad_() for y in draw_inputs(layout.tokens)[0][3:])
        leaves, grad = (x, weight, g, beta), torch.randn(layout.tokens, 4, 8)
        got, expected = (with_gradients(f(*leaves, layout), leaves, grad) for f in (compiled, layer))
        assert max(distances(got, [y.double() for y in expected])) <= 1e-6
    assert counter.frame_count == 2


def test_a_compiled_step_moves_states_in_place(seed):
    (q, k, v, g, beta), _ = draw_inputs(3, dtype=torch.float32)
    inputs, samples = [x.detach() for x in (q, k, v, g, beta)], torch.tensor([4, 0, 2])
    x, weight = torch.randn(3, 9), torch.randn(9, 4)

    def step(states, tails):
        mixed = ops.causal_conv_step(tails, x, weight, samples)
        return ops.gated_delta_step(states, *inputs, samples) + mixed.sum()

    first = torch.randn(5, 4, 8, 6), torch.randn(5, 9, 3)
    second = [y.clone() for y in first]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(*first), step(*second))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_layout_of_what_there_is():
    layout = ops.StateLayout([(3, (2, 0, 70)), (65, ()), (1, (0,)), (5, (1,))])
    assert layout.tokens == 147 and layout.prompts.steps.tolist() == [4, 1]
    assert layout.prompts.rows[:, 0].tolist() == [75, 0, 140, 141, 139] and layout.ends.tolist() == [1, 4, 2, 3]
    assert layout.completions.steps.tolist() == [3, 1] and layout.completions.rows[:, 0].tolist() == [5, 3, 146, 69]
    assert layout.starts.tolist() == [1, 1, 3] and layout.owners.tolist() == [0, 0, 3]
    assert layout.spans.tolist()[:3] == [[0, 3, 1, 1], [3, 2, 0, 0], [5, 70, 0, 0]]
    assert layout.context[:, :7].tolist() == [
        [-1, 0, 1, 2, 3, 2, 5],
        [-1, -1, 0, 1, 2, 1, 2],
        [-1, -1, -1, 0, 1, 0, 1],
    ]
    assert layout.tails.tolist()[2:] == [[-1, -1, 140], [143, 144, 145]]
    a, b = layout.follower_bounds[2:4]
    assert sorted(zip(*layout.followers[:, a:b].tolist())) == [(3, 1), (4, 2), (5, 1), (6, 2), (7, 3)]
    moved = layout.to("meta")
    assert moved.prompts.rows.is_meta and moved.context.is_meta and moved.starts.is_meta
    here = moved.prompts.steps, moved.completions.steps, moved.spans, *moved.host_bounds
    assert not any(x.is_meta for x in here)
    assert not layout.prompts.rows.is_meta


def stand_in_for_fla(monkeypatch):
    """A module with the published function's arguments, computed by `separate`d sequences of the reference."""
    calls = []

    def chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=None,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        use_beta_sigmoid_in_kernel=False,
        allow_neg_eigval=False,
        state_v_first=False,
        cu_seqlens=None,
        cu_seqlens_cpu=None,
        chunk_indices=None,
        cp_context=None,
        **kwargs,
    ):
        assert torch.equal(cu_seqlens, cu_seqlens_cpu) and q.shape[0] == 1 and cu_seqlens[-1] == q.shape[1]
        calls.append(len(cu_seqlens) - 1)
        prepared = delta_rule._prepare(q[0], k[0], v[0], g[0], beta[0], scale, use_qk_l2norm_in_kernel)
        out, states = [], []
        for n, (a, b) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            state = v.new_zeros(v.shape[2], k.shape[3], v.shape[3]) if initial_state is None else initial_state[n]
            for t in range(a, b):
                state, found = delta_rule._take(state, *(x[t] for x in prepared))
                out.append(found)
            states.append(state)
        return torch.stack(out)[None], torch.stack(states)

    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    delta_rule._find_fla.cache_clear()
    return calls


@pytest.fixture
def no_memory_of_fla():
    yield
    delta_rule._find_fla.cache_clear()


def test_what_fla_is_handed(seed, monkeypatch, no_memory_of_fla):
    calls = stand_in_for_fla(monkeypatch)
    monkeypatch.setattr(delta_rule, "_choose", lambda backend, q, v: "fla")
    for groups in (LAYOUTS[2], [(5, ()), (3, ())]):
        layout = ops.StateLayout(groups)
        inputs, grad = draw_inputs(layout.tokens)
        got, states = ops.gated_delta_rule(*inputs, layout, return_states=True)
        exact, expected = delta_rule._reference(*inputs, layout, 8**-0.5, True)
        found = distances(with_gradients(got, inputs, grad), with_gradients(exact, inputs, grad))
        assert max(found) <= 1e-12 and torch.allclose(states, expected) and not states.requires_grad
    assert calls == [4, 3, 2]


def test_one_place_decides(monkeypatch, no_memory_of_fla):
    def chosen(backend, device, dtype, d_k=128):
        like = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(9, 2, d_k))
        return delta_rule._choose(backend, like, like)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    delta_rule._find_fla.cache_clear()
    monkeypatch.setitem(sys.modules, "fla", None)
    assert chosen("auto", "cpu", torch.float32) == chosen("auto", "cpu", torch.bfloat16) == "cpp"
    assert chosen("auto", "cpu", torch.float64) == "products" == chosen("auto", "cuda", torch.float32)
    assert chosen("auto", "cuda", torch.bfloat16) == chosen("triton", "cuda", torch.float16) == "triton"
    assert chosen("auto", "cuda", torch.bfloat16, 256) == "products"
    with pytest.raises(ValueError, match="'triton' takes d_k to 128, got 256"):
        chosen("triton", "cuda", torch.bfloat16, 256)
    with pytest.raises(ValueError, match=r"'triton' takes bfloat16 and float16, got torch\.float32"):
        chosen("triton", "cuda", torch.float32)
    with pytest.raises(ValueError, match="'triton' takes CUDA tensors"):
        chosen("triton", "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match=r"'fla' needs flash-linear-attention 0\.6"):
        chosen("fla", "cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="'fla' takes bfloat16 and float16 on CUDA"):
        chosen("fla", "cuda", torch.float32)
    with pytest.raises(ValueError, match="'cpp' computes in float32"):
        chosen("cpp", "cpu", torch.float64)
    with pytest.raises(ValueError, match="'cpp' takes CPU tensors"):
        chosen("cpp", "cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="no backend 'fast'"):
        chosen("fast", "cpu", torch.float32)
    stand_in_for_fla(monkeypatch)
    assert chosen("auto", "cuda", torch.bfloat16) == chosen("fla", "cuda", torch.float16) == "fla"
    assert chosen("auto", "cuda", torch.float32) == "products"
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = lambda q, k, v: None
    delta_rule._find_fla.cache_clear()
    with pytest.raises(ValueError, match="this one takes no g, beta, scale"):
        chosen("fla", "cuda", torch.bfloat16)


def test_errors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (q, k, v, g, beta), _ = draw_inputs(5, dtype=torch.float32)
    with pytest.raises(ValueError, match="prompt has 0 tokens"):
        ops.StateLayout([(0, (3,))])
    good = dict(q=q, k=k, v=v, g=g, beta=beta, layout=[(5, ())])
    for change, words in (
        (dict(layout=[(4, ())]), "groups cover 4 tokens, q has 5"),
        (dict(k=k[:, :1]), r"q and k \[5, H_k, d_k\] .* got \[5, 2, 8\] and \[5, 1, 8\]"),
        (dict(v=v[:, :3], g=g[:, :3], beta=beta[:, :3]), "divides 3, the heads of v"),
        (dict(g=g[:, :2]), r"g must be \[5, 4\], got \[5, 2\]"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.gated_delta_rule(**{**good, **change})
    samples, states = torch.arange(5), torch.zeros(9, 4, 8, 6)
    good = dict(states=states, q=q, k=k, v=v, g=g, beta=beta, samples=samples)
    for change, words in (
        (dict(states=states[:, :2]), r"states must be \[samples, 4, 8, 6\]"),
        (dict(states=states.double(), backend="cpp"), "takes float32 states"),
        (dict(samples=samples[:2]), r"samples must be int64 \[5\]"),
        (dict(backend="triton"), "takes CUDA tensors"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.gated_delta_step(**{**good, **change})
    x, weight, tails = torch.zeros(5, 7), torch.zeros(7, 4), torch.zeros(9, 7, 3)
    with pytest.raises(ValueError, match=r"weight must be \[7, 4\], got \[7, 3\]"):
        ops.causal_conv(x, weight[:, 1:], [(5, ())])
    with pytest.raises(ValueError, match="groups cover 6 tokens, x has 5"):
        ops.causal_conv(x, weight, [(6, ())])
    for change, words in (
        (dict(tails=tails.double()), "tails must be torch.float32"),
        (dict(samples=samples.int()), "samples must be int64"),
        (dict(backend="triton"), "takes CUDA tensors"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.causal_conv_step(**{**dict(tails=tails, x=x, weight=weight, samples=samples), **change})


# The convolution


def separate_conv(x, weight):
    out = F.conv1d(x.t()[None], weight[:, None], padding=3, groups=len(weight))[0, :, : len(x)]
    return F.silu(out).t(), torch.zeros(1)


SHORT = [(1, (1, 2)), (2, (5, 0)), (40, (1,) * 16)]


def check_conv(backend, dtype, bound, device="cpu", layouts=(*LAYOUTS[1:], SHORT)):
    for groups in layouts:
        layout = ops.StateLayout(groups).to(device)
        wide = torch.randn(layout.tokens, 80, dtype=torch.float64, device=device)[:, 3:73]  # rows are not contiguous
        x, weight = (
            y.to(dtype).requires_grad_() for y in (wide, torch.randn(70, 4, dtype=torch.float64, device=device))
        )
        grad = torch.randn(layout.tokens, 70, device=device).to(dtype)
        got = with_gradients(ops.causal_conv(x, weight, layout, backend=backend), (x, weight), grad)
        leaves = widened((x, weight))
        rows, _ = separate(lambda x: separate_conv(x, leaves[1]), leaves[:1], groups)
        found = distances(got, with_gradients(rows, leaves, grad.double()))
        assert max(found) <= bound and all(y.dtype == dtype for y in got), (backend, groups, found)


def test_convolution_equals_separate_sequences(seed):
    check_conv("reference", torch.float64, 1e-12)
    check_conv("cpp", torch.float32, 1e-6)
    for backend in ("reference", "cpp"):
        check_conv(backend, torch.bfloat16, 5e-3)


def check_steps(backend, dtype, bound, device="cpu", shapes=((2, 2, 8, 6), (1, 3, 16, 40))):
    """Prompts once, forked; then a token for some samples at a time equals the rule over the whole row. What belongs to
    no one is NaN, and stays."""
    states_dtype = torch.promote_types(dtype, torch.float32)
    groups = [(5, (4, 1, 4)), (66, (3, 4)), (2, (2,))]
    layout = ops.StateLayout(groups)
    T, channels = layout.tokens, 70
    places = [7, 3, 0, 9, 4, 1]  # of the completions, among ten samples
    for key_heads, times, d_k, d_v in shapes:
        inputs, _ = draw_inputs(T, key_heads, times, d_k, d_v, dtype)
        x, weight = torch.randn(T, channels).to(dtype), torch.randn(channels, 4).to(dtype)
        wide = widened(inputs)
        with torch.no_grad():
            rule, ends = ops.gated_delta_rule(*wide, layout, return_states=True, backend="products")
            conv = ops.causal_conv(x.double(), weight.double(), layout)
        states = torch.full((10, *ends.shape[1:]), torch.nan, dtype=states_dtype, device=device)
        tails = torch.full((10, channels, 3), torch.nan, dtype=dtype, device=device)
        states[places] = ends[layout.owners].to(states)
        tails[places] = ops.prompt_tails(x, layout)[layout.owners].to(device)
        firsts = [a for a, _, prompt, _ in layout.spans.tolist() if not prompt]
        lengths = [c for _, completions in groups for c in completions]
        for t in range(4):
            going = [i for i, length in enumerate(lengths) if t < length][::-1]
            rows, samples = [firsts[i] + t for i in going], torch.tensor([places[i] for i in going], device=device)
            one = [y.detach()[rows].to(device) for y in inputs]
            out = ops.gated_delta_step(states, *one, samples, backend=backend)
            mixed = ops.causal_conv_step(tails, x[rows].to(device), weight.to(device), samples, backend=backend)
            assert out.dtype == mixed.dtype == dtype
            found = distances((out.cpu(), mixed.cpu()), (rule[rows], conv[rows]))
            assert max(found) <= bound, (backend, t, found)
        free = [i for i in range(10) if i not in places]
        assert states[free].isnan().all() and tails[free].isnan().all()
        assert states[places].isfinite().all() and tails[places].isfinite().all()


def check_rows_alone(backend, dtype=torch.float32, device="cpu"):
    """A row is the same bits alone, in another order, and beside NaN."""
    inputs, _ = draw_inputs(40, 1, 2, 32, 32, dtype, device)
    inputs, samples = [x.detach() for x in inputs], torch.randperm(50, device=device)[:40]
    states, tails = torch.randn(50, 2, 32, 32, device=device), torch.randn(50, 9, 3, device=device).to(dtype)
    x, weight = torch.randn(40, 9, device=device).to(dtype), torch.randn(9, 4, device=device).to(dtype)
    runs = []
    for rows in (list(range(40)), [17], list(range(39, -1, -1))):
        mine, my_tails = states.clone(), tails.clone()
        if len(rows) == 40:
            mine[samples[3]] = torch.nan if rows[0] else 1.0
        one = [y[rows] for y in inputs]
        out = ops.gated_delta_step(mine, *one, samples[rows], backend=backend)[rows.index(17)]
        mixed = ops.causal_conv_step(my_tails, x[rows], weight, samples[rows], backend=backend)[rows.index(17)]
        runs.append((out, mixed, mine[samples[17]], my_tails[samples[17]]))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other)), backend


def test_steps_go_on_where_prompts_end(seed):
    check_steps("reference", torch.float64, 1e-12)
    check_steps("cpp", torch.float32, 5e-6)
    check_steps("reference", torch.bfloat16, 5e-3)
    check_rows_alone("cpp")


def test_a_state_stays_finite(seed):
    states = torch.zeros(1, 2, 8, 6)
    for _ in range(300):
        inputs, _ = draw_inputs(1, 1, 2, dtype=torch.float32)
        q, k, v, _, _ = (x.detach() for x in inputs)
        ops.gated_delta_step(states, q, k, v, torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
    assert states.abs().max() < 50


def check_rule(backend, dtype, bound, layouts, device="cpu", d_k=8, d_v=40):
    for groups in layouts:
        layout = ops.StateLayout(groups).to(device)
        inputs, grad = draw_inputs(layout.tokens, 1, 2, d_k, d_v, dtype, device)
        wide = widened(inputs)
        exact, ends = ops.gated_delta_rule(*wide, layout, return_states=True, backend="products")
        got, states = ops.gated_delta_rule(*inputs, layout, return_states=True, backend=backend)
        found = distances(
            [*with_gradients(got, inputs, grad), states], [*with_gradients(exact, wide, grad.double()), ends]
        )
        assert states.dtype == torch.float32 and got.dtype == dtype and max(found) <= bound, (backend, groups, found)


def check_other_groups(backend, dtype=torch.float32, device="cpu"):
    """NaN in another group and in another completion is nothing to one."""
    layout = ops.StateLayout([(3, (2,)), (20, (17, 3))]).to(device)
    inputs, grad = draw_inputs(layout.tokens, 1, 1, 8, 40, dtype, device)
    mine = [*range(5, 25), *range(42, 45)]
    first = ops.gated_delta_rule(*inputs, layout, backend=backend)[mine]
    for x in inputs:
        x.data[:5] = x.data[25:42] = torch.nan
    assert torch.equal(ops.gated_delta_rule(*inputs, layout, backend=backend)[mine], first)


INTERPRETED = """
from tests.ops import test_delta_rule as test
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
    test.check_conv("triton", dtype, bound, layouts=[test.SHORT])
test.check_rule("triton", torch.float32, 5e-6, [[(5, (2, 0, 4)), (65, (70, 1))], [(20, ()), (3, ())]])
test.check_rule("triton", torch.bfloat16, 1e-2, [[(5, (9,))]])
test.check_other_groups("triton")
test.check_steps("triton", torch.float32, 5e-6)
test.check_steps("triton", torch.bfloat16, 1e-2)
test.check_rows_alone("triton")
"""


def test_triton_in_the_interpreter(seed):
    """bfloat16 results are cut there, not rounded."""
    interpret(INTERPRETED, seed)


def recurrent_kernels():
    """Each kernel as it is launched: name, constants, options, types of its own."""
    from sslr1.kernels import recurrent as module

    for d_k, d_v in ((128, 128), (64, 64), (32, 16)):
        for norm in (True, False):
            yield "step", dict(NORM=norm, KEYS=d_k, VALUES=module.step_block(d_v)), {"num_warps": 4}, {}
    yield "conv", dict(ROWS=module.ROWS, BLOCK=module.BLOCK), {}, {}
    yield "conv_dy", dict(ROWS=module.ROWS, BLOCK=module.BLOCK), {}, {}
    yield "conv_dx", dict(BLOCK=module.BLOCK), {}, {}
    yield "conv_step", dict(BLOCK=module.BLOCK), {}, {}


def chunk_kernels(half, d, C):
    from sslr1.kernels import delta_back, delta_chunks

    sizes = dict(C=C, KEYS=d, VALUES=delta_chunks.COLUMNS, PART=min(delta_chunks.PART, d), DOT=half)
    sizes |= dict(HEADS=32, KEY_HEADS=16, D_K=d, D_V=d, V_STRIDE=64 * d)
    yield "invert", sizes, delta_chunks.INVERT, {}
    for start, before, keep in ((False, False, True), (True, False, False), (False, True, False), (True, True, False)):
        flags = dict(START=start, BEFORE=before, KEEP=keep)
        yield "scan", sizes | flags, delta_chunks.SCAN, {} if before else {"states": "*fp32"}
    for end in (True, False):
        yield "scan_back", sizes | dict(END=end, FIRST=not end), delta_back.SCAN_BACK, {}
    yield "gather_gates", sizes, delta_back.GATHER_GATES, {}
    yield "gather_qk", sizes, delta_back.GATHER_QK, {}


def assert_compiles(modules, kernels, types, folder):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, constants, options, own in kernels:
        kernel = next(getattr(file, name) for file in modules if hasattr(file, name))
        names = kernel.arg_names
        constants = {n: value for n, value in constants.items() if n in names}
        signature = {n: "constexpr" if n in constants else {**types, **own}.get(n, "i32") for n in names}
        aligned = [i for i, n in enumerate(names) if signature[n][0] == "*"]
        source = ASTSource(
            kernel,
            signature,
            {(names.index(n),): value for n, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= 227 * 1024, (name, constants)
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        assert_no_spills(cubin)
        yield name, compiled.asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_compiles_for_hopper_without_spills(tmp_path, dtype):
    from sslr1.kernels import recurrent as module

    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = dict.fromkeys("q k v g beta x weight tails grad dx out".split(), pointer)
    types |= dict.fromkeys("states dy parts".split(), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys("samples context followers bounds".split(), "*i64")
    assert len(list(assert_compiles([module], recurrent_kernels(), types, tmp_path))) == 10


@pytest.mark.parametrize("dtype, d, C", [("bf16", 128, 64), ("fp16", 128, 16), ("bf16", 64, 64), ("bf16", 32, 16)])
def test_chunks_compile_for_hopper_without_spills(tmp_path, dtype, d, C):
    import triton.language as tl
    from sslr1.kernels import delta_back, delta_chunks

    types = dict.fromkeys("q k v beta grad products inverse states later dr dv u out".split(), f"*{dtype}")
    types |= dict.fromkeys("g start end first dq dk dg dbeta".split(), "*fp32")
    types |= dict.fromkeys("rows following starts lasts preceding".split(), "*i64")
    half = {"bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
    for name, ptx in assert_compiles([delta_back, delta_chunks], chunk_kernels(half, d, C), types, tmp_path):
        assert "wgmma.mma_async" in ptx or C < 64, name


# On a GPU


@pytest.mark.gpu
def test_the_products_on_the_gpu(seed):
    for groups in LAYOUTS:
        layout = ops.StateLayout(groups).to("cuda")
        inputs, grad = draw_inputs(layout.tokens, device="cuda")
        expected = with_gradients(ops.gated_delta_rule(*inputs, layout, backend="reference"), inputs, grad)
        for dtype in (torch.float64, torch.float32):
            mine = [x.detach().to(dtype).requires_grad_() for x in inputs]
            got = with_gradients(ops.gated_delta_rule(*mine, layout, backend="products"), mine, grad.to(dtype))
            assert max(distances(got, expected)) <= BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fla", "triton"])
def test_kernels_equal_the_products(seed, backend):
    """In bfloat16, by at most 2 % of each result's norm: their products take rounded factors."""
    if backend == "fla":
        pytest.importorskip("fla")
    layouts = [BORDERS, [(400, (32,) * 16)], [(20, ()), (3, ())]]
    check_rule(backend, torch.bfloat16, 2e-2, layouts, "cuda", 128, 128)
    check_rule(backend, torch.bfloat16, 2e-2, layouts[:1], "cuda", 64, 64)
    if backend == "triton":
        check_other_groups(backend, torch.bfloat16, "cuda")


@pytest.mark.gpu
def test_steps_and_convolution_on_the_gpu(seed):
    for backend, dtype, bound in (
        ("triton", torch.float32, 5e-6),
        ("triton", torch.bfloat16, 5e-3),
        ("reference", torch.float64, 1e-12),
    ):
        check_conv(backend, dtype, bound, "cuda")
        check_steps(backend, dtype, bound, "cuda", ((2, 2, 8, 6), (1, 3, 16, 40), (2, 2, 128, 128)))
    for dtype in (torch.float32, torch.bfloat16):
        check_rows_alone("triton", dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_one_captured_graph_serves_every_step(seed, backend):
    R, heads, d = 12, 4, 128
    states, tails = torch.randn(20, heads, d, d, device="cuda"), torch.randn(20, 70, 3, device="cuda")
    inputs = [x.detach() for x in draw_inputs(R, 2, 2, d, d, torch.float32, "cuda")[0]]
    x, weight, samples = (
        torch.randn(R, 70, device="cuda"),
        torch.randn(70, 4, device="cuda"),
        torch.arange(R, device="cuda"),
    )

    def both(states, tails, backend=backend):
        return (
            ops.gated_delta_step(states, *inputs, samples, backend=backend),
            ops.causal_conv_step(tails, x, weight, samples, backend=backend),
        )

    both(states.clone(), tails.clone())  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = both(states, tails)
    for _ in range(3):
        samples.copy_(torch.randperm(20, device="cuda")[:R])
        for y in (*inputs[:3], x):
            y.normal_()
        wide, before = states.double(), tails.clone()
        expected = (
            ops.gated_delta_step(wide, *(y.double() for y in inputs), samples, backend="reference"),
            ops.causal_conv_step(before, x, weight, samples, backend="reference"),
        )
        graph.replay()
        for a, b in zip((*out, states, tails), (*expected, wide, before)):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)
