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
from processes import assert_same, end, records, start

import train
from common.cli import run_script
from common.records import checkpoint
from common.training import loop
from common.training.loop import Trainer

KILLS = 6
DATA = ("--dataset=phantom", "--size=28", "--input_size=28", "--train_tiles=90", "--wandb=disabled", "--run_id=r")
# All that has a state or draws random numbers.
EVERYTHING = ("--augmentation=ta_wide,stain", "--ema_decay=0.9", "--mixup_alpha=0.4", "--cutmix_alpha=1")
SMALL = ("--model_name=mobilenet_v3_small", "--n_epochs=3", "--batch_size=45")


def run(folder: Path, data_root: Path, *keys: str) -> None:
    where = (f"--data_root={data_root}", f"--output_dir={folder}")
    run_script(train.main, train.TrainConfig, [*DATA, *SMALL, *EVERYTHING, *where, *keys])


@pytest.fixture(scope="module")
def whole(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, phantom_root)
    return folder


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


@pytest.mark.slow
def test_a_run_killed_six_times_leaves_the_same_records_and_weights(
    whole: Path, tmp_path: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draws, log = random.Random(0), tmp_path / "log"
    started = time.monotonic()
    assert end(start(lambda: run(tmp_path / "timed", phantom_root), log)) == 0
    duration = time.monotonic() - started
    writes = len(records(whole)) + 3 * 3  # the history and one or two checkpoints per epoch
    kills, runs = 0, 0
    while kills < KILLS:
        folder = tmp_path / f"killed-{runs}"
        runs += 1
        status: int | None = -signal.SIGKILL
        while status == -signal.SIGKILL:
            action = lambda folder=folder: run(folder, phantom_root)  # noqa: E731
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
        assert_same(folder, whole)
    with capsys.disabled():
        print(f"\n{kills} kills in {runs} runs, each with the files of the run without kills")


@pytest.mark.parametrize(
    ("number", "place"), [(signal.SIGTERM, "mix"), (signal.SIGINT, "mix"), (signal.SIGTERM, "evaluate")]
)
def test_a_signal_ends_the_run_at_once_and_loses_at_most_its_epoch(
    number: signal.Signals,
    place: str,
    whole: Path,
    tmp_path: Path,
    phantom_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, calls, stopped = getattr(loop, place), 0, []

    def signalled(*arguments: Any, **keys: Any) -> Any:
        nonlocal calls
        calls += 1
        if (tmp_path / "checkpoints/r/last.pt").exists():  # in the second epoch
            os.kill(os.getpid(), number)
        return original(*arguments, **keys)

    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(loop, place, signalled)
        patched.setattr(loop.Run, "stop", lambda run, number: stopped.append(number))
        run(tmp_path, phantom_root)
    assert ended.value.code == 128 + number
    assert stopped == [number]  # W&B's run is ended
    assert calls == (3 if place == "mix" else 2)  # an epoch is two steps: nothing came after the signal
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.endswith(
        f"{number.name}: run r keeps its finished epochs; the same command with --run_id=r continues"
    )
    assert len(checkpoint.load(tmp_path / "checkpoints/r/last.pt")["history"]) == 1
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == [
        signal.default_int_handler,  # run_script's
        handlers[1],
    ]
    run(tmp_path, phantom_root)
    assert_same(tmp_path, whole)


def test_outside_the_main_thread_no_signal_is_handled() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def enter() -> list[Any]:
        with loop.signals_interrupt():
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(enter).result() == before


def stop_before(epoch: int, monkeypatch: pytest.MonkeyPatch, folder: Path, data_root: Path, *keys: str) -> None:
    """Run until this epoch begins."""
    original = Trainer.train_epoch

    def stopped(trainer: Trainer, number: int) -> float:
        if number == epoch:
            raise KeyboardInterrupt
        return original(trainer, number)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Trainer, "train_epoch", stopped)
        run(folder, data_root, *keys)


@pytest.mark.parametrize("damage", ["torn", "missing"])
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(
    damage: str,
    whole: Path,
    tmp_path: Path,
    phantom_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_before(3, monkeypatch, tmp_path, phantom_root)
    last = tmp_path / "checkpoints/r/last.pt"
    content = last.read_bytes()
    last.unlink()
    if damage == "torn":
        last.write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    run(tmp_path, phantom_root)
    printed = capsys.readouterr()
    assert "continuing run r after epoch 1\n" in printed.out
    if damage == "torn":
        assert printed.err.startswith(f"{last} cannot be read: ")
    assert_same(tmp_path, whole)


def test_a_kill_between_last_checkpoint_and_history_loses_no_row(
    whole: Path, tmp_path: Path, phantom_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.Run.log_epoch

    def killed(run: loop.Run, history: list[dict[str, float]]) -> None:
        if len(history) == 2:
            raise KeyboardInterrupt
        original(run, history)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(loop.Run, "log_epoch", killed)
        run(tmp_path, phantom_root)
    run(tmp_path, phantom_root)
    assert_same(tmp_path, whole)


def test_two_damaged_checkpoints_end_the_run_and_stay(
    tmp_path: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints" / "r"
    folder.mkdir(parents=True)
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_text("torn")
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, phantom_root)
    assert ended.value.code == 1
    assert re.search(r"previous\.pt: not a readable checkpoint .*another --run_id", capsys.readouterr().err)
    assert (folder / "last.pt").read_text() == "torn"


def test_a_checkpoint_of_another_configuration_is_refused_without_its_record_too(
    tmp_path: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before(2, monkeypatch, tmp_path, phantom_root, "--lr=0.01")
    for path in (tmp_path / "runs" / "r").iterdir():
        path.unlink()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, phantom_root)
    assert ended.value.code == 2
    assert "started with another configuration (lr was 0.01)" in capsys.readouterr().err


def test_two_processes_cannot_train_the_same_run(tmp_path: Path, phantom_root: Path) -> None:
    log = tmp_path / "log"
    first = start(lambda: run(tmp_path, phantom_root, "--n_epochs=50"), tmp_path / "first")
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "runs" / "r" / "config.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert end(start(lambda: run(tmp_path, phantom_root, "--n_epochs=50"), log)) == 2
        assert log.read_text().strip().endswith(": wait for its end, or use another --run_id")
    finally:
        end(first, within=0)
