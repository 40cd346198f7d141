"""Checkpoints: written beside, flushed and renamed, so that a directory named `step-…` is always complete.

    step-000100/state/   model and optimiser, sharded safetensors (torch.distributed.checkpoint), and trainer.json
    step-000100/hf/      a complete Hugging Face folder

Nothing here pickles: tensors go through safetensors, the rest through JSON.
"""

import json
import os
import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from sslr1.learner import MOMENTS
from sslr1.model import parallel

TOKENIZER_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def newest(folder) -> Path | None:
    """The complete checkpoint of the highest step, None if there is none."""
    found = sorted(Path(folder).glob("step-*"))
    return found[-1] if found else None


def _state(policy, optimizer=None) -> dict:
    """Flat tensors by name: `model.<name>` and, with an optimiser, its moments and step counts."""
    state = {f"model.{name}": p.detach() for name, p in policy.model.named_parameters()}
    if optimizer is not None:
        for name, p in policy.model.named_parameters():
            moments = optimizer.state.get(p)
            if moments:
                state |= {f"optimizer.{name}.{m}": moments[m] for m in (*MOMENTS, "step")}
    return state


def save(folder, step, *, learner, sampler, tokenizer, source, trainer: dict, world, keep=2, also=()) -> Path:
    """Write `folder`/step-NNNNNN; all ranks call it. sampler: the engine's plain model, equal to the learner's in its compute
    dtype, which becomes hf/. source: the model folder whose processor files go along. trainer: JSON-able state.

    Afterwards the `keep` newest and those of the steps `also` are kept, older ones removed. An error on the way (a full disk) leaves
    the earlier checkpoints as they are and a `partial-…` directory, which the next save clears away.
    """
    folder = Path(folder)
    final, partial = folder / f"step-{step:06d}", folder / f"partial-{step:06d}"
    if world.main:
        for left in folder.glob("partial-*"):  # by a run that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        (partial / "state").mkdir(parents=True)
    parallel.barrier()
    has_optimizer = bool(learner.optimizer.state)
    writer = HuggingFaceStorageWriter(str(partial / "state"), save_distributed=True)
    dcp.save(_state(learner.policy, learner.optimizer), storage_writer=writer)
    if world.main:
        counters = {"step_number": learner.step_number, "skipped": learner.skipped, "optimizer": has_optimizer}
        (partial / "state" / "trainer.json").write_text(json.dumps({**trainer, "learner": counters}, indent=2) + "\n")
        save_hf(partial / "hf", sampler, tokenizer, source)
        for path in partial.rglob("*"):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _flush(folder)
        checkpoints = sorted(folder.glob("step-*"))
        for old in checkpoints[:-keep]:
            if old.name not in {f"step-{each:06d}" for each in also}:
                shutil.rmtree(old)
    parallel.barrier()
    return final


def save_hf(folder, model, tokenizer, source) -> None:
    """A complete Hugging Face folder: weights, config, generation config, tokenizer and `source`'s processor files."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copy(Path(source) / name, folder / name)


def _flush(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path, *, learner) -> dict:
    """Fill the learner's policy and optimiser from a checkpoint, written at any world size; returns the trainer's state."""
    path = Path(path) / "state"
    trainer = json.loads((path / "trainer.json").read_text())
    counters = trainer["learner"]
    if counters["optimizer"]:
        for p in (p for group in learner.optimizer.param_groups for p in group["params"]):
            learner.optimizer.state[p] = learner.empty_state(p)
    state = _state(learner.policy, learner.optimizer)
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)))
    learner.step_number, learner.skipped = counters["step_number"], counters["skipped"]
    return trainer
