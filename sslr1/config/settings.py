"""The settings of a run: each section's keys, types, ranges and defaults. A field's description is its
documentation."""

import difflib
import os
import re
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sslr1.errors import UserError
from sslr1.sums import plain_sum

BUILTIN_IMAGES = "builtin:scenes"
# What is built in, and of which family
BUILTIN_MODELS = {"builtin:tiny": "qwen2_5_vl", "builtin:tiny-qwen3-vl": "qwen3_vl", "builtin:tiny-qwen3.5": "qwen3_5"}


TASK_NAME = re.compile("[a-z][a-z0-9_-]*")


class ConfigError(UserError):
    """A line for the user: the key's full path, the value, what the key takes. What can't be printed is escaped."""

    def __init__(self, text):
        super().__init__(cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), 1500))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits(cls, value):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise PydanticCustomError("too_wide", "Input should fit into 64 bits")
        return value


def _tidy(path):
    """One spelling of a path: "~" is the home folder, no slash at its end, none doubled, no "." between two; what is
    built in as it is."""
    if path.startswith("builtin:"):
        if path not in (known := [*BUILTIN_MODELS, BUILTIN_IMAGES]):
            raise PydanticCustomError(
                "builtin", "nothing of that name is built in; {near}", {"near": nearest(path, known)}
            )
        return path
    path = str(PurePath(os.path.expanduser(path)))
    return f"./{path}" if path.startswith("~") else path  # a folder of that name, the next time too


Place = Annotated[str, Field(min_length=1), AfterValidator(_tidy)]


SOURCE = "a source is a path or {path: …, weight: …, column: …}"


class ImageSource(Section):
    """One of several places that images come from, or one whose column is to be named."""

    path: Place
    weight: float | None = Field(None, gt=0)
    column: Annotated[str, Field(min_length=1)] | None = None


def _source(given):
    """A path where that is all that is said."""
    if isinstance(given, dict):
        try:
            given = ImageSource(**given)
        except (ValidationError, TypeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            where = ".".join(map(str, first["loc"])) or "a source"
            said = f"{first['msg'][0].lower()}{first['msg'][1:]}"
            raise PydanticCustomError("source", f"{where}: {said}; {SOURCE}") from None
    if isinstance(given, ImageSource) and given.weight is None and given.column is None:
        return given.path
    if not isinstance(given, str | ImageSource) or given == "":
        raise PydanticCustomError("source", SOURCE)
    return given


def _sources(given):
    if not isinstance(given, list):
        found = _source(given)
        return _source(found.model_copy(update={"weight": None})) if isinstance(found, ImageSource) else found
    found = [_source(one) for one in given]
    if not found:
        raise PydanticCustomError("source", "a list of sources has at least one")
    return found if len(found) > 1 else _sources(found[0])


Images = Annotated[Place | ImageSource | list[Place | ImageSource], BeforeValidator(_sources)]
NoImages = Annotated[
    Place | ImageSource | list[Place | ImageSource] | None,
    BeforeValidator(lambda given: given if given is None else _sources(given)),
]


Targets = list[str] | str
NOT_OURS = {  # what adapters can be elsewhere
    "DoRA": ("dora", "use_dora"),
    "QLoRA": ("qlora", "bits", "quantization", "load_in_4bit", "load_in_8bit"),
}


class Lora(Section):
    rank: int = Field(
        0,
        ge=0,
        description="of the adapters (LoRA): the model is frozen, in model.dtype, and they alone are trained; 0 trains "
        "the model itself. A model.path that is an adapter brings its own rank, alpha and targets",
    )
    alpha: int | None = Field(
        None, ge=1, description="an adapter's product counts alpha / rank times; null is twice the rank"
    )
    rslora: bool = Field(False, description="alpha / sqrt(rank) in place of alpha / rank (rank-stabilised LoRA)")
    targets: Targets | None = Field(
        "all-linear",
        description="which linears of the language model get one, in the words of PEFT's target_modules: all-linear, a "
        "regular expression for the whole name, or a list of names or their ends; null is none",
    )
    vision: Targets | None = Field(
        None, description="which linears of the vision tower, in the same words; null leaves the tower as it is"
    )
    dropout: float = Field(
        0.0,
        ge=0,
        le=0,
        description="only 0: the loss takes the policy that drew the tokens for the one that it differentiates, and "
        "dropout would make them two",
    )

    @model_validator(mode="before")
    @classmethod
    def _ours(cls, tree):
        for what, keys in NOT_OURS.items():
            for key in keys:
                if isinstance(tree, dict) and key in tree:
                    told = {"key": f"model.lora.{key}", "what": what}
                    raise PydanticCustomError("lora", "{key}: {what} is not supported, only plain LoRA", told)
        return tree


class Model(Section):
    path: Place = Field(
        description="a Hugging Face folder, or builtin:tiny (Qwen2.5-VL), builtin:tiny-qwen3-vl or "
        "builtin:tiny-qwen3.5, a tiny model built on first use below log.dir"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; auto is bfloat16 on a GPU, float32 on a CPU"
    )
    frozen: Literal["none", "vision"] = Field(
        "none", description="vision leaves the vision tower as it is, which spares its gradients and moments"
    )
    lora: Lora = Lora()


class Data(Section):
    path: Images = Field(
        None,
        validate_default=False,
        description="a folder of images, tar archives and parquet files; one .tar archive; one .parquet file; a list "
        "of such, each a path or {path, weight, column}, of which docs/data.md says more; or builtin:scenes, "
        "procedural scenes drawn on first use below log.dir",
    )
    exclude: Place | None = Field(
        None,
        description="a file of images to leave out, as files.txt names them, one a line, which `sslr1 overlap` writes",
    )
    scenes: int = Field(2000, ge=16, description="how many images builtin:scenes has")
    decoder: Literal["auto", "dali", "pillow", "dali_gpu"] = Field(
        "auto",
        description="of PNG files, and for reducing; auto is DALI where it is installed. dali_gpu decodes ordinary "
        "JPEG files on the GPU, in batches, and all else as dali; it rounds otherwise, so that a run keeps to it",
    )
    min_side: int = Field(252, ge=28, description="images whose shorter side is under this many px are passed over")
    max_side: int | None = Field(
        768,
        ge=56,
        description="images whose longer side is over 1.25 times this many px are reduced to it, antialiased, when "
        "they are decoded; null leaves all as they are",
    )
    holdout: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="share of the images held out for evaluation: at least 64, at most 2,000 and never more than half "
        "of them",
    )
    cache_mb: int = Field(
        256,
        ge=1,
        description="decoded images kept in memory, MiB a rank; with decoder=dali_gpu as much of the GPU's, too",
    )
    max_bad: float = Field(
        0.2,
        ge=0,
        le=1,
        description="the run ends when more than this share of the images that its puzzles asked for (64 at least) "
        "were bad: can't be read or decoded, too small, or flat; 1 is off",
    )


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


class Task(Section):
    """Questions of the user's own."""

    path: Place = Field(
        description="a JSONL file, an object a line, or a parquet file (which needs pyarrow): a question a row"
    )
    kind: Literal["letter", "number", "yes/no", "sequence", "text"] | None = Field(
        None,
        description="what answers are: letter, of an option; number; yes/no; sequence, a permutation of 1 to K; text, "
        "compared word for word without its case. Needed unless a function judges them",
    )
    tolerance: float = Field(0.0, ge=0, description="how far a number may lie from the answer and be right")
    function: str | None = Field(
        None,
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="package.module:name of what judges answers, in place of a kind: called with the text in the box "
        "and the row as a dict, it returns a number from 0 to 1 within 10 s",
    )
    share: float = Field(
        0.1, ge=0, le=1, description="of a step's slots; puzzles share what tasks leave. 0 only evaluates"
    )
    images: str = Field("images", min_length=1, description="column of a row's pictures, one or a list")
    question: str = Field(
        "question", min_length=1, description="column of the question; <image> may say where each picture goes"
    )
    answer: str = Field("answer", min_length=1, description="column of the right answer")
    choices: str = Field(
        "choices", min_length=1, description="column of the options' texts, a list, which need not be there"
    )
    root: Place | None = Field(
        None, description="the folder that pictures' paths begin in; the file's own unless given"
    )

    @model_validator(mode="after")
    def _judged(self):
        told = {"name": "function" if self.function else "kind"}
        if (self.kind is None) == (self.function is None):
            raise PydanticCustomError("judged", "give either kind or function", told)
        if self.tolerance and self.kind != "number":
            raise PydanticCustomError("judged", "tolerance is for kind: number", told)
        return self


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


def nearest(name, known):
    close = difflib.get_close_matches(name[:100], known, 1, 0.5)
    return f"did you mean {close[0]}? Known: {', '.join(known)}" if close else f"known: {', '.join(known)}"


def cut(text, length) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
