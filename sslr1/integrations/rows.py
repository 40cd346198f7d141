"""Rows of puzzles, made by as many processes as wanted and handed over in order: the same ones, whatever their
number."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from sslr1.errors import UserError
from sslr1.integrations import easyr1, ms_swift, trl, verl

CHUNK = 8  # puzzles that a process makes at a time
AHEAD = 2  # chunks that are asked for, for each process


class Maker:
    """Makes rows. All that it is made from can be sent to another process.

    folder: `data.ImageFolder`; sides: `ImageStore.scan`'s; splits: {name: image numbers}; kinds, form, seed:
    `Series`'s; trainer: whose rows; image_format: "png" or "jpeg"."""

    def __init__(self, *, folder, sides, splits, kinds, form, seed, trainer, image_format):
        from sslr1.data import Decoder, ImageStore, Pool
        from sslr1.puzzles.series import Series

        self.trainer, self.image_format = trainer, image_format
        self.store = ImageStore(folder, Decoder(max_side=sides[1]), sides[0])
        self.series = {
            split: Series(self._get, numbers, kinds, form=form, pool=Pool(self.store, numbers), seed=seed)
            for split, numbers in splits.items()
        }

    def _get(self, number):
        return self.store.pictures([number])[0]

    def __call__(self, split, numbers) -> tuple:
        """(rows of puzzles of a split by their numbers, each with its picture files {path: bytes}; images found bad so
        far; the ValueError that ended it, or None)."""
        rows = []
        try:
            for number in numbers:
                rows.append(self.row(split, number))
        except ValueError as error:
            return rows, self.store.bad, error
        return rows, self.store.bad, None

    def row(self, split, number) -> tuple:
        """(row, {path: bytes})."""
        puzzle = self.series[split][number]
        images = [trl.encoded(canvas, self.image_format) for canvas in puzzle.render()]
        if self.trainer == "ms-swift":
            ending = "jpg" if self.image_format == "jpeg" else "png"
            paths = [f"images/{split}-{number:07d}-{k}.{ending}" for k in range(len(images))]
            return ms_swift.row(puzzle, paths), dict(zip(paths, images))
        images = [{"bytes": data, "path": None} for data in images]
        if self.trainer == "verl":
            return verl.row(puzzle, images, number, split), {}
        return {"trl": trl, "easyr1": easyr1}[self.trainer].row(puzzle, images), {}


@contextmanager
def made(options, workers):
    """A function (split, count) -> what a Maker of these options returns, chunk after chunk in the puzzles' order; by
    this process, or by `workers` others. Raises UserError where one of them is killed."""
    if workers == 1:
        maker = Maker(**options)
        yield lambda split, count: (maker(split, numbers) for numbers in _chunks(count))
        return
    start = multiprocessing.get_context("spawn")  # a fork would take over torch's threads, which then don't run
    pool = ProcessPoolExecutor(workers, start, _begin, (options,))

    def rows(split, count):
        waiting = deque()
        for numbers in _chunks(count):
            waiting.append(_submit(pool, split, numbers))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield rows
    except BrokenProcessPool:
        raise UserError(
            f"one of {workers} processes was killed, perhaps for want of memory: try fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(count):
    return (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _submit(pool, split, numbers):
    """Ctrl-C is the parent's to hear: a process that starts for this has it blocked from its first moment on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_make, split, numbers)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _begin(options):
    """In a new process: what it needs. It ends with its parent, however that does."""
    global _maker
    import torch

    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    torch.set_num_threads(1)
    _maker = Maker(**options)


def _end_with(parent):
    parent.join()
    os._exit(1)


def _make(split, numbers):
    return _maker(split, numbers)
