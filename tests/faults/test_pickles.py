"""Files that would run code when they are read by the careless: none is, and each ends in one line."""

import ast
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from sslr1 import model
from sslr1.errors import UserError
from sslr1.model.load import check_folder
from sslr1.runs import checkpoint
from tests.conftest import ROOT
from tests.learner.test_learner import make_learner

SOURCES = sorted(p for part in ("sslr1", "kernels", "bench", "examples") for p in (ROOT / part).rglob("*.py"))


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def called(tree):
    """Dotted names of all that is called, with the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_unpickles_or_runs_what_it_reads(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [a.name for a in getattr(node, "names", [])] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert not re.match(r"(c?[pP]ickle|dill|cloudpickle|joblib|shelve|marshal)\b", name), name
            assert name not in ("FileSystemReader", "unsafe_load", "UnsafeLoader", "FullLoader"), name
    for name, call in called(tree):
        assert name not in (
            "eval",
            "exec",
            "yaml.load",
            "yaml.unsafe_load",
            "yaml.full_load",
            "os.system",
        )
        assert not name.endswith((".load_all", "FileSystemReader", "np.memmap.load", "load_dataset")), name
        given = {k.arg: k.value for k in call.keywords}
        if name == "torch.load":  # of a package's file, which comes in no other form
            assert "bench" in path.parts and "weights_only" in given
        for key, harmless in (
            ("trust_remote_code", False),
            ("weights_only", True),
            ("allow_pickle", False),
            ("shell", False),
        ):
            assert key not in given or (isinstance(given[key], ast.Constant) and given[key].value is harmless), (
                name,
                key,
            )
        if name in ("np.load", "numpy.load"):
            assert isinstance(given.get("allow_pickle"), ast.Constant) or "allow_pickle" not in given
        if name.endswith("dcp.load"):
            assert "HuggingFaceStorageReader" in ast.unparse(given["storage_reader"])
        if name.startswith("Auto") and name.endswith(".from_pretrained") and "sslr1/model" in str(path):
            assert "trust_remote_code" in given, name


@pytest.fixture
def copy(tmp_path, tiny):
    """The tiny model's folder, to be spoilt; what it must not make is tmp_path / "mark"."""
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


def refused(what, *words):
    with pytest.raises(UserError) as caught:
        what()
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def loaded(folder, world):
    return make_learner(folder, world)


def test_the_mark_would_be_seen(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00001.bin", "tf_model.h5"])
def test_pickled_weights_are_not_read(tmp_path, copy, one_process, name):
    torch.save({"x": Evil(tmp_path / "mark")}, copy / name)
    loaded(copy, one_process)  # there is a safetensors file beside it
    (copy / "model.safetensors").unlink()
    refused(lambda: loaded(copy, one_process), str(copy), "pickled weights are not read")
    refused(lambda: model.load_model(copy), "pickled weights are not read")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["pickle", "torch", "cut short", "empty"])
def test_what_only_calls_itself_safetensors(tmp_path, copy, one_process, kind):
    path = copy / "model.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    elif kind == "torch":
        torch.save({"x": Evil(tmp_path / "mark")}, path)
    else:
        path.write_bytes(path.read_bytes()[: 100_000 if kind == "cut short" else 0])
    refused(lambda: loaded(copy, one_process), str(path), "is not a whole safetensors file")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("../other/model.safetensors", "is not a safetensors file of that folder"),
        ("/etc/passwd", "is not a safetensors file of that folder"),
        ("weights.bin", "is not a safetensors file of that folder"),
        ("model-00002-of-00002.safetensors", "the download is not complete"),
    ],
)
def test_an_index_that_leads_elsewhere(copy, name, words):
    """Where the index counts, which it does not beside a whole model.safetensors."""
    (copy.parent / "other").mkdir()
    whole, shard = copy / "model.safetensors", copy / "model-00001-of-00002.safetensors"
    shutil.copy(whole, copy.parent / "other")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name, "model.norm.weight": shard.name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    check_folder(copy)
    whole.rename(shard)
    refused(lambda: check_folder(copy), "model.safetensors.index.json", repr(name), words)
    index["weight_map"].pop("lm_head.weight")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    check_folder(copy)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_not_run(tmp_path, copy, file):
    (copy / "evil.py").write_text(f"import os\nos.system('touch {tmp_path / 'mark'}')\nclass Evil: pass\n")
    tree = json.loads((copy / file).read_text())
    own = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    tree |= {"auto_map": own, "tokenizer_class": "EvilTokenizer"}
    (copy / file).write_text(json.dumps(tree))
    if file == "config.json":
        refused(lambda: model.load_tokenizer(copy), str(copy), "wants to run its own code")
    else:  # transformers has a class for its tokenizer.json
        assert model.load_tokenizer(copy)("one")["input_ids"]
        (copy / "tokenizer.json").unlink()
        (copy / "vocab.json").write_text("{}")
        refused(lambda: model.load_tokenizer(copy), str(copy), "its tokenizer can't be loaded")
    assert not (tmp_path / "mark").exists()


def test_broken_settings_of_a_model(copy):
    (copy / "config.json").write_text('{"model_type": "qwen2')
    refused(lambda: check_folder(copy), "config.json is not a JSON file of settings")


@pytest.fixture
def saved(tmp_path, tiny, one_process):
    learner, weights = make_learner(tiny, one_process)
    options = dict(sampler=weights.model, tokenizer=model.load_tokenizer(tiny), source=tiny, world=one_process)
    return learner, checkpoint.save(tmp_path / "checkpoints", 1, learner=learner, trainer={"step": 1}, **options)


def test_pickles_beside_a_state_are_not_read(tmp_path, saved):
    """The default reader of torch.distributed.checkpoint would unpickle .metadata."""
    learner, path = saved
    for name in (".metadata", "metadata.pkl", "__0_0.distcp", "optimizer.pt"):
        (path / "state" / name).write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    index = {"weight_map": {"model.lm_head.weight": "../../../elsewhere.safetensors"}}
    (path / "state" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint.load(path, learner=learner)["step"] == 1
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["pickle", "cut short", "missing", "trainer", "no trainer"])
def test_a_state_that_is_broken(tmp_path, saved, kind):
    learner, path = saved
    (shard,) = (path / "state").glob("*.safetensors")
    trainer = path / "state" / "trainer.json"
    if kind == "pickle":
        shard.write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    elif kind == "cut short":
        shard.write_bytes(shard.read_bytes()[:100_000])
    elif kind == "missing":
        shard.unlink()
    elif kind == "trainer":
        trainer.write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    else:
        trainer.unlink()
    refused(lambda: checkpoint.load(path, learner=learner), str(path), "can't be read", "checkpoint before it")
    assert not (tmp_path / "mark").exists()


def test_nothing_that_is_written_is_a_pickle(saved):
    _, path = saved
    files = [p for p in Path(path).rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".jinja", ".txt"} and len(files) > 6
