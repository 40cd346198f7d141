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


def open_to_all(files, folder) -> None:
    """Give files that a library wrote for their owner alone (safetensors: 0600) the mode of any new file in `folder`, by the umask."""
    probe = Path(folder) / ".mode"  # asking for the umask itself would change it for other threads
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in files:
        if path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


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
