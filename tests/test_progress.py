"""Progress: bars on a terminal, lines in a pipe."""

import io
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import trainer_of

from common.data.dataset import Dataset
from common.progress import end_time, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, term: str) -> str:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("a bar", 10, done=5) as bar:
        bar.update(2)
        bar.refresh()
    return stream.getvalue()


def test_a_bar_is_shown_on_a_terminal_and_in_a_notebook_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "7/10" in shown(monkeypatch, Terminal(), "xterm")
    assert not shown(monkeypatch, Terminal(), "dumb")
    assert not shown(monkeypatch, io.StringIO(), "xterm")
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert "7/10" in shown(monkeypatch, io.StringIO(), "xterm")


def test_a_run_has_a_bar_with_its_end_time_beside_that_of_the_epoch(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(tiny, tmp_path, n_epochs=2)
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(  # as if each step took two seconds
        "common.training.loop.time.monotonic", lambda: next(clock)
    )
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    trainer.fit()
    assert isinstance(sys.stderr, Terminal)
    text = sys.stderr.getvalue()
    assert re.search(r"run r: .*/260 .*ends=", text)
    assert re.search(r"epoch 2/2: .*/130 .*loss=", text)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in lines if line.startswith("epoch")] == ["epoch   1", "epoch   2"]


def test_without_a_terminal_a_line_comes_at_the_start_and_after_each_epoch(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_of(tiny, tmp_path, n_epochs=2).fit()
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["run", "epoch", "epoch", "training"]
    assert not printed.err


def test_the_end_time_follows_from_the_mean_rate() -> None:
    facts = {"n": 30, "initial": 10, "total": 50, "elapsed": 60.0}
    end = datetime.now() + timedelta(seconds=60)
    assert end_time(SimpleNamespace(format_dict=facts)).endswith(
        (f"{end:%H:%M}", f"{end + timedelta(seconds=1):%H:%M}")
    )
    facts["elapsed"] = 3 * 24 * 3600.0
    assert re.fullmatch(r"[A-Z]\w+ \d\d:\d\d", end_time(SimpleNamespace(format_dict=facts)))
