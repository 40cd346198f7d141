"""How entry points start and end: configuration first, one line for errors that a user can mend, processes left cleanly."""

import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

from sslr1 import config as configuration
from sslr1.errors import UserError


@contextmanager
def built(path, overrides):
    """Everything that the configuration names, built, in a run folder that is locked; processes are joined before and left
    after. A UserError, here or in the body, ends the program with its line on stderr and exit code 2."""
    try:
        config = configuration.load(path, overrides)
    except UserError as error:
        _fail(error if os.environ.get("RANK", "0") == "0" else "")  # every rank reads the same file

    from transformers.utils import logging as transformers_logging

    from sslr1 import build
    from sslr1.model import parallel

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.distributed")
    world = parallel.start(config.train.device)
    handle = problem = None
    try:
        folder = Path(config.log.dir) / config.log.name
        if world.main:
            try:
                handle = build.lock(folder)
            except (UserError, OSError) as error:
                problem = error
        build.agree(problem, world)
        yield build.build(config, world, folder)
    except UserError as error:
        _fail(error)
    finally:
        parallel.stop()
        if handle is not None:
            handle.close()


def _fail(message):
    if str(message):
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
