"""How entry points start and end: configuration first, one line for errors that a user can mend, processes left cleanly."""

import errno
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

from sslr1 import config as configuration
from sslr1.errors import UserError
from sslr1.files import lock
from sslr1.runs import trackers
from sslr1.setup import interrupt

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def one_line(alike=True):
    """A UserError in the body ends the program with its line on stderr and exit code 2. alike: every rank meets the same
    error, so that one prints it."""
    try:
        yield
    except UserError as error:
        _fail("" if alike and os.environ.get("RANK", "0") != "0" else error)


@contextmanager
def session(path, overrides, run=False, folder=None, data=True, forms=()):
    """A Session: everything that the configuration names, built; processes are joined before and left after.

    run: in the run's own folder, locked, and refused if it was started with other settings. folder: a run folder, whose frozen
    list of images is used. data: images too. forms: as for `build.build`. A UserError, here or in the body, ends the program with its
    line on stderr and exit code 2; a KeyboardInterrupt ends it as Ctrl-C does, without a word if it has words of its own.
    """
    with one_line():
        config = configuration.load(path, overrides, data)

    from transformers.utils import logging as transformers_logging

    from sslr1 import distributed, model
    from sslr1.setup import build

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.distributed")
    warnings.filterwarnings("ignore", module="PIL")  # what it says of odd files stands in bad_images.txt if it matters
    world = distributed.start(config.train.device)
    held = problem = interrupted = None
    try:
        folder = Path(config.log.dir) / config.log.name if run else folder
        if run and world.main:
            try:
                held = _take(folder, config)
            except (UserError, OSError) as error:
                problem = error
        distributed.agree(problem, world)
        session = build.build(config, world, folder, data, forms)
        for remark in model.remarks(session.model_path, session.policy.model) if world.main else ():
            print(f"warning: {remark}", file=sys.stderr, flush=True)
        yield session
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
        if held is not None:
            held.close()
    if interrupted is not None:
        interrupt.leave(None if interrupted.args else "interrupted")


def plan(path, overrides, ranks):
    """Print what a configuration takes of each of `ranks` GPUs. Errors as in `built`."""
    try:
        config = configuration.load(path, overrides)
        if ranks < 1 or ranks % config.train.replicate or config.rollout.prompts % ranks:
            raise UserError(
                f"--plan {ranks}: it must be a multiple of train.replicate ({config.train.replicate}) that divides "
                f"rollout.prompts ({config.rollout.prompts})"
            )
        from sslr1.setup import budget, build

        print(budget.report(config, build.builtin(config)[0], ranks))
    except UserError as error:
        _fail(error)


def _take(folder, config):
    """Lock a run folder (the lock goes with the process) and see that it is this run's, and that its trackers are there."""
    trackers.find_wandb(config.log.wandb)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder / "run.lock")
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another run: give this one a log.name of its own") from None
    except OSError as error:
        raise UserError(
            f"the run's folder {folder} can't be written to ({error.strerror}): set log.dir and log.name to where it can"
        ) from None
    if (folder / "config.yaml").exists():
        try:
            configuration.check_unchanged(folder / "config.yaml", config)
        except UserError:
            if any((folder / "checkpoints").glob("step-*")):
                raise
            (folder / "files.txt").unlink(missing_ok=True)  # it began, made nothing to go on from, and begins anew
    _same_puzzles(folder, config)
    return held


def _same_puzzles(folder, config):
    """Raises UserError where a run would go on with puzzles that an older or newer version draws differently."""
    from sslr1 import puzzles
    from sslr1.runs import checkpoint

    newest = checkpoint.newest(folder / "checkpoints")
    rules = checkpoint.puzzle_rules(newest) if newest else None
    if rules not in (None, puzzles.RULES) and not config.checkpoint.allow_change:
        raise UserError(
            f"{folder} was started under version {rules} of the puzzles' rules, and this is version {puzzles.RULES}, by which "
            "the same image gives another puzzle: give this run a log.name of its own, go on with the version of sslr1 that "
            "started it, or set checkpoint.allow_change=true"
        )


def _fail(message):
    if str(message):
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
