"""The settings of what a run is given: its model and adapters, its images, and the user's own questions."""

from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from sslr1.config.kinds import Images, Place, Section

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
