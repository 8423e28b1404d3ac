"""What the task scripts share: data, augmentation, models, metrics, training loop, records and figures.

A script imports this package before PyTorch, whose import takes seconds: from here until `run_script` starts,
Ctrl-C ends the script with one line. Python itself would print a traceback, or abort within PyTorch.
A warning is one line, too.
"""

import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(128 + number)


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"warning: {' '.join(str(message).split())}\n"


# Other programs, such as pytest or a notebook, keep their own way of handling both. `python -m` sets "-m".
_is_script = sys.argv[0] == "-m" or Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent.parent
if _is_script:
    warnings.formatwarning = _one_line  # Python itself adds the line of code
if _is_script and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
