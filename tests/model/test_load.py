"""Loading: the same weights as transformers' own, into shards; what a folder must hold."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from sslr1 import model
from sslr1.errors import UserError
from sslr1.model import parallel
from sslr1.model.gated_delta_net import KEPT
from sslr1.model.tiny import FAMILIES, build_tiny


def loaded(path, world):
    policy = parallel.shard(model.Policy(model.skeleton(path)), world)
    assert all(p.is_meta for p in policy.parameters())
    parallel.materialize(policy, world.device)
    model.load_weights(policy.model, path)
    return policy


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers_own(tmp_path, tie, family, one_process):
    folder = build_tiny(tmp_path / "model", tie=tie, family=family)
    policy = loaded(folder, one_process)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    mine, theirs = dict(parallel.iter_full_params(policy)), dict(whole.named_parameters())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    buffers = dict(policy.model.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers())
    head, embeddings = policy.model.lm_head.weight, policy.model.model.language_model.embed_tokens.weight
    assert (head is embeddings) == tie
    own, their = (
        {k: v or None for k, v in network.generation_config.to_dict().items()} for network in (policy.model, whole)
    )
    assert own == their


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_whole_model_in_another_dtype(any_tiny, dtype):
    """Parameters and buffers, as transformers' own has them, but for those that it rounds and that stay as they are."""
    mine = model.load_model(any_tiny, dtype)
    theirs = AutoModelForImageTextToText.from_pretrained(any_tiny, dtype=dtype, local_files_only=True)
    whole = model.load_model(any_tiny)
    for name, parameter in theirs.named_parameters():
        if name.endswith(KEPT):
            parameter.data = whole.get_parameter(name).to(torch.promote_types(dtype, torch.float32))
            assert len(parameter.unique()) == 1 or not torch.equal(parameter, parameter.bfloat16())
    for kind in ("named_parameters", "named_buffers"):
        ours, own = (dict(getattr(network, kind)()) for network in (mine, theirs))
        assert ours.keys() == own.keys()
        assert all(ours[n].dtype == own[n].dtype and torch.equal(ours[n], own[n]) for n in own)
    assert mine.lm_head.weight is mine.model.language_model.embed_tokens.weight and not mine.training


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


def test_shards_of_files_and_a_stored_tied_head(tmp_path, any_tiny, one_process):
    """As published folders are: several files, and sometimes a copy of the embeddings as the head."""
    folder = tmp_path / "model"
    shutil.copytree(any_tiny, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors)
    file.unlink()
    halves, index = (names[: len(names) // 2], names[len(names) // 2 :]), {}
    for number, half in enumerate(halves):
        part = {name: tensors[name] for name in half}
        if number == 0:
            (embeddings,) = (tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
            part["lm_head.weight"] = embeddings.clone()
        index |= dict.fromkeys(part, f"model-{number + 1:05d}-of-00002.safetensors")
        save_file(part, folder / index[half[0]], {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    mine = dict(parallel.iter_full_params(loaded(folder, one_process)))
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert mine.keys() == dict(theirs.named_parameters()).keys()
    assert all(torch.equal(mine[n], p) for n, p in theirs.named_parameters())


# Parameters that follow from published config.json files (`model.SIZES`). Those of Qwen's models but the 72B are the
# counts that their pages and third parties give of the files (Qwen3.5's without mtp).
COUNTS = {
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
    "mimo-vl-7b": 8_306_217_216,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
    "qwen3.5-0.8b": 852_985_920,
    "qwen3.5-2b": 2_213_241_664,
    "qwen3.5-4b": 4_539_265_536,
    "qwen3.5-9b": 9_409_813_744,
    "qwen3.5-27b": 27_356_728_560,
}
# (config.json, parameters, tensors in the files) of those that recipes are named after. Qwen3-VL's index names 713
# tensors of 8,875,631,616 bytes in bfloat16.
TENSORS = {"qwen2.5-vl-3b": 824, "qwen2.5-vl-7b": 729, "mimo-vl-7b": 825, "qwen3-vl-4b": 713, "qwen3.5-4b": 723}
PUBLISHED = {name: (model.SIZES[name], COUNTS[name], tensors) for name, tensors in TENSORS.items()}


def published(folder, tiny, name):
    """(a folder with the configuration of that name, a processor of its family and the tiny model's other files, number
    of parameters)."""
    config, count, _ = PUBLISHED[name]
    shutil.copytree(tiny, folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(FAMILIES[config["model_type"]]["processor"]))
    return folder, count


def both(names):
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def tensor_names(name):
    """The tensors of the published files, but for Qwen3.5's mtp."""
    config = PUBLISHED[name][0]
    old = config["model_type"] == "qwen2_5_vl"  # names of before transformers 4.52
    text, vision = config.get("text_config", config), config["vision_config"]
    projections = [f"self_attn.{x}_proj" for x in "qkv"]
    layer = (
        both(projections)
        if old
        else [f"{p}.weight" for p in projections] + ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    )
    layer += ["self_attn.o_proj.weight"]
    linear = [f"linear_attn.{x}" for x in ("A_log", "dt_bias")]
    linear += [f"linear_attn.{x}.weight" for x in ("conv1d", "norm", "out_proj")]
    linear += [f"linear_attn.in_proj_{x}.weight" for x in ("qkv", "z", "b", "a")]
    every = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    every += [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    norms = ["norm1", "norm2"]
    block = both(["attn.qkv", "attn.proj"])
    block += [f"{n}.weight" for n in norms] if old else both(norms)
    block += both([f"mlp.{x}_proj" for x in ("gate", "up", "down")] if old else ["mlp.linear_fc1", "mlp.linear_fc2"])
    if old:
        tower = ["merger.ln_q.weight", "patch_embed.proj.weight", *both(["merger.mlp.0", "merger.mlp.2"])]
    else:
        deep = vision.get("deepstack_visual_indexes", ())
        mergers = ["merger", *(f"deepstack_merger_list.{i}" for i in range(len(deep)))]
        tower = both(["patch_embed.proj", *(f"{m}.{x}" for m in mergers for x in ("norm", "linear_fc1", "linear_fc2"))])
        tower += ["pos_embed.weight"]
    tower += [f"blocks.{i}.{leaf}" for i in range(vision["depth"]) for leaf in block]
    decoder = ["embed_tokens.weight", "norm.weight"]
    interval = text.get("full_attention_interval", 1)
    for i in range(text["num_hidden_layers"]):
        decoder += [f"layers.{i}.{leaf}" for leaf in (linear if (i + 1) % interval else layer) + every]
    places = ("visual.", "model.") if old else ("model.visual.", "model.language_model.")
    head = [] if config["tie_word_embeddings"] else ["lm_head.weight"]
    return [places[0] + n for n in tower] + [places[1] + n for n in decoder] + head


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_on_the_meta_device(tmp_path, tiny, name):
    """The skeletons have the published numbers of parameters, and every published tensor name finds its place."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    folder, count = published(tmp_path / "model", tiny, name)
    config, _, tensors = PUBLISHED[name]
    skeleton = model.skeleton(folder)
    assert sum(p.numel() for p in skeleton.parameters()) == count
    names, shapes = tensor_names(name), dict(skeleton.named_parameters())
    assert len(set(names)) == len(names) == tensors
    renames = get_model_conversion_mapping(skeleton)
    renamed = {rename_source_key(n, renames, [], skeleton.base_model_prefix, shapes)[0] for n in names}
    assert renamed == shapes.keys()
    assert skeleton.state_dict().keys() == shapes.keys() | {"lm_head.weight"}
    text = config.get("text_config", config)
    rope = skeleton.config.text_config.rope_parameters
    asked = text.get("rope_parameters") or text["rope_scaling"] | {"rope_theta": text["rope_theta"]}
    assert all(rope[key] == asked[key] for key in ("rope_theta", "mrope_section"))


def test_the_layer_that_guesses_ahead_is_passed_over(tmp_path, one_process):
    folder = build_tiny(tmp_path / "model", family="qwen3_5")
    rewrite(folder, lambda t: t.update({"mtp.layers.0.input_layernorm.weight": torch.zeros(2)}))
    assert not any("mtp" in name for name, _ in loaded(folder, one_process).named_parameters())


def test_a_family_that_is_not_supported_is_named(tmp_path, tiny):
    folder, _ = published(tmp_path / "model", tiny, "qwen3-vl-4b")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen3_vl_moe"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'qwen3_vl_moe' model; supported: qwen2_5_vl, qwen3_vl, qwen3_5"):
        model.skeleton(folder)
