"""The errors that end a script with one line on stderr instead of a traceback, and others' first lines."""

import signal


class UsageError(Exception):
    """What the user asked for cannot be done; the message names it and the remedy. Exit status 2."""

    exit_status = 2


class Fault(Exception):
    """Something outside the command failed: a file, the network, the numbers. Exit status 1."""

    exit_status = 1


class Stopped(Exception):
    """A signal stopped the run, which can be continued from there. Exit status 128 + the signal's number."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.number = number
        self.exit_status = 128 + number


def first_line(error: Exception) -> str:
    """The first line of what an error says; its type's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
