"""What the tests of bad input share: commands that refuse it, and damaged files."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

import task1
import task2
import task5
import train
from common.cli import run_script
from study import __main__ as study
from study import report, sweep

COMMANDS: dict[str, tuple[Any, Any]] = {
    "task1.py": (task1.main, task1.Task1Config),
    "task2.py": (task2.main, task2.Task2Config),
    "train.py": (train.main, train.TrainConfig),
    "task5.py": (task5.main, task5.Task5Config),
    "study.sweep": (sweep.main, sweep.SweepConfig),
    "study.report": (report.main, report.ReportConfig),
    "study.__main__": (study.main, study.StudyConfig),
}
PHANTOM = "--dataset=phantom --size=28 --input_size=28 --train_tiles=90 --n_epochs=1"
RUN = f"task1.py {PHANTOM} --data_root={{}} --output_dir={{}} --run_id=r"


def assert_refused(line: str, status: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(line.replace("{}", str(folder)))
    main, config_class = COMMANDS[program]
    before = contents(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(main, config_class, arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert re.search(message, said[0]), said[0]
    assert ended.value.code == status
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """`content` with one to three changes that hypothesis draws: other bytes, more bytes, or fewer."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(len(changed) - 1, 0)))
        match data.draw(st.sampled_from(["change", "insert", "cut"])):
            case "change":
                changed[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
            case "insert":
                changed[place:place] = data.draw(st.binary(max_size=8))
            case "cut":
                del changed[place : place + data.draw(st.integers(1, 2000))]
    return bytes(changed)
