"""torchrun with the same options, less what it does when it is told to stop: a traceback of its own, and SIGKILL for
ranks that are not done after half a minute.

python -m sslr1.torchrun --nproc_per_node=N -m sslr1.train CONFIG [section.key=value …]
"""

import logging
import os
import signal


def main():
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.run import main as run

    os.environ.setdefault(
        "PET_SHUTDOWN_TIMEOUT", "3600"
    )  # s, its --shutdown-timeout; a second Ctrl-C doesn't wait for it
    for name in ("agent.server.api", "multiprocessing.api"):  # a line for each signal and rank that it hands it on to
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.ERROR)
    try:
        run()
    except SignalException as error:
        signal.signal(error.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), error.sigval)


if __name__ == "__main__":
    main()
