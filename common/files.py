"""Files that appear complete or not at all, and what a record may show."""

import csv
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises OSError, and UnicodeDecodeError, which is a ValueError."""
    return path.read_bytes().decode("utf-8")


def digest(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def public(content: Any) -> Any:
    """`content` as a record may show it: without the home folder's path, which names the user, and passwords.

    In every text `~` takes the place of the home folder, and `user:password@` is left out of addresses.
    """
    if isinstance(content, str):
        home = os.environ.get("HOME", "").rstrip("/")
        if home:
            content = re.sub(rf"(?<![^\s=:,'\"]){re.escape(home)}(?![^/\s'\"])", "~", content)
        return re.sub(r"://[^/\s@]+@", "://", content)
    if isinstance(content, Mapping):
        return {name: public(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [public(value) for value in content]
    return content


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file with the same suffix; at the end, flush it and rename it to `path`.

    If the block raises, the temporary file is removed and the file at `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.unfinished-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:  # else a power cut could leave the name without the content
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the user knows this name, not the temporary one
        raise


def delete_temporary_files(folder: Path) -> None:
    """Delete the temporary files that a killed process has left in `folder`."""
    for path in folder.glob(".*.unfinished-*"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write what is `public` of `content` as indented JSON, atomically. Raises ValueError for NaN."""
    write_text(path, json.dumps(public(content), indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with full precision, atomically; the columns are the first line's keys."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
