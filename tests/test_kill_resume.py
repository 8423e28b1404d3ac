"""On a CPU, a killed and continued run leaves the same files, bit by bit, as a run that nothing interrupts."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MODEL
from processes import assert_same, end, mount, records, start
from sweep_runs import wait_for

import task1
import task5
import train
from common.config import run_script
from common.errors import Stopped
from common.records import checkpoint
from common.training import loop
from study import sweep

KILLS = 20  # per script
DATA = ("--dataset=phantom", "--size=28", "--input_size=28", "--train_tiles=90", "--wandb=disabled", "--run_id=r")
# All that has a state or draws random numbers, besides dropout.
EVERYTHING = ("--augmentation=ta_wide,stain", "--ema_decay=0.9", "--mixup_alpha=0.4", "--tta")
SMALL = ("--model_name=shufflenet_v2_x0_5", "--n_epochs=5", "--batch_size=45")
SCRIPTS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "task1.py": (task1.main, task1.Task1Config, SMALL),
    "train.py": (train.main, train.TrainConfig, (*SMALL, "--early_stopping_patience=5", *EVERYTHING)),
    "task5.py": (task5.main, task5.Task5Config, (*SMALL, "--weights=none", "--input_size=32")),
}


def killed_at_write(action: Callable[[], None], number: int, before: bool) -> Callable[[], None]:
    """The action; a SIGKILL comes before or after its `number`-th rename of a finished file."""

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
def test_a_run_killed_twenty_times_leaves_the_same_records_and_weights(
    name: str, tmp_path: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = random.Random(name)
    log = tmp_path / "log"
    script(name, tmp_path / "whole", phantom_root)()  # in this process, so that the forks have all imports
    started = time.monotonic()
    assert end(start(script(name, tmp_path / "timed", phantom_root), log)) == 0
    duration = time.monotonic() - started
    writes = len(records(tmp_path / "whole")) + 3 * 5  # the history and one or two checkpoints per epoch
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
                status = end(start(killed_at_write(action, number, before), log))
            else:
                status = end(start(action, log), within=draws.uniform(0, duration))
            kills += status == -signal.SIGKILL
            if (folder / "runs/r/summary.json").exists():  # the last file: the run is finished
                status = 0
        assert status == 0, log.read_text()[-2000:]
        assert_same(folder, tmp_path / "whole")
    with capsys.disabled():
        print(f"\n{name}: {kills} kills in {runs} runs, each with the files of the run without kills")


def run_six_steps(folder: Path, data_root: Path) -> None:
    """Two epochs of six steps, with a network that has dropout."""
    keys = [f"--model_name={MODEL}", "--n_epochs=2", "--batch_size=15", *EVERYTHING]
    where = [f"--data_root={data_root}", f"--output_dir={folder}"]
    run_script(train.main, train.TrainConfig, [*DATA, *keys, *where])


@pytest.fixture(scope="module")
def six_steps(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("six-steps")
    run_six_steps(folder, phantom_root)
    return folder


@pytest.fixture(scope="module")
def whole_task1(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole-task1")
    script("task1.py", folder, phantom_root)()
    return folder


@pytest.mark.parametrize(("signal_number", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 5), (signal.SIGTERM, 6)])
def test_a_signal_ends_the_run_after_its_step_and_the_run_can_be_continued(
    signal_number: signal.Signals,
    step: int,
    tmp_path: Path,
    phantom_root: Path,
    six_steps: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, steps = loop.mix, 0

    def signalled(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal_number)
        return original(*arguments)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(loop, "mix", signalled)
        run_six_steps(tmp_path, phantom_root)
    assert ended.value.code == 128 + signal_number
    assert steps == step  # no step came after it
    assert checkpoint.load(tmp_path / "checkpoints/r/last.pt")["begun"]["steps"] == step
    run_six_steps(tmp_path, phantom_root)
    assert_same(tmp_path, six_steps)


def test_a_signal_during_validation_ends_the_run_after_the_epoch(
    tmp_path: Path, phantom_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = loop.evaluate

    def signalled(*arguments: Any, **keys: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **keys)

    monkeypatch.setattr(loop, "evaluate", signalled)
    keys = [*DATA, "--n_epochs=1", f"--data_root={phantom_root}", f"--output_dir={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        run_script(task1.main, task1.Task1Config, keys)
    assert ended.value.code == 143
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "SIGTERM: run r is saved after epoch 1" in error[0]
    assert "--run_id=r" in error[0]
    assert len(checkpoint.load(tmp_path / "checkpoints/r/last.pt")["history"]) == 1


def test_the_second_signal_stops_the_process_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), loop.Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.came == signal.SIGINT
            assert isinstance(interruption.error("saved"), Stopped)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_no_signal_is_handled() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def enter() -> list[Any]:
        with loop.Interruption() as interruption:
            return [interruption.came, *(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))]

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(enter).result() == [None, *before]


@pytest.mark.parametrize("damage", ["torn", "missing"])
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(
    damage: str,
    tmp_path: Path,
    phantom_root: Path,
    whole_task1: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = loop.Trainer.train_epoch

    def stopped(trainer: loop.Trainer, epoch: int) -> float:
        if epoch == 4:
            raise KeyboardInterrupt
        return original(trainer, epoch)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(loop.Trainer, "train_epoch", stopped)
        script("task1.py", tmp_path, phantom_root)()
    last = tmp_path / "checkpoints/r/last.pt"
    content = last.read_bytes()
    last.unlink()
    if damage == "torn":
        last.write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    script("task1.py", tmp_path, phantom_root)()
    printed = capsys.readouterr()
    assert "continuing run r after epoch 2\n" in printed.out
    if damage == "torn":
        assert printed.err.startswith(f"{last} cannot be read: ")
    assert_same(tmp_path, whole_task1)


def test_a_kill_between_last_checkpoint_and_history_loses_no_row(
    tmp_path: Path, phantom_root: Path, whole_task1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.Run.log_epoch

    def killed(run: loop.Run, history: list[dict[str, float]]) -> None:
        if len(history) == 4:
            raise KeyboardInterrupt
        original(run, history)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(loop.Run, "log_epoch", killed)
        script("task1.py", tmp_path, phantom_root)()
    script("task1.py", tmp_path, phantom_root)()
    assert_same(tmp_path, whole_task1)


def test_two_damaged_checkpoints_end_the_run_with_one_line(
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


def test_a_checkpoint_of_another_configuration_is_refused_without_its_record_too(
    tmp_path: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    keys = [*DATA, f"--data_root={phantom_root}", f"--output_dir={tmp_path}"]
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(loop.Run, "finish", killed)  # a finished run has no last.pt
        run_script(task1.main, task1.Task1Config, [*keys, "--n_epochs=1", "--lr=0.01"])
    for path in (tmp_path / "runs" / "r").iterdir():
        path.unlink()
    with pytest.raises(SystemExit) as ended:
        run_script(task1.main, task1.Task1Config, [*keys, "--n_epochs=1"])
    assert ended.value.code == 2
    assert "started with another configuration (lr was 0.01)" in capsys.readouterr().err


def test_two_processes_cannot_train_the_same_run(tmp_path: Path, phantom_root: Path) -> None:
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
        assert line.endswith(": wait for its end, or use another --run_id")
    finally:
        end(first, within=0)


# Sweeps: the kill may end only the worker, or its trial with it


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
def test_a_sweep_killed_twenty_times_leaves_the_same_table(
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
    longest = (time.monotonic() - started) / 4  # the latest kill: about the time of one trial
    draws = random.Random(method)
    kills = 0
    while kills < KILLS:
        started = time.monotonic()
        status = end(start(work(killed), log), within=draws.uniform(0, longest))
        if status == 0:  # it finished first; further runs only write the table, so kill them earlier
            longest = min(longest, time.monotonic() - started)
            continue
        assert status == -signal.SIGKILL, log.read_text()
        kills += 1
    assert end(start(work(killed), log)) == 0, log.read_text()
    assert_same(killed / "runs", whole / "runs")
    for table in ("table.csv", *(["runs.csv"] if method == "grid" else [])):
        assert records(killed / "sweeps")[f"s/{table}"] == records(whole / "sweeps")[f"s/{table}"]
    with capsys.disabled():
        print(f"\n{method} sweep: {kills} kills, and the table of the sweep without kills")


@pytest.mark.slow
def test_a_search_ends_the_same_after_a_full_disk_and_killed_trainings(
    small_disk: Path, tmp_path: Path, phantom_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file, log = sweep_file(tmp_path, "bayes", phantom_root), tmp_path / "log"

    def search(folder: Path) -> int:
        arguments = [f"--file={file}", f"--output_dir={folder}", "--count=2", "--workers=1"]
        log.unlink(missing_ok=True)
        return start(lambda: run_script(sweep.main, sweep.SweepConfig, arguments), log)

    assert end(search(tmp_path / "whole")) == 0, log.read_text()
    assert mount(small_disk, "remount,size=400k") == 0  # room for the records, but for no checkpoint
    assert end(search(small_disk)) == 1
    assert "No space left on device" in log.read_text()
    assert mount(small_disk, "remount,size=64m") == 0
    for begun in ("runs/s-0/config.json", "checkpoints/s-0/last.pt"):
        command = search(small_disk)
        children = Path(f"/proc/{command}/task/{command}/children")
        wait_for(lambda begun=begun, children=children: (small_disk / begun).exists() and children.read_text())
        os.kill(
            int(children.read_text().split()[0]), signal.SIGKILL
        )  # as the kernel kills a training that needs too much memory
        assert end(command) == 1
        assert "failed: see their logs; the same command tries them again" in log.read_text()
    assert end(search(small_disk)) == 0, log.read_text()
    assert_same(small_disk / "runs", tmp_path / "whole" / "runs")
    assert records(small_disk / "sweeps")["s/table.csv"] == records(tmp_path / "whole/sweeps")["s/table.csv"]
