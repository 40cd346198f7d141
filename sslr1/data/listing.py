"""A list of images without a Python object a file: the lines of files.txt as they stand there, memory-mapped or in
memory, and where each begins.

A line is `bytes<tab>path`, `bytes@offset<tab>archive.tar/member` for what is in an archive, and
`bytes@row<tab>file.parquet/row` for a row of a parquet file, whose bytes are the file's. Eight bytes a file beside its
line; making and sorting a list takes some 40, for as long as that lasts.
"""

import io
import mmap
import re
import tempfile
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sslr1.errors import UserError
from sslr1.files import unwritable

CHUNK = 1 << 20  # bytes that are looked at together
ROWS = 1 << 14  # lines that are gathered together
_LINES = re.compile(rb"(?:\d+(?:@\d+)?\t[^\n]+\n)*+")


class File(NamedTuple):
    """Path relative to the folder, `archive.tar/member` for what is in an archive, `file.parquet/row` for a row; bytes,
    of a row its file's; the offset in the archive, or the row."""

    path: str
    size: int
    offset: int | None = None


class Files(Sequence):
    """Files by number. text: lines, as bytes or a mmap of them."""

    def __init__(self, text=b"", starts=None):
        self.text = text
        self.starts = _starts(text) if starts is None else starts

    @classmethod
    def of(cls, files) -> "Files":
        """Of (path, bytes, offset or None), or without the last, in their order."""
        return cls("".join(_line(*file) for file in files).encode())

    @classmethod
    def open(cls, path) -> "Files":
        """As they stand in a file. Raises UserError where a line isn't one."""
        with open(path, "rb") as file:
            files, number = cls(_mapped(file)), 1
        for part in files.parts():
            if not _LINES.fullmatch(part):
                lines = part.split(b"\n")
                number += next(i for i, line in enumerate(lines) if not _LINES.fullmatch(line + b"\n"))
                raise UserError(f"{path}, line {number}, is not `bytes<tab>path`: remove the file to list images anew")
            number += part.count(b"\n")
        if len(files.text) != files.starts[-1]:
            raise UserError(f"{path}, line {number}, is cut short: remove the file to list images anew")
        return files

    def parts(self):
        """The text in pieces of whole lines."""
        places = np.searchsorted(self.starts, np.arange(CHUNK, int(self.starts[-1]) + CHUNK, CHUNK), "right") - 1
        at = 0
        for end in self.starts[np.unique(np.append(places, len(self)))].tolist():
            if end > at:
                yield self.text[at:end]
            at = max(at, end)

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        head, _, path = self.text[self.starts[number] : self.starts[number + 1] - 1].partition(b"\t")
        size, _, offset = head.partition(b"@")
        return File(path.decode("utf-8", "replace"), int(size), int(offset) if offset else None)

    def __eq__(self, other):
        return isinstance(other, Files) and self.text[:] == other.text[:]

    def __reduce__(self):
        return Files, (self.text[:], self.starts)  # a mmap can't be sent to another process

    def paths(self):
        """Each path as bytes, in turn."""
        for part in self.parts():
            for line in part.split(b"\n")[:-1]:
                yield line.partition(b"\t")[2]

    def sizes(self) -> np.ndarray:
        """int64 [n] bytes of each."""
        out, text, at = np.zeros(len(self), np.int64), _array(self.text), self.starts[:-1].copy()
        digits = np.arange(len(self))
        while len(digits):
            byte = text[at[digits]]
            digits, byte = digits[byte >= ord("0")], byte[byte >= ord("0")]  # neither tab nor "@", which is above
            digits, byte = digits[byte <= ord("9")], byte[byte <= ord("9")]
            out[digits] = out[digits] * 10 + (byte - ord("0"))
            at[digits] += 1
        return out

    def empty(self) -> int:
        """How many have no bytes."""
        text, starts = _array(self.text), self.starts[:-1]
        return int(((text[starts] == ord("0")) & np.isin(text[starts + 1], (9, ord("@")))).sum())


class Gathered:
    """Lines in the order they were found, to be sorted. before: what all their paths begin with; without: paths, with
    that, which are left out and counted in `left_out`; report(how many): called now and then. refused: (name, reason)
    of names that no line can hold."""

    def __init__(self, before="", without=frozenset(), report=lambda found: None):
        self.text, self.refused, self.left_out = bytearray(), [], 0
        self._before, self._without, self._report = before, without, report
        self._lines, self._count = [], 0

    def add(self, path, size, offset=None) -> None:
        if self._before + path in self._without:
            self.left_out += 1
            return
        self._lines.append(_line(self._before + path, size, offset))
        if len(self._lines) == ROWS:
            self._flush()

    def add_all(self, files):
        """Add (path, bytes) in turn; yields the paths of those that have None for bytes."""
        before, plain = self._before, not self._without
        for path, size in files:
            if size is None:
                yield path
            elif plain:
                self._lines.append(f"{size}\t{before}{path}\n")
                if len(self._lines) == ROWS:
                    self._flush()
            else:
                self.add(path, size)

    def _flush(self):
        lines, self._lines = self._lines, []
        try:
            text = "".join(lines).encode()
        except UnicodeEncodeError:
            text = b""
        if text.count(b"\n") != len(lines):
            whole = []
            for line in lines:
                name = line.partition("\t")[2][:-1]
                if reason := unlistable(name):
                    self.refused.append((name, reason))
                else:
                    whole.append(line)
            lines, text = whole, "".join(whole).encode()
        self._count += len(lines)
        self.text += text
        self._report(self._count)

    def write_sorted(self, file) -> int:
        """The lines to a file open for bytes, by the parts of their paths; of one path the last line. Returns how many;
        nothing is kept here."""
        self._flush()
        self.text += bytes(8)  # so that each byte of a path has eight from it on
        text, starts = np.frombuffer(self.text, np.uint8), _starts(memoryview(self.text)[:-8])
        order = _order(text, starts)
        del text
        for at in range(0, len(order), ROWS):
            rows = order[at : at + ROWS]
            ends = starts[rows + 1].tolist()
            file.write(b"".join([self.text[a:b] for a, b in zip(starts[rows].tolist(), ends)]))
        self.text = bytearray()
        return len(order)


def written(parts, scratch=None) -> tuple[Files, list]:
    """(the Files of several Gathered, one after another as they come; how many each has): in a file without a name in
    the folder `scratch`, else in memory. Raises UserError where that can't be written."""
    counts, parts = [], iter(parts)
    with _scratch(scratch) as file:
        while (part := next(parts, None)) is not None:
            try:
                counts.append(part.write_sorted(file))
                file.flush()
            except OSError as error:
                raise unwritable(scratch, error) from None
        return Files(file.getvalue() if scratch is None else _mapped(file)), counts


def _scratch(folder):
    try:
        return io.BytesIO() if folder is None else tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise unwritable(folder, error) from None


def _mapped(file):
    """Its bytes, which outlive it."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.seek(0, io.SEEK_END) else b""


def _line(path, size, offset=None):
    return f"{size}\t{path}\n" if offset is None else f"{size}@{offset}\t{path}\n"


def unlistable(name) -> str | None:
    """Why a name can't stand in a line of a text file, or None."""
    if "\n" in name:
        return "its name holds a line break"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return None


def _array(text):
    return np.frombuffer(text, np.uint8)


def _starts(text):
    """[n + 1]: where each line begins, and where the last one ends; uint32 where that does."""
    found = array("I" if len(text) < 1 << 32 else "Q", [0])
    for at in range(0, len(text), CHUNK):
        lines = np.flatnonzero(_array(text[at : at + CHUNK]) == ord("\n"))
        found.frombytes((lines + (at + 1)).astype(found.typecode).tobytes())
    return np.frombuffer(found, found.typecode)


def _order(text, starts):
    """Numbers of lines by the parts of their paths, which is by their bytes where "/" counts as the lowest; of one path
    only the last.

    Eight bytes of all paths at a time, of those that are still alike: as a radix sort does, without an object a path.
    """
    n = len(starts) - 1
    small = np.int32 if n < 1 << 31 else np.int64
    heads = _heads(text, starts)
    order = places = np.arange(n, dtype=small)
    groups, gone, depth = None, [], 0  # groups: of `places`, which are in their order, the first place of the group
    while len(places):
        keys = _keys(text, starts, heads, order[places] if depth else order, depth)
        moved = _moves(keys, groups).astype(small)
        first = np.ones(len(places), bool)
        for at in range(1, len(places), ROWS):  # in pieces: a sorted copy of the keys would be the most that is held
            some = keys[moved[at - 1 : at + ROWS]]
            first[at : at + ROWS] = some[1:] != some[:-1]
        del keys
        if groups is not None:
            first[1:] |= groups[1:] != groups[:-1]
        rows = (order[places] if depth else order)[moved]
        if depth:
            order[places] = rows
        else:
            order = rows
        del moved
        last = np.ones(len(places), bool)
        last[:-1] = first[1:]
        tied = np.flatnonzero(~(first & last)).astype(small)
        groups = places[first][(np.cumsum(first, dtype=small) - 1)[tied]]
        rows = rows[tied]
        lengths = starts[rows + 1] - starts[rows]
        lengths -= heads[rows]
        ended = lengths <= depth + 1  # with the line's end
        if ended.any():  # to the same path
            gone.append(places[tied[ended & ~last[tied]]])
        places, groups = places[tied[~ended]], groups[~ended]
        del first, last, tied, ended, lengths, rows  # four bytes a file each, or one, while the next round takes most
        depth += 8
    return np.delete(order, np.concatenate(gone)) if gone else order


def _moves(keys, groups):
    """Places of the keys in their order within each group; those are in order themselves."""
    if groups is None:
        return np.argsort(keys, kind="stable")
    out, at = np.empty(len(keys), groups.dtype), 0
    while at < len(keys):  # some whole groups at a time: of all at once it would take three times the memory
        end = np.searchsorted(groups, groups[min(at + ROWS, len(keys)) - 1], "right")
        out[at:end] = np.lexsort((keys[at:end], groups[at:end]))
        out[at:end] += at
        at = end
    return out


def _heads(text, starts):
    """uint8 [n]: how many bytes of each line stand before its path."""
    heads, rows = np.zeros(len(starts) - 1, np.uint8), np.arange(len(starts) - 1, dtype=np.int32)
    while len(rows):
        rows = rows[text[starts[rows] + heads[rows]] != ord("\t")]
        heads[rows] += 1
    return heads + np.uint8(1)


def _keys(text, starts, heads, rows, depth):
    """uint64 [rows]: the eight bytes of each path from `depth` on, "/" and what lies beyond its end as 0."""
    words = np.ndarray(len(text) - 7, ">u8", text, strides=(1,))
    out = np.empty(len(rows), np.uint64)
    low, high = np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x8080808080808080)
    for at in range(0, len(rows), ROWS):
        some = rows[at : at + ROWS]
        begin = starts[some].astype(np.int64) + heads[some] + depth
        left = np.clip(starts[some + 1].astype(np.int64) - 1 - begin, 0, 8)
        word = words[np.minimum(begin, len(words) - 1)].astype(np.uint64)
        beyond = np.minimum(8 * (8 - left), 63).astype(np.uint64)
        word = np.where(left > 0, word >> beyond << beyond, np.uint64(0))
        slash = word ^ np.uint64(0x2F2F2F2F2F2F2F2F)
        slash = ~(((slash & low) + low) | slash | low) & high  # the top bit of each byte that is one
        out[at : at + ROWS] = word & ~((slash >> np.uint64(7)) * np.uint64(0xFF))
    return out
