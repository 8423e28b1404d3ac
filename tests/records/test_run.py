import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from example_records import row, scored
from matplotlib.figure import Figure
from wandb_server import offline_records

from common.cli import UsageError
from common.config import TrainingConfig
from common.data.dataset import Dataset
from common.records import run as module
from common.records.read import Record, best_weights
from common.records.run import Run

KEY = "0123456789abcdef0123456789abcdef01234567"


def start(dataset: Dataset, output_dir: Path, device: str = "a CPU", sha256: str = "a", **keys: Any) -> Run:
    """Open the run `r`, which starts from weights with this hash; `source` may differ between starts."""
    config = TrainingConfig(output_dir=output_dir, run_id="r", n_epochs=1, **keys)
    return Run("task1", config, dataset, device, facts={"weights": {"source": device, "sha256": sha256}})


def finish(run: Run, *rows: dict[str, float], **changes: Any) -> dict[str, Any]:
    """End the run after epochs, by default one, that were none; returns the content of summary.json."""
    history = list(rows) or [row(1)]
    run.log_epoch(history)
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "best.pt").write_bytes(b"weights")
    summary = {**scored(history), **changes}
    run.finish(history, {name: value for name, value in summary.items() if value is not None})
    content: dict[str, Any] = json.loads((run.folder / "summary.json").read_text())
    return content


def test_config_json_tells_where_a_run_came_from(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["task1.py", "--seed=7"])
    start(tiny, tmp_path, seed=7, input_size=32)
    content = json.loads((tmp_path / "runs" / "r" / "config.json").read_text())
    assert content["config"]["seed"] == 7
    assert content["command"].endswith(" --seed=7")
    assert content["config"]["output_dir"] == str(tmp_path)
    assert content["tiles"] == {"train": 130, "val": 45, "test": 63}
    assert (content["data_fingerprint"], content["synthetic"], content["device"]) == ("tiny", True, "a CPU")
    assert content["dataset"] == "phantom (130 training tiles, 28 px)"
    assert {"torch", "torchvision", "numpy"} <= content["versions"].keys()


def test_a_run_is_not_continued_on_other_data_or_from_other_weights(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tiny, tmp_path)
    monkeypatch.setattr("common.records.run._commit", lambda: "later")
    run = start(tiny, tmp_path, device="a GPU")  # another source of the same weights
    with pytest.raises(UsageError, match=r"another configuration \(data_fingerprint was tiny\): use that, or"):
        start(dataclasses.replace(tiny, fingerprint="other"), tmp_path)
    with pytest.raises(UsageError, match=r"another configuration \(weights_sha256 was a\)"):
        start(tiny, tmp_path, sha256="b")
    assert finish(run)["device"] == "a CPU, then a GPU"
    assert Record.read(tmp_path, "r").summary["device"] == "a CPU, then a GPU"
    assert Record.read(tmp_path, "r").summary["commit"].endswith(", then later")


def test_a_key_that_is_newer_than_a_run_may_stand_at_off(tiny: Dataset, tmp_path: Path) -> None:
    record = start(tiny, tmp_path).folder / "config.json"
    content = json.loads(record.read_text())
    del content["config"]["amsgrad"], content["config"]["ema_decay"]
    record.write_text(json.dumps(content))
    start(tiny, tmp_path)
    with pytest.raises(UsageError, match=r"another configuration \(amsgrad was None\)"):
        start(tiny, tmp_path, amsgrad=True)


def test_last_pt_stays_until_summary_json_is_written(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tiny, tmp_path)
    run.checkpoints.mkdir(parents=True)
    for name in ("best.pt", "last.pt"):
        (run.checkpoints / name).touch()
    monkeypatch.setattr(module, "write_json", lambda *_: Path("no such disk").stat())
    with pytest.raises(OSError, match="no such disk"):
        run.finish([row(1)], scored([row(1)]))
    assert run.last_checkpoint.exists()


def test_a_run_that_finishes_just_before_its_lock_is_taken_stays_as_it_is(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*arguments: Any, **keys: Any) -> Any:
        finish(run)
        run._lock.release()
        return original(*arguments, **keys)

    run, original = start(tiny, tmp_path), module.FileLock
    monkeypatch.setattr(module, "FileLock", late)
    with pytest.raises(UsageError, match="run r is finished already"):
        start(tiny, tmp_path)
    assert not list(run.folder.glob(".lock"))


def test_a_finished_run_names_its_weights_and_both_sides_of_its_tiles(tiny: Dataset, tmp_path: Path) -> None:
    run = start(tiny, tmp_path, input_size=64, seed=3)
    summary = finish(run)
    lines = (run.folder / "history.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,train/loss,validate/loss,validate/auc,validate/acc,")
    assert lines[1].startswith("1,1.0,1.0,0.5,0.5,")
    assert run.title == "Task 1 · resnet18 · phantom (130 training tiles, 28 px tiles, 64 px inputs) · seed 3"
    assert summary["best_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert best_weights(tmp_path, "r") == run.checkpoints / "best.pt"
    names = ["train-loss", "validate-auc", "validate-acc", "confusion"]
    assert {path.name for path in run.figures.iterdir()} == {f"r-{name}.png" for name in names}


def test_the_figures_show_the_kept_epoch_and_true_classes_in_rows(
    tiny: Dataset, tmp_path: Path, drawn: list[Figure]
) -> None:
    rows = [row(1, 0.6), row(2, 0.3)]
    scores = scored(rows, best=1)
    scores["best"]["confusion_matrix"][0][1] = 77
    finish(start(tiny, tmp_path), *rows, best=scores["best"], validate=rows[0])
    assert [list(figure.axes[0].get_lines()[1].get_xdata()) for figure in drawn[:-1]] == [[1, 1]] * 3
    [cell] = [text for text in drawn[-1].axes[0].texts if text.get_text() == "77"]
    assert cell.get_position() == (1, 0)  # column and row


def test_a_run_without_test_scores_finishes(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = dict.fromkeys(("test/auc", "test/acc", "best"))
    summary = finish(start(tiny, tmp_path, test=False), shifted={"gamma": 0.5}, **tests)
    assert not summary.keys() & tests
    assert (summary["validate"]["validate/acc"], summary["shifted"]) == (0.5, {"gamma": 0.5})
    assert not (tmp_path / "fig/task1/r-confusion.png").exists()
    assert "test tiles" not in capsys.readouterr().out


def track(output_dir: Path, body: str) -> "subprocess.CompletedProcess[str]":
    """Run `body` in a process of its own: W&B is on, `open_run()` waits 3 seconds for its server."""
    script = f"""
import os, sys
os.environ["WANDB_MODE"] = "offline"
sys.path.insert(0, {str(ROOT / "tests")!r})
from conftest import coloured_tiles
from example_records import row, scored
from wandb_server import WandbServer
from common.records import run as module
from common.config import TrainingConfig
from common.explain.tiles import write_records
from common.data.dataset import Dataset

module.WANDB_PATIENCE = 3.0
KEY = {KEY!r}

def open_run():
    tiles = coloured_tiles(9, 28, 0)
    tiny = Dataset("phantom", 28, tiles, tiles, tiles, "tiny")
    config = TrainingConfig(output_dir=module.Path({str(output_dir)!r}), run_id="r")
    return module.Run("task1", config, tiny, "cpu")

def end(run):
    run.log_epoch([row(1)])
    run._send(lambda wandb_run: wandb_run.finish())
    print("finished")

"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment["NETRC"] = os.devnull
    command = [sys.executable, "-c", script + body]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run whose second epoch of three is the best one."""
    folder = tmp_path_factory.mktemp("logged")
    body = """
os.environ.update(WANDB_PROJECT="mine", WANDB_API_KEY=KEY)
run, rows = open_run(), [row(1, 0.3), row(2, 0.6), row(3, 0.4)]
for last in (1, 2, 3):
    run.log_epoch(rows[:last])
run.checkpoints.mkdir(parents=True)
(run.checkpoints / "best.pt").write_bytes(b"weights")
run.finish(rows, scored(rows, best=2, auc=0.8, acc=0.7))
network = "tf_efficientnet_lite1 from efficientnet_lite1_imagenet, training classifier"
facts = {"run_id": "r", "dataset": "phantom", "network": f"{network} on phantom"}
config, picture = TrainingConfig(output_dir=run.folder.parent.parent), next(run.figures.iterdir())
write_records(run.folder, config, facts, [], {}, {"map": picture})
"""
    done = track(folder, body)
    assert (done.returncode, done.stderr) == (0, "")
    assert "W&B: offline, project mine" in done.stdout
    assert "test/auc 0.8000  test/acc 0.7000  (18 test tiles, weights of epoch 2)" in done.stdout
    assert KEY not in done.stdout
    return folder


def test_wandbs_summary_is_that_of_the_best_epoch(logged: Path) -> None:
    summary: dict[str, Any] = {}
    for entry in offline_records(logged, "r", "summary"):
        summary |= entry["summary"]["update"]
    expected = {**row(2, 0.6), "best_epoch": 2, "test/acc": 0.7, "test/auc": 0.8}
    assert {name: summary[name] for name in expected} == expected


def test_no_record_log_or_figure_contains_the_api_key(logged: Path) -> None:
    written = [path for path in logged.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert any(path.suffix == ".wandb" for path in written)
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_a_wandb_run_has_a_readable_name_and_every_key(logged: Path) -> None:
    (record,) = offline_records(logged, "r", "run")
    run = record["run"]
    config = run["config"]["update"]
    assert (run["project"], run["display_name"]) == ("mine", "Task 1 · resnet18 · seed 0")
    assert (config["dataset"], config["device"], config["command"]) == ("pathmnist", "auto", "-c")
    assert run["tags"] == ["task1", "resnet18", "phantom (9 training tiles, 28 px)"]
    assert config["commit"] == module.provenance(())["commit"]
    assert config["facts"]["dataset"] == "phantom (9 training tiles, 28 px)"


def test_wandb_gets_task_2_with_its_figures_and_tags_that_are_not_too_long(logged: Path) -> None:
    (record,) = offline_records(logged, "r-task2", "run")
    tag = "tf_efficientnet_lite1 from efficientnet_lite1_imagenet, training"
    assert record["run"]["tags"] == ["task2", tag, "phantom"]
    assert "figures/map" in json.dumps(offline_records(logged, "r-task2", "history"))


def test_a_continued_run_sends_wandb_the_epochs_that_a_kill_has_lost(tmp_path: Path) -> None:
    rows = "run, rows = open_run(), [row(1, 0.1), row(2, 0.2), row(3, 0.3)]\n"
    body = f"{rows}run.log_epoch(rows[:1])\nrun.log_epoch(rows[:2])\nos.kill(os.getpid(), 9)"
    assert track(tmp_path, body).returncode == -9
    done = track(tmp_path, f"{rows}run.log_epoch(rows[:2])\nrun.log_epoch(rows)\nsys.exit(130)")
    assert done.returncode == 130, done.stderr
    (ended,) = offline_records(tmp_path, "r", "exit")
    assert ended["exit"]["exit_code"] == 130
    sent = [entry["history"]["item"] for entry in offline_records(tmp_path, "r", "history")]
    assert [(row["epoch"], row["validate/acc"]) for row in sent] == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_an_epoch_is_sent_to_wandb_at_once(tiny: Dataset, tmp_path: Path) -> None:
    run, sent = start(tiny, tmp_path), []
    run._wandb = SimpleNamespace(log=lambda row, **keys: sent.append((row["epoch"], keys)))
    run.log_epoch([row(1)])
    assert sent == [(1, {"step": 1, "commit": True})]


def test_a_run_goes_online_where_a_key_is_configured_and_outlives_its_server(tmp_path: Path) -> None:
    body = """
with WandbServer() as server:
    del os.environ["WANDB_MODE"]
    os.environ.update(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    run = open_run()
    print("asked:", *server.operations)
end(run)
"""
    done = track(tmp_path, body)
    assert "W&B: online" in done.stdout
    assert "UpsertBucket" in done.stdout
    assert "finished" in done.stdout
    assert (tmp_path / "runs" / "r" / "history.csv").exists()


def test_where_wandb_cannot_be_reached_the_run_goes_on_offline(tmp_path: Path) -> None:
    body = """
del os.environ["WANDB_MODE"]
os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"
end(open_run())  # without a key
def refuse(operation, variables):
    raise PermissionError
with WandbServer(refuse) as server:
    os.environ.update(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url.replace("//", "//me:secret@"))
    end(open_run())
end(open_run())  # without a server
"""
    done = track(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B online failed") == len(done.stderr.splitlines()) == 3
    assert done.stdout.count("W&B: offline") == done.stdout.count("finished") == 3
    assert "secret" not in done.stdout + done.stderr


def test_a_record_names_its_commit_and_whether_a_tracked_file_differs_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPOSITORY", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert module.provenance(())["commit"] is None
    (tmp_path / "a.py").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "one"], check=True)
    (tmp_path / "new.md").write_text("2")
    clean = module.provenance(())["commit"]
    assert len(clean) == 40
    (tmp_path / "a.py").write_text("22")
    assert module.provenance(())["commit"] == f"{clean}-dirty"
    monkeypatch.setattr(module, "REPOSITORY", tmp_path / "installed")  # in a repository of its user
    assert module.provenance(())["commit"] is None
