"""The settings of a run: each section's keys, types, ranges and defaults; `inputs` has those of what a run is given. A
field's description is its documentation."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sslr1.config.inputs import Data, Model, Task
from sslr1.config.kinds import ConfigError, ImageSource, NoImages, Place, Section, nearest
from sslr1.sums import plain_sum

TASK_NAME = re.compile("[a-z][a-z0-9_-]*")


class Warmup(Section):
    steps: int = Field(0, ge=0, description="steps of warm-up before GRPO, towards answers in the right format")
    batch: int = Field(32, ge=1, description="puzzles a warm-up step, over all ranks")
    lr: float = Field(1e-3, gt=0, description="its learning rate, constant")
    answers: Literal["random", "right"] = Field(
        "random",
        description="what it is taught: random answers teach the form and no skill; right ones are fine-tuning, for a "
        "model that can't begin to solve a puzzle and so has nothing for GRPO to reward",
    )
    right_for: list[str] = Field(
        [],
        description="puzzles and tasks that answers=right is for, all if empty; the others are shown with random "
        "answers",
    )


class Puzzles(Section):
    preset: Literal["default", "paper"] = Field(
        "default",
        description="what mixture, levels and rule are unless given; paper is an assumption about the unpublished "
        "settings of arXiv 2604.20705: a fifth of each puzzle, 3x3 ordering, the paper's reward",
    )
    mixture: dict[str, float] = Field({}, description="share of each puzzle; {} is the preset's")
    levels: dict[str, int] = Field(
        {},
        description="level of each puzzle: where training starts, and where held-out evaluation stays; each puzzle's "
        "own start unless given",
    )
    curriculum: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="fixed trains at puzzles.levels; adaptive starts there, and a puzzle's level rises and falls with "
        "how well it is solved",
    )
    thinking: bool = Field(
        True,
        description="ask for <think></think> before the boxed answer. The chat template is told by enable_thinking; "
        "one that opens <think> itself is seen, and completions are scored as opened. One that does so where this is "
        "false is refused",
    )
    wordings: int | None = Field(
        None, ge=1, description="use only the first so many wordings of each question, plainest first; all unless given"
    )
    composed: bool = Field(False, description="show all pictures of a puzzle on one canvas, with marks")
    rule: Literal["default", "paper", "visual_jigsaw", "exact"] | None = Field(
        None, description="reward rule; the preset's unless given"
    )
    min_pixels: int | None = Field(None, ge=1, description="smallest canvas area in px; the model's own unless given")
    max_pixels: int | None = Field(None, ge=1, description="largest canvas area in px; the model's own unless given")


class Rollout(Section):
    prompts: int = Field(64, ge=1, description="puzzles a step, over all ranks")
    group_size: int = Field(8, ge=1, description="completions a puzzle")
    max_tokens: int = Field(512, ge=1, description="longest completion")
    temperature: float = Field(1.0, gt=0, description="divides the logits, in sampling and in the loss")
    top_p: float = Field(1.0, gt=0, le=1, description="sampling only from the smallest set of this probability")
    top_k: int = Field(0, ge=0, description="sampling only from the k likeliest tokens; 0 is off")
    truncated: Literal["zero", "score", "mask"] = Field(
        "zero",
        description="a completion cut off at max_tokens gets reward 0, or is scored by what it holds, or that and "
        "left out of the loss",
    )
    max_logp_gap: float | None = Field(
        None,
        gt=0,
        description="a token whose log-prob under the learner is further than this from the sampler's is weighted by "
        "their ratio, loss.is_cap at most, which takes one more product with the vocabulary's matrix; null only logs "
        "the difference",
    )
    wave_rows: int = Field(1024, ge=1, description="samples that decode together at most")
    wave_groups: int = Field(
        0,
        ge=0,
        description="puzzles whose keys and values are held at most, on a rank; the more, the better are wave_rows "
        "filled while groups wait for their longest completions. 0 is half as many again as fill wave_rows",
    )
    batch_invariant: bool = Field(
        False,
        description="a completion is the same, bit for bit, whatever it is decoded with, on one machine; slower: "
        "prompts run one by one, steps in blocks of 64 rows, and finished completions are computed until their block "
        "is done",
    )
    look_every: int = Field(
        0, ge=0, description="decode steps between two looks at what has finished; 0 is 8 on a GPU, 1 on a CPU"
    )
    cuda_graphs: bool = Field(
        True,
        description="on a GPU, capture decode steps once and replay them: buffers and captured steps stay for the "
        "whole run where its memory holds them beside the learner (--plan says how much that is), and for a step "
        "elsewhere",
    )
    resample: int = Field(
        0,
        ge=0,
        description="how many times at most a puzzle whose completions all earned the same, which teaches nothing, is "
        "replaced by another one within its step",
    )


class Loss(Section):
    loss_type: Literal["dapo", "grpo", "dr_grpo", "cispo", "gspo"] = Field(
        "dapo", description="how token terms are formed and reduced"
    )
    advantage: Literal["group", "mean", "batch"] = Field(
        "group", description="rewards minus group mean, over the group's standard deviation, nothing, or the step's"
    )
    is_cap: float = Field(
        2.0,
        gt=0,
        description="largest weight of a token whose sampler and learner differ by more than rollout.max_logp_gap",
    )
    clip_low: float = Field(0.2, ge=0, lt=1, description="lower clip of the ratio")
    clip_high: float = Field(0.2, ge=0, description="upper clip of the ratio")
    kl_coef: float = Field(
        0.0,
        ge=0,
        description="weight of the distance (KL, as e^r - r - 1) to the model as it was before the first step, after "
        "the format warm-up. Above 0, a frozen copy of it is held, sharded like the model and in its compute dtype, "
        "and read from the run's checkpoint of step 0, which is then kept; with model.lora no copy but of adapters",
    )
    entropy_coef: float = Field(0.0, ge=0, description="entropy bonus a token, in nats")
    updates: int = Field(
        1,
        ge=1,
        description="optimiser updates from each step's completions, all at the step's learning rate; the log-probs "
        "of the first, which is on-policy, are the old ones of the others. Steps, schedule and intervals count steps, "
        "not updates",
    )


Decay = Annotated[float, Field(ge=0, lt=1)]


class Optim(Section):
    lr: float = Field(1e-6, gt=0, description="peak learning rate of AdamW")
    betas: tuple[Decay, Decay] = Field((0.9, 0.99), description="AdamW's moment decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    moments: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="dtype of AdamW's moments; bfloat16 takes 4 bytes a parameter instead of 8, rounded at random",
    )
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 is off")
    warmup_steps: int = Field(10, ge=0, description="steps over which the learning rate rises from 0")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the rise; linear and cosine end at 0"
    )


class Train(Section):
    steps: int = Field(1000, ge=0, description="optimiser steps")
    seed: int = Field(0, description="names every random draw of the run")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is cuda where there is one")
    threads: int = Field(
        0,
        ge=0,
        description="CPU threads a rank; 0 is what OMP_NUM_THREADS says, or else shares the processors that the run "
        "may use (affinity, control group) among the ranks of its machine",
    )
    token_budget: int = Field(16384, ge=1, description="packed tokens a micro-batch at most")
    replicate: int = Field(
        1, ge=1, description="copies of the model, each sharded over its share of the ranks; 1 shards it over all"
    )
    recompute: int = Field(
        0,
        ge=0,
        description="every so-many-th layer keeps only its input and runs again in the backward pass: less memory, "
        "more time; 0 is none, 1 all",
    )
    compile: bool = Field(False, description="torch.compile of each layer but its attention")
    warmup: Warmup = Warmup()


class Checkpoint(Section):
    every: int = Field(
        100, ge=1, description="steps between checkpoints; a new best evaluation and the last step make one too"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints kept, besides the best one")
    background: bool | None = Field(
        None,
        description="copy the state to the host's memory and write it while training goes on; false waits until it is "
        "written; null is true on a GPU and false on a CPU, which has no time to spare",
    )
    allow_change: bool = Field(
        False, description="go on with a run although settings that alter its result have changed since it was started"
    )


class Log(Section):
    dir: Place = Field("runs", description="folder of run folders")
    name: str | None = Field(
        None,
        min_length=1,
        description="the run's own folder below log.dir; unless given, the configuration's name and a hash of every "
        "setting that alters the result, so that the same command goes on where it stopped and another begins anew",
    )
    samples: int = Field(
        4, ge=0, description="puzzles a step whose pictures, questions and completions go to samples.jsonl and samples/"
    )
    report_every_s: float = Field(
        60,
        ge=0,
        description="seconds between updates of report.html at least, besides those after evaluations and at the end",
    )
    tensorboard: bool = Field(True, description="write every metric to tensorboard/ in the run folder")
    wandb: str | None = Field(
        None,
        min_length=1,
        description="a project of Weights & Biases to send every metric to; its own WANDB_* environment variables "
        "(WANDB_MODE=offline) hold, and the package must be installed",
    )


class Eval(Section):
    every: int = Field(
        100, ge=1, description="steps between held-out evaluations; there is one before and one after in any case"
    )
    count: int = Field(400, ge=1, description="held-out puzzles of each kind")
    path: NoImages = Field(
        None,
        description="images to evaluate on, in place of held-out ones; as data.path, but without weights",
    )

    @field_validator("path")
    @classmethod
    def _unweighted(cls, value):
        if any(isinstance(one, ImageSource) and one.weight for one in (value if isinstance(value, list) else [value])):
            raise PydanticCustomError("source", "images to evaluate on have no weights")
        return value


class Config(Section):
    model: Model
    data: Data = Data()  # whose path is asked for where images are needed
    puzzles: Puzzles = Puzzles()
    tasks: dict[str, Task] = Field(
        {}, description="questions of your own beside the puzzles, {name: settings}; see docs/your-questions.md"
    )
    rollout: Rollout = Rollout()
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _whole(self):
        from sslr1.puzzles import LEVELS, MIXTURE, NAMES, PAPER_LEVEL, PAPER_MIXTURE, START_LEVEL

        named = {"puzzles.mixture": self.puzzles.mixture, "puzzles.levels": self.puzzles.levels}
        for key, given in (named | {"train.warmup.right_for": self.train.warmup.right_for}).items():
            known = [*NAMES, *(self.tasks if key == "train.warmup.right_for" else ())]
            for name in given:
                if name not in known:
                    raise ConfigError(f"{key}.{name} is not a puzzle; {nearest(name, known)}")
        for name, share in self.puzzles.mixture.items():
            if share < 0:
                raise ConfigError(f"puzzles.mixture.{name} is {share}: a share is 0 or more")
        if self.puzzles.mixture and not any(self.puzzles.mixture.values()):
            raise ConfigError("puzzles.mixture has no puzzle with a share above 0")
        for name, level in self.puzzles.levels.items():
            if level not in LEVELS[name]:
                raise ConfigError(
                    f"puzzles.levels.{name} is {level}; {name} has levels {', '.join(map(str, LEVELS[name]))}"
                )
        for name in self.tasks:
            if not TASK_NAME.fullmatch(name):
                raise ConfigError(f"tasks.{name}: a task's name is of the letters a to z, digits, - and _")
            if name in NAMES:
                raise ConfigError(f"tasks.{name} is a puzzle's name: give the task another one")
        if (total := plain_sum(task.share for task in self.tasks.values())) > 1 + 1e-9:
            raise ConfigError(f"tasks have shares of {total:g} together: puzzles share what they leave of 1")
        if self.model.frozen == "vision" and self.model.lora.vision is not None:
            raise ConfigError("model.frozen=vision and model.lora.vision exclude each other: set one of them")
        if self.rollout.group_size == 1:
            raise ConfigError("rollout.group_size is 1: a group of one has no advantage; use 2 or more")
        preset = {"default": (MIXTURE, START_LEVEL, "default"), "paper": (PAPER_MIXTURE, PAPER_LEVEL, "paper")}
        mixture, levels, rule = preset[self.puzzles.preset]
        object.__setattr__(self.puzzles, "mixture", dict(self.puzzles.mixture or mixture))
        object.__setattr__(self.puzzles, "levels", {**levels, **self.puzzles.levels})
        object.__setattr__(self.puzzles, "rule", self.puzzles.rule or rule)
        return self


def shares(settings: dict) -> dict:
    """{name: share of the slots} of the puzzles and tasks of a configuration as config.yaml holds it; without tasks the
    puzzles' mixture."""
    mixture, tasks = settings["puzzles"]["mixture"], settings.get("tasks") or {}
    if not tasks:
        return mixture
    own = {name: task["share"] for name, task in tasks.items()}
    left, whole = max(0.0, 1 - plain_sum(own.values())), plain_sum(mixture.values())
    return {name: left * share / whole for name, share in mixture.items()} | own


def levels(settings: dict) -> dict:
    """{name: level} of the same; a task has one, 1."""
    return settings["puzzles"]["levels"] | dict.fromkeys(settings.get("tasks") or {}, 1)
