"""How many decode steps a run captures as CUDA graphs, counted without a GPU: `Recorded` stands in for a graph.

    python bench/ captures

The run is 20 steps of 6 puzzles with 4 completions each, some with a second rollout of some of them, with real updates,
and an evaluation before and after. Counted are the steps captured by an engine that keeps its buffers, the buckets
(kinds of step) that run more than once, and the steps captured where buffers are made anew for each call, as they were
up to commit 96c2c70.
"""

import contextlib
from dataclasses import replace
from unittest import mock
from weakref import WeakMethod

import torch
from grpo import TINY, Case
from row import Row, Sides
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from sslr1 import model, ops, puzzles
from sslr1.rollout import Engine, wave

STEPS, PROMPTS, GROUP, NEW = 20, 6, 4, 9
EVALUATED = (8, 3)  # prompts of its calls


class Trace(TorchDispatchMode):
    """Every operation of a step, as a graph would hold it: by its numbers, and by where the tensors lie that were there
    before it."""

    def __init__(self):
        super().__init__()
        self.lines, self.outside, self.inside, self.alive = [], set(), set(), []

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        given, _ = tree_flatten((arguments, options or {}))
        self.lines.append((str(op), *map(self._said, given)))
        out = op(*arguments, **(options or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor) and (at := x.untyped_storage().data_ptr()) not in self.outside:
                self.inside.add(at)
                self.alive.append(x)  # or another could take its place
        return out

    def _said(self, x):
        if not isinstance(x, torch.Tensor):
            return repr(x)
        kind = str(x.dtype), tuple(x.shape), x.stride()
        if (at := x.untyped_storage().data_ptr()) in self.inside:
            return kind
        self.outside.add(at)
        return *kind, x.data_ptr()


def traced(step, block) -> list:
    with Trace() as trace:
        step(*block)
    return trace.lines


class Recorded:
    """What a CUDA graph is on a GPU: replayed, it runs the captured step again, and fails where that is no longer the
    very operations on the very addresses, or draws by other numbers."""

    made = 0

    def __init__(self, step, block):
        type(self).made += 1
        self.step, self.block, self.replays = WeakMethod(step), block, 0  # a graph keeps nobody's buffers either
        self.lines = traced(step, block)

    def replay(self):
        self.replays += 1
        if self.replays > 1:  # tracing it was the first
            lines = traced(self.step(), self.block)
            changed = next(((a, b) for a, b in zip(self.lines, lines) if a != b), len(lines) != len(self.lines))
            assert not changed, f"a captured step is not what it was: {changed}"


@contextlib.contextmanager
def stand_in():
    """Engines on the CPU capture their steps, as `Recorded`."""
    with (
        mock.patch.object(wave, "capture", lambda step, block, pool: (Recorded(step, block), 0)),
        mock.patch.object(torch.cuda, "graph_pool_handle", lambda: None),
        mock.patch.object(Engine, "_captures", lambda self: self.cuda_graphs),
    ):
        yield


@contextlib.contextmanager
def counted():
    """Inside, {"captures": steps captured, "runs": {bucket: how often it ran}}."""
    found, inner, before = {"captures": 0, "runs": {}}, wave.Graphs.run, Recorded.made

    def run(self, step, block, sampling):
        bucket = step.__self__.group_size, block, sampling
        found["runs"][bucket] = found["runs"].get(bucket, 0) + 1
        inner(self, step, block, sampling)

    with stand_in(), mock.patch.object(wave.Graphs, "run", run):
        yield found
    found["captures"] = Recorded.made - before


def draw(case, count, seed):
    """Prompts of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randint(112, 169, (count,), generator=generator).tolist()
    images = [torch.randint(0, 256, (side, 140, 3), dtype=torch.uint8, generator=generator) for side in sides]
    spec = ops.PatchSpec.from_pretrained(case.folder, dtype=case.dtype, max_pixels=168**2)
    batch = puzzles.make(images, "rotation", seed=seed, level=2, spec=spec, thinking=False, wordings=1)
    return model.prompts(batch, case.tokenizer)


def run(case, after=lambda engine: None) -> list:
    """The tokens of a run's completions. after(engine): what is done after each call of `generate`."""
    engine = Engine(case.weights.model, case.tokenizer, max_tokens=NEW, look_every=4)
    engine.expect(PROMPTS, GROUP)
    engine.stop_ids = sorted({*engine.stop_ids, *range(0, 300, 9)} - {*engine.suppressed})
    found = []

    def generate(prompts, **options):
        groups = engine.generate(prompts, **options)
        after(engine)
        found.extend(s.tokens.tolist() for g in groups for s in g.samples)
        return groups

    def evaluate():
        for n, count in enumerate(EVALUATED):
            generate(draw(case, count, 1000 + n), group_size=1, temperature=0)

    evaluate()
    for step in range(STEPS):
        prompts = draw(case, PROMPTS, step)
        groups = generate(prompts, group_size=GROUP, step=step)
        if step % 3 == 0:
            generate(prompts[: 1 + step % 4], group_size=GROUP, step=step, attempt=1)
        case.learner.step(groups, torch.rand(PROMPTS, GROUP, generator=torch.Generator().manual_seed(step)))
        case.weights.refresh(case.policy)
    evaluate()
    return found


def made():
    return Case(replace(TINY, token_budget=16384, recompute=0), visual=16, prompts=PROMPTS, group_size=GROUP, new=NEW)


def facts(_) -> dict:
    with counted() as kept:
        mine = run(made())
    with counted() as anew:
        theirs = run(made(), after=Engine.release)
    again = sum(n > 1 for n in kept["runs"].values())
    assert mine == theirs and kept["captures"] == again, (kept["captures"], again)
    return {
        "counters": {
            "steps captured:": kept["captures"],
            "buckets that ran more than once:": again,
            "captured with buffers made anew for each call (as at 96c2c70):": anew["captures"],
        }
    }


def rows(mode):
    what = f"captured decode steps of a run of {STEPS} steps and two evaluations, a stand-in for CUDA graphs"
    if mode != "cpu":
        return []
    return [Row(what=what, make=lambda: Sides(ours=lambda: None, facts=facts, once=True))]
