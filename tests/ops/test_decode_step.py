"""What stands between a decode step's products: C++ and Triton's kernels (interpreted, and compiled) against the plain
forms in float64, rows that don't depend on others, and buffers of which only the samples' own places change."""

import pytest
import torch

from sslr1 import ops
from tests.hopper import assert_no_spills
from tests.interpreter import interpret

FORMS = [  # heads, kv heads, d, rotary, gated, norms, zero_centred
    (4, 2, 32, 32, False, False, False),
    (8, 2, 64, 64, False, True, False),
    (8, 2, 64, 16, True, True, True),
    (6, 1, 128, 32, True, True, True),
]
WIDE = (2, 1, 256, 64, True, True, True)
STEPS = [  # places, G, samples of all, rows
    (2, 4, [0, 1, 2, 3, 4, 5, 6, 7], 8),
    (3, 4, [1, 2, 7, 8, 9], 8),
    (1, 20, list(range(20)), 20),
]


def attention_case(form, step, dtype, seed):
    """Arguments of `step_attention`, and options."""
    heads, heads_kv, d, rotary, gated, norms, zero_centred = form
    P, G, samples, rows = step
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    L, C = 13, 9
    samples = torch.tensor(samples)
    written = torch.randint(0, C, (len(samples),), generator=random)
    own_lengths = torch.zeros(P * G, dtype=torch.int32)
    own_lengths[samples] = written.int() + 1
    lengths = torch.randint(1, L + 1, (P,), generator=random).int()
    width = ((2 if gated else 1) * heads + 2 * heads_kv) * d
    given = [draw(rows, width), draw(rows, rotary), draw(rows, rotary)]
    given += [draw(d), draw(d)] if norms else [None, None]
    given += [draw(P, heads_kv, L, d), draw(P, heads_kv, L, d), lengths]
    given += [draw(P, G, heads_kv, C, d), draw(P, G, heads_kv, C, d), own_lengths.view(P, G), samples, written, d**-0.5]
    return given, dict(heads=heads, gated=gated, eps=1e-6, zero_centred=zero_centred)


def widened(given):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]


def copied(given):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in given]


def delta_case(dtype, seed, n=5, rows=7, key_heads=2, heads=4, d_k=32, d_v=16):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    channels = 2 * key_heads * d_k + heads * d_v
    given = [draw(rows, channels + heads * (d_v + 2)), draw(channels, 4), draw(heads).to(wide), draw(heads)]
    given += [draw(d_v).to(wide), draw(9, heads, d_k, d_v).to(wide), draw(9, channels, 3)]
    return [*given, torch.tensor([0, 2, 3, 7, 8])[:n]]


def near(found, expected, dtype):
    """bfloat16's results are cut, not rounded, in the interpreter, and scores of a whole head add that up; float32 is
    the tight test."""
    torch.testing.assert_close(
        found.double(),
        expected,
        **dict(rtol=5e-2, atol=1e-1) if dtype == torch.bfloat16 else dict(rtol=2e-5, atol=2e-5),
    )


def check_rows(backend, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    for R, D in ((1, 32), (5, 100), (0, 64), (3, 2048)):
        x, weight = (torch.randn(n, D, generator=random).to(dtype) for n in (R, 1))
        for zero_centred in (False, True):
            options = dict(eps=1e-6, zero_centred=zero_centred)
            expected = ops.step_norm(x.double(), weight[0].double(), **options, backend="reference")
            near(ops.step_norm(x, weight[0], **options, backend=backend), expected, dtype)
        gate_up = torch.randn(R, 2 * D, generator=random).mul(4).to(dtype)
        near(ops.step_swiglu(gate_up, backend=backend), ops.step_swiglu(gate_up.double(), backend="reference"), dtype)


def check_attention(backend, dtype, seed, forms=FORMS, steps=STEPS):
    for form in forms:
        for step in steps:
            given, options = attention_case(form, step, dtype, seed)
            mine, theirs = copied(given), copied(widened(given))
            expected = ops.step_attention(*theirs, **options, backend="reference")
            found = ops.step_attention(*mine, **options, backend=backend)
            near(found, expected, dtype)
            assert not found[len(given[11]) :].any()
            for i in (8, 9):  # own keys and values: those of the samples, and no others
                near(mine[i], theirs[i], dtype)
                changed = (mine[i] != given[i]).any(-1).any(2).sum()
                assert changed <= len(given[11])


def check_delta(backend, dtype, seed):
    for n, rows in ((5, 5), (3, 7), (0, 2)):
        given = delta_case(dtype, seed, n, rows)
        mine, theirs = copied(given), copied(widened(given))
        expected = ops.step_delta(*theirs, backend="reference")
        near(ops.step_delta(*mine, backend=backend), expected, dtype)
        for i in (5, 6):
            near(mine[i], theirs[i], dtype)
            others = torch.ones(9, dtype=torch.bool).index_fill(0, given[7], False)
            assert torch.equal(mine[i][others], given[i][others])


def check_samples(backend, seed):
    """Steps of a few samples, the others untouched; some were never live, some are done, by a stop or by their number.
    Draws of ids below 8, of which two stop, against loops in Python."""
    random = torch.Generator().manual_seed(seed)
    S, T, most = 300, 5, 4
    stop, limit = torch.tensor([3, 6]), torch.tensor(most)
    tokens, logprobs = torch.full((S, T), 9), torch.full((S, T), torch.nan)
    counts = torch.randint(0, most + 1, (S,), generator=random)
    live = (counts > 0) & (counts < most) & (torch.rand(S, generator=random) < 0.8)
    addresses = torch.randint(-(2**63), 2**63 - 1, (S,), generator=random)
    first_position = torch.randint(0, 1000, (S,), generator=random)
    state = tokens, logprobs, counts, live
    for n in (270, 3, 1):
        samples = torch.randperm(S, generator=random)[:n]
        lengths = torch.full((S // 10, 10), -1, dtype=torch.int32)
        known = tokens, counts, live, addresses, first_position, lengths
        token, position, written, key = ops.step_begin(samples, *known, backend=backend)
        assert lengths.flatten().tolist() == [c if on else 0 for c, on in zip(counts.tolist(), live.tolist())]
        for i, s in enumerate(samples.tolist()):
            count = counts[s].item()
            assert token[i] == tokens[s, max(count - 1, 0)]
            assert written[i] == count - 1 and position[i] == first_position[s] + count - 1
            assert key[i] == ops.fold_tensor(addresses[s], counts[s])
        drawn, drawn_logprobs = torch.randint(0, 8, (n,), generator=random), torch.rand(n, generator=random)
        expected = copied(state)
        for i, s in enumerate(samples.tolist()):
            if expected[3][s]:
                expected[0][s, counts[s]], expected[1][s, counts[s]] = drawn[i], drawn_logprobs[i]
                expected[2][s] += 1
                expected[3][s] = drawn[i] not in stop and expected[2][s] < most
        ops.step_end(samples, drawn, drawn_logprobs, stop, limit, *state, backend=backend)
        for mine, theirs in zip(state, expected):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_samples(seed):
    check_samples("reference", seed)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_rows(backend, seed):
    check_rows(backend, torch.float32, seed)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_attention(backend, seed):
    check_attention(backend, torch.float32, seed)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_delta(backend, seed):
    check_delta(backend, torch.float32, seed)


def test_attention_is_separate_modules_attention(seed):
    """Against SDPA on each sample's own sequence, float64."""
    given, options = attention_case(FORMS[0], STEPS[1], torch.float64, seed)
    qkv, cos, sin, _, _, prompt_k, prompt_v, lengths, own_k, own_v, _, samples, written, scale = given
    found = ops.step_attention(*given, **options, backend="reference")
    heads, d, G = 4, 32, own_k.shape[1]
    for row, (sample, at) in enumerate(zip(samples.tolist(), written.tolist())):
        place, L = sample // G, lengths[sample // G]
        q = qkv[row, : heads * d].view(heads, 1, d)
        turned = torch.cat([-q[..., d // 2 :], q[..., : d // 2]], -1)
        q = q * cos[row] + turned * sin[row]
        keys, values = (
            torch.cat([prompt[place, :, :L], own[place, sample % G, :, : at + 1]], 1).repeat_interleave(2, 0)
            for prompt, own in ((prompt_k, own_k), (prompt_v, own_v))
        )
        alone = torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=scale)
        torch.testing.assert_close(found[row], alone.reshape(-1), rtol=1e-12, atol=1e-12)


def test_a_row_does_not_depend_on_others(seed):
    """Bit for bit, in C++: fewer samples, other threads."""
    given, options = attention_case(FORMS[2], STEPS[0], torch.float32, seed)
    whole = ops.step_attention(*copied(given), **options, backend="cpp")
    some = copied(given)
    for i in (0, 1, 2, 11, 12):
        some[i] = some[i][[1, 4, 5]].contiguous()
    assert torch.equal(ops.step_attention(*some, **options, backend="cpp"), whole[[1, 4, 5]])


def test_what_does_not_fit_is_refused():
    x, weight = torch.zeros(2, 4), torch.zeros(4)
    with pytest.raises(ValueError, match="weight"):
        ops.step_norm(x, weight[:3], 1e-6)
    with pytest.raises(ValueError, match="gate_up"):
        ops.step_swiglu(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="not in float64"):
        ops.step_swiglu(torch.zeros(2, 4, dtype=torch.float64), backend="cpp")


INTERPRETED = """
from tests.ops import test_decode_step as t
t.check_samples("triton", int(sys.argv[1]))
for dtype in (torch.float32, torch.bfloat16):
    t.check_rows("triton", dtype, int(sys.argv[1]))
    t.check_attention("triton", dtype, int(sys.argv[1]), [*t.FORMS[1:3], t.WIDE], t.STEPS[1:2])
    t.check_delta("triton", dtype, int(sys.argv[1]))
"""


def test_triton_in_the_interpreter(seed):
    interpret(INTERPRETED, seed)


KERNELS = [
    ("norms", dict(ZERO_CENTRED=False, BLOCK=4096), 8),
    ("norms", dict(ZERO_CENTRED=True, BLOCK=8192), 8),
    ("swiglu_rows", dict(BLOCK=2048), 4),
    ("split_turn", dict(D=128, EACH=128, NORM=False, ZERO_CENTRED=False), 1),
    ("split_turn", dict(D=256, EACH=512, NORM=True, ZERO_CENTRED=True), 1),
    ("gather_gate", dict(D=256, GATED=True), 1),
    ("delta", dict(KEYS=128, VALUES=32), 4),
    ("gate_norm", dict(BLOCK=128), 1),
    ("begin_rows", dict(BLOCK=256), 2),
    ("end_rows", dict(BLOCK=256), 2),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triton_compiles_for_hopper_without_spills(tmp_path, dtype):
    import triton
    import triton.language as tl
    from sslr1.kernels import step as module
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    known = dict(states="*fp32", A_log="*fp32", eps="fp32", scale="fp32", samples="*i64", written="*i64")
    known |= dict.fromkeys("tokens counts addresses first_position token position key drawn stop most".split(), "*i64")
    known |= dict(live="*u8", own_lengths="*i32", drawn_logprobs="*fp32", logprobs="*fp32")
    numbers = "width stride heads heads_kv room rotary n d times d_k d_v q_stride k_stride v_stride gate_stride".split()
    numbers += ["every", "stops"]
    for name, constants, warps in KERNELS:
        kernel = getattr(module, name)
        names = kernel.arg_names
        if "TO" in names:
            constants = constants | {"TO": {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]}
        types = {n: known.get(n, "i32" if n in numbers else pointer) for n in names}
        signature = {n: "constexpr" if n in constants else types[n] for n in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
        source = ASTSource(kernel, signature, {(names.index(n),): x for n, x in constants.items()}, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        cubin = tmp_path / f"{name}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        assert_no_spills(cubin)
