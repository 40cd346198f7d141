"""Rows of a file, read one by one by their number: of JSONL by where each line begins, of parquet by pyarrow. No row is
kept."""

import hashlib
import json
import os
from bisect import bisect_right
from itertools import accumulate
from threading import Lock

import numpy as np

from sslr1.data import parquet
from sslr1.errors import UserError

BLOCK = 1 << 24  # bytes read at once for line ends
LONGEST = 1 << 26  # bytes of a line
TOGETHER = 64  # rows of a parquet file that are decoded together
BOM = b"\xef\xbb\xbf"


class BadRow(Exception):
    """What is wrong with a row, in words."""


def open_rows(path, key):
    """The rows of a file. key: the setting that names it. Raises UserError."""
    named = f"{key} {str(path)!r}"
    try:
        kind = Table if str(path).lower().endswith(".parquet") else Lines
        rows = kind(path)
    except (OSError, parquet.Unfit) as error:
        raise UserError(f"{named} can't be read: {getattr(error, 'strerror', None) or error}") from None
    if not len(rows):
        raise UserError(f"{named} has no rows")
    return rows


class Lines:
    """Of a JSONL file, an object a line; blank ones are no rows. 8 bytes of memory a row, 4 more where there are blank
    lines. digest: of the file's content."""

    def __init__(self, path):
        self.path, self._file = path, open(path, "rb", buffering=0)
        digest, ends, at = hashlib.blake2b(digest_size=16), [], 0
        while block := self._file.read(BLOCK):
            digest.update(block)
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + at)
            at += len(block)
        self.digest = digest.hexdigest()
        ends = np.concatenate(ends) if ends else np.empty(0, np.int64)
        if at and not (len(ends) and ends[-1] == at - 1):
            ends = np.append(ends, at)
        starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64) if len(ends) else ends
        if len(starts) and os.pread(self._file.fileno(), 3, 0) == BOM:
            starts[0] = 3
        short = np.flatnonzero(ends - starts <= 1)
        blank = [
            n for n in short if not os.pread(self._file.fileno(), int(ends[n] - starts[n]), int(starts[n])).strip()
        ]
        kept = np.ones(len(starts), bool)
        kept[blank] = False
        self._edges = np.append(starts[kept], at)  # a blank line after one belongs to it
        self._numbers = np.flatnonzero(kept).astype(np.int32) if blank else None

    def __len__(self):
        return len(self._edges) - 1

    def where(self, row) -> str:
        """As an editor counts."""
        return f"{self.path}, line {int(row if self._numbers is None else self._numbers[row]) + 1}"

    def read(self, row) -> dict:
        """Raises BadRow, or OSError."""
        start, end = int(self._edges[row]), int(self._edges[row + 1])
        if end - start > LONGEST:
            raise BadRow(f"{end - start:,} bytes long, more than {LONGEST:,}")
        try:
            found = json.loads(os.pread(self._file.fileno(), end - start, start))
        except (ValueError, RecursionError) as error:
            raise BadRow(f"no JSON object ({' '.join(str(error).split())[:200]})") from None
        if not isinstance(found, dict):
            raise BadRow(f"a JSON {type(found).__name__}, where an object is due")
        return found

    def each(self):
        """(row's number, a function that reads it), in order."""
        for row in range(len(self)):
            yield row, lambda row=row: self.read(row)


class Table:
    """Of a parquet file. digest: of its footer and size. Rows are read with their group, up to them."""

    def __init__(self, path):
        self.path, self._lock = path, Lock()
        pyarrow, self.errors = parquet.pyarrow_parquet()
        try:
            self.file = pyarrow.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        except FileNotFoundError:
            raise
        except self.errors as error:
            raise parquet.Unfit(f"not a parquet file that can be read ({' '.join(str(error).split())[:200]})") from None
        groups = self.file.metadata
        self._firsts = [0, *accumulate(groups.row_group(n).num_rows for n in range(groups.num_row_groups))]
        self.digest = _footer(path)
        self._near = None  # (number of its first row, rows) that were decoded last

    def __len__(self):
        return self._firsts[-1]

    def where(self, row) -> str:
        return f"{self.path}, row {int(row)}"

    def read(self, row) -> dict:
        """Raises OSError."""
        with self._lock:
            if self._near is None or not 0 <= row - self._near[0] < len(self._near[1]):
                group = bisect_right(self._firsts, row) - 1
                near = (near for near in self._batches(group) if row < near[0] + len(near[1]))
                self._near = next(near, None)
                if self._near is None:
                    raise OSError("the file has fewer rows than when the run began")
            return self._near[1].slice(row - self._near[0], 1).to_pylist()[0]

    def each(self):
        for group in range(len(self._firsts) - 1):
            for first, batch in self._batches(group):
                for at in range(len(batch)):
                    yield first + at, lambda at=at, batch=batch: batch.slice(at, 1).to_pylist()[0]

    def _batches(self, group):
        first = self._firsts[group]
        try:
            for batch in self.file.iter_batches(TOGETHER, row_groups=[group], use_threads=False):
                yield first, batch
                first += len(batch)
        except self.errors as error:
            raise OSError(
                f"row group {group} of {self.path} can't be read ({' '.join(str(error).split())[:200]})"
            ) from None


def _footer(path) -> str:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little") + 8
        file.seek(max(0, size - length))
        return hashlib.blake2b(b"%d " % size + file.read(), digest_size=16).hexdigest()
