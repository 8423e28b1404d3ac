"""A damaged or foreign record of a run ends with one line that names the file and the key, and status 1."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input import assert_refused, damaged, npy, special_file
from conftest import ROOT
from example_records import CONFIG, outputs, row, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import Fault
from common.files import write_csv, write_json
from common.records.read import Record, read_json
from study.comparison import comparison

Change = Callable[[Path], Any]  # damages a record in the run's folder
REPORT = "study.report --output_dir={}"


def changed(name: str, *keys: str | int, to: Any) -> Change:
    """Change the value of a key in a JSON record, or all of it. `to` may be a function of the former value."""

    def change(folder: Path) -> None:
        content = {"": json.loads((folder / name).read_text())}
        part: Any = content
        for key in ("", *keys)[:-1]:
            part = part[key]
        last = keys[-1] if keys else ""
        part[last] = to(part[last]) if callable(to) else to
        (folder / name).write_text(json.dumps(content[""]))

    return change


def without(name: str, *keys: str) -> Change:
    """Delete a key of a JSON record."""

    def remove(part: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key != keys[-1]}

    return changed(name, *keys[:-1], to=remove)


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


def member(content: bytes, compression: int = zipfile.ZIP_DEFLATED, declared: int | None = None) -> Change:
    """`content` in the place of an array in scores.npz, with a wrong length in the archive if it is `declared`."""

    def change(folder: Path) -> None:
        np.savez(folder / "scores.npz", **{name: value for name, value in outputs().items() if name != "targets"})
        with zipfile.ZipFile(folder / "scores.npz", "a") as archive:
            archive.writestr("targets.npy", content, compression)
            if declared is not None:
                archive.getinfo("targets.npy").file_size = declared

    return change


def special(name: str, kind: str) -> Change:
    return lambda folder: special_file(folder / name, kind)


CASES: list[tuple[Change, str]] = [
    (without("config.json", "config"), r"config\.json: .*config: Field required"),
    (without("config.json", "task"), r"config\.json: .*task: Field required"),
    (without("config.json", "config", "seed"), r"config\.json: .*config\.seed: Field required"),
    (changed("config.json", "config", to=[1]), r"config\.json: .*config: "),
    (changed("config.json", "config", "seed", to="0"), r"config\.json: .*config\.seed: "),
    (changed("config.json", "config", "seed", to=-1), r"config\.json: .*config\.seed: "),
    (changed("config.json", "config", "seed", to=True), r"config\.json: .*config\.seed: "),
    (changed("config.json", "config", "size", to=28.5), r"config\.json: .*config\.size: "),
    (changed("config.json", "config", "model_name", to=["resnet18"]), r"config\.json: .*config\.model_name: "),
    (changed("config.json", "synthetic", to="yes"), r"config\.json: .*synthetic: "),
    (changed("config.json", "started", to=None), r"config\.json: .*started: "),
    (changed("config.json", "run_id", to="other"), r"config\.json: .*run_id: it is of run other"),
    (changed("config.json", "run_id", to="../r"), r"config\.json: .*run_id: .*a run id names files"),
    (changed("config.json", to=[]), r"config\.json: not a readable record"),
    (written("config.json", b""), r"config\.json: not a readable record"),
    (written("config.json", b'{"config": '), r"config\.json: not a readable record"),
    (written("config.json", b"\x00" * 100), r"config\.json: not a readable record"),
    (written("config.json", b'{"task": "\xff"}'), r"config\.json: not a readable record"),
    (written("config.json", b"[" * 100_000), r"config\.json: not a readable record"),
    (written("config.json", b'{"a":' * 20_000), r"config\.json: not a readable record"),
    (without("summary.json", "best"), r"summary\.json: .*best: Field required"),
    (without("summary.json", "validate", "validate/acc"), r"summary\.json: .*validate\.validate/acc: Field req"),
    (changed("summary.json", "test/acc", to=1.5), r"summary\.json: .*test/acc: "),
    (changed("summary.json", "test/acc", to=-0.1), r"summary\.json: .*test/acc: "),
    (changed("summary.json", "test/acc", to=float("nan")), r"summary\.json: .*test/acc: "),
    (changed("summary.json", "test/acc", to="0.5"), r"summary\.json: .*test/acc: "),
    (changed("summary.json", "best", "auc", "high", to=float("inf")), r"summary\.json: .*best\.auc\.high: "),
    (changed("summary.json", "best", "auc", to=0.5), r"summary\.json: .*best\.auc: "),
    (changed("summary.json", "best", "epoch", to=0), r"summary\.json: .*best\.epoch: "),
    (changed("summary.json", "best", "n", to=17), r"summary\.json: .*best: .*confusion_matrix does not sum"),
    (changed("summary.json", "best", "confusion_matrix", 0, to=[2]), r"best: .*has not 9 rows and columns"),
    (changed("summary.json", "best", "confusion_matrix", 0, 1, to=-1), r"confusion_matrix\.0\.1: "),
    (changed("summary.json", "last", "auc_per_class", "mucus", to="high"), r"last\.auc_per_class\.mucus: "),
    (changed("summary.json", "validate", "validate/acc", to=2), r"summary\.json: .*validate\.validate/acc: "),
    (changed("summary.json", "tiles", "val", to=0), r"summary\.json: .*tiles\.val: "),
    (changed("summary.json", "wall_seconds", to=-1), r"summary\.json: .*wall_seconds: "),
    (changed("summary.json", "task", to="task3"), r"summary\.json: .*task: it is task3, in config\.json task1"),
    (changed("summary.json", "run_id", to="s"), r"summary\.json: .*run_id: it is of run s"),
    (written("summary.json", b"null"), r"summary\.json: not a readable record"),
    (written("history.csv", b""), r"history\.csv: not a readable record \(no epochs\)"),
    (written("history.csv", b"\x00\x01\x02,\n\x00"), r"history\.csv: not a readable record"),
    (written("history.csv", b"\xff\xfe\n1\n"), r"history\.csv: not a readable record"),
    (written("history.csv", b"epoch,validate/acc\n1,high\n"), r"history\.csv: not a readable record"),
    (written("history.csv", b"epoch,validate/acc\n1\n"), r"history\.csv: not a readable record"),
    (written("history.csv", b"epoch,validate/acc\n1,0.5,3\n"), r"history\.csv: not a readable record"),
    (written("history.csv", b'epoch,a\n1,"' + b"5" * 200_000), r"history\.csv: not a readable record"),
    (history(row(1), row(3)), r"history\.csv: .*epoch: the epochs do not count from 1"),
    (history({"epoch": 1, "validate/acc": 0.5}), r"history\.csv: .*0\.train/loss: Field required"),
    (history({**row(1), "train/loss": float("inf")}), r"history\.csv: .*0\.train/loss: "),
    (history({**row(1), "validate/acc": 3}), r"history\.csv: .*0\.validate/acc: "),
    (history({**row(1), "validate/auc": -3}), r"history\.csv: .*0\.validate/auc: "),
    (history({**row(1), "validate/auc": float("nan")}), r"history\.csv: .*0\.validate/auc: "),
    (changed("config.json", "weights", to={"name": "w"}), r"config\.json: .*weights\.source: Field required"),
    (lambda folder: (folder / "scores.npz").unlink(), r"scores\.npz: not a readable record"),
    (written("scores.npz", b""), r"scores\.npz: not a readable record"),
    (written("scores.npz", b"PK\x03\x04torn"), r"scores\.npz: not a readable record"),
    (arrays(best_logits=None), r"scores\.npz: not a readable record"),
    (arrays(best_logits=np.zeros((18, 8))), r"scores\.npz: .*\(18, 8\).*not the shape \(18, 9\)"),
    (arrays(best_logits=np.zeros((17, 9))), r"scores\.npz: .*\(17, 9\)"),
    (arrays(best_logits=np.zeros((18, 9), int)), r"scores\.npz: .*int64"),
    (arrays(best_logits=np.full((18, 9), np.nan)), r"scores\.npz: .*best_logits has values that are not finite"),
    (arrays(targets=np.full(18, 99, np.uint8)), r"scores\.npz: .*targets has values"),
    (arrays(targets=np.full(18, -1)), r"scores\.npz: .*targets has values"),
    (arrays(targets=np.array([None] * 18)), r"scores\.npz: .*dtype object"),
    (arrays(targets=np.array(["a"] * 18)), r"scores\.npz: .*dtype <U1"),
    (member(b"not an array"), r"scores\.npz: not a readable record"),
    (member(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (18,")), r"scores\.npz: not a readable record"),
    (member(npy("((((((((((" * 11)), r"scores\.npz: not a readable record"),
    (member(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (18,)}")), r"scores\.npz: .*shorter or longer"),
    (
        member(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999,)}")),
        r"scores\.npz: .*99999999999999",
    ),
    (member(b"\x00" * 50_000_000), r"scores\.npz: .*is longer than an array of the shape"),
    (member(b"\x00" * 50_000_000, declared=200), r"scores\.npz: not a readable record"),
    (member(npy("", b"\x00" * 18), zipfile.ZIP_LZMA), r"scores\.npz: .*compressed in an unknown way"),
    *[
        (special(name, kind), rf"{name}: not a readable record \(.*(not a regular file|Too many levels)")
        for name in ("config.json", "history.csv", "scores.npz")
        for kind in ("fifo", "folder", "zero", "loop")
    ],
    (special("summary.json", "fifo"), r"summary\.json: not a readable record \(.*not a regular file"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=[message[:50] for _, message in CASES])
def test_a_bad_record_is_named_with_its_key(
    change: Change, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(write_run(tmp_path))
    assert_refused(REPORT, 1, message, tmp_path, capsys)


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """The folder r of a run with the records of Tasks 2 and 5."""
    for run_id in ("q", "r"):
        folder = write_run(tmp_path, {**CONFIG, "run_id": run_id})
        changed("summary.json", "weights", to={"name": "none", "source": "random"})(folder)
    one, other = (Record.read(tmp_path, run_id) for run_id in ("q", "r"))
    write_json(folder / "comparison.json", comparison({"from scratch": [one], "fine-tuned": [other]}))
    attribution = json.loads((ROOT / "runs/task1-0/attribution.json").read_text())
    write_json(folder / "attribution.json", {**attribution, "run_id": "r"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("comparison.json", "runs"), r"comparison\.json: .*runs: Field required"),
        (changed("comparison.json", "runs", "from scratch", 0, "seed", to=-1), r"runs\.from scratch\.0\.seed: "),
        (changed("comparison.json", "runs", "from scratch", 0, "run_id", to="../q"), "0.run_id: .*names files"),
        (changed("comparison.json", "runs", to=lambda runs: {"fine-tuned": []}), "runs: "),
        (changed("comparison.json", "over_seeds", "test/acc", to=3), "over_seeds.test/acc: "),
        (changed("comparison.json", "differences", "test/acc", "p", to=2), "differences.test/acc.p: "),
        (changed("comparison.json", "weights", to="w"), "weights: "),
        (written("comparison.json", b"{}"), r"comparison\.json: not a readable record"),
        (without("attribution.json", "methods"), "methods: Field required"),
        (changed("attribution.json", "methods", "saliency", "passes", to="yes"), "methods.saliency.passes: "),
        (changed("attribution.json", "methods", "saliency", "infidelity", "low", to=None), "infidelity.low: "),
        (changed("attribution.json", "tiles", 0, "probability", to=7), "tiles.0.probability: "),
        (changed("attribution.json", "n", "removal", to=0), "n.removal: "),
        (changed("attribution.json", "figures", to=["a.png"]), "figures: "),
        (changed("attribution.json", "run_id", to="other"), "run_id: it is of run other"),
        (special("attribution.json", "fifo"), "not a regular file"),
    ],
)
def test_a_bad_record_of_tasks_2_and_5_is_named_with_its_key(change: Change, message: str, compared: Path) -> None:
    read_json(compared / "comparison.json")
    read_json(compared / "attribution.json")
    change(compared)
    with pytest.raises(Fault, match=message):
        for name in ("comparison.json", "attribution.json"):
            read_json(compared / name)


def test_a_whole_record_is_read_and_keeps_what_later_versions_add(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    content = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**content, "later": {"a": 1}}))
    record = Record.read(tmp_path, "r")
    assert record.summary["later"] == {"a": 1}
    assert record.config == CONFIG
    assert [epoch["epoch"] for epoch in record.history] == [1, 2]
    arrays = record.arrays()
    assert arrays.keys() == outputs().keys()
    assert all(np.array_equal(arrays[name], value) for name, value in outputs().items())


def read(folder: Path, name: str) -> Any:
    if name.endswith(".json"):
        return read_json(folder / name)
    record = Record.read(folder.parent.parent, folder.name)
    return record.history if name == "history.csv" else record.arrays()


@pytest.mark.parametrize("name", ["config.json", "summary.json", "history.csv", "scores.npz"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_of_a_record_is_a_fault(name: str, data: st.DataObject, tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / name).write_bytes(damaged((folder / name).read_bytes(), data))
    try:
        found = read(folder, name)
    except Fault:
        return
    if name == "scores.npz":  # its checksums notice every change of a value
        assert all(np.array_equal(found[key], value) for key, value in outputs().items() if key in found)


def test_an_archive_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(18, np.uint8))
    member(buffer.getvalue(), declared=2**40)(folder)
    with pytest.raises(Fault, match="longer than an array"):
        Record.read(tmp_path, "r").arrays()
