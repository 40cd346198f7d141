"""Files that are whole or as they were, whatever ends the process that writes them."""

import os
from pathlib import Path

from sslr1.errors import UserError


def write_whole(path, text: str) -> None:
    """Replace a file's text: written beside, flushed, renamed. Raises UserError where that can't be."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None


def flush(path) -> None:
    """Have the disk hold what a file or a folder's list of names holds."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(path, error: OSError) -> UserError:
    return UserError(
        f"{path} can't be written: {error.strerror or error}. When that is mended, start the same command again: "
        "the run goes on from its last checkpoint"
    )
