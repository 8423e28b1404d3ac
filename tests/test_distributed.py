"""Two processes train one network on a CPU: with the results of one process, and one set of records."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT
from processes import assert_same

import task1
from common.config import run_script
from common.data.batches import DeviceTiles
from common.data.dataset import load_dataset
from common.records import checkpoint
from common.records.read import read_history
from common.training.evaluation import evaluate
from common.training.models import build_model

# 99 training, 11 validation and 19 test tiles: no two processes can share these equally.
DATA = ("--dataset=phantom", "--size=64", "--train_tiles=99", "--device=cpu", "--wandb=disabled", "--run_id=r")
# No BatchNorm, because on a CPU each process normalises its own share; DRIVER switches dropout off.
SQUEEZENET = ("--model_name=squeezenet1_1", "--n_epochs=3", "--batch_size=30", "--lr=0.0003")
DRIVER = """
import os, signal, sys, time
sys.path.insert(0, os.getcwd())
import torch
import task1
from common.training import loop
from common.config import run_script
from common.training.loop import Trainer

torch.nn.functional.dropout = lambda inputs, *_: inputs
epoch_of = Trainer.train_epoch
mix = loop.mix

def train_epoch(trainer, epoch):
    if epoch == 2 and os.environ["RANK"] == "1":
        if "DIE" in os.environ:
            os._exit(9)
        if "STOP" in os.environ:
            os.kill(os.getpid(), signal.SIGTERM)
    return epoch_of(trainer, epoch)

def noted(inputs, draws, *alphas):
    folder = os.environ.get("WAIT")
    if folder and os.path.exists(f"{folder}/runs/r/history.csv"):
        with open(f"{folder}/seed-{os.environ['RANK']}", "w") as file:
            file.write(f"{draws.initial_seed()} {torch.initial_seed()}")
        time.sleep(0.5)
    return mix(inputs, draws, *alphas)

Trainer.train_epoch = train_epoch
loop.mix = noted
run_script(task1.main, task1.Task1Config)
"""


def command(script: str, *keys: str, data_root: Path, output: Path) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script]
    return [*start, *keys, f"--data_root={data_root}", f"--output_dir={output}"]


def together(
    script: str, *keys: str, data_root: Path, output: Path, **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(script, *keys, data_root=data_root, output=output),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("driver") / "driver.py"
    path.write_text(DRIVER)
    return str(path)


@pytest.fixture(scope="module")
def two(driver: str, phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run on two processes."""
    folder = tmp_path_factory.mktemp("two")
    done = together(driver, *DATA, *SQUEEZENET, data_root=phantom_root, output=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1 ") == 1
    return folder


@pytest.mark.slow
def test_two_processes_have_the_same_loss_curve_as_one(
    two: Path, phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda inputs, *_: inputs)
    keys = [*DATA, *SQUEEZENET, f"--data_root={phantom_root}", f"--output_dir={tmp_path}"]
    run_script(task1.main, task1.Task1Config, keys)
    alone, together = (read_history(folder / "runs/r/history.csv") for folder in (tmp_path, two))
    assert alone[-1]["train/loss"] < alone[0]["train/loss"]
    for column in ("train/loss", "validate/loss", "lr"):  # one tie changes AUC and ACC of so few tiles a lot
        np.testing.assert_allclose([row[column] for row in together], [row[column] for row in alone], atol=1e-4)
    assert "2 × " in json.loads((two / "runs/r/config.json").read_text())["device"]


def assert_scores_are_those_of_one_process(folder: Path, model_name: str, data_root: Path) -> None:
    """Score the test tiles with the best weights in this process, and compare with the run's records."""
    model = build_model(model_name, 9, 64)
    dataset = load_dataset("phantom", 64, data_root, 99)
    tiles = DeviceTiles(dataset.test, CPU.device)
    summary = json.loads((folder / "runs/r/summary.json").read_text())
    model.load_state_dict(checkpoint.load(folder / "checkpoints/r/best.pt")["state_dict"])
    scored = evaluate(model, tiles, CPU).rounded()
    with np.load(folder / "runs/r/scores.npz", allow_pickle=False) as scores:
        np.testing.assert_allclose(scores["best_logits"], scored.logits, rtol=1.5e-3)  # float16
        np.testing.assert_array_equal(scores["targets"], scored.targets)
    assert summary["best"]["acc"]["value"] == float((scored.logits.argmax(1) == scored.targets).mean())
    validation = evaluate(model, DeviceTiles(dataset.val, CPU.device), CPU).summary("validate")
    row = read_history(folder / "runs/r/history.csv")[summary["best"]["epoch"] - 1]
    assert row["validate/loss"] == pytest.approx(validation["validate/loss"], rel=1e-5)


def test_two_processes_record_the_scores_that_one_process_computes(two: Path, phantom_root: Path) -> None:
    assert_scores_are_those_of_one_process(two, "squeezenet1_1", phantom_root)


@pytest.mark.slow
def test_two_processes_score_with_the_same_batchnorm_statistics(phantom_root: Path, tmp_path: Path) -> None:
    keys = (
        "--model_name=shufflenet_v2_x0_5",
        "--n_epochs=3",
        "--batch_size=10",
        "--lr=0.003",
    )  # enough steps for BatchNorm
    done = together("task1.py", *DATA, *keys, data_root=phantom_root, output=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_scores_are_those_of_one_process(tmp_path, "shufflenet_v2_x0_5", phantom_root)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_after_the_same_step_and_the_same_command_continues_there(
    two: Path, driver: str, phantom_root: Path, tmp_path: Path
) -> None:
    keys = [*DATA, *SQUEEZENET]
    stopped = together(driver, *keys, data_root=phantom_root, output=tmp_path, STOP="1")
    assert stopped.returncode != 0
    assert stopped.stderr.count("run r is saved after epoch 1 and 1 step;") == 2  # by either process
    again = together(driver, *keys, data_root=phantom_root, output=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "continuing run r after epoch 1 and 1 step\n" in again.stdout
    assert_same(tmp_path, two)


@pytest.mark.slow
def test_one_dead_process_ends_both_and_the_same_command_continues(
    two: Path, driver: str, phantom_root: Path, tmp_path: Path
) -> None:
    keys = [*DATA, *SQUEEZENET]
    died = together(driver, *keys, data_root=phantom_root, output=tmp_path, DIE="1")
    assert died.returncode != 0
    assert not (tmp_path / "runs/r/summary.json").exists()
    again = together(driver, *keys, data_root=phantom_root, output=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "continuing run r after epoch 1\n" in again.stdout
    assert_same(tmp_path, two)


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves_the_step_in_progress(driver: str, phantom_root: Path, tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as log:
        running = subprocess.Popen(
            command(driver, *DATA, *SQUEEZENET, data_root=phantom_root, output=tmp_path),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "WAIT": str(tmp_path)},
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + 120
    seeds = [tmp_path / f"seed-{rank}" for rank in range(2)]
    while not all(path.exists() for path in seeds):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) != 0
    text = (tmp_path / "log").read_text()
    begun = checkpoint.load(tmp_path / "checkpoints/r/last.pt")["begun"]
    assert begun is not None, text
    assert f"run r is saved after epoch 1 and {begun['steps']} step" in text
    assert len(begun["processes"]) == 2
    one, other = (path.read_text().split() for path in seeds)
    assert not set(one) & set(other)  # no process repeats the other's augmentation or dropout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "keys"),
    [
        (
            "train.py",
            ("--augmentation=ta_wide,stain", "--ema_decay=0.9", "--cutmix_alpha=1", "--tta", "--n_epochs=2"),
        ),
        (
            "task5.py",
            ("--weights=none", "--model_name=shufflenet_v2_x0_5", "--n_epochs=2", "--input_size=32"),
        ),
    ],
)
def test_every_script_runs_on_two_processes(
    script: str, keys: tuple[str, ...], phantom_root: Path, tmp_path: Path
) -> None:
    done = together(script, *DATA, *keys, "--batch_size=30", data_root=phantom_root, output=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(read_history(tmp_path / "runs/r/history.csv")) == 2
    assert done.stdout.count("best weights") == 1


def test_two_processes_without_a_run_id_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        run_script(task1.main, task1.Task1Config, ["--dataset=phantom"])
    assert ended.value.code == 2
    assert "torchrun: give --run_id" in capsys.readouterr().err
