"""What learner, rollout and step are measured on: a small Qwen2.5-VL on a CPU, one of the published 3B model's shape on
a GPU, both of random weights; and the parts of a GRPO step, put together as sslr1.setup.build and sslr1.run do from a
configuration, for machines without pydantic.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace

import torch

from sslr1 import distributed, model, ops, puzzles
from sslr1.learner import Learner
from sslr1.model import lora, parallel, tiny
from sslr1.rollout import Engine, SamplerWeights

UNITS = {"qwen2_5_vl": 28, "qwen3_5": 32}  # px a side of a visual token


@dataclass(frozen=True)
class Shape:
    """called: how rows name the model; text, vision: `build_tiny`'s; dtype: of its files, and what it computes in;
    token_budget, recompute, moments, frozen, lora: as in the configuration; family: a key of `tiny.FAMILIES`."""

    called: str
    text: dict
    vision: dict
    device: str = "cpu"
    dtype: str = "float32"
    token_budget: int = 16384
    recompute: int = 0
    moments: str = "float32"
    frozen: str = "none"
    lora: object = field(default_factory=lambda: SimpleNamespace(rank=0))
    family: str = "qwen2_5_vl"


SMALL = Shape(
    "6 layers of 256, a vision tower of 4 layers of 128",
    dict(hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8),
    dict(depth=4, hidden_size=128, intermediate_size=256, out_hidden_size=256, fullatt_block_indexes=[1, 3]),
)
# As Qwen/Qwen2.5-VL-3B-Instruct's config.json has it; in AdamW's moments it is configs/qwen2.5-vl-3b-one-gpu.yaml's.
LARGE = Shape(
    "Qwen2.5-VL-3B",
    dict(
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151_936,
        max_position_embeddings=128_000,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    ),
    dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=2048,
        fullatt_block_indexes=[7, 15, 23, 31],
        window_size=112,
        initializer_range=0.02,
    ),
    device="cuda",
    dtype="bfloat16",
    recompute=1,
    moments="bfloat16",
)


# What the large one's rows are tried with on a CPU: recomputed and in micro-batches, as it is
TINY = Shape(
    "2 layers of 128",
    dict(num_hidden_layers=2, hidden_size=128, intermediate_size=128),
    dict(depth=2, out_hidden_size=128),
    recompute=1,
    token_budget=200,
)


def weights(shape) -> Path:
    """A model folder of the shape, written once for all processes that are given SSLR1_BENCH_MODELS, a folder to keep
    it in."""
    kept = Path(os.environ.get("SSLR1_BENCH_MODELS") or _temporary().name)
    looks = json.dumps([shape.family, shape.text, shape.vision, shape.dtype]) + Path(tiny.__file__).read_text("utf-8")
    folder = kept / hashlib.sha256(looks.encode()).hexdigest()[:12]
    if not (folder / "preprocessor_config.json").exists():  # written last
        with torch.device(shape.device):
            tiny.build_tiny(folder, text=shape.text, vision=shape.vision, dtype=shape.dtype, family=shape.family)
    return folder


@cache
def _temporary():
    return tempfile.TemporaryDirectory(prefix="sslr1-bench-")


def model_folder(shape, max_pixels) -> tempfile.TemporaryDirectory:
    """`weights` with a bound of its own on pictures: links to the files, which are large."""
    out = tempfile.TemporaryDirectory(prefix="sslr1-bench-")
    for path in weights(shape).iterdir():
        os.symlink(path, Path(out.name) / path.name)
    settings = Path(out.name) / "preprocessor_config.json"
    bounded = tiny.bounded(json.loads(settings.read_text()), max_pixels)
    settings.unlink()
    settings.write_text(json.dumps(bounded))
    return out


class Case:
    """A model folder of a shape, whose pictures have `visual` tokens (a square number), and what is made of it when it
    is asked for. prompts, group_size, new: of a step, completions all of `new` tokens."""

    def __init__(self, shape, visual, prompts, group_size, new):
        self.shape, self.visual, self.prompts, self.group_size, self.new = shape, visual, prompts, group_size, new
        unit = UNITS[shape.family]
        self.side = unit * round(visual**0.5)
        assert (self.side // unit) ** 2 == visual
        self._folder = model_folder(shape, self.side**2)
        self.folder = Path(self._folder.name)
        self.tokenizer = model.load_tokenizer(self.folder)
        self.dtype = getattr(torch, shape.dtype)
        self.spec = ops.PatchSpec.from_pretrained(self.folder, dtype=self.dtype)
        edge = self.side + unit // 2 + 1
        self.images = list(torch.randint(0, 256, (prompts, edge, edge, 3), dtype=torch.uint8))
        # the configuration's values, as tests/test_bench.py sees to, but for a learning rate that leaves a random model
        # be
        self.optim = SimpleNamespace(
            lr=1e-6,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.0,
            moments=shape.moments,
            clip_norm=1.0,
            warmup_steps=10,
            schedule="constant",
        )
        self.loss = SimpleNamespace(
            loss_type="dapo",
            advantage="group",
            is_cap=2.0,
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.0,
            entropy_coef=0.0,
            updates=1,
        )
        self.rollout = SimpleNamespace(
            prompts=prompts, group_size=group_size, max_tokens=new, wave_rows=1024, wave_groups=0, cuda_graphs=True
        )

    def draw(self):
        """The puzzles: one picture each, and a question."""
        return puzzles.make(self.images, "rotation", level=2, spec=self.spec, thinking=False, wordings=1)

    def groups(self):
        """Groups of completions that were not drawn by the model, and their rewards [P, G]."""
        out = []
        for prompt in model.prompts(self.draw(), self.tokenizer):
            tokens = torch.randint(0, 300, (self.group_size, self.new))
            out.append(model.Group(prompt, [model.Sample(ids, torch.zeros(self.new), "", "length") for ids in tokens]))
        return out, torch.rand(self.prompts, self.group_size)

    @cached_property
    def world(self):
        return distributed.start(self.shape.device)

    @cached_property
    def _trained(self):
        network = model.skeleton(self.folder)
        model.freeze(network, self.shape.frozen)
        if adapted := lora.wanted(self.shape.lora, network, self.folder):
            lora.add(network, adapted, self.dtype)
        weights = SamplerWeights(network, self.dtype)
        policy = parallel.shard(model.Policy(network), self.world, self.dtype, recompute=self.shape.recompute)
        parallel.materialize(policy, self.world.device)
        model.load_weights(policy.model, self.folder)
        lora.begin(policy.model, 0)
        return policy, weights.attach(policy, self.world)

    @cached_property
    def policy(self):
        return self._trained[0]

    @cached_property
    def weights(self):
        return self._trained[1]

    @cached_property
    def learner(self):
        return Learner(
            self.policy,
            self.world,
            optim=self.optim,
            loss=self.loss,
            temperature=1.0,
            max_tokens=self.new,
            token_budget=self.shape.token_budget,
            steps=1000,
        )

    def engine(self, network):
        """One for a model that is not sharded, which never stops early."""
        engine = Engine(network, self.tokenizer, max_tokens=self.new)
        engine.suppressed, engine.stop_ids = sorted({*engine.suppressed, *engine.stop_ids}), [-1]
        return engine

    def plain(self):
        """transformers' own model of the folder."""
        return model.load_model(self.folder, self.dtype).to(self.shape.device)

    def planned_gb(self, kept=False):
        """What `--plan 1` says that such a step takes at most; kept: where the rollout's buffers stay."""
        from sslr1.setup import budget

        return budget.peak(budget.kept(self.memory) if kept else self.memory)

    def make_room(self, engine):
        """As a session does before the learner's turn."""
        from sslr1.setup import budget

        budget.make_room(engine, lambda: self.memory, self.world.device)

    @cached_property
    def memory(self):
        """The lines of `--plan 1`."""
        from sslr1.setup import budget

        settings = SimpleNamespace(
            model=SimpleNamespace(frozen=self.shape.frozen, dtype=self.shape.dtype, lora=self.shape.lora),
            train=SimpleNamespace(
                replicate=1, token_budget=self.shape.token_budget, recompute=self.shape.recompute, compile=False
            ),
            data=SimpleNamespace(max_side=self.side),
            puzzles=SimpleNamespace(
                mixture={"rotation": 1.0},
                levels={"rotation": 2},
                curriculum="fixed",
                composed=False,
                min_pixels=None,
                max_pixels=None,
            ),
            rollout=self.rollout,
            optim=self.optim,
            loss=self.loss,
            eval=SimpleNamespace(count=0),
        )
        return budget.plan(settings, self.folder, 1, self.shape.device)[0]
