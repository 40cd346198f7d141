"""SSL-R1: self-supervised visual reinforcement post-training for multimodal language models.

Subpackages load on first use, so `import sslr1.puzzles.reward` costs nothing but that file.
"""

import sys
from importlib import import_module

__version__ = "0.1.0"
__all__ = ["data", "integrations", "model", "ops", "puzzles", "rollout"]


def __getattr__(name):
    if name in __all__:
        return import_module(f"sslr1.{name}")
    raise AttributeError(f"module 'sslr1' has no attribute {name!r}")


def at_first_use(package, homes):
    """(__getattr__, names) of a package whose names load with the file that they are from: {file: names, spaced}."""
    home = {name: file for file, names in homes.items() for name in names.split()}

    def load(name):
        if name in home:
            return getattr(import_module(f"{package}.{home[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load, list(home)


def begin_program() -> None:
    """What has to be settled before a program of ours imports anything large."""
    from sslr1.setup import interrupt, processors

    interrupt.watch()
    processors.wait_briefly()
    processors.collect_rarely()


def program() -> str:
    """What this process was begun with, `sslr1.train` of `python -m sslr1.train …`; "" where it is none of ours."""
    command = getattr(sys, "orig_argv", [])
    name = command[command.index("-m") + 1] if "-m" in command[:-1] else ""
    return name if name.split(".")[0] == __name__ else ""


if getattr(sys, "argv", [])[:1] == ["-m"] and program():  # this import is the first thing that it does
    begin_program()
    if program() != __name__:
        from sslr1.__main__ import answer

        answer(program().partition(".")[2])
