"""A model folder is read as transformers reads it, by everything that reads one; what can't be read is named in one line."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sslr1 import budget, checkpoint, config, export, model
from sslr1.errors import UserError
from sslr1.model import parallel
from sslr1.model.folder import weight_files
from sslr1.model.tiny import build_tiny
from tests.test_learner import make_learner

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # in the files


def write(folder, tensors, parts=0, index=True, change=lambda weight_map: None):
    """Weights as one file, or as so many shards."""
    if not parts:
        return save_file(tensors, folder / SINGLE, {"format": "pt"})
    files = [f"model-{n + 1:05d}-of-{parts:05d}.safetensors" for n in range(parts)]
    weight_map = {name: files[i * parts // len(tensors)] for i, name in enumerate(sorted(tensors))}
    for file in files:
        part = {name: tensors[name] for name, place in weight_map.items() if place == file}
        save_file(part, folder / file, {"format": "pt"})
    change(weight_map)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def other(tensors):
    return {name: tensor + 1 for name, tensor in tensors.items()}


def theirs(folder):
    """The model as transformers alone reads it."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def extra(folder, own):
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    save_file({"v_head.weight": torch.zeros(3)}, folder / "value_head.safetensors")
    save_file({"exp_avg": torch.zeros(3)}, folder / "optimizer.safetensors")
    save_file(other(own), folder / "consolidated.safetensors")
    save_file(other(own), folder / "model.fp16.safetensors")
    save_file(other(own), folder / "old.safetensors")
    save_file(other(own), folder / "model-00001-of-00002.safetensors.bak")
    (folder / "checkpoint-500").mkdir()
    write(folder / "checkpoint-500", other(own))
    torch.save(other(own), folder / "pytorch_model.bin")


def single(folder, own):
    write(folder, own)


def shards(folder, own):
    write(folder, own, 3)


def stale_shards_beside_a_file(folder, own):
    write(folder, other(own), 3)
    write(folder, own)


def stale_shards_of_an_index_that_is_gone(folder, own):
    write(folder, other(own), 3, index=False)
    write(folder, own)


def stale_index_without_its_files(folder, own):
    write(folder, own)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {HEAD: "model-00001-of-00004.safetensors"}}))


def broken_index_beside_a_file(folder, own):
    write(folder, own)
    (folder / INDEX).write_text("{")


def a_file_left_under_shards(folder, own):
    """Saved over a single file, which transformers leaves there and goes on reading."""
    write(folder, own)
    write(folder, other(own), 2)


def stale_shards_of_another_split(folder, own):
    write(folder, other(own), 4)
    write(folder, own, 2)


def fewer_shards_over_more_of_the_same_names(folder, own):
    save_file(other(own), folder / "model-00003-of-00002.safetensors", {"format": "pt"})
    write(folder, own, 2)


def shards_that_share_a_tensor(folder, own):
    """Of two the later file's counts, whatever the index says."""
    write(folder, own, 2)
    first, last = sorted(folder.glob("model-*.safetensors"))
    tensors = load_file(last)
    save_file(load_file(first) | {name: tensor + 1 for name, tensor in tensors.items()}, first, {"format": "pt"})


def named_by_config(folder, own):
    write(folder, other(own))
    save_file(own, folder / "mine.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "mine.safetensors"}
    (folder / "config.json").write_text(json.dumps(settings))


def linked_as_in_the_hubs_cache(folder, own):
    write(folder, own, 2)
    (folder.parent / "blobs").mkdir()
    for n, file in enumerate(folder.glob("*")):
        shutil.move(file, folder.parent / "blobs" / str(n))
        file.symlink_to(f"../blobs/{n}")


def saved_by_transformers(folder, own, size, before):
    network = theirs(folder.parent / "tiny")
    for file in folder.glob("model*"):
        file.unlink()
    network.save_pretrained(folder, max_shard_size=before)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    network.save_pretrained(folder, max_shard_size=size)


def saved_as_one_over_shards(folder, own):
    saved_by_transformers(folder, own, "5GB", "1MB")


def saved_as_shards_over_one(folder, own):
    saved_by_transformers(folder, own, "1MB", "5GB")


def head_stored_too(folder, own):
    write(folder, own | {HEAD: own[EMBEDDINGS].clone()}, 2)


def head_stored_alone(folder, own):
    write(folder, {HEAD if name == EMBEDDINGS else name: tensor for name, tensor in own.items()})


def head_stored_with_values_of_its_own(folder, own):
    write(folder, own | {HEAD: own[EMBEDDINGS] * 2}, 2)


def own_head(folder, own):
    build_tiny(folder, tie=False, seed=3)


LAYOUTS = [
    *(single, shards, stale_shards_beside_a_file, stale_shards_of_an_index_that_is_gone, stale_index_without_its_files),
    *(broken_index_beside_a_file, a_file_left_under_shards, stale_shards_of_another_split),
    *(fewer_shards_over_more_of_the_same_names, shards_that_share_a_tensor, named_by_config, linked_as_in_the_hubs_cache),
    *(saved_as_one_over_shards, saved_as_shards_over_one),
    *(head_stored_too, head_stored_alone, head_stored_with_values_of_its_own, own_head),
]


@pytest.fixture
def folder(tmp_path, tiny):
    """The tiny model's folder, without its weights."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / SINGLE).unlink()
    (tmp_path / "tiny").symlink_to(tiny)
    return tmp_path / "model"


def same(mine, reference):
    mine, reference = dict(mine), dict(reference)
    assert mine.keys() == reference.keys()
    wrong = [name for name in reference if not torch.equal(mine[name], reference[name])]
    assert not wrong, wrong


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_the_weights_are_those_that_transformers_reads(folder, tmp_path, tiny, one_process, layout):
    own = load_file(tiny / SINGLE)
    layout(folder, own)
    extra(folder, own)
    reference = dict(theirs(folder).named_parameters())
    same(model.load_model(folder).named_parameters(), reference)
    learner, weights = make_learner(folder, one_process)
    same(parallel.iter_full_params(learner.policy), reference)  # what is trained
    same(weights.model.named_parameters(), reference)  # what answers, in training and evaluation
    same(parallel.iter_full_params(model.load_reference(folder, one_process)), reference)
    settings = config.check({"model": {"path": str(folder)}, "data": {"path": "d"}})
    planned = {line.what: line.how for line in budget.plan(settings, folder, 1)[0]}
    assert f"{sum(p.numel() for p in reference.values()):,} parameters" in planned["weights"]
    options = dict(sampler=weights.model, tokenizer=model.load_tokenizer(folder), source=folder, world=one_process)
    written = checkpoint.save(tmp_path / "checkpoints", 1, learner=learner, trainer={"step": 1}, **options)
    same(theirs(written / "hf").named_parameters(), reference)
    export.export_model(written, tmp_path / "out")
    same(theirs(tmp_path / "out").named_parameters(), reference)
