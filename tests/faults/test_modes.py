"""Everything that is written is as open as the umask lets it be: others of a cluster's group, and containers, read
it."""

import os

import pytest

from sslr1.data.scenes import write_scenes
from sslr1.files import open_to_all
from tests.forks import launch


def odd(folder, mask):
    """Files and folders whose modes are not those of new ones under that umask."""
    out = {}
    for path in (folder, *folder.rglob("*")):
        right = (0o777 if path.is_dir() else 0o666) & ~mask
        if path.stat().st_mode & 0o777 != right:
            out[str(path.relative_to(folder))] = oct(path.stat().st_mode)
    return out


@pytest.mark.parametrize("mask", [0o022, 0o027], ids=oct)
def test_all_that_is_written_follows_the_umask(tmp_path, scenes, mask):
    home, options = tmp_path / "home", ("data.min_side=112", "train.threads=1", "eval.count=2", "rollout.prompts=2")

    def run(*arguments):
        launch("tests.faults.umask", f"{mask:o}", *arguments)

    run(
        *("sslr1.train", "configs/tiny.yaml", f"data.path={scenes}", f"log.dir={home}", "log.name=run", *options),
        *("train.steps=1", "train.warmup.steps=0", "checkpoint.background=true", "puzzles.mixture={rotation: 1}"),
    )
    model, puzzles = ("sslr1.export", "model", home / "run"), ("sslr1.export", "puzzles", scenes)
    few = ("--count", 2, "--puzzle", "rotation", "--min-side", 112)
    run(*model, home / "exported", "--checkpoint", "newest")
    run(*puzzles, home / "swift", "--format", "ms-swift", *few)
    if mask == 0o027:
        run(*puzzles, home / "trl", "--format", "trl", *few)
        write_scenes(tmp_path / "large", 20, 288)
        run(
            "sslr1.preview",
            tmp_path / "large",
            "--out",
            home / "preview",
            "--puzzle",
            "rotation",
            "--count",
            1,
            "--html",
        )
        tiny = home / "builtin" / "tiny"
        run(
            "sslr1.warmup",
            "configs/tiny.yaml",
            home / "warm",
            f"model.path={tiny}",
            f"data.path={scenes}",
            *options,
            "train.warmup.steps=1",
        )
        run("sslr1.evaluate", home / "run", f"data.path={scenes}", "eval.count=2", "--out", home / "numbers.json")
    assert odd(home, mask) == {}
    names = {path.name for path in home.rglob("*")}
    wanted = "config.yaml files.txt metrics.jsonl samples.jsonl report.html run.lock trainer.json model.safetensors "
    assert names >= {*wanted.split(), "tokenizer.json", "tensorboard", "samples", "train.jsonl"}


def test_only_what_was_named_is_opened(tmp_path):
    for name in ("weights", "secret"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o600)
    open_to_all([tmp_path / "weights"], tmp_path)
    (tmp_path / "new").touch()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert (
        modes == {"secret": 0o600, "weights": modes["new"], "new": modes["new"]}
        and os.listdir(tmp_path).count(".mode") == 0
    )
