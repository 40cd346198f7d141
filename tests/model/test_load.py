"""Loading: the same weights as transformers' own, into shards; what a folder must hold."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sslr1 import model
from sslr1.errors import UserError
from sslr1.model import parallel
from sslr1.model.tiny import build_tiny


def loaded(path, world):
    policy = parallel.shard(model.Policy(model.skeleton(path)), world)
    assert all(p.is_meta for p in policy.parameters())
    parallel.materialize(policy, world.device)
    model.load_weights(policy.model, path)
    return policy


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_equal_to_transformers_own(tmp_path, tie, one_process):
    folder = build_tiny(tmp_path / "model", tie=tie)
    policy, whole = loaded(folder, one_process), model.load_model(folder)
    mine, theirs = dict(parallel.iter_full_params(policy)), dict(whole.named_parameters())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    buffers = dict(policy.model.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers())
    head, embeddings = policy.model.lm_head.weight, policy.model.model.language_model.embed_tokens.weight
    assert (head is embeddings) == tie
    assert policy.model.generation_config.to_dict() == whole.generation_config.to_dict()


def rewrite(folder, change):
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(sorted(t)[3]), "lacks 1"),
        (lambda t: t.update(stray=torch.zeros(2)), "stray"),
        (lambda t: t.update({sorted(t)[0]: torch.zeros(3, 3)}), "shape"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_a_folder_that_does_not_fit(tmp_path, tiny, change, words, one_process):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    rewrite(folder, change)
    with pytest.raises(UserError, match=words):
        loaded(folder, one_process)


def test_shards_of_files_and_a_stored_tied_head(tmp_path, tiny, one_process):
    """As published folders are: several files, and sometimes a copy of the embeddings as the head."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors)
    file.unlink()
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for number, half in enumerate(halves):
        part = {name: tensors[name] for name in half}
        if number == 0:
            part["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])  # never to be used
        save_file(part, folder / f"model-{number + 1:05d}-of-00002.safetensors", {"format": "pt"})
    mine = dict(parallel.iter_full_params(loaded(folder, one_process)))
    assert all(torch.equal(mine[n], p) for n, p in model.load_model(tiny).named_parameters())


# Shapes of the published configurations (config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct)
PUBLISHED = {
    "3B": (
        dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
        2048,
        True,
        3_754_622_976,
    ),
    "7B": (
        dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28),
        3584,
        False,
        8_292_166_656,
    ),
}


def published(folder, tiny, size):
    """(a folder with the configuration of that size and the tiny model's weights, number of parameters, sizes of the text model,
    whether the head is tied)."""
    text, out, tie, count = PUBLISHED[size]
    config = json.loads((tiny / "config.json").read_text())
    kv = {"3B": 2, "7B": 4}[size]
    vocabulary = {"3B": 151_936, "7B": 152_064}[size]
    heads = dict(num_key_value_heads=kv, vocab_size=vocabulary, max_window_layers=text["num_hidden_layers"])
    config["text_config"] |= text | heads | {"tie_word_embeddings": tie, "layer_types": None}
    config["text_config"]["rope_parameters"] = config["text_config"].get("rope_parameters") | {
        "mrope_section": [16, 24, 24]
    }
    config["tie_word_embeddings"] = tie
    config["vision_config"] |= dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=out,
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    shutil.copytree(tiny, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder, count, text, tie


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_on_the_meta_device(tmp_path, tiny, size):
    """The skeletons have the published numbers of parameters, and every published tensor name finds its place."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    folder, count, text, tie = published(tmp_path / "model", tiny, size)
    skeleton = model.skeleton(folder)
    assert sum(p.numel() for p in skeleton.parameters()) == count
    names = [
        "model.norm.weight",
        "visual.merger.ln_q.weight",
        "visual.patch_embed.proj.weight",
        "model.embed_tokens.weight",
    ]
    names += [] if tie else ["lm_head.weight"]
    names += [f"visual.merger.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    for layer in range(text["num_hidden_layers"]):
        leaves = [f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")] + [
            "self_attn.o_proj.weight"
        ]
        leaves += [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
        leaves += ["input_layernorm.weight", "post_attention_layernorm.weight"]
        names += [f"model.layers.{layer}.{leaf}" for leaf in leaves]
    for block in range(32):
        leaves = [f"attn.{x}.{kind}" for x in ("qkv", "proj") for kind in ("weight", "bias")] + [
            "norm1.weight",
            "norm2.weight",
        ]
        leaves += [f"mlp.{x}_proj.{kind}" for x in ("gate", "up", "down") for kind in ("weight", "bias")]
        names += [f"visual.blocks.{block}.{leaf}" for leaf in leaves]
    renames = get_model_conversion_mapping(skeleton)
    shapes = {name: p for name, p in skeleton.named_parameters()}
    renamed = {rename_source_key(n, renames, [], skeleton.base_model_prefix, shapes)[0] for n in names}
    assert renamed == shapes.keys()
