"""The command line: help, misspelt settings, and how commands end."""

import subprocess
import sys
from pathlib import Path

import pytest

import sslr1
from sslr1.__main__ import COMMANDS, MODULES, main, parsed
from sslr1.evaluate import benchmarks
from sslr1.puzzles import picture

ROOT = Path(__file__).parent.parent


def said(capsys, call, *arguments):
    """(exit code, stdout, stderr) of what ends a program."""
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    return end.value.code, *capsys.readouterr()


def test_help_needs_nothing_large():
    """No command's, asked for either way, and no wrong option."""
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'pydantic', 'transformers', 'PIL', 'rich'): sys.modules[name] = None\n"
        "from sslr1.__main__ import COMMANDS, main\n"
        "for asked in [['--help'], ['--version'], *([name, '--help'] for name in COMMANDS)]:\n"
        "    sys.argv = ['sslr1', *asked]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert end.code == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.count("usage: sslr1 ") == 1 + len(COMMANDS), done.stderr
    for asked, stream, words in ((["--help"], 1, "usage: python -m sslr1.evaluate"), (["--formm"], 2, "unrecognized")):
        line = [sys.executable, "-X", "importtime", "-m", "sslr1.evaluate", *asked]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
        assert words in (done.stdout, done.stderr)[stream - 1]
        assert "argparse" in done.stderr and not {"torch", "numpy"} & set(done.stderr.split())


def test_each_is_a_module_and_on_the_page():
    page = (ROOT / "docs" / "commands.md").read_text()
    for name in COMMANDS:
        assert f"\n| `sslr1 {name} " in page
        place = MODULES.get(name, name).replace(".", "/")
        assert any((ROOT / "sslr1" / file).exists() for file in (f"{place}.py", f"{place}/__main__.py"))


def test_without_a_command_they_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(sslr1, "begin_program", lambda: None)  # whose signals and settings are a process's own
    monkeypatch.setattr(sys, "argv", ["sslr1"])
    assert main() is None
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed and command.about in listed for name, command in COMMANDS.items())
    for asked, code in ((["--version"], 0), (["trian"], 2)):
        monkeypatch.setattr(sys, "argv", ["sslr1", *asked])
        found, out, err = said(capsys, main)
        version = f"sslr1 {sslr1.__version__}\n"
        assert found == code and (out == version) == (code == 0) and ("'trian'" in err) == (code == 2)


def test_defaults_are_the_modules_own_and_in_the_help(capsys):
    assert parsed("preview", ["x"]).min_side == parsed("export", ["puzzles", "x", "y", "--format", "trl"]).min_side
    assert parsed("preview", ["x"]).min_side == picture.MIN_SIDE
    assert parsed("export", ["puzzles", "x", "y", "--format", "trl"]).max_side == picture.MAX_SIDE
    assert parsed("evaluate", ["x"]).max_pixels == benchmarks.MAX_PIXELS
    _, out, _ = said(capsys, parsed, "evaluate", ["--help"])
    assert "(default: 12845056)" in out and "(default: 2000)" in out and "(default: None)" not in out
    _, out, _ = said(capsys, parsed, "export", ["puzzles", "--help"])
    assert "(default: 768)" in out and "(default: one an image)" in out and "(default: False)" not in out


@pytest.mark.parametrize(
    "written, meant",
    [
        (["--optim.lr=1e-4"], "optim.lr=1e-4"),
        (["--optim.lr", "1e-4"], "optim.lr=VALUE"),
        (["--group_size=4"], "rollout.group_size=4"),
        (["--lr", "3"], "optim.lr=VALUE or train.warmup.lr=VALUE"),
        (["--neither.nor=3"], "neither.nor=3"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_settings_with_dashes(capsys, command, written, meant):
    code, _, err = said(capsys, parsed, command, ["x", "train.steps=1", *written])
    assert code == 2 and f"{written[0]} is no option; settings have no dashes: {meant}\n" in err


def test_other_options_are_left_to_argparse(capsys):
    code, _, err = said(capsys, parsed, "train", ["x", "--frobnicate"])
    assert code == 2 and "unrecognized arguments: --frobnicate" in err
