"""Files that are whole or as they were, whatever ends the process that writes them.

Some file systems (Lustre without `-o flock`, some network and container mounts) have no locks, or can't flush a folder.
There a run goes on, and a warning says once what isn't guarded.
"""

import errno
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from sslr1.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
NO_FOLDER_FLUSH = (
    errno.EINVAL,
    errno.EBADF,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
)  # of a folder; a file that can't is an error
LFS = b"version https://git-lfs.github.com/spec/"
NOT_FETCHED = "is not the file itself but Git LFS's note of it: run git lfs pull in that folder"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_warned = set()


def no_folder(path, kind="model") -> str:
    """What a path is that leads to no folder, and what to do. kind: of the hub's repositories that it may be meant
    for."""
    path = str(path)
    if os.path.exists(path):
        packed = re.search(r"\.(zip|tgz|tbz2?|txz|7z|rar|gz|bz2|xz|zst)$", path, re.IGNORECASE)
        return "is a compressed archive: unpack it, and give the folder" if packed else "is a file, not a folder"
    if not HUB_NAME.fullmatch(path) or os.path.isdir(os.path.dirname(path)):
        return "does not exist"
    fetch = f"hf download {path} {'' if kind == 'model' else f'--repo-type {kind} '}--local-dir FOLDER"
    return f"does not exist, and names on the Hugging Face hub are not fetched: {fetch}"


def write_whole(path, text: str) -> None:
    """Replace a file's text: written beside, flushed, renamed. Raises UserError where that can't be."""
    with whole(path) as file:
        file.write(text.encode())


@contextmanager
def whole(path):
    """A file open for bytes that takes the place of `path` when the body is done, as `write_whole` does."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None


def open_to_all(files, folder) -> None:
    """Give files that a library wrote for their owner alone (safetensors: 0600) the mode of any new file in `folder`,
    by the umask."""
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
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH or not os.path.isdir(path):
            raise
        _warn(
            "flush",
            f"the file system of {path} can't flush folders ({error.strerror}): killed processes do no harm, but a "
            "machine that crashes or loses power may take the newest checkpoint and records along",
        )
    finally:
        os.close(handle)


def lock(path):
    """An open file that no other process holds a lock of; closing it, or the end of the process, gives it back. Raises
    BlockingIOError where another does, OSError where it can't be opened."""
    import fcntl  # here: a report is made on any system

    file = Path(path).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            raise
        _warn(
            "lock",
            f"the file system of {path} has no locks ({error.strerror}): nothing keeps a second run out of this folder "
            "while this one runs; see to it that there is none",
        )
    if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        file.close()
        raise BlockingIOError(f"{path} was taken away by the start that held it, which was refused")
    return file


def _warn(kind, text):
    """Once a process."""
    if kind not in _warned:
        _warned.add(kind)
        print(f"warning: {text}", file=sys.stderr, flush=True)


def unwritable(path, error: OSError) -> UserError:
    return UserError(
        f"{path} can't be written: {error.strerror or error}. When that is mended, start the same command again: "
        "the run goes on from its last checkpoint"
    )
