"""The errors that end a script with one line on stderr instead of a traceback."""

import signal


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
