"""Configuration: errors that a person can act on, overrides, round trip."""

from pathlib import Path

import pytest

from sslr1 import config
from sslr1.errors import UserError
from sslr1.settings import Optim, Section
from tests import fuzz
from tests.fuzz import config as fuzzed

GOOD = {"model": {"path": "m"}, "data": {"path": "d"}}


def error(tree):
    with pytest.raises(config.ConfigError) as caught:
        config.check(tree)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "change, words",
    [
        ({"optim": {"learning_rate": 1}}, ["optim.learning_rate is not a setting", "known: lr"]),
        ({"optim": {"leer": 1}}, ["optim.leer is not a setting", "lr"]),
        ({"optimiser": {}}, ["optimiser is not a setting", "did you mean optim?"]),
        ({"rollout": {"group_sise": 4}}, ["rollout.group_sise", "did you mean group_size?"]),
        ({"train": {"warmup": {"step": 4}}}, ["train.warmup.step", "did you mean steps?"]),
        ({"train": {"steps": "many"}}, ["train.steps is 'many'", "integer", "optimiser steps"]),
        ({"train": {"steps": -1}}, ["train.steps is -1", "greater than or equal to 0"]),
        ({"data": {}}, ["data.path is missing", "a folder of images"]),
        ({"data": {"path": "d", "holdout": 1.5}}, ["data.holdout is 1.5", "less than 1"]),
        ({"loss": {"loss_type": "ppo"}}, ["loss.loss_type is 'ppo'", "'dapo'", "'gspo'"]),
        ({"rollout": {"group_size": 1}}, ["rollout.group_size is 1", "use 2 or more"]),
        ({"puzzles": {"mixture": {"rotaton": 1}}}, ["puzzles.mixture.rotaton", "did you mean rotation?"]),
        ({"puzzles": {"mixture": {"rotation": -1}}}, ["puzzles.mixture.rotation is -1"]),
        ({"puzzles": {"mixture": {"rotation": 0}}}, ["no puzzle with a share"]),
        ({"puzzles": {"levels": {"rotation": 7}}}, ["puzzles.levels.rotation is 7", "1, 2, 3, 4"]),
        ({"optim": 3}, ["optim is 3: it is a section, of lr, betas"]),
        ({"optim": {"lr": float("inf")}}, ["optim.lr is inf", "finite"]),
        ({"optim": {"betas": [0.9, 1]}}, ["optim.betas.1 is 1", "less than 1", "decay"]),
        ({"puzzles": {"mixture": {"rotation": float("nan")}}}, ["puzzles.mixture.rotation is nan", "finite"]),
        ({"train": {"seed": 2**63}}, ["train.seed is 9223372036854775808", "64 bits"]),
        ({"train": {"steps": 16**5000}}, ["train.steps is a number of thousands of digits"]),
        ({"train": {"steps": "x" * 5000}}, ["train.steps is 'xxx", "xx…: ", "integer"]),
        ({"o\np\x85tim": {}}, [r"o\np\x85tim is not a setting; did you mean optim? Known"]),
    ],
)
def test_errors_name_the_key_and_what_it_takes(change, words):
    text = error({**GOOD, **change})
    assert all(word in text for word in words), text


def test_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\n")
    c = config.load(
        path,
        [
            "optim.lr=3e-4",
            "train.warmup.steps=7",
            "puzzles.mixture={ordering: 1}",
            "data.path=/my folder",
            "log.name=a=b",
        ],
    )
    assert (c.optim.lr, c.train.warmup.steps, c.data.path, c.log.name) == (3e-4, 7, "/my folder", "a=b")
    assert c.puzzles.mixture == {"ordering": 1.0} and c.puzzles.levels["rotation"] == 2
    for bad, words in (
        ("optim", "section.key=value"),
        ("=3", "section.key=value"),
        ("model.path.x=3", "model.path is a value"),
        ("optim.lt=1", "did you mean lr"),
    ):
        with pytest.raises(config.ConfigError, match=words):
            config.load(path, [bad])


def test_a_run_is_named_by_what_alters_its_result(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\n")
    names = {
        o: config.load(path, [o] if o else []).log.name
        for o in (
            "",
            "train.steps=7",
            "log.dir=x",
            "eval.count=9",
            "train.threads=3",
            "data.path=e",
            "optim.lr=1",
            "optim.schedule=linear",
        )
    }
    assert len({names[o] for o in ("", "train.steps=7", "log.dir=x", "eval.count=9", "train.threads=3")}) == 1
    assert len(set(names.values())) == 4 and names[""].startswith("mine-")
    assert config.load(path, ["optim.schedule=linear", "train.steps=7"]).log.name != names["optim.schedule=linear"]


def test_going_on_with_other_settings_is_refused(tmp_path):
    started = tmp_path / "config.yaml"
    started.write_text(config.dump(config.check(GOOD)))
    config.check_unchanged(started, config.check({**GOOD, "train": {"steps": 3, "threads": 2}, "eval": {"every": 1}}))
    other = {**GOOD, "optim": {"lr": 1}, "puzzles": {"mixture": {"rotation": 1}}}
    with pytest.raises(
        config.ConfigError, match=r"optim.lr: 1e-06 → 1.0, .*puzzles.mixture.ordering: 0.3 → None.*log.name"
    ):
        config.check_unchanged(started, config.check(other))
    config.check_unchanged(started, config.check({**other, "checkpoint": {"allow_change": True}}))


def test_files_that_are_no_configuration(tmp_path):
    for text, words in (
        ("[1, 2]", "must hold sections"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("train: {seed: 2001-99-99}", "is not YAML: ValueError: month"),
        ("[" * 5000, "is not YAML: RecursionError"),
        (b"model: {path: \xe9}", "can't be read: 'utf-8' codec"),
    ):
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(config.ConfigError, match=words):
            config.load(path)
    for name in ("missing.yaml", "nul\0.yaml"):
        with pytest.raises(config.ConfigError, match="can't be read"):
            config.load(tmp_path / name)


def test_a_section_with_nothing_in_it_is_its_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\noptim:\n  # lr: 1\n")
    assert config.load(path).optim == Optim() and config.load(path, ["optim.lr=2"]).optim.lr == 2


def test_whatever_is_written_is_a_configuration_or_one_line(seed):
    """A second's worth; `python -m tests.fuzz config --minutes 10` for more."""
    assert fuzz.run(fuzzed.CHECKS, seconds=1, seed=seed) >= 40


def test_resolved_configuration_reads_back(tmp_path):
    c = config.load("configs/tiny.yaml")
    path = tmp_path / "c.yaml"
    path.write_text(config.dump(c))
    assert config.load(path) == c


def test_every_setting_is_described():
    def fields(section, path=""):
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from fields(field.annotation, f"{path}{name}.")
            else:
                yield f"{path}{name}", field.description

    missing = [name for name, description in fields(config.Config) if not description]
    assert not missing


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_a_configuration(path):
    loaded = config.load(path, ["data.path=photos"])
    assert loaded.log.name.startswith(path.stem)


def test_a_path_is_one_path_however_it_is_spelt(tmp_path, monkeypatch):
    """In a run's name, and when the run is gone on with; what is built in, and .., stay as they are."""
    names = {
        config.load(None, ["model.path=m", f"data.path={path}", f"eval.path={path}"]).log.name
        for path in ("/data/photos", "/data/photos/", "/data//photos", "/data/./photos/.")
    }
    assert len(names) == 1
    read = config.load(None, ["model.path=builtin:tiny", "data.path=../photos//", "log.dir=./runs/"])
    assert (read.model.path, read.data.path, read.log.dir) == ("builtin:tiny", "../photos", "runs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "linked").symlink_to("photos")
    started = tmp_path / "config.yaml"
    started.write_text(config.dump(config.check({"model": {"path": "m"}, "data": {"path": "photos"}})))
    for path in ("photos/", f"{tmp_path}/photos", "linked"):
        config.check_unchanged(started, config.check({"model": {"path": "m"}, "data": {"path": path}}))
    with pytest.raises(config.ConfigError, match=r"data\.path: photos → others"):
        config.check_unchanged(started, config.check({"model": {"path": "m"}, "data": {"path": "others"}}))


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"[1, 2]", b"{", b"words", b"\xff\xfe", b"a: 2024-99-99"])
def test_a_runs_own_configuration_that_is_none(tmp_path, content):
    """Emptied by a full disk, or overwritten: whoever reads it says so in one line."""
    from sslr1 import evaluate, report

    (tmp_path / "checkpoints" / "step-000001" / "hf").mkdir(parents=True)
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    readers = [
        lambda: config.check_unchanged(file, config.check(GOOD)),
        lambda: evaluate.locate(tmp_path),
        lambda: report.page(tmp_path),
    ]
    for read in readers:
        with pytest.raises(UserError) as caught:
            read()
        text = str(caught.value)
        assert (
            text.startswith(f"{file}: ")
            and "the configuration that a run was started with" in text
            and "\n" not in text
        )
