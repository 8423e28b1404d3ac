"""Progress bars: on a terminal and in a notebook, never in a pipe or a file."""

import os
import sys
from datetime import datetime, timedelta
from typing import Any

from tqdm.auto import tqdm


def progress_bar(description: str, n_tiles: int, done: int = 0) -> Any:
    """A bar that starts at `done` tiles and goes away when it is closed; its rate is the mean since the start."""
    shown = (sys.stderr.isatty() and os.environ.get("TERM") != "dumb") or "ipykernel" in sys.modules
    look: dict[str, Any] = {
        "unit": " tiles",
        "leave": False,
        "dynamic_ncols": True,
        "smoothing": 0,
        "disable": not shown,
    }
    return tqdm(total=n_tiles, desc=description, initial=done, **look)


def no_bar() -> Any:
    """A bar that is never shown."""
    return tqdm(disable=True)


def end_time(bar: Any) -> str:
    """The time of day at which the bar will be full, after the day of the week where that is not today."""
    facts = bar.format_dict
    done, left = facts["n"] - facts["initial"], facts["total"] - facts["n"]
    now = datetime.now().astimezone()
    end = now + timedelta(seconds=facts["elapsed"] * left / max(done, 1))
    return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%a %H:%M}"
