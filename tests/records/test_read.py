"""A damaged or foreign record of a run is a Fault, one line that names the file and the key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from example_records import CONFIG, outputs, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.cli import Fault
from common.files import digest
from common.records.read import Record, best_weights, input_size_of, read_history, read_json

Change = Callable[[Path], Any]  # damages a record in the run's folder


def changed(name: str, *keys: str, to: Any) -> Change:
    """Change the value of a key in a JSON record; None deletes the key."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        part = content
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = to
        if to is None:
            del part[keys[-1]]
        (folder / name).write_text(json.dumps(content))

    return change


def written(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def arrays(**changes: Any) -> Change:
    """Other arrays in scores.npz."""
    return lambda folder: np.savez(folder / "scores.npz", **{**outputs(), **changes})


CASES: list[tuple[Change, str]] = [
    (changed("config.json", "run_id", to="other"), r"config\.json: .*run_id: it is of run other"),
    (written("config.json", b"[]"), r"config\.json: not a readable record"),
    (written("config.json", b'{"task": "\xff"}'), r"config\.json: not a readable record"),
    (changed("summary.json", "best", to=None), r"runs/r: the run has no test scores \(--test=False\)"),
    (changed("summary.json", "tiles", "train", to=91), r"summary\.json: .*tiles: it is .*91.*, in config\.json"),
    (changed("config.json", "config", to=3), r"config\.json: .*config: Input should be a valid dict"),
    (
        changed("config.json", "config", "seed", to="x"),
        r"config\.json: .*config\.seed: Input should be a valid int",
    ),
    (changed("config.json", "started", to=None), r"config\.json: .*started: Field required"),
    (changed("summary.json", "wall_seconds", to="x"), r"wall_seconds: Input should be a valid number"),
    (written("history.csv", b"\xff\xfe\n1\n"), r"history\.csv: not a readable record"),
    (written("history.csv", b"epoch,validate/acc\n1,0.5,3\n"), r"history\.csv: not a readable record"),
    (written("history.csv", b"epoch,validate/acc\n1,0.5\n3,0.5\n"), r"history\.csv: .*do not count from 1"),
    (written("history.csv", b"epoch,validate/acc\n1,0.5\n"), r"history\.csv: .*it lacks epochs"),
    (changed("config.json", "config", "n_epochs", to=3), r"history\.csv: .*it lacks epochs"),
    (lambda folder: (folder / "scores.npz").unlink(), r"scores\.npz: not a readable record"),
    (written("scores.npz", b"PK\x03\x04torn"), r"scores\.npz: not a readable record"),
    (arrays(best_logits=np.zeros((18, 8))), r"scores\.npz: .*do not have the shape \(18, 9\)"),
    (arrays(targets=np.array([None] * 18)), r"scores\.npz: .*[Oo]bject"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=[message[:50] for _, message in CASES])
def test_a_bad_record_is_named_with_its_key(change: Change, message: str, tmp_path: Path) -> None:
    change(write_run(tmp_path))
    with pytest.raises(Fault, match=message):
        Record.read(tmp_path, "r").arrays()


def test_a_whole_record_is_read_and_keeps_what_later_versions_add(tmp_path: Path) -> None:
    changed("summary.json", "later", to={"a": 1})(write_run(tmp_path))
    record = Record.read(tmp_path, "r")
    assert record.summary["later"] == {"a": 1}
    assert record.config == CONFIG
    assert [epoch["epoch"] for epoch in record.history] == [1, 2]
    arrays = record.arrays()
    assert arrays.keys() == outputs().keys()
    assert all(np.array_equal(arrays[name], value) for name, value in outputs().items())


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


@pytest.mark.parametrize("name", ["config.json", "summary.json", "history.csv", "scores.npz"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_of_a_record_is_a_fault(name: str, data: st.DataObject, tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / name).write_bytes(damaged((folder / name).read_bytes(), data))
    try:
        found = Record.read(tmp_path, "r").arrays()
    except Fault:
        return
    if name == "scores.npz":  # its checksums notice every change of a value
        assert all(np.array_equal(found[key], value) for key, value in outputs().items() if key in found)


def test_the_records_of_the_study_stay_readable() -> None:
    for path in (ROOT / "runs").glob("*/summary.json"):
        summary, config = read_json(path), read_json(path.with_name("config.json"))["config"]
        history = read_history(path.with_name("history.csv"))
        assert ("baseline" in config) == (not history)
        assert input_size_of(config) in (28, 56, 64, 96, 112)
        if "best" in summary:
            assert 0.5 < Record.read(ROOT, path.parent.name).summary["test/acc"] < 1


def test_the_weights_of_a_finished_run_are_those_with_which_it_finished(tmp_path: Path) -> None:
    folder, path = write_run(tmp_path), tmp_path / "checkpoints/r/best.pt"
    missing = r"checkpoints/r/best\.pt: no checkpoint of a finished run; train first"
    with pytest.raises(Fault, match=missing):
        best_weights(tmp_path, "r")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights of r")
    assert best_weights(tmp_path, "r") == path  # an older record has no digest
    changed("summary.json", "best_sha256", to=digest(path))(folder)
    assert best_weights(tmp_path, "r") == path
    path.write_bytes(b"weights of another run")
    with pytest.raises(Fault, match=r"best\.pt: not the weights with which run r finished"):
        best_weights(tmp_path, "r")
    (folder / "summary.json").unlink()
    with pytest.raises(Fault, match=missing):
        best_weights(tmp_path, "r")
