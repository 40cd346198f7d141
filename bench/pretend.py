"""A CPU that passes for a GPU while kernels are compiled: what tests and benchmarks launch is compiled as they would,
and not run.

Tensors say that they lie on the GPU, and everything that they are given to goes the GPU's way; Triton compiles each
launch's variant for the card, its launcher too, into TRITON_CACHE_DIR. Outputs stay zero, so what is computed from them
means nothing: tests run without their asserts, and one that fails on the way has compiled what came before. A plugin:
`python -O -m pytest --assert=plain -p pretend -m gpu`. `python bench/pretend.py` compiles what benchmarks launch.
`bench/kit.py` runs both.
"""

import sys
from math import prod
from types import SimpleNamespace

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)  # H100 and H200
ZEROED = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    torch.Tensor.new_empty: torch.Tensor.new_zeros,
}
HERE = (torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.pin_memory)  # where a tensor is already
IS_CUDA, DEVICE = torch.Tensor.is_cuda.__get__, torch.Tensor.device.__get__
LARGE = 1 << 27  # elements
launches, compiled = [0], {}


class OnGpu(TorchFunctionMode):
    """Tensors on the CPU that say that they are on the GPU."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function == IS_CUDA:
            return True
        if function == DEVICE:
            return torch.device("cuda", 0)
        if function in HERE:
            return arguments[0]
        options = {key: x for key, x in (options or {}).items() if key != "pin_memory"}
        if options.get("device") is not None:
            options["device"] = "cpu"
        arguments = ["cpu" if isinstance(x, torch.device) else x for x in arguments]
        if function is torch.Tensor.to and arguments[1:] and isinstance(arguments[1], str):
            arguments[1] = "cpu"
        if "out_dtype" in options:  # which no CPU knows
            dtype = options.pop("out_dtype")
            arguments = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
        if function is torch.randn and prod(x for x in arguments if isinstance(x, int)) > LARGE:
            function = torch.zeros  # which takes no memory until it is written to
        return ZEROED.get(function, function)(*arguments, **options)


def in_operators(register):
    """torch.library.Library.impl: torch calls operators outside of such a mode."""

    def impl(library, name, function, key="", **options):
        def operator(*arguments, **named):
            with OnGpu():
                return function(*arguments, **named)

        ours = library.ns == "sslr1" and not options
        return register(library, name, operator if ours else function, key, **options)

    return impl


def drawn(sample):
    """ops.sample, with tokens at random: all zero would end every sample at once."""

    def inner(logits, *arguments, **options):
        tokens, logprobs = sample(logits, *arguments, **options)
        return torch.randint(0, logits.shape[1], tokens.shape), logprobs

    return inner


class Driver:
    """What Triton asks about a GPU."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self):
        self.utils = nvidia.CudaUtils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return HOPPER

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_only():
    """From now on launches are compiled; sslr1 may not have been imported before."""
    assert "sslr1" not in sys.modules
    torch.library.Library.impl = in_operators(torch.library.Library.impl)
    from transformers import modeling_utils

    from sslr1 import ops
    from sslr1.rollout import Engine

    modeling_utils.get_torch_context_manager_or_global_device = lambda: None
    triton.runtime.driver.set_active(Driver())
    run = JITFunction.run

    def compile_one(self, *arguments, grid, warmup, **options):
        launches[0] += 1
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if id(kernel) not in compiled:
            compiled[id(kernel)] = kernel
            nvidia.CudaLauncher(kernel.src, kernel.metadata)
        return kernel

    JITFunction.run = compile_one
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.memory_allocated = torch.cuda.memory_reserved = lambda *_: 0
    torch.cuda.mem_get_info = lambda *_: (1 << 36, 1 << 36)
    ops.sample = drawn(ops.sample)
    Engine._captures = lambda self: False
    torch.testing.assert_close = lambda *_, **__: None
    OnGpu().__enter__()


def say(name):
    print(f"{name}: {launches[0]} launches, {len(compiled)} variants", flush=True)


def pytest_configure(config):
    compile_only()


def pytest_unconfigure(config):
    say("tests")


def compile_benchmarks():
    """Kernels alone where whole rows hold the small ones, and at the shapes of the whole models' rows, of which one
    layer is enough."""
    import decode
    import rollout
    import sampling
    import step

    from sslr1 import ops

    for row in [*render_rows(), *sampling.rows("cuda")]:
        row.make().ours()
    ops.decode_attention(*decode.draw(decode.Shape(), "cuda"), 0.1)
    cases = [step.SHAPES["cuda"], step.AGAINST_TRL["cuda"]]
    cases += [(rollout.SHAPES["cuda"][0], sizes) for sizes, _ in rollout.SHAPES["cuda"][1]]
    for shape, sizes in cases:
        compile_steps(shape, **sizes)


def render_rows():
    import render

    return render.rows("cuda")


def compile_steps(shape, visual, prompts, group_size, new):
    """What a decode step and a first draw launch; only a prompt's length is looked up, with a small model."""
    import grpo

    from sslr1 import model, ops
    from sslr1.rollout.cache import GroupCache, Shape, head_size

    case = grpo.Case(grpo.TINY, visual=visual, prompts=1, group_size=1, new=1)
    longest = max(len(p.input_ids) for p in model.prompts(case.draw(), case.tokenizer))
    text = SimpleNamespace(**{**shape.text, "num_hidden_layers": 1})
    buffers = Shape(places=prompts, longest=longest, group_size=group_size, max_tokens=new, rows=prompts * group_size)
    cache = GroupCache(text, buffers, getattr(torch, shape.dtype), "cpu")
    q = torch.zeros(prompts, group_size, text.num_attention_heads, head_size(text), dtype=cache.own_k.dtype)
    held = (
        cache.prompt_k[0],
        cache.prompt_v[0],
        cache.prompt_lengths,
        cache.own_k[0],
        cache.own_v[0],
        cache.own_lengths,
    )
    ops.decode_attention(q, *held, head_size(text) ** -0.5)
    rows, V = prompts * group_size, text.vocab_size
    ops.sample(torch.zeros(rows, V), torch.zeros(rows, dtype=torch.int64), suppress=torch.arange(768, V))


if __name__ == "__main__":
    compile_only()
    try:
        compile_benchmarks()
    finally:
        say("benchmarks")
    sys.exit(not compiled)
