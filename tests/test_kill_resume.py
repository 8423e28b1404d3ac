"""On a CPU, a killed and continued run leaves the same files, bit by bit, as a run that nothing interrupts."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import assert_same, end, start

import train
from common.cli import run_script
from common.records import checkpoint
from common.training import loop
from common.training.loop import Trainer

DATA = (
    *("--dataset=phantom", "--size=28", "--input_size=28", "--train_tiles=90"),
    *("--wandb=disabled", "--run_id=r", "--device=cpu"),
)
# All that has a state or draws random numbers.
EVERYTHING = ("--augmentation=ta_wide,stain", "--ema_decay=0.9995")
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 4, 6, 8, 11, 14])
def test_a_run_that_is_killed_and_continued_leaves_the_same_records_and_weights(
    number: int, whole: Path, tmp_path: Path, phantom_root: Path
) -> None:
    def killed() -> None:
        """Run until the `number`-th finished file is about to get its name."""
        rename, count = os.replace, 0

        def counted(*arguments: Any, **keys: Any) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*arguments, **keys)

        os.replace = counted  # type: ignore[assignment]
        run(tmp_path, phantom_root)

    log = tmp_path.with_suffix(".log")
    assert end(start(killed, log)) == -signal.SIGKILL
    assert end(start(lambda: run(tmp_path, phantom_root), log)) == 0, log.read_text()
    assert_same(tmp_path, whole)


def test_a_signal_ends_the_run_at_once_and_loses_at_most_its_epoch(
    whole: Path,
    tmp_path: Path,
    phantom_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, calls = loop.learning_rate_factor, 0

    def signalled(*arguments: Any, **keys: Any) -> Any:
        nonlocal calls
        calls += 1
        if (tmp_path / "checkpoints/r/last.pt").exists():  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **keys)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(loop, "learning_rate_factor", signalled)
        run(tmp_path, phantom_root)
    assert ended.value.code == 143
    assert calls == 3  # an epoch is two steps: nothing came after the signal
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.endswith(": ended by SIGTERM; start the same command with --run_id=r again")
    assert len(checkpoint.load(tmp_path / "checkpoints/r/last.pt")["history"]) == 1
    assert signal.getsignal(signal.SIGTERM) == handler
    run(tmp_path, phantom_root)
    assert_same(tmp_path, whole)


def test_a_checkpoint_without_its_record_is_refused_and_nothing_is_written(
    tmp_path: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Trainer, "save_best", lambda trainer: os.kill(os.getpid(), signal.SIGINT))
        run(tmp_path, phantom_root, "--lr=0.01")
    for path in (tmp_path / "runs" / "r").iterdir():
        path.unlink()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, phantom_root)
    assert ended.value.code == 1
    assert "config.json: missing, but the run has a last.pt: restore it, or use" in capsys.readouterr().err
    assert [*(tmp_path / "runs" / "r").iterdir()] == []
