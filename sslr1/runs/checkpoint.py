"""Checkpoints: written beside, flushed and renamed, so that a directory named `step-…` is always complete.

    step-000100/state/   model and optimiser, sharded safetensors (torch.distributed.checkpoint), and trainer.json
    step-000100/hf/      a complete Hugging Face folder

Nothing here unpickles a file: tensors go through safetensors, the rest through JSON.
"""

import hashlib
import json
import os
import re
import shutil
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from sslr1 import distributed
from sslr1.errors import UserError
from sslr1.files import flush, open_to_all
from sslr1.learner.adamw import MOMENTS
from sslr1.model import lora
from sslr1.model.folder import INDEX, SINGLE, weight_files

TOKENIZER_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
COUNTERS = ("step_number", "skipped", "skipped_in_a_row")  # of the learner
OUTSIDE = (OSError, SafetensorError, CheckpointException)  # what a disk does, or the files on it


def steps(folder) -> list:
    """The complete checkpoints of a folder, paths in the order of their steps."""
    found = [p for p in Path(folder).glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest(folder) -> Path | None:
    """The complete checkpoint of the highest step, None if there is none."""
    return (steps(folder) or [None])[-1]


def puzzle_rules(path) -> int | None:
    """The `puzzles.RULES` that a checkpoint's run was drawn by; None where its file can't be read."""
    try:
        return json.loads((path / "state" / "trainer.json").read_text(encoding="utf-8"))["made_by"].get("puzzles", 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # `load` says what is wrong with it


def _state(policy, optimizer=None) -> dict:
    """Flat tensors by name: `model.<name>` and, with an optimiser, its moments and step counts; of a model with
    adapters those alone, as nothing else of it changes."""
    parameters = dict(lora.adapters(policy.model) if lora.lora_of(policy.model) else policy.model.named_parameters())
    state = {f"model.{name}": p.detach() for name, p in parameters.items()}
    if optimizer is not None:
        for name, p in parameters.items():
            moments = optimizer.state.get(p)
            if moments:
                state |= {f"optimizer.{name}.{m}": moments[m] for m in (*MOMENTS, "step")}
    return state


def save(*arguments, **options) -> Path:
    """Take a checkpoint and wait until it is written. As `Snapshot`."""
    return Snapshot(*arguments, copy=False, **options).write()


class Snapshot:
    """The state of this moment, copied to the host's memory, which `write` makes the checkpoint `folder`/step-NNNNNN.
    All ranks take it. Without `copy` it is the state at the time of `write`. Snapshots before it must have been
    written: what lies there unfinished is cleared away.

    sampler: the engine's plain model, equal to the learner's in its compute dtype, which becomes hf/; of a model with
    adapters they do, as PEFT has them, in float32. source: the model folder whose processor files go along, and which
    adapters name as their base. trainer: JSON-able state. records: files to be flushed before the checkpoint
    counts, since a run that goes on from it wants their lines up to its step. Afterwards the `keep` newest and those of
    the steps `also` are kept, older ones removed. group: for `write`'s collectives.
    """

    def __init__(
        self,
        folder,
        step,
        *,
        learner,
        sampler,
        tokenizer,
        source,
        trainer: dict,
        world,
        keep=2,
        also=(),
        records=(),
        group=None,
        copy=True,
    ):
        self.folder, self.world, self.group, self.records = Path(folder), world, group, records
        self.final, self.partial = self.folder / f"step-{step:06d}", self.folder / f"partial-{step:06d}"
        self.keep, self.also = keep, {f"step-{each:06d}" for each in also}
        counters = {name: getattr(learner, name) for name in COUNTERS}
        trainer = {**trainer, "learner": {**counters, "optimizer": bool(learner.optimizer.state)}}
        self.trainer = json.dumps(trainer, indent=2) + "\n"
        self.sampler, self.weights, self.problem = sampler, None, None
        self.state = _state(learner.policy, learner.optimizer)
        self.source, self.lora = source, lora.lora_of(sampler)
        if self.lora:
            self.weights = lora.gathered(learner.policy.model)
        if copy:
            self.state = DefaultStager(StagingOptions(False, False, False, False)).stage(self.state)
            self.weights = self.weights or (_copies(sampler) if world.main else None)
        if world.main:
            self.problem = self._attempt(self._prepare, tokenizer, source)

    def write(self) -> Path:
        """For all ranks to call, on any thread if `group` is used for nothing else. What can't be written (a full disk)
        is a UserError on all ranks, worded on one of them; earlier checkpoints are then as they were."""
        _agree(self.problem, self.world, self.group)
        writer = HuggingFaceStorageWriter(str(self.partial / "state"), save_distributed=True)
        # The same on all ranks
        failed = self._attempt(dcp.save, self.state, storage_writer=writer, process_group=self.group)
        if self.world.main:
            failed = failed or self._attempt(self._finish)
            if failed:
                shutil.rmtree(self.partial, ignore_errors=True)
        _agree(failed, self.world, self.group)
        return self.final

    def _prepare(self, tokenizer, source):
        for left in self.folder.glob("partial-*"):  # by a run that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        (self.partial / "state").mkdir(parents=True)
        _save_small(self.partial / "hf", tokenizer, source)  # not on the thread: tokenizers serve one at a time

    def _finish(self):
        partial, final = self.partial, self.final
        (partial / "state" / "trainer.json").write_text(self.trainer, encoding="utf-8")
        if self.lora:
            lora.write(partial / "hf", self.weights, self.lora, self.source)
        else:
            self.sampler.save_pretrained(partial / "hf", state_dict=self.weights)
        open_to_all([path for path in partial.rglob("*") if path.is_file()], partial)
        for path in (*partial.rglob("*"), partial, *(path for path in self.records if path.exists())):
            flush(path)
        if final.exists():
            _remove(final)
        os.replace(partial, final)
        flush(self.folder)
        for old in steps(self.folder)[: -self.keep]:
            if old.name not in self.also:
                _remove(old)

    def _attempt(self, work, *arguments, **options):
        """What went wrong with it, in words; None if nothing."""
        try:
            work(*arguments, **options)
        except OUTSIDE as error:
            return (
                f"checkpoint {self.final} could not be written: {_reason(error)}. Earlier ones are whole; when that is "
                "mended, start the same command again"
            )


def _agree(problem, world, group):
    """Raise a UserError on all ranks if any has a problem: its words on the first of those, none elsewhere."""
    first = int(distributed.all_reduce(torch.tensor(world.rank if problem else world.size), "min", group))
    if first < world.size:
        raise UserError(problem if first == world.rank else "")


def _reason(error) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


def _copies(model) -> dict:
    """A model's state in the host's memory; names that share a tensor share the copy."""
    copies = {}
    return {
        name: copies.get(tensor.data_ptr())
        if tensor.data_ptr() in copies
        else copies.setdefault(tensor.data_ptr(), tensor.detach().to("cpu", copy=True))
        for name, tensor in model.state_dict().items()
    }


def _remove(path):
    """Under another name first: a kill on the way leaves no half of a step-…."""
    doomed = path.with_name(f"partial-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def save_hf(folder, model, tokenizer, source) -> None:
    """A complete Hugging Face folder: weights, config, generation config, tokenizer and `source`'s processor files.
    Weights that lay there in another layout are not read any more: transformers leaves a single file under shards, and
    goes on reading it."""
    folder = Path(folder)
    for name in (SINGLE, INDEX):
        (folder / name).unlink(missing_ok=True)
    model.save_pretrained(folder)
    _save_small(folder, tokenizer, source)
    open_to_all(weight_files(folder), folder)


def save_adapter(folder, tensors, what, tokenizer, source) -> None:
    """A folder as a checkpoint's hf/ with adapters: `lora.write`'s, with tokenizer and `source`'s processor files."""
    lora.write(folder, tensors, what, source)
    _save_small(Path(folder), tokenizer, source)
    open_to_all([Path(folder) / lora.ADAPTER[1]], Path(folder))


def _save_small(folder, tokenizer, source):
    tokenizer.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        file, target = Path(source) / name, folder / name
        if file.is_file() and not (target.exists() and file.samefile(target)):
            shutil.copyfile(file, target)


def load(path, *, learner) -> dict:
    """Fill the learner's policy and optimiser from a checkpoint, written at any world size; returns the trainer's
    state. Raises UserError for one that can't be read."""
    path = Path(path) / "state"
    try:
        trainer = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        counters = trainer["learner"]
        if counters["optimizer"]:
            for p in (p for group in learner.optimizer.param_groups for p in group["params"]):
                learner.optimizer.state[p] = learner.empty_state(p)
        state = _state(learner.policy, learner.optimizer)
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)))
    except (*OUTSIDE, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        mend = f"move {path.parent} away to go on from the checkpoint before it"
        words = f"{path} can't be read ({_reason(error)}): {mend}"
        raise UserError(words if learner.world.main else "") from None
    for name in COUNTERS:
        setattr(learner, name, counters.get(name, 0))
    return trainer


@cache
def versions() -> dict:
    """The code that writes checkpoints: this package with a hash of its files, and the libraries that compute."""
    digest = hashlib.blake2b(digest_size=4)
    for package in ("sslr1", "sslr1.kernels"):
        for place in find_spec(package).submodule_search_locations:
            for path in sorted(p for p in Path(place).rglob("*") if p.suffix in (".py", ".so")):
                digest.update(path.read_bytes())
    return {"sslr1": f"{version('sslr1')}+{digest.hexdigest()}", **{n: version(n) for n in ("torch", "transformers")}}
