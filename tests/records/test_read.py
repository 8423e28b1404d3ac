"""A damaged or foreign record of a run is a Fault, one line that names the file and the key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input import damaged
from conftest import ROOT
from example_records import CONFIG, outputs, row, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.cli import Fault
from common.files import digest, write_csv
from common.finetune.trained import load_run
from common.finetune.weights import load_weights
from common.records.read import Record, best_weights, read_json

Change = Callable[[Path], Any]  # damages a record in the run's folder
KEPT = ["task1-*", "combined-*", "mean_rgb-*", "neighbours-*", "boosting-*"]  # the report shows these runs


def changed(name: str, *keys: str | int, to: Any) -> Change:
    """Change the value of a key in a JSON record, or all of it."""

    def change(folder: Path) -> None:
        content = {"": json.loads((folder / name).read_text())}
        part: Any = content
        for key in ("", *keys)[:-1]:
            part = part[key]
        part[keys[-1] if keys else ""] = to
        (folder / name).write_text(json.dumps(content[""]))

    return change


def without(name: str, key: str) -> Change:
    """Delete a key of a JSON record."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        del content[key]
        (folder / name).write_text(json.dumps(content))

    return change


def written(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def history(*rows: dict[str, Any]) -> Change:
    return lambda folder: write_csv(folder / "history.csv", rows)


def arrays(**changes: Any) -> Change:
    """Other arrays in scores.npz; None leaves an array out."""

    def change(folder: Path) -> None:
        all_arrays = {name: value for name, value in {**outputs(), **changes}.items() if value is not None}
        np.savez(folder / "scores.npz", **all_arrays)

    return change


CASES: list[tuple[Change, str]] = [
    (without("config.json", "config"), r"config\.json: .*config: Field required"),
    (changed("config.json", "config", to=[1]), r"config\.json: .*config: "),
    (changed("config.json", "config", "seed", to="0"), r"config\.json: .*config\.seed: "),
    (changed("config.json", "config", "seed", to=True), r"config\.json: .*config\.seed: "),
    (changed("config.json", "config", "size", to=28.5), r"config\.json: .*config\.size: "),
    (changed("config.json", "config", "model_name", to=["resnet18"]), r"config\.json: .*config\.model_name: "),
    (changed("config.json", "run_id", to="other"), r"config\.json: .*run_id: it is of run other"),
    (changed("config.json", to=[]), r"config\.json: not a readable record"),
    (written("config.json", b'{"config": '), r"config\.json: not a readable record"),
    (written("config.json", b'{"task": "\xff"}'), r"config\.json: not a readable record"),
    (written("config.json", b"[" * 100_000), r"config\.json: not a readable record"),
    (without("summary.json", "validate"), r"summary\.json: .*validate: Field required"),
    (without("summary.json", "best"), r"runs/r: the run has no test scores \(--test=False\)"),
    (changed("summary.json", "test/acc", to=1.5), r"summary\.json: .*test/acc: "),
    (changed("summary.json", "test/acc", to=float("nan")), r"summary\.json: .*test/acc: "),
    (changed("summary.json", "test/acc", to="0.5"), r"summary\.json: .*test/acc: "),
    (changed("summary.json", "best", "auc", "high", to=float("inf")), r"summary\.json: .*best\.auc\.high: "),
    (changed("summary.json", "best", "confusion_matrix", 0, 1, to=-1), r"confusion_matrix\.0\.1: "),
    (changed("summary.json", "last", "auc_per_class", "mucus", to="high"), r"last\.auc_per_class\.mucus: "),
    (changed("summary.json", "tiles", "val", to=0), r"summary\.json: .*tiles\.val: "),
    (changed("summary.json", "figures", to={"train/loss": 0.5}), r"summary\.json: .*figures\.train/loss: "),
    (changed("summary.json", "shifted", to={"gamma": "x"}), r"summary\.json: .*shifted\.gamma: "),
    (changed("summary.json", "task", to="task3"), r"summary\.json: .*task: it is task3, in config\.json task1"),
    (
        changed("summary.json", "device", to="a GPU"),
        r"summary\.json: .*device: it is a GPU, in config\.json a CPU",
    ),
    (changed("summary.json", "tiles", "train", to=91), r"summary\.json: .*tiles: it is .*91.*, in config\.json"),
    (written("history.csv", b""), r"history\.csv: not a readable record \(no epochs\)"),
    (written("history.csv", b"\xff\xfe\n1\n"), r"history\.csv: not a readable record"),
    (written("history.csv", b"epoch,validate/acc\n1,high\n"), r"history\.csv: not a readable record"),
    (written("history.csv", b"epoch,validate/acc\n1,0.5,3\n"), r"history\.csv: not a readable record"),
    (history(row(1), row(3)), r"history\.csv: .*epoch: the epochs do not count from 1"),
    (history({"epoch": 1, "validate/acc": 0.5}), r"history\.csv: .*0\.validate/loss: Field required"),
    (history({**row(1), "validate/acc": 3}), r"history\.csv: .*0\.validate/acc: "),
    (history({**row(1), "validate/auc": float("nan")}), r"history\.csv: .*0\.validate/auc: "),
    (lambda folder: (folder / "scores.npz").unlink(), r"scores\.npz: not a readable record"),
    (written("scores.npz", b"PK\x03\x04torn"), r"scores\.npz: not a readable record"),
    (arrays(best_logits=None), r"scores\.npz: not a readable record \('best_logits'\)"),
    (arrays(best_logits=np.zeros((18, 8))), r"scores\.npz: .*\(18, 8\), not of the shape \(18, 9\)"),
    (arrays(best_logits=np.zeros((18, 9), int)), r"scores\.npz: .*int64"),
    (arrays(best_logits=np.full((18, 9), np.nan)), r"scores\.npz: .*best_logits has values that are not finite"),
    (arrays(targets=np.full(18, 99, np.uint8)), r"scores\.npz: .*targets has values"),
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


@pytest.mark.parametrize("run_id", sorted(path.name for name in KEPT for path in (ROOT / "runs").glob(name)))
def test_the_records_of_the_study_stay_readable(run_id: str) -> None:
    record = Record.read(ROOT, run_id)
    assert record.arrays()["best_logits"].shape == (7180, 9)
    assert 0.5 < record.scores["test/acc"] < 1
    assert len(record.history) == (0 if "baseline" in record.config else record.summary["last"]["epoch"])


def test_the_weights_of_a_finished_run_are_those_with_which_it_finished(tmp_path: Path) -> None:
    folder, path = write_run(tmp_path), tmp_path / "checkpoints/r/best.pt"
    with pytest.raises(Fault, match=r"checkpoints/r/best\.pt: no such checkpoint; train first"):
        best_weights(tmp_path, "r")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights of r")
    assert best_weights(tmp_path, "r") == path  # an older record has no digest
    changed("summary.json", "best_sha256", to=digest(path))(folder)
    assert best_weights(tmp_path, "r") == path
    path.write_bytes(b"weights of another run")
    with pytest.raises(Fault, match=r"best\.pt: not the weights with which run r finished"):
        best_weights(tmp_path, "r")
    for read in (lambda: load_weights("r", "resnet18", tmp_path), lambda: load_run(tmp_path, "r")):
        with pytest.raises(Fault, match="not the weights with which run r finished"):
            read()
    (folder / "summary.json").unlink()
    assert best_weights(tmp_path, "r") == path  # those of the best epoch until now


def test_a_run_without_test_scores_can_be_read_as_json(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    for name in ("best", "last", "test/acc", "test/auc"):
        without("summary.json", name)(folder)
    assert read_json(folder / "summary.json")["validate"]["validate/acc"] == 0.5
