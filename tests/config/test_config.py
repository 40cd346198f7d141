"""Configuration: errors that a person can act on, overrides, round trip."""

import json
import re
from pathlib import Path

import pytest

from sslr1 import config
from sslr1.config.kinds import Section
from sslr1.config.settings import Optim
from sslr1.errors import UserError
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
        ("model: !!timestamp 2001-99-99", "is not YAML: ValueError: month"),
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


def load(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config.load(path, overrides)


PLACES = "model: {path: m}\ndata: {path: d}\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("optim:\n  lr: 1\noptim:\n  lr: 1\n", "c.yaml': optim stands on line 3 and on line 5"),
        ("optim:\n  lr: 1\n  eps: 1\n  'lr': 1\n", "lr stands on line 4 and on line 6"),
        ("optim:\r\n  lr: 1\r\n\r\noptim: {}\r\n", "optim stands on line 3 and on line 6"),
        ("puzzles:\n  levels: {rotation: 3, rotation: 1}\n", "rotation stands twice"),
        ("train: {warmup: {steps: 1,\n  steps: 1}}\n", "steps stands on line 3 and on line 4"),
        ("unknown:\n  a: {b: 1}\n  a: {}\n", "a stands on line 4 and on line 5"),
    ],
)
def test_a_key_that_stands_twice(tmp_path, text, words):
    with pytest.raises(config.ConfigError, match=words):
        load(tmp_path, PLACES + text)


def test_a_key_that_stands_twice_in_an_override(tmp_path):
    with pytest.raises(config.ConfigError, match=r"puzzles\.levels=.*rotation stands twice"):
        load(tmp_path, PLACES, "puzzles.levels={rotation: 3, rotation: 1}")
    assert load(tmp_path, PLACES, "optim.lr=1", "optim.lr=2").optim.lr == 2  # as on any command line


def test_merged_keys_stand_once(tmp_path):
    c = load(
        tmp_path,
        "model: &m {path: m, dtype: float32}\ndata: {path: d}\noptim: &o {lr: 1}\nloss: {}\ntrain: {steps: 3}\n",
    )
    assert c.model.dtype == "float32"
    c = load(tmp_path, "model: &a {path: 010}\ndata:\n  <<: *a\n  holdout: 0.5\nlog: {<<: [{name: 1e3}, {name: no}]}\n")
    assert (c.model.path, c.data.path, c.data.holdout, c.log.name) == ("010", "010", 0.5, "1e3")
    assert load(tmp_path, "model: &a {path: m}\ndata: {<<: *a, path: d}\n").data.path == "d"


@pytest.mark.parametrize(
    "name",
    ["007", "2024-10-01", "1e-4", "0x10", "1_000", "1:30", "yes", "no", "on", "true", ".5", "12", "-1", "0o7", "<<"],
)
def test_text_settings_have_their_text_as_it_is_written(tmp_path, name):
    for c in (
        load(tmp_path, PLACES, f"log.name={name}", f"data.path={name}", f"eval.path={name}"),
        load(tmp_path, f"model: {{path: m}}\ndata:\n  path: {name}\neval: {{path: {name}}}\nlog:\n  name: {name}\n"),
    ):
        assert c.log.name == c.data.path == c.eval.path == name
        assert load(tmp_path, config.dump(c)) == c


@pytest.mark.parametrize(
    "text",
    [
        "/my #1 photos",
        "a # b",
        "C: x",
        "[a",
        "{a}",
        "*a",
        "&a b",
        "- a",
        "@x",
        "!a",
        "'a",
        'a"b',
        "a'b'",
        "%",
        "ü😀",
        " a ",
    ],
)
def test_overrides_of_text_are_text(tmp_path, text):
    assert load(tmp_path, PLACES, f"data.path={text}").data.path == text
    assert load(tmp_path, PLACES, "data.path=" + json.dumps(text, ensure_ascii=False)).data.path == text


def test_what_takes_null(tmp_path):
    for null in ("null", "~", ""):
        c = load(tmp_path, PLACES + f"eval: {{path: {null}}}\nlog: {{name: {null}}}\n")
        assert c.eval.path is None and c.log.name.startswith("c-")
        assert load(tmp_path, PLACES, f"eval.path={null}", f"data.max_side={null}") == load(
            tmp_path, PLACES, "data.max_side=null"
        )
    for text, override in (
        ("data: {path: ~}", []),
        ("data: {path: null}", []),
        ("data:\n  path:\n", []),
        ("data: {}", ["data.path="]),
    ):
        with pytest.raises(config.ConfigError, match=r"data\.path is empty; it takes a folder .*quotes: \"~\""):
            load(tmp_path, f"model: {{path: m}}\n{text}\n", *override)
    with pytest.raises(config.ConfigError, match=r"log\.name is '': "):
        load(tmp_path, PLACES + "log: {name: ''}")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    c = load(tmp_path, "model: {path: ~/m}\ndata: {path: ~/d}\n", "log.dir=~", "eval.path=~/a b")
    assert (c.model.path, c.data.path, c.log.dir, c.eval.path) == (
        "/home/me/m",
        "/home/me/d",
        "/home/me",
        "/home/me/a b",
    )
    assert load(tmp_path, PLACES, "data.path=./~/x", "log.name=~x").data.path == "./~/x"


@pytest.mark.parametrize(
    "written, read",
    [("010", 10), ("1_000", 1000), ("1e3", 1000), ("1.0e+3", 1000), ("0x10", 16), ("+7", 7), ("08", 8), ("7.", 7)],
)
def test_numbers_are_decimal(tmp_path, written, read):
    assert load(tmp_path, PLACES, f"train.steps={written}", f"optim.lr={written}").train.steps == read
    c = load(tmp_path, PLACES + f"train: {{steps: {written}}}\npuzzles: {{mixture: {{rotation: {written}}}}}\n")
    assert c.train.steps == c.puzzles.mixture["rotation"] == read


def test_small_numbers(tmp_path):
    for written in ("1e-4", "1E-4", ".1e-3", "1.e-4", "0.000_1"):
        c = load(tmp_path, PLACES + f"optim: {{lr: {written}, betas: [9e-1, 0{written}]}}\n")
        assert c.optim.lr == 1e-4 and c.optim.betas == (0.9, 1e-4)
        assert load(tmp_path, PLACES, f"optim.lr={written}").optim.lr == 1e-4


@pytest.mark.parametrize(
    "written", ["1:30", "0o17", "0b1", "yes", "true", "1 000", "1,000", "2024-10-01", "_1", "1e", "."]
)
def test_what_is_no_number(tmp_path, written):
    for key in ("train.steps", "optim.lr"):
        section, name = key.split(".")
        for asked in ((PLACES, f"{key}={written}"), (PLACES + f"{section}:\n  {name}: {written}\n",)):
            with pytest.raises(config.ConfigError, match=f"{key} is '{written}': input should be a valid"):
                load(tmp_path, *asked)


def test_truth_values(tmp_path):
    for written, read in (("yes", True), ("on", True), ("true", True), ("False", False), ("no", False), ("off", False)):
        assert load(tmp_path, PLACES, f"train.compile={written}").train.compile is read
        assert load(tmp_path, PLACES + f"train: {{compile: {written}}}\n").train.compile is read


def test_where_quotes_are_needed_they_are_shown(tmp_path):
    (tmp_path / "my #1 photos").mkdir()
    for path, words in (
        ("C: photos", r'is not YAML: .*goes into quotes: path: "C: photos"$'),
        ("@photos", r'is not YAML: .*goes into quotes: path: "@photos"$'),
        ("[new] photos", r'is not YAML: .*goes into quotes: path: "\[new\] photos"$'),
        ("{new}", r'line 3: a text setting takes {new} in quotes: "{new}"$'),
        (f"{tmp_path}/my #1 photos", r'line 3: a text setting takes .*my #1 photos in quotes: ".*/my #1 photos"$'),
    ):
        with pytest.raises(config.ConfigError, match=words):
            load(tmp_path, f"model: {{path: m}}\ndata:\n  path: {path}\n")
    with pytest.raises(config.ConfigError, match=r'line 1: a text setting takes \[new\] in quotes: "\[new\]"$'):
        load(tmp_path, "model: {path: [new]}\ndata: {path: d}\n")
    assert load(tmp_path, "model: {path: m}\ndata:\n  path: photos # mine\n").data.path == "photos"
    with pytest.raises(config.ConfigError, match=r"line 3, .*; write spaces in place of the tab$"):
        load(tmp_path, "model: {path: m}\ndata:\n\tpath: d\n")


def test_marks_and_line_ends_of_other_systems(tmp_path):
    for content in (
        ("\ufeff" + PLACES).encode(),
        PLACES.encode("utf-16"),
        PLACES.replace("\n", "\r\n").encode(),
        PLACES.replace("\n", "\r").encode(),
    ):
        assert load(tmp_path, content).data.path == "d"


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


@pytest.mark.parametrize(
    "content", [b"", b"# nothing\n", b"[1, 2]", b"{", b"words", b"\xff\xfe", b"a: !!timestamp 2024-99-99"]
)
def test_a_runs_own_configuration_that_is_none(tmp_path, content):
    """Emptied by a full disk, or overwritten: whoever reads it says so in one line."""
    from sslr1.evaluate import __main__ as evaluate
    from sslr1.report import page as report

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


@pytest.mark.parametrize(
    "override, meant",
    [
        ("lr=1e-4", "optim.lr=1e-4 or train.warmup.lr=1e-4"),
        ("train.seeed.seed=3", "train.seed=3"),
        ("learner.group_size=4", "rollout.group_size=4"),
        ("path=/photos", "model.path=/photos or data.path=/photos or eval.path=/photos"),
    ],
)
def test_a_setting_without_its_section(override, meant):
    key = override.partition("=")[0]
    with pytest.raises(config.ConfigError, match=rf"^{override}: {key} is not a setting; did you mean {meant}\?$"):
        config.load(None, ["model.path=m", "data.path=d", override])


def test_a_setting_without_its_section_in_a_file():
    assert error({**GOOD, "lr": 1}) == "lr is not a setting; did you mean optim.lr or train.warmup.lr?"
    assert error({**GOOD, "eval": {"seed": 1}}) == "eval.seed is not a setting; did you mean train.seed?"


SOURCES = [
    ("[a/, b]", ["a", "b"]),
    ("[007, {path: 1e-4, weight: 3}]", ["007", ("1e-4", 3.0, None)]),
    ("{path: x.parquet, column: no}", ("x.parquet", None, "no")),
    ("[{path: x.parquet, column: img, weight: 2}]", ("x.parquet", None, "img")),  # alone it has no weight
    ("[a]", "a"),
]


@pytest.mark.parametrize("written, read", SOURCES)
def test_images_may_have_several_sources(tmp_path, written, read):
    """In a file, as an override, and again from a run's own configuration."""

    def plain(path):
        if isinstance(path, list):
            return [plain(one) for one in path]
        return path if isinstance(path, str) else (path.path, path.weight, path.column)

    in_file = load(tmp_path, f"model: {{path: m}}\ndata:\n  path: {written}\n")
    given = load(tmp_path, PLACES, f"data.path={written}")
    (tmp_path / "config.yaml").write_text(config.dump(given))
    again = config.check(config.of_run(tmp_path / "config.yaml"))
    assert [plain(c.data.path) for c in (in_file, given, again)] == [read] * 3
    assert config.check_unchanged(tmp_path / "config.yaml", in_file) == ""


@pytest.mark.parametrize(
    "written, words",
    [
        ("[]", "a list of sources has at least one"),
        ("[{path: a, weight: 0}, b]", "weight: input should be greater than 0"),
        ("[{path: a, weigth: 1}, b]", "weigth: extra inputs are not permitted"),
        ("['', b]", "a source is a path or {path: …, weight: …, column: …}"),
    ],
)
def test_what_is_no_source(tmp_path, written, words):
    for asked in ((PLACES, f"data.path={written}"), (f"model: {{path: m}}\ndata:\n  path: {written}\n",)):
        with pytest.raises(config.ConfigError, match=f"data.path is .*{re.escape(words)}"):
            load(tmp_path, *asked)
    with pytest.raises(config.ConfigError, match=r"eval\.path is .*: images to evaluate on have no weights"):
        load(tmp_path, PLACES, "eval.path=[{path: a, weight: 1}, b]")
