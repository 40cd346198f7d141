"""Ctrl-C ends a program with one line in place of a traceback, and for the shell as a program that Ctrl-C has ended:
130.

A shell's loop or script goes on after a program that leaves with code 130 of its own accord, and stops after one that
the signal ended. So these die of the signal when all is said. Training saves first (`Signals`).
"""

import contextlib
import os
import signal
import sys
import threading

TERMINAL = b"\x1b[?25h\n"  # shows the cursor that a bar has hidden, and leaves the bar's line


STOP, INTERRUPT = 1, 2  # what asks a run to stop: SIGTERM or SIGUSR1, and Ctrl-C, the graver


class Signals:
    """Within it, SIGTERM, SIGUSR1 and Ctrl-C are noted (`received`: 0, STOP or INTERRUPT), for a loop to look at
    between two steps. say: tells the user; a second Ctrl-C ends the process at once."""

    def __init__(self, say):
        self.say, self.received = say, 0

    def __enter__(self):
        names = [signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            names.append(signal.SIGINT)
        self._before = {name: signal.signal(name, self._note) for name in names}
        return self

    def __exit__(self, *_):
        if not self.received:  # else what was said of the next one holds
            for name, handler in self._before.items():
                signal.signal(name, handler)

    def _note(self, number, _):
        self.received = max(self.received, INTERRUPT if number == signal.SIGINT else STOP)
        if number == signal.SIGINT:
            next_ends()
            words = "interrupted: the step is finished and saved; once more leaves at once"
            threading.Thread(target=self.say, args=(words,)).start()  # this one may be writing just now


def watch() -> None:
    """From now on Ctrl-C ends this process with a line, unless it was started to pay no heed to it (a script's `&`)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: leave())


def unwind() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, for a program that has to clear something away before it calls
    `leave`."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def next_ends() -> None:
    """The next Ctrl-C ends this process at once, whatever it is in.

    torchrun hands the first one on to its ranks, which have it from the terminal already, and at the second it sends
    SIGTERM."""
    ranks = "TORCHELASTIC_RUN_ID" in os.environ
    signal.signal(signal.SIGINT, signal.SIG_IGN if ranks else signal.SIG_DFL)
    if ranks:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def leave(words="interrupted") -> None:
    """End this process by SIGINT, at once; rank 0 says the words on stderr before, if there are any."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # in the middle of a write, or nobody reads it any more
            stream.flush()
    if words and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, (TERMINAL if os.isatty(2) else b"") + f"{words}\n".encode())
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(128 + signal.SIGINT)  # the first process of a container, which signals that nobody handles don't end
