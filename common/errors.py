"""The errors that end a script with one line on stderr instead of a traceback."""

import difflib
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from common.files import public, write_text


class UsageError(Exception):
    """The user asked for something impossible; the message names it and the remedy. Exit status 2."""

    exit_status = 2


class Fault(Exception):
    """Something outside the command failed: a file, the network, the numbers. Exit status 1."""

    exit_status = 1


class Untrainable(Fault):
    """Every run of this configuration on this machine fails: its numbers diverge, or it needs more memory.

    Exit status 3. So a search does not try it again.
    """

    exit_status = 3


class Stopped(Exception):
    """A signal ended the run, which can be resumed. Exit status 128 + the signal's number."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.number = number
        self.exit_status = 128 + number


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: Exception) -> bool:
    """Whether the system, a GPU or one of their libraries had too little memory left."""
    found = re.search("out of memory|allocate memory|ALLOC_FAILED", str(error))
    return isinstance(error, MemoryError) or found is not None


def keep_traceback(error: Exception, folders: Sequence[Path]) -> Path | None:
    """Write the traceback and the command to a file in the first of these folders that can be written.

    Returns the file's path, or None where there is no such folder.
    """
    text = f"{shlex.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}"
    for folder in folders:
        path = folder / "unexpected-error.txt"
        with suppress(OSError, ValueError):
            if folder.is_dir():
                write_text(path, public(text))
                return path
    return None


def closest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?` with the known name that is most similar to `name`; empty where none is similar."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
