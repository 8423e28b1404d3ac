"""Regular files to read, files that appear complete or not at all, and locks between processes."""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = re.compile(r"\..+\.unfinished-[0-9a-f]{8}(\.\w+)?")  # the names of `atomic_path`


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading.

    Raises OSError for anything else, such as a folder, a FIFO, which may never send a byte, or a device, which may
    never end.
    """
    return os.fdopen(_open_descriptor(path, os.O_RDONLY), "rb")


def _open_descriptor(path: Path, flags: int) -> int:
    # Without O_NONBLOCK a FIFO without a writer would block this call.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def is_of_disk(error: Exception) -> bool:
    """Whether a file could not be read because of the disk, and not because of its content.

    A damaged file may refer to a place before its own beginning: that error (EINVAL) is one of the content.
    """
    return isinstance(error, OSError) and error.errno != errno.EINVAL


def read_text(path: Path) -> str:
    """The text of a regular file in UTF-8. Raises OSError, and UnicodeDecodeError, which is a ValueError."""
    with open_regular(path) as file:
        return file.read().decode("utf-8")


def digest(path: Path, algorithm: str = "sha256") -> str:
    """The digest of a regular file's content in hexadecimal digits. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, and flush their names to disk."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        flush(one.parent)


def flush(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk: a power cut does not lose them any more."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder may be writable and not readable
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def public(content: Any) -> Any:
    """`content` as a record may show it: without the home folder's path, which names the user, and passwords.

    In every text `~` takes the place of the home folder, and `user:password@` is left out of addresses.
    """
    if isinstance(content, str):
        home = os.environ.get("HOME", "")
        if len(home) > 1:
            content = re.sub(rf"(?<![^\s=:,'\"]){re.escape(home)}(?![^/\s'\"])", "~", content)
        return re.sub(r"://[^/\s@]+@", "://", content)
    if isinstance(content, Mapping):
        return {name: public(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [public(value) for value in content]
    return content


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file beside `path`; at the end, flush it to disk and rename it to `path`.

    The temporary name keeps the suffix, because numpy and matplotlib choose the format by it. If the block raises,
    the temporary file is removed and the file at `path` stays as it was.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.unfinished-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the user knows this name, not the temporary one
        raise


def sweep_up(folder: Path) -> None:
    """Delete the temporary files that a killed process has left in `folder`, and no other file."""
    for path in folder.glob(".*"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write what is `public` of `content` as indented JSON, atomically.

    Raises ValueError for NaN, which JSON does not have.
    """
    write_text(path, json.dumps(public(content), indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with full precision, atomically; the columns are the first line's keys."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _lock(path: Path, lock: Callable[[int, int], None], wait: bool) -> BinaryIO | None:
    """Open `path`, create it if it is missing, and lock it with `lock`; None where the lock is taken.

    The content stays as it is, and a symbolic link is refused: it may lead to a file of the user.
    """
    make_folder(path.parent)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a lock must not be a symbolic link; delete it", str(path))
    descriptor = _open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
    file = os.fdopen(descriptor, "ab")
    try:
        lock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError | PermissionError):  # POSIX allows either
            return None
        error.filename = str(path)
        raise
    return file


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[int | None]:
    """Lock the file `path` and yield its descriptor, or None where the lock is taken already.

    With `wait`, wait until the lock is free. A process that is started with the descriptor (`pass_fds`) shares the
    lock. The kernel releases the lock when the last of these processes has ended.
    """
    file = _lock(path, fcntl.flock, wait)
    try:
        yield file.fileno() if file else None
    finally:
        if file:
            file.close()


def process_lock(path: Path) -> BinaryIO | None:
    """Lock the file `path` for this process until the returned file is closed; None where another process has it.

    Unlike `locked`, the same process can lock the file again, and no process that it starts shares the lock.
    """
    return _lock(path, fcntl.lockf, wait=False)
