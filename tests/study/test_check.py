"""Every recorded score is computed again, and a changed record is refused."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from common.cli import Fault
from common.records.read import Record
from common.training.verification import check_scores
from study.check import check_runs

# What a run's outputs do not tell. The digest of the records, on the page, tells of a change.
UNTOLD = {"wandb", "stopped", "select_on", "wall_seconds", "train/loss", "lr", "tiles_per_second", "seconds"}
UNTOLD |= {"figures", "figure_sha256", "title", "setting", "tried"}


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to the values of a JSON record; of a list the first element stands for all."""
    items = content.items() if isinstance(content, Mapping) else list(enumerate(content))[:1]
    for name, value in items:
        if isinstance(value, Mapping | list):
            yield from leaves(value, (*path, name))
        else:
            yield *path, name


def changed(value: Any) -> Any:
    """Another value of the same type, a bit further away than rounding."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value - 1e-6 if isinstance(value, float) else f"{value}x"


@pytest.mark.parametrize("run_id", ["task1-0", "neighbours-900-0"])
def test_every_changed_score_of_a_record_is_refused(run_id: str, tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "runs" / run_id, tmp_path / "runs" / run_id)
    whole = json.loads((folder / "summary.json").read_text())
    check_scores(Record.read(tmp_path, run_id))
    tried = 0
    for path in leaves(whole):
        if not UNTOLD & set(path):
            summary = copy.deepcopy(whole)
            place: Any = summary
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = changed(place[path[-1]])
            (folder / "summary.json").write_text(json.dumps(summary))
            with pytest.raises(Fault, match=run_id):
                check_scores(Record.read(tmp_path, run_id))
                pytest.fail(f"{path} was changed and nothing noticed")
            tried += 1
    assert tried > 30


@pytest.mark.parametrize("change", [{"seed": 1}, {"run_id": "task1-1"}, {"train_tiles": 9000}])
def test_a_configuration_that_contradicts_its_run_is_refused(change: dict[str, Any]) -> None:
    record = Record.read(ROOT, "task1-0")
    record = dataclasses.replace(record, summary={**record.summary, "config": {**record.config, **change}})
    with pytest.raises(Fault, match="task1-0"):
        check_runs([record]) if "seed" in change else check_scores(record)


def test_a_run_that_is_a_copy_of_another_one_is_refused(tmp_path: Path) -> None:
    for run_id in ("task1-0", "task1-9"):
        shutil.copytree(ROOT / "runs/task1-0", tmp_path / "runs" / run_id)
    for path in (tmp_path / "runs/task1-9").glob("*.json"):
        path.write_text(path.read_text().replace("task1-0", "task1-9").replace('"seed": 0', '"seed": 9'))
    records = [Record.read(tmp_path, run_id) for run_id in ("task1-0", "task1-9")]
    with pytest.raises(Fault, match="task1-9: it has the very outputs of task1-0"):
        check_runs(records)
    row = Record.read(ROOT, "ablation-combined-0")
    renamed = dataclasses.replace(row, summary={**row.summary, "config": {**row.config, "ablation": "with_ema"}})
    with pytest.raises(Fault, match="it has the very outputs of ablation-combined-0"):
        check_runs([row, renamed])
    config = {**row.config, "seed": 1, "run_id": "ablation-combined-1"}
    copy = dataclasses.replace(row, summary={**row.summary, "config": config, "run_id": "ablation-combined-1"})
    with pytest.raises(Fault, match="it has the very outputs of ablation-combined-0"):
        check_runs([row, copy])


def test_early_stopping_may_change_nothing() -> None:
    twins = ["ablation-combined-0", "ablation-without_early_stopping-0"]
    check_runs([Record.read(ROOT, run_id) for run_id in twins])
