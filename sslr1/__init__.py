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


def _asked_for() -> bool:
    """Whether this import is the first thing that `python -m sslr1.…` does."""
    command = getattr(sys, "orig_argv", [])
    place = command.index("-m") + 1 if getattr(sys, "argv", [])[:1] == ["-m"] and "-m" in command else len(command)
    return command[place : place + 1] != [] and command[place].split(".")[0] == __name__


if _asked_for():
    begin_program()
