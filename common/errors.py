"""The two errors that end a script with one line on stderr instead of a traceback."""


class UsageError(Exception):
    """What the user asked for cannot be done; the message names it and the remedy. Exit status 2."""

    exit_status = 2


class Fault(Exception):
    """Something outside the command failed: a file, the network, the numbers. Exit status 1."""

    exit_status = 1
