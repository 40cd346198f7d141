"""How entry points start and end: configuration first, one line for errors that a user can mend, processes left
cleanly."""

import errno
import os
import sys
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from sslr1 import config as configuration
from sslr1.errors import UserError
from sslr1.files import lock
from sslr1.model.folder import check_folder
from sslr1.runs import trackers
from sslr1.setup import interrupt, processors

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def one_line(alike=True):
    """A UserError in the body ends the program with its line on stderr and exit code 2. alike: every rank of a machine
    meets the same error, so that one prints it."""
    try:
        yield
    except UserError as error:
        _fail("" if alike and os.environ.get("LOCAL_RANK", "0") != "0" else error)


@contextmanager
def session(path, overrides, run=False, folder=None, data=True, forms=(), learns=True, allow_functions=False):
    """A Session: everything that the configuration names, built; processes are joined before and left after.

    run: in the run's own folder, locked, and refused if it was started with other settings. folder: a run folder, whose
    frozen list of images is used. data: images too. forms, learns: as for `build.build`. allow_functions: whether
    functions are imported that a configuration in a run's or a model's folder names. A UserError, here or in the
    body, ends the program with its line on stderr and exit code 2; a KeyboardInterrupt ends it as Ctrl-C does, without
    a word if it has words of its own.
    """
    with one_line():
        config = configuration.load(path, overrides, data)
        _check_paths(config, data)
        stored = _stored(path)
        if data and stored and not allow_functions:
            _check_functions(config, path, overrides)
    folder = Path(config.log.dir) / config.log.name if run else folder
    claim = problem = interrupted = built = None
    if run and os.environ.get("RANK", "0") == "0":
        try:
            claim = Claim(folder, config)
        except (UserError, OSError) as error:
            problem = error
            if os.environ.get("WORLD_SIZE", "1") == "1":
                _fail(error)

    # what has been refused so far has been without these, which take seconds
    from transformers.utils import logging as transformers_logging

    from sslr1 import distributed, model
    from sslr1.setup import build

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.distributed")
    warnings.filterwarnings("ignore", module="PIL")  # what it says of odd files stands in bad_images.txt if it matters
    try:
        world = distributed.start(config.train.device)
        distributed.agree(problem, world)
        built = build.build(config, world, folder, data, forms, learns, stored)
        for remark in model.remarks(built.model_path, built.policy.model) if world.main else ():
            print(f"warning: {remark}", file=sys.stderr, flush=True)
        processors.collect_as_usual()
        yield built
    except UserError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in FULL:
            raise
        _fail(f"{error.filename or 'a file of the run'} can't be written: {error.strerror}")
    except KeyboardInterrupt as error:
        interrupted = error
    finally:
        distributed.stop()
        if claim is not None:
            claim.give_up(begun=built is not None)
    if interrupted is not None:
        interrupt.leave(None if interrupted.args else "interrupted")


def plan(path, overrides, ranks, size=None, card=None):
    """Print what a configuration (None: the defaults) takes of each of `ranks` GPUs. No weights are looked at, and no
    images. size: a name of model.SIZES in place of model.path; card: one of card.NAMES. Errors as in `session`."""
    try:
        named = [f"model.path={size}"] if size else []
        config = configuration.load(path, [*overrides, *named], data=False)
        if ranks < 1 or ranks % config.train.replicate or config.rollout.prompts % ranks:
            raise UserError(
                f"--plan {ranks}: it must be a multiple of train.replicate ({config.train.replicate}) that divides "
                f"rollout.prompts ({config.rollout.prompts})"
            )
        from sslr1 import model
        from sslr1.setup import budget, build
        from sslr1.setup import card as cards

        for option, name, known in (("--size", size, model.SIZES), ("--card", card, cards.NAMES)):
            if name and name not in known:
                raise UserError(f"{option} {name} is not listed; {configuration.nearest(name, list(known))}")
        what = size or build.builtin(config, data=False)[0]
        print(budget.report(config, what, ranks))
        if card:
            print("\n" + cards.report(config, what, ranks, card))
    except UserError as error:
        _fail(error)


def _check_paths(config, data):
    """Raise the UserError of a path at which a look shows that it won't do."""
    from sslr1.data.images import ImageFolder  # takes a second, which a wrong key need not wait for

    if config.model.path not in configuration.BUILTIN_MODELS:
        check_folder(config.model.path)
    for key, path in (("data.path", config.data.path), ("eval.path", config.eval.path)) if data else ():
        if path not in (None, configuration.BUILTIN_IMAGES):
            ImageFolder.check(path, key)
    for name, task in config.tasks.items() if data else ():
        for key in ("path", "root"):
            if (place := getattr(task, key)) is not None and not os.path.exists(place):
                raise UserError(f"tasks.{name}.{key} {place!r} does not exist")


def _stored(path) -> Path | None:
    """The folder of a configuration that lies in a run's or a model's: None for one of the user's own."""
    folder = Path(path).resolve().parent if path else None
    signs = ("checkpoints", "files.txt", "metrics.jsonl", "run.lock", "config.json", "adapter_config.json")
    return folder if folder and any((folder / sign).exists() for sign in signs) else None


def _check_functions(config, path, overrides):
    """Raises UserError for a function of a task that no override names."""
    given = {override.partition("=")[0] for override in overrides}
    for name, task in config.tasks.items():
        if task.function and not given & {"tasks", f"tasks.{name}", f"tasks.{name}.function"}:
            raise UserError(
                f"{path} has tasks.{name}.function={task.function}, and what a run's or a model's folder names is only "
                "imported with --allow-functions: look at that function first, or give one by "
                f"tasks.{name}.function=… on the command line"
            )


class Claim:
    """A run's folder, which nobody else can claim before this process ends. Raises UserError where another has, where
    it is another run's, and where a tracker is missing; a start that is refused leaves it as it was."""

    def __init__(self, folder, config):
        trackers.find_wandb(config.log.wandb)
        try:
            self.folder, self._before = folder, {*folder.iterdir()} if folder.is_dir() else None
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(folder / "run.lock")
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run: give this one a log.name of its own") from None
        except OSError as error:
            raise UserError(
                f"the run's folder {folder} can't be written to ({error.strerror}): set log.dir and log.name to where "
                "it can"
            ) from None
        try:
            self._check(config)
        except UserError:
            self.give_up(begun=False)
            raise

    def _check(self, config):
        if (self.folder / "config.yaml").exists():
            try:
                if words := configuration.check_unchanged(
                    self.folder / "config.yaml", config, lambda: self._lists(config.data)
                ):
                    print(words, flush=True)
            except UserError:
                if any((self.folder / "checkpoints").glob("step-*")):
                    raise
                (self.folder / "files.txt").unlink(missing_ok=True)  # it made nothing to go on from, and begins anew
        _same_puzzles(self.folder, config)

    def _lists(self, data) -> bool:
        """Whether the run's list of images is that of the section `data`."""
        from sslr1.data.images import ImageFolder
        from sslr1.data.listing import Files

        listing = self.folder / "files.txt"
        if data.path == configuration.BUILTIN_IMAGES or not listing.is_file():
            return False
        return ImageFolder.scan(data.path, exclude=data.exclude).files == Files.open(listing)

    def give_up(self, begun) -> None:
        """begun: whether there is a run, whose files stay."""
        if not begun:
            with suppress(OSError):  # of which nothing is said: what ends the start is
                for path in {*self.folder.iterdir()} - (self._before or set()):
                    path.unlink()
                if self._before is None:
                    self.folder.rmdir()
        self._lock.close()


def _same_puzzles(folder, config):
    """Raise the UserError of a run that would go on with puzzles that another version draws otherwise."""
    from sslr1 import puzzles
    from sslr1.runs import checkpoint

    newest = checkpoint.newest(folder / "checkpoints")
    rules = checkpoint.puzzle_rules(newest) if newest else None
    if rules not in (None, puzzles.RULES) and not config.checkpoint.allow_change:
        raise UserError(
            f"{folder} was started under version {rules} of the puzzles' rules, and this is version {puzzles.RULES}, "
            "by which the same image gives another puzzle: give this run a log.name of its own, go on with the version "
            "of sslr1 that started it, or set checkpoint.allow_change=true"
        )


def _fail(message):
    if str(message):
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
