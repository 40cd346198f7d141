"""bad_images.txt: which files a run has passed over, and why; found by any rank, in this start of the run or an earlier
one."""

from pathlib import Path

import torch

from sslr1 import distributed
from sslr1.files import write_whole

NAME = "bad_images.txt"
REFUSED = "refused: "


class BadImages:
    """The list in a run's folder. stores: {what to put before its files' names: ImageStore or Task}. All ranks make
    one.

    `update` is for all ranks together, `save` for any rank alone; only the main one writes.
    """

    def __init__(self, folder, stores, world):
        self.path, self.stores, self.world = Path(folder) / NAME, stores, world
        self.listed = read(self.path) if world.main else {}
        self._told = 0

    def untold(self) -> int:
        """How many bad images this rank has met since the last update."""
        return sum(len(store.bad) for store in self.stores.values()) - self._told

    def update(self) -> None:
        """List what all ranks have met."""
        self._told += self.untold()
        lines = _lines(self._met()).encode() or b"\n"
        for row in distributed.all_gather_rows(torch.frombuffer(bytearray(lines), dtype=torch.uint8)[:, None]):
            self.listed |= _parse(row.numpy().tobytes())
        self.save()

    def save(self) -> None:
        """List what this rank has met: all that can be done where the others may be gone."""
        self.listed |= self._met()
        if self.world.main and self.listed:
            write(self.path, self.listed)

    def __str__(self):
        examples = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.listed.items())[:3])
        return f"{self.path} lists {len(self.listed)} files with their reasons, e.g. {examples}"

    def summary(self) -> list:
        """A line for the end of a run, none if nothing was bad."""
        refused = sum(reason.startswith(REFUSED) for reason in self.listed.values())
        bad = len(self.listed) - refused
        words = [f"{bad:,} image{' was' if bad == 1 else 's were'} bad"] if bad else []
        words += [f"{refused:,} name{' was' if refused == 1 else 's were'} refused"] if refused else []
        return [f"{', '.join(words)}, see {self.path}"] if words else []

    def _met(self):
        met = {}
        for before, store in self.stores.items():
            met |= {before + store.named(n): reason for n, reason in list(store.bad.items())}
            met |= {before + name: reason for name, reason in refusals(store).items()}
        return met


def refusals(folder) -> dict:
    """{name: reason} of what an ImageFolder's, or a store's, scan refused: no images of the run, which are told from
    them by the reason."""
    return {name: f"{REFUSED}{reason}" for name, reason in folder.refused}


def read(path) -> dict:
    """{file: reason} of a list; {} if there is none."""
    return _parse(Path(path).read_bytes()) if Path(path).exists() else {}


def write(path, listed) -> None:
    """Write {file: reason}, one `file<tab>reason` a line, sorted. Raises UserError where that can't be."""
    write_whole(path, _lines(dict(sorted(listed.items()))))


def _lines(listed):
    return "".join(f"{name}\t{reason}\n" for name, reason in listed.items())


def _parse(content):
    rows = [line.rpartition("\t") for line in content.decode("utf-8", "replace").split("\n") if line]
    return {name: reason for name, _, reason in rows}
