"""A model folder is read as transformers reads it, by everything that reads one; what can't be read is named in one
line."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from sslr1 import config, export, model, ops
from sslr1.errors import UserError
from sslr1.model import parallel
from sslr1.model.tiny import CHAT_TEMPLATE, build_tiny
from sslr1.runs import checkpoint
from sslr1.setup import budget, build
from tests.learner.test_learner import make_learner

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
    *(
        fewer_shards_over_more_of_the_same_names,
        shards_that_share_a_tensor,
        named_by_config,
        linked_as_in_the_hubs_cache,
    ),
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


# ------------------------------------------------------------------------------------- what can't be read, in one line


def edit(name, **changes):
    def change(folder):
        tree = json.loads((folder / name).read_text())
        for key, value in changes.items():
            tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
            if value is None:
                tree.pop(key)
        (folder / name).write_text(json.dumps(tree))

    return change


def put(name, data):
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def gone(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def renamed(name, to):
    return lambda folder: (folder / name).rename(folder / to)


def also(*changes):
    return lambda folder: [change(folder) for change in changes]


def adapter_alone(folder):
    gone(*(path.name for path in folder.iterdir()))(folder)
    put("adapter_config.json", '{"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}')(folder)
    put("adapter_model.safetensors", "whatever")(folder)


def hub_cache(place):
    """Two snapshots, of which the older is the main branch's."""

    def change(folder):
        for n, name in enumerate(("beef", "dead")):
            file = folder / place / "snapshots" / name / "config.json"
            file.parent.mkdir(parents=True)
            file.write_text("{}")
            os.utime(file, (n, n))
        (folder / place / "refs").mkdir()
        (folder / place / "refs" / "main").write_text("beef")

    return change


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
TEXT_ONLY = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
NO_TEXT = CHAT_TEMPLATE.replace("{{ part['text'] }}", "")
OTHER_MARK = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
BROKEN = {
    "no model_type": (edit("config.json", model_type=None), "config.json has no model_type"),
    "another family": (edit("config.json", model_type="llama"), "'llama' model; supported: qwen2_5_vl"),
    "quantised": (edit("config.json", quantization_config={"quant_method": "gptq"}), "quantised weights .*gptq"),
    **{
        f"quantised, {method}": (
            edit("config.json", quantization_config={"quant_method": method}),
            f"weights .*{method}",
        )
        for method in ("bitsandbytes", "awq", "fp8", "mxfp4", "compressed-tensors")
    },
    "quantised, unnamed": (edit("config.json", quantization_config={"load_in_4bit": True}), "weights .*load_in_4bit"),
    "quantised for MLX": (edit("config.json", quantization={"group_size": 64, "bits": 4}), "weights .*'bits': 4"),
    "a list for a configuration": (put("config.json", "[]"), "config.json is not a JSON file of settings"),
    "an empty configuration": (put("config.json", ""), "config.json is empty: the download is not complete"),
    "a configuration that is no text": (put("config.json", b"\xff\xfe"), "config.json is not a JSON file of settings"),
    "a word for a number": (
        edit("config.json", text_config={"num_attention_heads": "four"}),
        "config.json can't be used: ",
    ),
    "another family's tower": (edit("config.json", vision_config={"patch_size": 16}), "patch_size is 16 .* has 14"),
    "no processor": (gone("preprocessor_config.json"), "preprocessor_config.json is missing: .*processor_config.json"),
    "a broken processor": (put("preprocessor_config.json", "{"), "preprocessor_config.json is not a JSON file"),
    "a processor's word": (edit("preprocessor_config.json", patch_size="14"), "patch can't be '14'"),
    "a processor's std": (edit("preprocessor_config.json", image_std=[0, 0, 0]), r"std can't be \[0, 0, 0\]"),
    "a processor's size": (edit("preprocessor_config.json", size=224), "size can't be 224"),
    "a broken generation config": (put("generation_config.json", "{"), "generation_config.json can't be used"),
    "an empty generation config": (put("generation_config.json", ""), "generation_config.json is empty"),
    "an odd end": (put("generation_config.json", '{"eos_token_id": "x"}'), "eos_token_id can't be 'x'"),
    "what can't be saved": (
        put("generation_config.json", '{"do_sample": false, "temperature": 0.5}'),
        "generation_config.json can't be used: .*temperature",
    ),
    "no tokenizer": (gone("tokenizer.json"), "has no tokenizer"),
    "a tokenizer not fetched": (put("tokenizer.json", POINTER), "tokenizer.json is .* Git LFS.*: run git lfs pull"),
    "an empty tokenizer": (put("tokenizer.json", ""), "tokenizer.json is empty"),
    "half a tokenizer": (cut("tokenizer.json", 1000), "its tokenizer can't be loaded"),
    "a tokenizer's broken settings": (put("tokenizer_config.json", "{"), "its tokenizer can't be loaded"),
    "no end of an answer": (edit("tokenizer_config.json", eos_token=None), "names no eos_token"),
    "another tokenizer's picture": (
        edit("config.json", image_token_id=151655),
        r"image_token_id is 151655 .*image_pad\|> is",
    ),
    "more tokens than rows": (
        edit("config.json", text_config={"vocab_size": 753}),
        "counts up to 753, .* vocab_size 753",
    ),
    "no chat template": (gone("chat_template.jinja"), "has no chat template"),
    "a template that joins strings": (put("chat_template.jinja", TEXT_ONLY), "TypeError: can only concatenate str"),
    "a template that prints the list": (put("chat_template.jinja", "{{ messages }}"), r"with 0 <\|image_pad\|>"),
    "a template with another mark": (put("chat_template.jinja", OTHER_MARK), r"with 0 <\|image_pad\|>"),
    "a template that drops words": (put("chat_template.jinja", NO_TEXT), "without all of its words"),
    "a template with a rule": (put("chat_template.jinja", SYSTEM), "TemplateError: system first"),
    "half a template": (put("chat_template.jinja", "{% for m in messages %}"), "TemplateSyntaxError: "),
    "a template that is no text": (put("chat_template.jinja", b"\xff\xfe"), "its tokenizer can't be loaded: 'utf-8'"),
    "a broken chat_template.json": (put("chat_template.json", "{"), "chat_template.json is not a JSON file"),
    "a list in chat_template.json": (
        put("chat_template.json", '{"chat_template": [1]}'),
        "its chat_template is no text",
    ),
    "templates, none of them the default": (
        also(
            gone("chat_template.jinja"),
            edit("tokenizer_config.json", chat_template=[{"name": "other", "template": CHAT_TEMPLATE}]),
        ),
        "no default specified",
    ),
    "half a header": (cut(SINGLE, 100), "model.safetensors is not a whole safetensors file"),
    "half of the data": (cut(SINGLE, 100_000), "model.safetensors is not a whole safetensors file"),
    "no data": (put(SINGLE, ""), "model.safetensors is not a whole safetensors file"),
    "data not fetched": (put(SINGLE, POINTER), "model.safetensors is .*Git LFS.*: run git lfs pull"),
    "an index not fetched": (also(gone(SINGLE), put(INDEX, POINTER)), "index.json is .*: run git lfs pull"),
    "an index of nothing": (also(gone(SINGLE), put(INDEX, '{"weight_map": {}}')), "names no files"),
    "an index without its files": (
        also(gone(SINGLE), put(INDEX, '{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')),
        "names 'model-00001-of-00002.safetensors', which is not there: the download is not complete",
    ),
    "shards without their index": (
        renamed(SINGLE, "model-00001-of-00002.safetensors"),
        "holds model-00001-of-00002.safetensors, but no model.safetensors.index.json",
    ),
    "an adapter": (
        adapter_alone,
        "is an adapter of 'Qwen/Qwen2.5-VL-3B-Instruct', which is no folder here: put .*base_model_name_or_path",
    ),
    "an adapter's weights": (
        renamed(SINGLE, "adapter_model.safetensors"),
        "holds an adapter .*, but no model, and no adapter_config.json that would name its base",
    ),
    "a value head": (
        renamed(SINGLE, "value_head.safetensors"),
        "value_head.safetensors is not what transformers reads",
    ),
    "a variant": (renamed(SINGLE, "model.fp16.safetensors"), "model.fp16.safetensors is not what transformers reads"),
    "pickles": (renamed(SINGLE, "pytorch_model.bin"), "pickled weights are not read: pytorch_model.bin"),
    "no weights at all": (gone(SINGLE), "holds no safetensors weights"),
    "one tensor less, by two names": (
        lambda folder: save_file(dict([*load_file(folder / SINGLE).items()][1:]), folder / SINGLE, {"format": "pt"}),
        "lacks 2 of the model's tensors",
    ),
    "the hub's cache of it": (
        also(gone("config.json"), hub_cache("")),
        "is the hub's cache of a model, which is in .*/model/snapshots/beef: give that folder",
    ),
    "the hub's cache, of half a download": (
        lambda folder: [gone("config.json")(folder), (folder / "snapshots" / "beef").mkdir(parents=True)],
        "cache of a model whose download is not complete",
    ),
    "the hub's cache": (
        also(gone("config.json"), hub_cache("models--Qwen--X")),
        "is the hub's cache, of 1 models: give one's folder, e.g. .*/models--Qwen--X/snapshots/beef",
    ),
    "the hub's home": (
        also(gone("config.json"), hub_cache("hub/models--Qwen--X")),
        "is the hub's cache, of 1 models: .*/hub/models--Qwen--X/snapshots/beef",
    ),
    "a checkpoint": (
        lambda folder: [(folder / "hf").mkdir(), renamed("config.json", "hf/config.json")(folder)],
        "its model is .*/hf",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_read_is_one_line_before_a_weight_is_read(
    tmp_path, tiny, scenes, one_process, monkeypatch, what
):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(parallel, "fill", lambda *_: pytest.fail("a weight is read"))
    change, words = BROKEN[what]
    shutil.copytree(tiny, tmp_path / "model")
    change(tmp_path / "model")
    sections = {"data": {"path": str(scenes), "min_side": 112}, "puzzles": {"mixture": {"rotation": 1.0}}}
    settings = config.check({"model": {"path": str(tmp_path / "model")}} | sections)
    with pytest.raises(UserError, match=words) as caught:
        build.build(settings, one_process)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


def test_a_path_that_is_no_folder_is_named_for_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    hub, fetched = "Qwen/Qwen2.5-VL-3B-Instruct", "not fetched: hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir"
    for name in ("model.zip", "model.gguf"):
        (tmp_path / name).touch()
    for path, words in (
        (tmp_path / "none", "none' does not exist. Give"),
        ("model.zip", "is a compressed archive: unpack it"),
        ("model.gguf", "is a file, not a folder"),
        (hub, f"does not exist, and names on the Hugging Face hub are {fetched} FOLDER. Give"),
    ):
        with pytest.raises(UserError, match=words):
            model.load_tokenizer(path)
    hub_cache("cache/models--Qwen--Qwen2.5-VL-3B-Instruct")(tmp_path)
    with pytest.raises(
        UserError, match=f"{fetched} FOLDER, or give its download in the hub's cache, .*/snapshots/beef"
    ):
        model.load_tokenizer(hub)
    (tmp_path / "Qwen").mkdir()
    with pytest.raises(UserError, match="Instruct' does not exist"):
        model.load_tokenizer(hub)


# ------------------------------------------------------------------------------------------- processors and templates


def nested(folder):
    """As transformers 5 saves a processor."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "X", "image_processor": settings}))


PROCESSORS = {
    "of before": lambda folder: None,
    "of transformers 5": also(nested, gone("preprocessor_config.json")),
    "both": also(nested, edit("preprocessor_config.json", max_pixels=200_000, image_mean=[0.1, 0.2, 0.3])),
    "without an image processor": put("processor_config.json", '{"processor_class": "X"}'),
    "bounds as size": edit(
        "preprocessor_config.json", min_pixels=None, max_pixels=None, size={"shortest_edge": 4000, "longest_edge": 9000}
    ),
    "both kinds of bounds": edit("preprocessor_config.json", size={"shortest_edge": 4000, "longest_edge": 9000}),
    "without bounds": edit("preprocessor_config.json", min_pixels=None, max_pixels=None),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_an_image_processor_is_read_as_transformers_reads_it(tmp_path, tiny, kind):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    shutil.copytree(tiny, tmp_path / "model")
    PROCESSORS[kind](tmp_path / "model")
    Qwen2VLImageProcessorPil.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}  # reading one changes it
    read, spec = (
        Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "model"),
        ops.PatchSpec.from_pretrained(tmp_path / "model"),
    )
    size = dict(read.size)
    assert (spec.patch, spec.merge, spec.temporal) == (read.patch_size, read.merge_size, read.temporal_patch_size)
    assert (spec.min_pixels, spec.max_pixels) == (size["shortest_edge"], size["longest_edge"])
    assert (list(spec.mean), list(spec.std)) == (list(read.image_mean), list(read.image_std))


def marked(mark):
    return CHAT_TEMPLATE.replace("assistant", mark)


in_settings = also(gone("chat_template.jinja"), edit("tokenizer_config.json", chat_template=marked("settings")))
several = [{"name": name, "template": marked(name)} for name in ("default", "tool_use")]
in_json = put("chat_template.json", json.dumps({"chat_template": marked("json")}))
TEMPLATES = {
    "chat_template.jinja": (put("chat_template.jinja", marked("jinja")), "jinja"),
    "chat_template.json": (also(gone("chat_template.jinja"), in_json), "json"),
    "the tokenizer's settings": (in_settings, "settings"),
    "several in the tokenizer's settings": (
        also(gone("chat_template.jinja"), edit("tokenizer_config.json", chat_template=several)),
        "default",
    ),
    "the processor's before the tokenizer's": (also(in_settings, in_json), "json"),
    "the processor's settings": (
        also(in_json, put("processor_config.json", json.dumps({"chat_template": marked("own")}))),
        "own",
    ),
    "the file before the settings": (also(in_settings, put("chat_template.jinja", marked("jinja"))), "jinja"),
}


@pytest.mark.parametrize("place", TEMPLATES)
def test_a_chat_template_is_found_wherever_transformers_puts_it(tmp_path, tiny, place):
    """As a processor of transformers looks for it; what is saved has it for tokenizer and processor alike."""
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny, folder)
    change, mark = TEMPLATES[place]
    change(folder)
    tokenizer = model.load_tokenizer(folder)
    question = [torch.zeros(4, 4), torch.tensor([[1, 2, 2]]), tokenizer, 2]
    ids = model.prompt("Look: <image> which?", *question).input_ids
    assert tokenizer.decode(ids).endswith(f"<|im_start|>{mark}\n")
    checkpoint.save_hf(out, model.skeleton(folder).to_empty(device="cpu"), tokenizer, folder)
    assert AutoTokenizer.from_pretrained(out).get_chat_template() == marked(mark)
    assert torch.equal(model.prompt("Look: <image> which?", *question[:2], model.load_tokenizer(out), 2).input_ids, ids)
    with_it, _ = ProcessorMixin.get_processor_dict(out)
    found = with_it.get("chat_template", marked(mark))
    assert (found if isinstance(found, str) else found["default"]) == marked(mark)


def test_what_an_export_takes_along(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "model")
    also(nested, gone("preprocessor_config.json"), put("video_preprocessor_config.json", "{}"), in_json)(
        tmp_path / "model"
    )
    for path in (tmp_path / "model").iterdir():
        path.chmod(0o400)  # the modes of a cache are its own
    network, tokenizer = model.load_model(tmp_path / "model"), model.load_tokenizer(tmp_path / "model")
    checkpoint.save_hf(tmp_path / "out", network, tokenizer, tmp_path / "model")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "model").iterdir()}
    assert ops.PatchSpec.from_pretrained(tmp_path / "out") == ops.PatchSpec.from_pretrained(tiny)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask()}


def umask():
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def test_what_one_may_not_expect_is_said(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "model")
    assert model.remarks(tmp_path / "model", model.skeleton(tmp_path / "model")) == []
    put("adapter_config.json", "{}")(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE)
    save_file(tensors | {HEAD: tensors[EMBEDDINGS] * 2}, tmp_path / "model" / SINGLE, {"format": "pt"})
    adapter, head = model.remarks(tmp_path / "model", model.skeleton(tmp_path / "model"))
    assert "(adapter_config.json) is not used" in adapter and "ties lm_head to the embeddings" in head
