"""The keys: how they are read, their defaults, --help, and how a program ends."""

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
import torch
from conftest import ROOT
from processes import end, start
from pydantic import ValidationError, model_validator

from common import cli
from common.cli import UsageError, parse, run_script
from common.config import TrainingConfig
from task5 import Task5Config
from train import TrainConfig


def read(*arguments: str) -> TrainingConfig:
    return parse(TrainingConfig, arguments)


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--batch_size=32"], {"batch_size": 32}),
        (["--batch_size", "32"], {"batch_size": 32}),
        (["--amsgrad", "--lr=2"], {"amsgrad": True, "lr": 2.0}),
        # As a W&B agent writes them.
        (["--tta=False", "--amsgrad=True"], {"tta": False, "amsgrad": True}),
        (["--batch_size=512.0", "--lr=1e-05"], {"batch_size": 512, "lr": 1e-5}),
        (["--early_stopping_patience=null"], {"early_stopping_patience": None}),
        (["--early_stopping_patience=none"], {"early_stopping_patience": None}),
        (["--run_id=none"], {"run_id": "none"}),  # not an optional key
    ],
)
def test_every_spelling_of_a_key_is_read(arguments: list[str], values: dict[str, Any]) -> None:
    config = read(*arguments).as_dict()
    assert {name: config[name] for name in values} == values


def test_the_id_is_new_or_that_of_the_wandb_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    assert len({read().run_id for _ in range(20)}) == 20
    assert re.fullmatch("[0-9a-f]{8}", read().run_id)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert read().run_id == "fromagent"


def test_defaults_follow_other_keys() -> None:
    assert (read().train_tiles, read("--dataset=phantom").train_tiles) == (None, 9000)
    assert read("--train_tiles=9000", "--train_tiles=None").train_tiles is None
    assert [read(f"--size={size}").input_size for size in (28, 64, 128)] == [64, 64, 128]


def test_a_path_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read().data_root == tmp_path / ".medmnist"
    assert read("--output_dir=~").output_dir == tmp_path
    assert TrainingConfig(data_root="~/tiles").data_root == tmp_path / "tiles"  # type: ignore[arg-type]
    monkeypatch.setenv("PATHMNIST_ROOT", "~/data")
    assert read().data_root == tmp_path / "data"


def test_a_warm_up_that_would_fill_the_run_is_shortened() -> None:
    for n_epochs, warmup in ((1, 0), (2, 1), (9, 4), (10, 9)):
        assert read(f"--n_epochs={n_epochs}", "--lr_warmup_epochs=9").lr_warmup_epochs == warmup


def test_bookkeeping_keys_do_not_belong_to_what_a_run_computes() -> None:
    first = Task5Config(weights="none", run_id="r")
    kept = {"data_root": "/a", "device": "cpu", "output_dir": "/b", "wandb": "offline", "scratch": False}
    assert first.replaced(**kept).identity() == first.identity()
    assert first.replaced(seed=1).identity() != first.identity()
    assert set(first.as_dict()) - set(first.identity()) == set(kept)


def test_a_configuration_in_python_is_checked_and_cannot_change() -> None:
    config = TrainConfig(run_id="r", n_epochs=3)
    assert config.replaced(seed=2) == TrainConfig(run_id="r", n_epochs=3, seed=2)
    for change, message in ({"lr": -1}, "--lr -1: must be greater than 0"), ({"learn": 1}, "--learn 1: "):
        with pytest.raises(UsageError, match=message):
            TrainConfig(**change)
        with pytest.raises(UsageError, match=message):
            config.replaced(**change)
    with pytest.raises(ValidationError, match="frozen"):
        config.lr = 1.0

    class Refused(TrainConfig):
        @model_validator(mode="after")
        def _refuse(self) -> Self:
            raise ValueError("all of it")

    with pytest.raises(UsageError, match=r"^all of it$"):
        Refused(run_id="r")


def test_help_explains_every_key_with_its_choices_and_its_default() -> None:
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    shown = " ".join(done.stdout.split())
    for name, field in TrainConfig.model_fields.items():
        assert f"--{name} " in shown
        assert str(field.description)[:20] in shown
    assert "--optimizer STR Adam, or AdamW with decoupled weight decay [adam | adamw] (default: adamw)" in shown
    assert "(`last`: loss); None: never (default: 3)" in shown  # the recipe's


def test_errors_name_the_program_as_it_is_typed(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "study.report", "--quux", f"--output_dir={tmp_path}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "study.report: unknown key --quux; --help lists the keys\n"


def ended(main: Callable[[TrainingConfig], None], *arguments: str) -> int:
    """The exit status of a program."""
    with pytest.raises(SystemExit) as end:
        run_script(main, TrainingConfig, arguments)
    return int(str(end.value.code))


def refuse(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "main",
    [
        lambda _: torch.empty(2**60),
        lambda _: np.empty(2**50),
        lambda _: refuse(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
        lambda _: refuse(RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")),
        lambda _: refuse(ImportError("libx.so: failed to map segment from shared object")),
        lambda _: refuse(RuntimeError("could not create a primitive")),
        lambda _: refuse(OSError(errno.ENOMEM, "Cannot allocate memory")),
    ],
)
def test_out_of_memory_is_one_line_that_names_the_key_to_lower(
    main: Callable[[TrainingConfig], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(main) == 3
    [line] = capsys.readouterr().err.splitlines()
    remedy = "lower --input_size or lower --batch_size, with another --run_id"
    assert re.search(rf"out of memory \(.*\): {remedy}$", line)


def test_before_the_line_of_an_unexpected_error_stands_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(lambda _: refuse(RuntimeError("a shape\ndoes not fit"))) == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].endswith(": unexpected: RuntimeError: a shape; please report it with the lines above")
    ended(lambda _: refuse(RuntimeError()))
    assert ": unexpected: RuntimeError: RuntimeError; please" in capsys.readouterr().err
    ended(lambda _: refuse(UsageError("a\x1bb\nc")))
    assert capsys.readouterr().err.endswith(": a b c\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_that_says_how_to_continue(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def main(config: TrainingConfig) -> None:
        os.kill(os.getpid(), number)

    assert ended(main, "--run_id=r") == 128 + number
    words = f": ended by {number.name}; start the same command with --run_id=r again\n"
    assert capsys.readouterr().err.endswith(words)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")  # its agent would count an exit status as a failure
    finish = SimpleNamespace(finish=lambda exit_code: print("W&B's run is ended with", exit_code))
    monkeypatch.setitem(sys.modules, "wandb", finish)
    assert end(start(lambda: ended(main), tmp_path / "log")) == -number
    assert f"W&B's run is ended with {128 + number}\n" in (tmp_path / "log").read_text()


def test_a_log_has_lines_of_progress(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert (list(cli.progress([1, 2], desc="work")), capfd.readouterr().err) == ([1, 2], "")
    monkeypatch.setattr(cli, "LOG_EVERY", 0.0)
    with cli.progress(total=4, desc="work", unit=" tiles", leave=False) as bar:
        bar.update(1)
        bar.update(2)
    begins = [line[:18] for line in capfd.readouterr().err.split("\n")]
    assert begins == ["work:   0%|       ", "work:  25%|##5    ", "work:  75%|#######", ""]
