"""Ctrl-C and SIGTERM as a request, to a command that starts other processes."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from common.cli import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context in which the first Ctrl-C or SIGTERM is only noted, in `came`; a second one ends the process.

    Outside the main thread, where Python handles no signals, nothing is noted.
    """

    came: signal.Signals | None = None

    def __enter__(self) -> "Interruption":
        """Put the handlers in place."""
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def error(self, message: str) -> Stopped:
        """The error to raise when everything is saved."""
        number = self.came or signal.SIGINT
        return Stopped(f"{number.name}: {message}", number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came is None:
            self.came = signal.Signals(number)
        self.__exit__(None, None, None)
