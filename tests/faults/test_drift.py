"""Settings and code that change between two starts of a run: refused, allowed or said, by what they do."""

import json
import shutil

import pytest

from sslr1 import config, puzzles
from sslr1.config.kinds import Section
from sslr1.errors import UserError
from sslr1.runs import checkpoint
from sslr1.setup import entry
from tests.faults.runs import command, finish

GOOD = {"model": {"path": "m"}, "data": {"path": "d"}}
# What may change in a run: where, how fast, what is kept and shown. Every other setting is refused, new ones too.
FREE = {
    *("checkpoint.every", "checkpoint.keep", "checkpoint.background", "checkpoint.allow_change"),
    *("log.dir", "log.name", "log.samples", "log.report_every_s", "log.tensorboard", "log.wandb"),
    *("eval.every", "eval.count", "data.cache_mb", "data.max_bad"),
    *("rollout.wave_rows", "rollout.wave_groups", "rollout.batch_invariant", "rollout.look_every"),
    *("rollout.cuda_graphs", "train.steps", "train.threads", "train.device", "train.token_budget"),
    *("train.replicate", "train.recompute", "train.compile"),
}
OTHER = {  # values that no rule derives from the present one
    "checkpoint.background": True,
    "data.exclude": "excluded.txt",
    "model.lora.alpha": 7,
    "model.lora.vision": "all-linear",
    "puzzles.mixture": {"rotation": 1.0},
    "puzzles.levels": {"rotation": 1},
    "train.warmup.right_for": ["rotation"],
    "rollout.max_logp_gap": 0.5,
    "rollout.group_size": 4,
    "optim.betas": (0.8, 0.9),
    "data.holdout": 0.1,
    "data.max_side": 500,
    "log.name": "other",
    "log.wandb": "a project",
    "eval.path": "elsewhere",
    "puzzles.wordings": 1,
    "tasks": {"colours": {"path": "rows.jsonl", "kind": "text"}},
    "puzzles.min_pixels": 100,
    "puzzles.max_pixels": 10000,
}


def settings(section, path=""):
    """(dotted key, field) of every setting."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from settings(kind, f"{path}{name}.")
        else:
            yield f"{path}{name}", field


def changed(key, field, value):
    """A config where one setting has another value than the default."""
    if key in OTHER:
        value = OTHER[key]
    elif choices := [v for v in config.file._literals(field.annotation) if isinstance(v, str)]:
        value = next(v for v in choices if v != value)
    elif isinstance(value, bool):
        value = not value
    elif isinstance(value, str):
        value += "x"
    else:
        value = value * 0.5 if isinstance(value, float) and value else value + 1
    tree = json.loads(json.dumps(GOOD))
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = value
    return config.check(tree)


def test_every_setting_is_free_or_refused(tmp_path):
    started = tmp_path / "config.yaml"
    default = config.check(GOOD)
    started.write_text(config.dump(default))
    every = dict(settings(config.Config))
    assert set(every) >= FREE
    for key, field in every.items():
        if key == "model.lora.dropout":  # takes 0 only
            continue
        value = default
        for part in key.split("."):
            value = getattr(value, part)
        other = changed(key, field, value)
        assert other != default, key
        if key in FREE:
            config.check_unchanged(started, other)
        else:
            with pytest.raises(config.ConfigError, match=rf"{key}.* → ") as caught:
                config.check_unchanged(started, other)
            assert "\n" not in str(caught.value) and "checkpoint.allow_change=true" in str(caught.value)
            insisting = other.checkpoint.model_copy(update={"allow_change": True})
            config.check_unchanged(started, other.model_copy(update={"checkpoint": insisting}))


def test_steps_matter_where_the_learning_rate_counts_them(tmp_path):
    for schedule in ("linear", "cosine"):
        tree = {**GOOD, "optim": {"schedule": schedule}}
        (tmp_path / "config.yaml").write_text(config.dump(config.check(tree)))
        with pytest.raises(config.ConfigError, match=r"train.steps: 1000 → 7"):
            config.check_unchanged(tmp_path / "config.yaml", config.check({**tree, "train": {"steps": 7}}))


def test_a_run_that_is_older_than_a_setting(tmp_path):
    """It ran with what is now that setting's default."""
    text = config.dump(config.check(GOOD)).replace("  resample: 0\n", "")
    assert "resample" not in text
    (tmp_path / "config.yaml").write_text(text)
    config.check_unchanged(tmp_path / "config.yaml", config.check(GOOD))
    with pytest.raises(config.ConfigError, match=r"rollout.resample: 0 → 2"):
        config.check_unchanged(tmp_path / "config.yaml", config.check({**GOOD, "rollout": {"resample": 2}}))


def test_a_run_keeps_to_the_puzzles_it_was_started_with(tmp_path):
    asked = config.check({**GOOD, "checkpoint": {"allow_change": False}})
    state = tmp_path / "checkpoints" / "step-000003" / "state"
    state.mkdir(parents=True)
    for before, refused in (
        ({}, 1),
        ({"puzzles": puzzles.RULES + 1}, puzzles.RULES + 1),
        ({"puzzles": puzzles.RULES}, 0),
    ):
        (state / "trainer.json").write_text(json.dumps({"step": 3, "made_by": {"threads": 1, **before}}))
        if not refused:
            entry._same_puzzles(tmp_path, asked)
            continue
        with pytest.raises(UserError, match=rf"version {refused} of the puzzles' rules, and this is version") as caught:
            entry._same_puzzles(tmp_path, asked)
        assert "log.name" in str(caught.value) and "\n" not in str(caught.value)
        insisting = asked.checkpoint.model_copy(update={"allow_change": True})
        entry._same_puzzles(tmp_path, asked.model_copy(update={"checkpoint": insisting}))


@pytest.mark.slow
def test_other_code_is_said(tmp_path, unbroken, warm, scenes):
    """And the same code is not."""
    shutil.copytree(unbroken, tmp_path / "run")
    out, _ = finish(command(tmp_path, warm, scenes))
    assert "warning" not in out
    path = checkpoint.newest(tmp_path / "run" / "checkpoints") / "state" / "trainer.json"
    state = json.loads(path.read_text())
    now = checkpoint.versions()
    assert state["made_by"].items() >= now.items() and set(now) == {"sslr1", "torch", "transformers"}
    state["made_by"] |= {"sslr1": "0.0.1+00000000", "threads": 77}
    path.write_text(json.dumps(state))
    out, _ = finish(command(tmp_path, warm, scenes))
    assert f"(sslr1 0.0.1+00000000 → {now['sslr1']}, threads 77 → 1)" in out


def test_the_codes_version_is_that_of_its_files(tmp_path, monkeypatch):
    from importlib.machinery import ModuleSpec

    (tmp_path / "a.py").write_text("1")
    spec = ModuleSpec("x", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: spec)
    found = []
    for text in ("1", "2", "1"):
        (tmp_path / "a.py").write_text(text)
        found.append(checkpoint.versions.__wrapped__()["sslr1"])
    assert found[0] == found[2] != found[1]
