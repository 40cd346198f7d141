"""Parquet files of images, Hugging Face's among them: which column holds them, how many rows there are, and a row's
bytes. Read by pyarrow, of a row group no more at once than it takes to come to the row; never whole.

Nothing but this file imports pyarrow, and that when it is needed.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from threading import Lock

OPEN = 32  # files that are held open, with what their footers say
ROWS = 16  # that are decoded together, on the way to the one that is wanted
PACKAGE = "pip install 'sslr1[parquet]'"


class Unfit(Exception):
    """Why a file gives no images."""


def count(path, column=None) -> int:
    """Rows of a file, by its footer. Raises Unfit where it is no parquet file, or its images can't be told."""
    table = _Table(path, column)
    try:
        return table.firsts[-1]
    finally:
        table.close()


class Tables:
    """Parquet files as they are read from: the last ones are held open."""

    def __init__(self):
        self._open, self._lock = OrderedDict(), Lock()

    def __reduce__(self):
        return Tables, ()

    def read(self, path, size, row, column=None) -> bytes:
        """A row's image. Raises OSError where it can't be read, holds none, or the file has not `size` bytes."""
        with self._lock:
            key = path, size, column
            try:
                table = self._open.pop(key, None) or _Table(path, column, size)
                self._open[key] = table
                if len(self._open) > OPEN:
                    self._open.popitem(last=False)[1].close()
                data = table.read(row)
            except Unfit as unfit:
                raise OSError(str(unfit)) from None
        if data is None:
            raise OSError("the row holds no image: nothing stands in its column, or only the path of a file")
        return data


class _Table:
    def __init__(self, path, column, size=None):
        if os.path.isfile(path) and size is not None and os.path.getsize(path) != size:
            raise OSError(f"its file's size has changed: it had {size:,} bytes when the run began")
        parquet, self.errors = pyarrow_parquet()
        try:
            self.file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        except self.errors as error:
            raise Unfit(f"not a parquet file that can be read ({_line(error)})") from None
        self.close = self.file.close
        try:
            self.leaf = _leaf(self.file.schema_arrow, column)
        except Unfit:
            self.close()
            raise
        groups = self.file.metadata
        rows = [groups.row_group(group).num_rows for group in range(groups.num_row_groups)]
        self.firsts = [0, *accumulate(rows)]

    def read(self, row):
        group = bisect_right(self.firsts, row) - 1
        at = row - self.firsts[group]
        try:
            batches = self.file.iter_batches(ROWS, row_groups=[group], columns=[self.leaf], use_threads=False)
            for batch in batches:
                if at < len(batch):
                    value = batch.column(0)[at].as_py()
                    return value["bytes"] if isinstance(value, dict) else value
                at -= len(batch)
        except self.errors as error:
            raise OSError(f"its row group can't be read ({_line(error)})") from None
        raise OSError("the file has fewer rows than when the run began")


def pyarrow_parquet():
    """(its parquet module, what it raises)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Unfit(f"a parquet file, which needs pyarrow: {PACKAGE}") from None
    return pyarrow.parquet, (pyarrow.ArrowException, OSError, ValueError)


def _line(error):
    return " ".join(str(error).split())[:200]


def _leaf(schema, named) -> str:
    """The column of bytes, as pyarrow names it: `image.bytes` of Hugging Face's struct. Raises Unfit."""
    fitting = {field.name: leaf for field in schema if (leaf := _bytes_of(field))}
    there = f"it has {', '.join(f'{field.name} ({_kind(field.type)})' for field in schema) or 'no columns'}"
    if named is not None:
        if named not in schema.names:
            raise Unfit(f"no column {named!r}: {there}")
        if named not in fitting:
            raise Unfit(f"column {named!r} holds no images (binary, or a struct of bytes and path): {there}")
        return fitting[named]
    if not fitting:
        raise Unfit(f"no column of images (binary, or a struct of bytes and path): {there}")
    if len(fitting) > 1:
        raise Unfit(f"several columns may hold images ({', '.join(fitting)}): name one, {{path: …, column: …}}")
    return next(iter(fitting.values()))


def _kind(kind):
    return str(kind) if len(str(kind)) < 40 else str(kind).partition("<")[0]


def _bytes_of(field):
    from pyarrow import types

    def is_binary(kind):
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    if is_binary(field.type):
        return field.name
    if types.is_struct(field.type):
        at = field.type.get_field_index("bytes")
        return f"{field.name}.bytes" if at >= 0 and is_binary(field.type.field(at).type) else None
    return None
