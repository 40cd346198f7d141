"""The command as a user runs it: real JPEG files, torchrun, resuming, and errors in one line."""

import json
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from docs import glossary
from sslr1 import config, ops
from sslr1 import train as program
from sslr1.data import Decoder, ImageFolder
from sslr1.errors import UserError
from sslr1.setup import entry
from tests.conftest import ROOT, launch_anew
from tests.forks import Program, launch
from tests.runs.test_trackers import scalars

SMALL = (
    "data.min_side=112",
    "rollout.prompts=8",
    "rollout.group_size=4",
    "train.steps=6",
    "train.warmup.steps=2",
    "train.warmup.batch=8",
    "eval.count=20",
    "eval.every=3",
    "checkpoint.every=2",
    "checkpoint.keep=9",
    "train.threads=1",
)


def arguments(tmp_path, tiny, scenes, name, *overrides):
    """Of a small run."""
    own = {"model.path": tiny, "data.path": scenes, "log.dir": tmp_path, "log.name": name}
    return ROOT / "configs/tiny.yaml", *(f"{key}={value}" for key, value in own.items()), *SMALL, *overrides


def train(tmp_path, tiny, scenes, name, *overrides, program="sslr1.train", launch=launch, **options):
    return launch(program, *arguments(tmp_path, tiny, scenes, name, *overrides), **options)


def records(folder):
    """metrics.jsonl without what the clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows]


def pictures(folder):
    """All files of samples/."""
    return {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}


def state(checkpoint):
    """All tensors of a checkpoint."""
    return {k: v for p in (checkpoint / "state").glob("*.safetensors") for k, v in load_file(p).items()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, warm, scenes):
    folder = tmp_path_factory.mktemp("runs")
    done = train(folder, warm, scenes, "unbroken")
    return folder / "unbroken", done.stdout


def test_a_run_leaves_what_is_promised(unbroken):
    folder, shown = unbroken
    for name in ("config.yaml", "files.txt", "metrics.jsonl", "samples.jsonl", "held_out.jsonl", "report.html"):
        assert (folder / name).stat().st_size
    rows = records(folder)
    assert [r["step"] for r in rows] == list(range(7))
    for key in (
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "entropy",
        "grad_norm",
        "learning_rate",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "rewards/rotation/mean",
        "accuracy/rotation/level2",
        "curriculum/rotation/level",
        "curriculum/rotation/mean",
        "sampling/logp_difference/max",
    ):
        assert all(key in r for r in rows[1:]), key
    assert all(
        r["grad_norm"] > 0 and r["reward"] > 0 for r in rows[1:]
    )  # or the comparisons below would compare nothing
    assert all(r["sampling/logp_difference/max"] < 1e-4 and r["ratio/max"] == 1 for r in rows[1:])
    assert not any("rollout/resampled" in r for r in rows)
    assert [r["step"] for r in rows if "eval/rotation/exact" in r] == [0, 3, 6]
    assert all(r["eval/ordering/n"] == 20 for r in rows if "eval/ordering/n" in r)
    answered = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert [line.pop("step") for line in answered] == [0, 3, 6]
    for line, row in zip(answered, [r for r in rows if "eval/rotation/exact" in r]):
        for name, marks in line.items():
            assert len(marks) == 20 and marks.count("1") / 20 == row[f"eval/{name}/exact"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == set(range(1, 7)) and all(len(s["completions"]) == 4 for s in samples)
    for s in samples:
        assert s["question"].count("<image>") == len(s["sizes"]) and (folder / s["picture"]).stat().st_size
        rewards = torch.tensor([[c["reward"] for c in s["completions"]]])
        assert [c["advantage"] for c in s["completions"]] == ops.advantages(rewards)[0].tolist()
    assert any(c["advantage"] for s in samples for c in s["completions"])
    assert "6 of 6" in (folder / "report.html").read_text()
    chosen = f"86 images to train on, 64 held out, decoded by {Decoder().backend}, rendered by cpp; "
    chosen += "1 cpu rank(s), 1 thread(s)"
    assert chosen in shown
    table = shown[shown.index("Held-out accuracy") :]
    assert "rotation" in table and "warm-up" in table and "before" not in table  # the heading may take two lines


def test_what_a_step_takes_of_the_machine(unbroken):
    rows = [json.loads(line) for line in (unbroken[0] / "metrics.jsonl").read_text().splitlines()][1:]
    for row in rows:
        assert 0 < row["perf/cpu_cores"] < 64
        assert 0.1 < row["perf/host_memory_gb"] <= row["perf/max_host_memory_gb"] * 1.001
        assert row["perf/host_to_device_mb"] == 0  # tests/test_transfer.py counts where there is a device


def test_the_glossary_knows_every_metric_and_no_other(unbroken):
    """What the run wrote has an entry; an entry that it didn't write is written somewhere: its name is in the code."""
    lines = (unbroken[0] / "metrics.jsonl").read_text().splitlines()
    written = {key for line in lines for key in json.loads(line)}
    assert {key for key in written if not glossary.find(key)} == set()
    met = {glossary.find(key) for key in written}
    code = "".join(p.read_text() for p in (ROOT / "sslr1").rglob("*.py") if p.name != "glossary.py")
    for pattern in [p for entries in glossary.GLOSSARY.values() for p in entries if p not in met]:
        literal = re.sub("<[a-z]+>", lambda _: r"\{[^}]+\}", re.escape(pattern))
        assert re.search(f"[\"']{literal}[\"']", code), pattern


def test_checkpoints_are_hugging_face_folders(unbroken, warm):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder = unbroken[0] / "checkpoints" / "step-000006" / "hf"
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    AutoTokenizer.from_pretrained(folder)
    assert (folder / "preprocessor_config.json").read_text() == (warm / "preprocessor_config.json").read_text()
    assert network.config._attn_implementation == "sdpa"
    assert (
        network.generation_config.eos_token_id
        == AutoModelForImageTextToText.from_pretrained(warm).generation_config.eos_token_id
    )
    state = {}
    for part in (unbroken[0] / "checkpoints" / "step-000006" / "state").glob("*.safetensors"):
        state |= load_file(part)
    for name, p in network.named_parameters():
        assert torch.equal(p, state[f"model.{name}"]), name


def test_the_sampler_learns_from_where_it_stopped(unbroken, tmp_path, warm, scenes):
    """Killed behind step 4 and started again: every number is what it would have been."""
    whole = unbroken[0]
    shutil.copytree(whole, tmp_path / "unbroken")
    for late in ("step-000006",):
        shutil.rmtree(tmp_path / "unbroken" / "checkpoints" / late)
    (tmp_path / "unbroken" / "checkpoints" / "partial-000006").mkdir()  # what a kill while writing leaves
    late = tmp_path / "unbroken" / "samples" / "step-000009-slot-0.webp"
    late.write_bytes(b"of a step that was not kept")
    with (tmp_path / "unbroken" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 7, "rew')
    done = train(tmp_path, warm, scenes, "unbroken")
    assert "going on from" in done.stdout and "step-000004" in done.stdout
    assert records(tmp_path / "unbroken") == records(whole)
    for name in ("samples.jsonl", "held_out.jsonl"):
        assert (tmp_path / "unbroken" / name).read_text() == (whole / name).read_text()
    assert pictures(tmp_path / "unbroken") == pictures(whole) and len(pictures(whole)) == 6 * 4
    board = scalars(tmp_path / "unbroken" / "tensorboard")
    assert [step for step, _ in board["reward"]] == list(range(1, 7))
    assert [step for step, _ in board["eval/rotation/exact"]] == [0, 3, 6]
    a, b = (state(f / "checkpoints" / "step-000006") for f in (whole, tmp_path / "unbroken"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_ranks_train_alike_and_go_on_as_one(unbroken, tmp_path, warm, scenes):
    """Two ranks of torchrun make the run of one, up to rounding; a checkpoint of two is resumed by one."""
    train(tmp_path, warm, scenes, "two", "train.steps=4", ranks=2, launch=launch_anew)
    one, two = records(unbroken[0])[:5], records(tmp_path / "two")
    for a, b in zip(one, two):
        for key in ("reward", "entropy", "grad_norm", "eval/rotation/exact", "eval/rotation/n"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), (a["step"], key)
    train(tmp_path, warm, scenes, "two", "train.steps=6")
    assert [r["step"] for r in records(tmp_path / "two")] == list(range(7))


def test_an_adaptive_run_goes_on_as_if_never_stopped(tmp_path, warm, scenes):
    """Levels move and an alarm is raised (see eager.py), flat groups are drawn again, every step takes two updates,
    held to the model behind the warm-up; stopped while a move is under way, the run is bit for bit the one that
    wasn't."""
    levels = "puzzles.levels={rotation: 2, ordering: 2, similarity: 2}"
    options = ["puzzles.curriculum=adaptive", levels, "train.steps=8", "eval.every=8", "rollout.resample=2"]
    options += ["loss.kl_coef=0.1", "loss.updates=2"]
    done = train(tmp_path / "whole", warm, scenes, "run", *options, program="tests.eager")
    whole, again = (tmp_path / name / "run" for name in ("whole", "again"))
    rows = records(whole)
    assert sum(row["rollout/resampled"] for row in rows[1:]) > 0
    assert [row["step"] for row in rows if "alarm/entropy" in row] == [3]
    assert all(0 < row["kl"] < 1 and row["ratio/min"] < 1 < row["ratio/max"] for row in rows[1:])
    moves = 0
    for name in ("rotation", "ordering", "similarity"):
        levels = [2] + [row[f"curriculum/{name}/level"] for row in rows[1:]]
        moved = [step for step in range(1, 9) if levels[step] != levels[step - 1]]
        assert all(f"step {step}: {name} " in done.stdout for step in moved)
        moves += len(moved)
    assert moves >= 3 and done.stdout.count(" from level ") == moves
    assert any(len([key for key in row if key.startswith("exact/rotation/level")]) > 1 for row in rows)

    def trainer(run, step):
        return json.loads((run / "checkpoints" / f"step-{step:06d}" / "state" / "trainer.json").read_text())

    plans = {step: trainer(whole, step)["curriculum"]["plan"] for step in (2, 4, 6)}
    stopped = next(step for step, plan in plans.items() if plan[-1] != plan[-2])
    shutil.copytree(whole, again)
    for checkpoint in (again / "checkpoints").iterdir():
        if int(checkpoint.name[-6:]) > stopped:
            shutil.rmtree(checkpoint)
    done = train(tmp_path / "again", warm, scenes, "run", *options, program="tests.eager")
    assert "going on from" in done.stdout and f"step-{stopped:06d}" in done.stdout
    assert ("step 3: warning: entropy" in done.stdout) == (stopped < 3)
    assert records(again) == rows and trainer(again, 8) == trainer(whole, 8)
    assert (again / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    a, b = (state(f / "checkpoints" / "step-000008") for f in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_says_so(unbroken, tmp_path, warm, scenes):
    shutil.copytree(unbroken[0], tmp_path / "unbroken")
    done = train(tmp_path, warm, scenes, "unbroken")
    assert "has already made its 6 steps" in done.stdout and "Held-out accuracy" in done.stdout
    assert records(tmp_path / "unbroken") == records(unbroken[0])


def test_other_settings_are_refused_in_the_same_folder(unbroken, tmp_path, warm, scenes):
    shutil.copytree(unbroken[0], tmp_path / "unbroken")
    done = train(tmp_path, warm, scenes, "unbroken", "optim.lr=1e-2", check=False)
    assert done.returncode == 2 and "optim.lr: 0.0003 → 0.01" in done.stderr


def test_images_that_have_moved(unbroken, tmp_path, scenes, capsys):
    """The same names and sizes elsewhere are the same images; any other set is another run's."""
    run = shutil.copytree(unbroken[0], tmp_path / "run")
    tree = config.of_run(run / "config.yaml")
    moved = shutil.copytree(scenes, tmp_path / "moved")

    def claim():
        return entry.Claim(run, config.check(tree | {"data": tree["data"] | {"path": str(moved)}}))

    claim().give_up(begun=True)
    said = capsys.readouterr().out
    assert (
        said.startswith(f"data.path: {tree['data']['path']} → {moved}, the same images by name") and said[-1:] == "\n"
    )
    assert said.count("\n") == 1
    (moved / "notes.txt").write_text("no image")
    claim().give_up(begun=True)
    with min(moved.glob("*.jpg")).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=rf"other settings \(data\.path: .* → {moved}\)"):
        claim()
    assert (run / "files.txt").exists() and (run / "checkpoints").exists()


def test_sigterm_ends_the_step_and_saves(tmp_path, warm, scenes):
    endless = arguments(tmp_path, warm, scenes, "long", "train.steps=10000", "checkpoint.every=10000")
    process = Program("sslr1.train", *endless)
    metrics = tmp_path / "long" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 4):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    last = records(tmp_path / "long")[-1]["step"]
    assert (tmp_path / "long" / "checkpoints" / f"step-{last:06d}" / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["optim.lrr=1"], "error: optim.lrr is not a setting; did you mean lr?"),
        (["data.path={empty}"], "holds no images"),
        (["data.path={empty}/missing"], "is not a folder"),
        (["model.path={empty}/missing"], "does not exist"),
        (["model.path={empty}"], "no config.json"),
        (["model.path={no_tokenizer}"], "has no tokenizer"),
        (["model.path={remote}"], "run its own code"),
        (["model.path={other}"], "'llama' model; supported: qwen2_5_vl"),
        (["rollout.group_size=1"], "rollout.group_size is 1"),
        (["train.token_budget=20"], "train.token_budget is 20"),
        (["eval.path={empty}"], "holds no images"),
        (["data.min_side=5000"], "the shorter side is under data.min_side 5000"),
    ],
)
def test_errors_end_in_one_line(tmp_path, tiny, scenes, overrides, words, monkeypatch, capfd):
    places = {name: tmp_path / name for name in ("empty", "no_tokenizer", "remote", "other")}
    places["empty"].mkdir()
    for name in ("no_tokenizer", "remote", "other"):
        shutil.copytree(tiny, places[name])
    (places["no_tokenizer"] / "tokenizer.json").unlink()
    for name, change in (("remote", {"auto_map": {"AutoModel": "x.Y"}}), ("other", {"model_type": "llama"})):
        path = places[name] / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    asked = arguments(tmp_path, tiny, scenes, "run", *[o.format(**places) for o in overrides])
    monkeypatch.setattr(sys, "argv", ["sslr1.train", *map(str, asked)])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    printed = capfd.readouterr().err
    lines = printed.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], printed
    began = "min_side" in overrides[0]  # what it lists as bad stays
    assert (tmp_path / "run").exists() == began, "a refused start leaves nothing"


def test_a_refused_start_leaves_a_folder_as_it_was(tmp_path, tiny, scenes, monkeypatch):
    """Also one that has a file already."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    asked = arguments(tmp_path, tiny, scenes, "run", "train.token_budget=20")
    monkeypatch.setattr(sys, "argv", ["sslr1.train", *map(str, asked)])
    with pytest.raises(SystemExit):
        program.main()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_an_error_of_the_program(tmp_path, tiny, scenes):
    """As a user meets it."""
    done = train(tmp_path, tiny, scenes, "run", f"model.path={tmp_path}", check=False, launch=launch_anew)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr


def test_ranks_must_divide_the_batch(tmp_path, tiny, scenes):
    done = train(tmp_path, tiny, scenes, "run", "rollout.prompts=7", ranks=2, check=False)
    assert done.returncode and "error: rollout.prompts is 7, not divisible by the 2 ranks" in done.stderr


def test_broken_images_are_passed_over_and_listed(tmp_path, warm, scenes):
    """Both ranks meet bad files, and each draws its flat groups again; all bad files are listed once, with the reason,
    and the run ends as any other."""
    shutil.copytree(scenes, tmp_path / "images")
    for i in range(0, 60, 3):
        (tmp_path / "images" / f"scene-{i:05d}.jpg").write_bytes(b"\xff\xd8 no picture")
    options = ["train.steps=6", "rollout.prompts=16", "rollout.resample=3"]
    done = train(tmp_path, warm, tmp_path / "images", "run", *options, ranks=2)
    rows = [line.split("\t") for line in (tmp_path / "run" / "bad_images.txt").read_text().splitlines()]
    assert f"{len(rows)} images were bad, see {tmp_path}" in done.stdout and len(rows) > 5
    assert len({name for name, _ in rows}) == len(rows)
    assert all(int(name[6:11]) % 3 == 0 and int(name[6:11]) < 60 and "decoded" in reason for name, reason in rows)
    folder = ImageFolder.scan(tmp_path / "images")  # 96 slots go through every training image, whichever rank has it
    bad = {folder.files[n][0] for n in folder.hold_out(0.2)[0] if folder.files[n][1] < 100}
    assert bad and bad <= {name for name, _ in rows}
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(7))
    assert all(
        0 < r["rollout/resampled"] <= 16 * (1 - r["frac_reward_zero_std"]) for r in records(tmp_path / "run")[1:]
    )


def test_two_runs_in_one_folder_are_refused(tmp_path, tiny, scenes):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "run.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = train(tmp_path, tiny, scenes, "run", check=False)
    assert done.returncode == 2 and "in use by another run" in done.stderr


def test_evaluate_command(warm, tmp_path, scenes):
    done = launch("sslr1.evaluate", "configs/tiny.yaml", f"model.path={warm}", f"data.path={scenes}", *SMALL)
    assert "rotation" in done.stdout and "chance 25.0%" in done.stdout
    assert "form 100.0%, n 20" in done.stdout  # forty steps of warm-up teach the format


def test_a_completion_cut_off_earns_nothing_unless_asked():
    from types import SimpleNamespace

    from sslr1 import config
    from sslr1.model import Group, Sample
    from sslr1.puzzles import Answer
    from sslr1.setup.session import Session
    from sslr1.train import learnable, score

    rewards = {}
    for truncated in ("zero", "score", "mask"):
        tree = {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "rollout": {"truncated": truncated},
            "puzzles": {"thinking": False},
        }
        settings = config.check(tree)
        session = SimpleNamespace(config=settings, opening="")
        session.score = partial(Session.score, session)
        for finish in ("stop", "length"):
            sample = Sample(torch.zeros(1, dtype=torch.int64), torch.zeros(1), r"\boxed{90}", finish)
            rewards[truncated, finish] = score(session, Answer("number", 90), sample).reward
        group = Group(None, [sample, replace(sample, finish="stop")])
        lengths = [len(s.tokens) for s in learnable([group], truncated)[0].samples]
        assert lengths == ([0, 1] if truncated == "mask" else [1, 1]) and len(group.samples[0].tokens) == 1
    assert rewards == {
        (how, finish): float((how, finish) != ("zero", "length"))
        for how in ("zero", "score", "mask")
        for finish in ("stop", "length")
    }
