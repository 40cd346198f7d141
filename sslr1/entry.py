"""How entry points start and end: configuration first, one line for errors that a user can mend, processes left cleanly."""

import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

from sslr1 import config as configuration


def read_config(path, overrides):
    """The checked configuration, or one line on stderr and exit code 2."""
    try:
        return configuration.load(path, overrides)
    except configuration.ConfigError as error:
        fail(error)


def fail(message):
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    # every rank leaves with 2; torchrun adds its own report behind the line
    sys.exit(2)


@contextmanager
def built(path, overrides, folder=None):
    """Everything that the configuration names, built; processes joined before and left after."""
    from transformers.utils import logging as transformers_logging

    config = read_config(path, overrides)
    from sslr1 import build
    from sslr1.model import parallel

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.distributed")
    world = parallel.start(config.train.device)
    handle = problem = None
    try:
        run = Path(folder or Path(config.log.dir) / config.log.name)
        if world.main:
            try:
                handle = build.lock(run)
            except (build.UserError, OSError) as error:
                problem = error
        build.agree(problem, world)
        yield build.build(config, world, run)
    except (build.UserError, configuration.ConfigError, FileNotFoundError) as error:
        fail(error)
    finally:
        parallel.stop()
        if handle is not None:
            handle.close()
