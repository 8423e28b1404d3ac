import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from common.config import TrainingConfig
from common.data.dataset import Dataset
from common.errors import Fault, UsageError
from common.records import run as module
from common.records.read import read_json
from common.records.run import Run, group, wandb_mode

KEY = "a" * 40
ROW = {
    "epoch": 1,
    "train/loss": 1.0,
    "validate/loss": 1.0,
    "validate/auc": 0.5,
    "validate/acc": 0.5,
    "lr": 0.1,
    "tiles_per_second": 100.0,
    "seconds": 1.0,
}


def test_auto_mode_is_online_exactly_where_a_key_is_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"
    assert wandb_mode("disabled") == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode("auto") == "offline"


def test_config_json_tells_where_a_run_came_from(tiny: Dataset, tmp_path: Path) -> None:
    Run("task1", TrainingConfig(output_dir=tmp_path, run_id="r", seed=7), tiny, "a device")
    content = json.loads((tmp_path / "runs" / "r" / "config.json").read_text())
    assert content["config"]["seed"] == 7
    assert content["config"]["output_dir"] == str(tmp_path)
    assert content["tiles"] == {"train": 130, "val": 45, "test": 63}
    assert content["data_fingerprint"] == "tiny"
    assert content["synthetic"] is True
    assert content["device"] == "a device"
    assert {"torch", "torchvision", "numpy", "medmnist"} <= content["versions"].keys()
    assert "phantom" in content["dataset"]
    assert content["commit"] is None or len(content["commit"].split("-")[0]) == 40


def test_a_run_is_not_continued_on_other_data_or_from_other_weights(tiny: Dataset, tmp_path: Path) -> None:
    config = TrainingConfig(output_dir=tmp_path, run_id="r")

    def start(dataset: Dataset, sha256: str, source: str = "a package, version 1") -> None:
        weights = {"name": "w", "source": source, "sha256": sha256}
        Run("task5", config, dataset, "cpu", facts={"weights": weights})

    start(tiny, "a")
    start(tiny, "a", "a package, version 2")
    with pytest.raises(
        UsageError, match=r"run r was started on other data .*tiny\): use that data or another --run"
    ):
        start(dataclasses.replace(tiny, fingerprint="other"), "a")
    with pytest.raises(
        UsageError, match=r"r was started from other weights .*sha256 was a\): use those or another"
    ):
        start(tiny, "b")


def test_a_run_that_ends_while_another_process_waits_for_its_lock_is_not_trained_again(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.FileLock

    def ended_just_before(path: Path, **keys: Any) -> Any:
        (path.parent / "summary.json").touch()
        return original(path, **keys)

    monkeypatch.setattr(module, "FileLock", ended_just_before)
    with pytest.raises(UsageError, match="run r is finished already"):
        Run("task1", TrainingConfig(output_dir=tmp_path, run_id="r"), tiny, "cpu")
    assert not (tmp_path / "runs/r/config.json").exists()


def test_history_is_one_row_an_epoch_with_full_precision(tiny: Dataset, tmp_path: Path) -> None:
    run = Run("task1", TrainingConfig(output_dir=tmp_path, run_id="r"), tiny, "cpu")
    run.log_epoch([ROW])
    run.log_epoch([ROW, {**ROW, "epoch": 2, "train/loss": 1 / 3}])
    lines = (run.folder / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,train/loss,validate/loss,validate/auc,validate/acc,lr,tiles_per_second,seconds"
    assert len(lines) == 3
    assert float(lines[2].split(",")[1]) == 1 / 3


def test_a_torn_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"config": ')
    with pytest.raises(Fault, match=r"config\.json: not a readable record"):
        read_json(tmp_path / "config.json")


def track(output_dir: Path, body: str) -> "subprocess.CompletedProcess[str]":
    """Run `body` in a process of its own: W&B is on, `open_run()` waits 3 seconds for its server."""
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from conftest import coloured_tiles
from wandb_server import WandbServer
from common.records import run as module
from common.config import TrainingConfig
from common.data.dataset import Dataset

module.WANDB_PATIENCE = 3.0
KEY, ROW = {KEY!r}, {ROW!r}

def open_run():
    tiles = coloured_tiles(9, 28, 0)
    tiny = Dataset("phantom", 28, tuple("abcdefghi"), tiles, tiles, tiles, "tiny")
    config = TrainingConfig(output_dir=module.Path({str(output_dir)!r}), run_id="r")
    return module.Run("task1", config, tiny, "cpu")

def finish(run, rows=(ROW,)):
    run.log_epoch(rows)
    run._send(lambda wandb_run: wandb_run.finish())
    print("finished")

"""
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    return subprocess.run(
        [sys.executable, "-c", script + body],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_offline_says_so_and_keeps_a_wandb_run(tmp_path: Path) -> None:
    done = track(tmp_path, "finish(open_run())")
    assert done.returncode == 0, done.stderr
    assert "W&B: offline" in done.stdout
    assert "URL" not in done.stderr
    assert list((tmp_path / "wandb").glob("offline-run-*-r/run-r.wandb"))


def test_a_run_goes_online_where_a_key_is_configured(tmp_path: Path) -> None:
    body = """
with WandbServer() as server:
    os.environ.update(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    run = open_run()
    print("asked:", *server.operations)
"""
    done = track(tmp_path, body)
    assert "W&B: online" in done.stdout
    assert "UpsertBucket" in done.stdout


def test_an_unreachable_server_leaves_an_offline_run(tmp_path: Path) -> None:
    body = """
with WandbServer() as server:
    os.environ.update(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
finish(open_run())
"""
    done = track(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert "W&B online failed" in done.stderr
    assert "W&B: offline" in done.stdout
    assert "finished" in done.stdout


def test_without_a_key_or_with_a_refused_one_the_run_goes_on_offline(tmp_path: Path) -> None:
    body = """
os.environ.update(WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9", NETRC=os.devnull)
finish(open_run())
def refuse(operation, variables):
    raise PermissionError
with WandbServer(refuse) as server:
    os.environ.update(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    finish(open_run())
"""
    done = track(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B online failed") == 2
    assert "Traceback" not in done.stderr
    assert done.stdout.count("W&B: offline") == 2
    assert done.stdout.count("finished") == 2


def test_a_server_that_dies_in_mid_run_does_not_harm_the_run(tmp_path: Path) -> None:
    body = """
with WandbServer() as server:
    os.environ.update(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    run = open_run()
finish(run)
"""
    done = track(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert "W&B: online" in done.stdout
    assert "finished" in done.stdout
    assert (tmp_path / "runs" / "r" / "history.csv").exists()


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in the file of the newest offline W&B run."""
    path = max(folder.glob("wandb/offline-run-*-r/run-r.wandb"), key=lambda path: path.stat().st_mtime_ns)
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return [
        entry
        for line in printed.splitlines()
        if line.startswith("{") and (entry := json.loads(line))["type"] == kind
    ]


ROWS = 'rows = [{**ROW, "epoch": epoch, "validate/acc": epoch / 10} for epoch in (1, 2, 3)]\nrun = open_run()\n'


def test_a_continued_run_sends_wandb_the_epochs_that_a_kill_has_lost(tmp_path: Path) -> None:
    body = ROWS + "run.log_epoch(rows[:1])\nrun.log_epoch(rows[:2])\nos.kill(os.getpid(), 9)"
    assert track(tmp_path, body).returncode == -9
    done = track(tmp_path, ROWS + "run.continue_from(rows[:2])\nfinish(run, rows)")
    assert done.returncode == 0, done.stderr
    sent = [entry["history"]["item"] for entry in records(tmp_path, "history")]
    assert [(row["epoch"], row["validate/acc"]) for row in sent] == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_wandb_gets_the_users_project_every_key_and_a_group_of_seeds(tmp_path: Path) -> None:
    done = track(tmp_path, 'os.environ["WANDB_PROJECT"] = "mine"\nfinish(open_run())')
    assert "project mine" in done.stdout
    (record,) = records(tmp_path, "run")
    assert record["run"]["project"] == "mine"
    config = record["run"]["config"]["update"]
    assert (config["dataset"], config["device"]) == ("pathmnist", "auto")
    assert config["facts"]["dataset"] == "phantom (9 training tiles, 28 px)"
    assert record["run"]["run_group"] == group("task1", TrainingConfig(run_id="other", seed=5))
    assert record["run"]["run_group"] != group("task1", TrainingConfig(lr=0.5))


class Recorder:
    """In the place of a W&B run: notes what was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **keys: self.calls.append((name, arguments or keys))


@pytest.mark.parametrize(
    ("number", "under_agent", "marked"),
    [(signal.SIGTERM, False, True), (signal.SIGTERM, True, False), (signal.SIGINT, False, False)],
)
def test_a_run_is_marked_as_preempted_where_its_machine_is_taken_away(
    number: signal.Signals,
    under_agent: bool,
    marked: bool,
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "UNDER_AGENT", under_agent)
    run = Run("task1", TrainingConfig(output_dir=tmp_path, run_id="r"), tiny, "cpu")
    run._wandb = sink = Recorder()
    run.stop(number)
    assert (("mark_preempting", {}) in sink.calls) == marked
    assert sink.calls[-1] == ("finish", {"exit_code": 128 + number})


def test_a_record_names_its_commit_and_whether_code_but_not_results_differ_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPOSITORY", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert module.provenance(())["commit"] is None
    (tmp_path / "bench").mkdir()
    for name in ("bench/a.py", "table.md"):
        (tmp_path / name).write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "one"], check=True)
    (tmp_path / "table.md").write_text("2")
    clean = module.provenance(())["commit"]
    assert len(clean) == 40
    (tmp_path / "bench" / "a.py").write_text("2")
    assert module.provenance(())["commit"] == f"{clean}-dirty"
