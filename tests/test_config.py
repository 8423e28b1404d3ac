import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from common.config import Config, TrainingConfig, parse, run_script
from common.errors import UsageError
from study.sweep import SweepConfig
from task2 import Task2Config
from task5 import Task5Config


def read(*arguments: str) -> TrainingConfig:
    return parse(TrainingConfig, arguments, "")


def test_every_spelling_of_a_key_is_read() -> None:
    for arguments in (
        ["--batch_size=32"],
        ["--batch-size=32"],
        ["--batch_size", "32"],
        ["--batch-size", "32"],
    ):
        assert read(*arguments).batch_size == 32


def test_values_as_a_wandb_agent_passes_them() -> None:
    config = read("--lr=0.0019976195957370426", "--batch_size=512.0", "--resume=False", "--run_id=a1b2c3d4")
    assert (config.lr, config.batch_size, config.resume) == (0.0019976195957370426, 512, False)


def test_none_switches_off_only_optional_keys() -> None:
    config = read("--early_stopping_patience=None", "--norm_weight_decay=null", "--run_id=none")
    assert (config.early_stopping_patience, config.norm_weight_decay) == (None, None)
    assert config.run_id == "none"


def test_a_bare_flag_is_true() -> None:
    assert read("--resume", "--run_id", "x").resume is True


def test_the_wandb_agents_run_id_is_taken_only_under_an_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    assert read().run_id != "fromagent"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert read().run_id == "fromagent"


def test_fresh_run_ids_differ() -> None:
    assert len({read().run_id for _ in range(20)}) == 20
    assert len(read().run_id) == 8


def test_the_number_of_training_tiles_follows_the_data_set() -> None:
    assert read().train_tiles is None
    assert read("--train_tiles=1").train_tiles == 1
    assert read("--train_tiles=9000", "--train_tiles=None").train_tiles is None
    assert read("--dataset=phantom").train_tiles == 9000
    assert read("--dataset=phantom", "--train_tiles=45").train_tiles == 45


def test_tiles_have_64_pixels_in_every_data_set() -> None:
    assert (read().size, read("--dataset=phantom").size) == (64, 64)
    assert read("--dataset", "phantom", "--size", "128").size == 128


def test_data_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHMNIST_ROOT", "/somewhere")
    assert read().data_root == Path("/somewhere")
    monkeypatch.delenv("PATHMNIST_ROOT")
    assert read().data_root == Path.home() / ".medmnist"
    assert read("--data_root=here").data_root == Path("here")


def test_a_path_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read("--data_root=~/data", "--output_dir", "~")
    assert (config.data_root, config.output_dir) == (tmp_path / "data", tmp_path)
    monkeypatch.setenv("PATHMNIST_ROOT", "~/tiles")
    assert read().data_root == tmp_path / "tiles"
    assert parse(SweepConfig, ["--file=~/s.yaml"], "").file == tmp_path / "s.yaml"


def allocate_a_tensor(config: TrainingConfig) -> None:
    torch.empty(2**60)


def allocate_an_array(config: TrainingConfig) -> None:
    np.empty(2**50)


def fill_a_gpu(config: TrainingConfig) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("main", [allocate_a_tensor, allocate_an_array, fill_a_gpu])
def test_out_of_memory_is_one_line_that_names_the_key_to_lower(
    main: Callable[[TrainingConfig], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(main, TrainingConfig, [])
    assert ended.value.code == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "out of memory (" in lines[0]
    assert lines[0].endswith(": lower --input_size or (in training) --batch_size")


@pytest.mark.parametrize("folder", ["runs/r", "", "gone"])
def test_an_unexpected_error_is_one_line_and_its_traceback_is_in_a_file_beside_the_run(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(config: TrainingConfig) -> None:
        raise RuntimeError("a shape\ndoes not fit")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if folder != "gone":
        (tmp_path / "out" / folder).mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        run_script(main, TrainingConfig, [f"--output_dir={tmp_path}/out", "--run_id=r"])
    assert ended.value.code == 70
    [line] = capsys.readouterr().err.splitlines()
    path = (tmp_path if folder == "gone" else tmp_path / "out" / folder) / "unexpected-error.txt"
    assert line.endswith(f": unexpected: RuntimeError: a shape; please report it with {path}")
    assert "does not fit" in path.read_text()
    assert "Traceback" in path.read_text()


def test_an_unexpected_error_without_a_folder_for_its_traceback_names_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(config: TrainingConfig) -> None:
        raise RuntimeError("a shape does not fit")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(SystemExit):
        run_script(main, TrainingConfig, [f"--output_dir={tmp_path}/out", "--run_id=r"])
    assert capsys.readouterr().err.endswith(": unexpected: RuntimeError: a shape does not fit; please report it\n")


def test_a_warm_up_that_would_fill_the_run_is_shortened_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for n_epochs, warmup in ((1, 0), (2, 1), (9, 4), (10, 9)):
        assert read(f"--n_epochs={n_epochs}", "--lr_warmup_epochs=9").lr_warmup_epochs == warmup
    read("--n_epochs=2", "--lr_warmup_epochs=9")
    lines = [line for line in capsys.readouterr().out.splitlines() if "lr_warmup_epochs 9 → 1" in line]
    assert lines == ["lr_warmup_epochs 9 → 1: the run has 2 epochs"]


def test_bookkeeping_keys_do_not_belong_to_what_a_run_computes() -> None:
    first = Task5Config(weights="none", train_part="all", run_id="r")
    kept = dataclasses.replace(
        first,
        data_root="/a",
        output_dir="/b",
        wandb="offline",
        wandb_model=True,
        resume=True,
        scratch=False,
        n_seeds=2,
    )
    assert kept != first
    assert kept.identity() == first.identity()
    assert dataclasses.replace(first, seed=1).identity() != first.identity()
    assert set(first.as_dict()) - set(first.identity()) == {
        *("data_root", "output_dir", "wandb", "wandb_model", "resume", "scratch", "n_seeds")
    }
    assert "run_id" in read().identity()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batchsize=3"], "unknown key --batchsize; did you mean --batch_size?"),
        (["extra"], "unknown key extra; --help lists the keys"),
        (["--no-tta"], "unknown key --no_tta; write --tta=False"),
        (["--batch_size=0"], "--batch_size 0: must be at least 2"),
        (["--batch_size=many"], "'many' is not a whole number"),
        (["--batch_size=1.5"], "'1.5' is not a whole number"),
        (["--batch_size"], "--batch_size: expected one argument"),
        (["--lr=0"], "--lr 0.0: must be above 0"),
        (["--lr=-1"], "--lr -1.0: must be above 0"),
        (["--lr=nan"], "--lr nan: must be a finite number"),
        (["--lr=inf"], "--lr inf: must be a finite number"),
        (["--lr=fast"], "'fast' is not a number"),
        (["--lr_min=1.5"], "--lr_min 1.5: must be at least 0 and at most 1"),
        (["--n_epochs=0"], "--n_epochs 0: must be at least 1"),
        (["--seed=-1"], "--seed -1: must be at least 0"),
        (["--resume=perhaps"], "'perhaps' is neither True nor False"),
        (["--resume"], "--resume needs --run_id"),
        (["--data_root=~nobody-has-this-name/x"], "'~nobody-has-this-name/x' begins with an unknown home folder"),
        (["--size=32"], "--size 32: choose from 28, 64, 128, 224"),
        (["--dataset=pathmnst"], "--dataset pathmnst: choose from pathmnist, phantom; did you"),
        (["--dataset=phantom", "--train_tiles=44"], "--train_tiles 44: must be at least 45 on the phantom"),
        (["--train_tiles=0"], "--train_tiles 0: must be at least 1"),
        (["--train_tiles=half"], "'half' is not a whole number"),
        (["--device=tpu"], "--device tpu: choose from auto, cpu, cuda"),
        (["--precision=fp16"], "--precision fp16: choose from auto, fp32, bf16"),
        (["--run_id=../x"], "--run_id ../x: a run id names files"),
        (["--model_name=resnet19"], "--model_name resnet19: torchvision has no classification model of this"),
        (["--model_name=mobilenetv3_large"], "did you mean mobilenet_v3_large?"),
        (["--model_name=timm:resnet19"], "--model_name timm:resnet19: timm has no classification model of this"),
        (["--select_on=test/acc"], "--select_on test/acc: choose from"),
    ],
)
def test_impossible_values_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        read(*arguments)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_key_of_the_runs_is_no_mistyped_key_of_another_program() -> None:
    with pytest.raises(UsageError, match=r"^unknown key --dataset; --help lists the keys$"):
        parse(Task2Config, ["--dataset=x"], "")
    with pytest.raises(
        UsageError, match=r"^unknown key --dataset, which is a key of the runs: write it after --$"
    ):
        parse(SweepConfig, ["--dataset=x"], "")


def test_an_unknown_mode_of_wandb_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(UsageError, match=r"WANDB_MODE=offlin is no mode; choose from .*; did you mean offline"):
        read()
    assert read("--wandb=disabled").wandb == "disabled"


def test_a_configuration_made_in_python_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert TrainingConfig(data_root="~/tiles").data_root == Path("/home/me/tiles")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--lr -1"):
        TrainingConfig(lr=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().lr = 1.0  # type: ignore[misc]


def test_a_usage_error_is_one_line_with_exit_status_2_and_writes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "task1.py", "--lrr=1", f"--output_dir={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "task1.py: unknown key --lrr; did you mean --lr?\n"
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_help_explains_every_key_with_its_default() -> None:
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for field in dataclasses.fields(TrainingConfig):
        assert f"--{field.name} " in done.stdout
        assert field.metadata["description"][:20] in " ".join(done.stdout.split())
    assert "(default: mobilenet_v3_large)" in done.stdout
    assert not re.search(r"\(default: [^)]*\)\s+\(default", done.stdout)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["task1.py"], "task1.py"),
        (["-m", "common.finetune.predict"], "common.finetune.predict"),
        (["-m", "study"], "study"),
    ],
)
def test_help_and_errors_name_the_command_as_it_is_typed(command: list[str], name: str) -> None:
    def start(key: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *command, key], cwd=ROOT, capture_output=True, text=True)

    assert start("--help").stdout.startswith(f"usage: python {' '.join(command)} [-h] ")
    assert start("--quux").stderr == f"{name}: unknown key --quux; --help lists the keys\n"


def test_as_dict_is_plain_data_of_every_key() -> None:
    values = Config().as_dict()
    assert set(values) == {field.name for field in dataclasses.fields(Config)}
    assert values.pop("train_tiles") is None
    assert all(isinstance(value, str | int | float | bool) for value in values.values())
