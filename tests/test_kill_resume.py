"""A run that is killed at any moment and goes on ends as an undisturbed run does: bit for bit, on a CPU."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import assert_same, end, records, start

import task1
import task5
import train
from common import checkpoint, training
from common.config import run_script
from common.errors import Stopped
from study import sweep

KILLS = 20  # of every script, in one test
DATA = ("--dataset=phantom", "--size=28", "--train_tiles=90", "--wandb=disabled", "--run_id=r")
# Small, and with everything that keeps a state or draws: EMA, dropout, augmentation, a mixing partner.
EVERYTHING = ("--augmentation=ta_wide,stain", "--ema_decay=0.9", "--mixup_alpha=0.4", "--tta")
SMALL = ("--model_name=shufflenet_v2_x0_5", "--n_epochs=5", "--batch_size=45")
SCRIPTS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "task1.py": (task1.main, task1.Task1Config, SMALL),
    "train.py": (train.main, train.TrainConfig, (*SMALL, "--early_stopping_patience=5", *EVERYTHING)),
    "task5.py": (task5.main, task5.Task5Config, (*SMALL, "--weights=none", "--resize_to=32")),
}


def dying_at_write(action: Callable[[], None], number: int, before: bool) -> Callable[[], None]:
    """The action, killed at its `number`-th rename of a finished file, before or after it."""

    def killed() -> None:
        rename, count = os.replace, 0

        def counted(*arguments: Any, **keys: Any) -> None:
            nonlocal count
            count += 1
            if count == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*arguments, **keys)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = counted  # type: ignore[assignment]
        action()

    return killed


def script(name: str, folder: Path, data_root: Path) -> Callable[[], None]:
    main, config_class, keys = SCRIPTS[name]
    return lambda: run_script(
        main, config_class, [*DATA, *keys, f"--data_root={data_root}", f"--output_dir={folder}"]
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_twenty_kills_leave_the_records_and_weights_of_an_undisturbed_run(
    name: str, tmp_path: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = random.Random(name)
    log = tmp_path / "log"
    script(name, tmp_path / "whole", phantom_root)()  # here, so that the forks need not import anything any more
    started = time.monotonic()
    assert end(start(script(name, tmp_path / "timed", phantom_root), log)) == 0
    duration = time.monotonic() - started
    writes = len(records(tmp_path / "whole")) + 3 * 5  # an epoch writes its history and one or two checkpoints
    kills, runs = 0, 0
    while kills < KILLS:
        folder = tmp_path / f"killed-{runs}"
        runs += 1
        status: int | None = -signal.SIGKILL
        while status == -signal.SIGKILL:
            action = script(name, folder, phantom_root)
            if kills >= KILLS:
                status = end(start(action, log))
            elif kills % 2:
                number, before = draws.randint(1, writes // 2), draws.random() < 0.5
                status = end(start(dying_at_write(action, number, before), log))
            else:
                status = end(start(action, log), within=draws.uniform(0, duration))
            kills += status == -signal.SIGKILL
            if (folder / "runs/r/summary.json").exists():  # the last file: whatever kills it now, it is finished
                status = 0
        assert status == 0, log.read_text()[-2000:]
        assert_same(folder, tmp_path / "whole")
    with capsys.disabled():
        print(f"\n{name}: {kills} kills over {runs} runs, every one ended like the undisturbed one")


def run_six_steps(folder: Path, data_root: Path) -> None:
    """An epoch of six steps, and another one."""
    keys = ["--n_epochs=2", "--batch_size=15", *EVERYTHING, f"--data_root={data_root}", f"--output_dir={folder}"]
    run_script(train.main, train.TrainConfig, [*DATA, *keys])


@pytest.fixture(scope="module")
def six_steps(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("six-steps")
    run_six_steps(folder, phantom_root)
    return folder


def run_four_epochs(folder: Path, data_root: Path) -> None:
    keys = ["--n_epochs=4", "--batch_size=45", f"--data_root={data_root}", f"--output_dir={folder}"]
    run_script(task1.main, task1.Task1Config, [*DATA, *keys])


@pytest.fixture(scope="module")
def four_epochs(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four-epochs")
    run_four_epochs(folder, phantom_root)
    return folder


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 5, 6])
def test_a_signal_lets_the_step_end_and_loses_nothing(
    signal_number: signal.Signals,
    step: int,
    tmp_path: Path,
    phantom_root: Path,
    six_steps: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, steps = training.mix, 0

    def signalled(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal_number)
        return original(*arguments)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(training, "mix", signalled)
        run_six_steps(tmp_path, phantom_root)
    assert ended.value.code == 128 + signal_number
    assert steps == step  # the step in progress was the last
    assert checkpoint.load(tmp_path / "checkpoints/r/last.pt")["begun"]["steps"] == step
    run_six_steps(tmp_path, phantom_root)
    assert_same(tmp_path, six_steps)


def test_a_signal_in_an_evaluation_keeps_the_epoch(
    tmp_path: Path, phantom_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = training.evaluate

    def signalled(*arguments: Any, **keys: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **keys)

    monkeypatch.setattr(training, "evaluate", signalled)
    keys = [*DATA, "--n_epochs=1", f"--data_root={phantom_root}", f"--output_dir={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        run_script(task1.main, task1.Task1Config, keys)
    assert ended.value.code == 143
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].endswith("SIGTERM: run r is saved after epoch 1; the same command with --run_id=r continues")
    assert len(checkpoint.load(tmp_path / "checkpoints/r/last.pt")["history"]) == 1


def test_the_second_signal_is_obeyed_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), training.Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.came == signal.SIGINT
            assert isinstance(interruption.stopped("saved"), Stopped)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("damage", ["torn", "empty", "missing"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(
    damage: str,
    tmp_path: Path,
    phantom_root: Path,
    four_epochs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = training.Trainer.train_epoch

    def stopped(trainer: training.Trainer, epoch: int) -> float:
        if epoch == 4:
            raise KeyboardInterrupt
        return original(trainer, epoch)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(training.Trainer, "train_epoch", stopped)
        run_four_epochs(tmp_path, phantom_root)
    last = tmp_path / "checkpoints/r/last.pt"
    content = last.read_bytes()
    last.unlink()
    if damage != "missing":
        last.write_bytes(content[: len(content) // 2] if damage == "torn" else b"")
    capsys.readouterr()
    run_four_epochs(tmp_path, phantom_root)
    said = capsys.readouterr()
    assert "continuing run r after epoch 2\n" in said.out
    if damage != "missing":
        assert said.err.startswith(f"{last} cannot be read; going on from previous.pt, an earlier one\n")
    assert_same(tmp_path, four_epochs)


def test_a_kill_between_the_last_checkpoint_and_the_history_loses_no_line(
    tmp_path: Path, phantom_root: Path, four_epochs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training.Run.log_epoch

    def killed(run: training.Run, history: list[dict[str, float]]) -> None:
        if len(history) == 4:
            raise KeyboardInterrupt
        original(run, history)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(training.Run, "log_epoch", killed)
        run_four_epochs(tmp_path, phantom_root)
    run_four_epochs(tmp_path, phantom_root)
    assert_same(tmp_path, four_epochs)


def test_two_torn_checkpoints_are_a_fault_in_one_line(
    tmp_path: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints" / "r"
    folder.mkdir(parents=True)
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_text("torn")
    keys = [*DATA, "--n_epochs=1", f"--data_root={phantom_root}", f"--output_dir={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        run_script(task1.main, task1.Task1Config, keys)
    assert ended.value.code == 1
    assert re.search(r"last\.pt: not a readable checkpoint .*another --run_id", capsys.readouterr().err)
    assert (folder / "last.pt").read_text() == "torn"


def test_a_checkpoint_of_another_configuration_is_refused_though_its_record_is_gone(
    tmp_path: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [*DATA, f"--data_root={phantom_root}", f"--output_dir={tmp_path}"]
    run_script(task1.main, task1.Task1Config, [*keys, "--n_epochs=1", "--lr=0.01"])
    for path in (tmp_path / "runs" / "r").iterdir():
        path.unlink()
    with pytest.raises(SystemExit) as ended:
        run_script(task1.main, task1.Task1Config, [*keys, "--n_epochs=1"])
    assert ended.value.code == 2
    assert "started with another configuration (lr was 0.01)" in capsys.readouterr().err


def test_a_run_belongs_to_one_process_at_a_time(tmp_path: Path, phantom_root: Path) -> None:
    log = tmp_path / "log"
    main, config_class, _ = SCRIPTS["task1.py"]
    keys = [*DATA, "--n_epochs=50", f"--data_root={phantom_root}", f"--output_dir={tmp_path}"]
    first = start(lambda: run_script(main, config_class, keys), tmp_path / "first")
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "runs" / "r" / "config.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert end(start(lambda: run_script(main, config_class, keys), log)) == 2
        [line] = log.read_text().strip().splitlines()
        assert line.endswith("run r is another process's at the moment: use another --run_id")
    finally:
        end(first, within=0)


# The sweeps: a killed worker leaves its run behind, or takes it along


def sweep_file(folder: Path, method: str, data_root: Path) -> Path:
    content: dict[str, Any] = {
        "name": "s",
        "program": "train.py",
        "method": method,
        "metric": {"name": "validate/acc", "goal": "maximize"},
        "parameters": {
            **{name.removeprefix("--"): {"value": value} for name, value in (key.split("=") for key in DATA[:4])},
            "data_root": {"value": str(data_root)},
            "model_name": {"value": "shufflenet_v2_x0_5"},
            "n_epochs": {"value": 4},
            "batch_size": {"value": 15},
            "label_smoothing": {"values": [0.0, 0.1]},
        },
    }
    if method == "grid":
        content["parameters"]["seed"] = {"values": [0, 1]}
    else:
        content["parameters"]["lr"] = {"min": 0.0001, "max": 0.01, "distribution": "log_uniform_values"}
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["grid", "bayes"])
def test_twenty_kills_of_a_sweep_leave_its_table_as_it_is_without_them(
    method: str,
    tmp_path: Path,
    phantom_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = sweep_file(tmp_path, method, phantom_root)

    def work(folder: Path) -> Callable[[], None]:
        config = sweep.SweepConfig(file=file, output_dir=folder, count=4)
        return lambda: sweep.main(config)

    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    started = time.monotonic()
    assert end(start(work(whole), log)) == 0, log.read_text()
    longest = (time.monotonic() - started) / 4  # of the time until a kill: about that of a trial
    draws = random.Random(method)
    kills = 0
    while kills < KILLS:
        started = time.monotonic()
        status = end(start(work(killed), log), within=draws.uniform(0, longest))
        if status == 0:  # finished all the same: from now on only the table is made again, and killed at that
            longest = min(longest, time.monotonic() - started)
            continue
        assert status == -signal.SIGKILL, log.read_text()
        kills += 1
    assert end(start(work(killed), log)) == 0, log.read_text()
    assert_same(killed / "runs", whole / "runs")
    for table in ("table.csv", *(["runs.csv"] if method == "grid" else [])):
        assert records(killed / "sweeps")[f"s/{table}"] == records(whole / "sweeps")[f"s/{table}"]
    with capsys.disabled():
        print(f"\n{method} sweep: {kills} kills, its table is that of an undisturbed one")
