"""Every mistake of a user ends with one line that names it and the right exit status; no file changes."""

import os
import pwd
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bad_input import PHANTOM, RUN, assert_refused, contents, special_file
from conftest import write_official
from example_records import CONFIG, write_run

import task1
from common.cli import parse
from common.data.pathmnist import OfficialFile
from common.records import checkpoint

Make = Callable[[Path, pytest.MonkeyPatch], Any]  # puts a file into the folder of a case

# The command, its exit status, and a pattern of its one line. {} is the folder of the case.
OPTIONS: list[tuple[str, int, str]] = [
    ("task1.py --batchsize=3", 2, r"unknown key --batchsize; did you mean --batch_size\?$"),
    ("task1.py --quux=3", 2, "unknown key --quux; --help lists the keys$"),
    ("task1.py quux", 2, "unknown key quux; --help lists the keys$"),
    ("task1.py lr=3", 2, ": lr=3: write --lr=3$"),
    ("task1.py --no-tta", 2, "unknown key --no_tta; write --tta=False$"),
    ("task1.py --lr", 2, "--lr: expected one argument$"),
    ("task1.py --lr=fast", 2, "--lr fast: must be a number$"),
    ("task1.py --lr=0", 2, "--lr 0.0: must be above 0$"),
    ("task1.py --lr=nan", 2, "--lr nan: must be a finite number$"),
    ("task1.py --lr=1e999", 2, "--lr 1e999: must be a finite number$"),
    ("task1.py --lr_min=1.5", 2, "--lr_min 1.5: must be at most 1$"),
    ("task1.py --label_smoothing=1", 2, "--label_smoothing 1.0: must be below 1$"),
    ("task1.py --n_epochs=0", 2, "--n_epochs 0: must be at least 1$"),
    ("task1.py --n_epochs=2.5", 2, "--n_epochs 2.5: must be a whole number$"),
    ("task1.py --n_epochs=inf", 2, "--n_epochs inf: must be a whole number$"),
    ("task1.py --batch_size=10000000", 2, "--batch_size 10000000: must be at most 1000000$"),
    ("task1.py --seed=4294967296", 2, "--seed 4294967296: must be at most 4294967295$"),
    ("task1.py --amsgrad=perhaps", 2, "--amsgrad perhaps: must be True or False$"),
    (
        "task1.py --dataset=pathmist",
        2,
        r"--dataset pathmist: choose from pathmnist, phantom; did you mean pathmnist\?$",
    ),
    ("task1.py --size=30", 2, "--size 30: choose from 28, 64, 128, 224$"),
    ("task1.py --device=gpu", 2, r"--device gpu: choose from auto, cpu, cuda; did you mean cuda\?$"),
    ("task1.py --wandb=off", 2, r"--wandb off: choose from auto, .*; did you mean disabled\?$"),
    ("task1.py --dataset=phantom --train_tiles=44", 2, "--train_tiles 44: must be at least 45 on the phantom$"),
    ("task1.py --train_tiles=100000", 2, "--train_tiles 100000: PathMNIST has 89,996 training tiles$"),
    ("task1.py --run_id=../mine", 2, r"--run_id \.\./mine: a run id names files"),
    (f"task1.py --run_id={'x' * 65}", 2, "a run id names files"),
    ("task1.py --resume", 2, "--resume needs --run_id"),
    (
        "task1.py --data_root=~nobody-has-this-name/x",
        2,
        "--data_root ~nobody.*/x: begins with an unknown home folder",
    ),
    (f"{RUN} --model_name=resnet17", 2, "--model_name resnet17: torchvision has no .* name; did you mean resnet"),
    (f"{RUN} --model_name=timm:resnet19", 2, "--model_name timm:resnet19: timm has no classification model"),
    (
        f"{RUN} --augmentation=stain,flipp",
        2,
        "--augmentation stain,flipp: unknown part flipp; .*did you mean flip",
    ),
    (f"{RUN} --augmentation=flip,none", 2, "--augmentation flip,none: none cannot be joined"),
    (f"{RUN} --input_size=1000000", 3, r"out of memory \(.*\): lower --input_size or "),
    (f"{RUN} --device=cuda", 2, "--device cuda: PyTorch sees no CUDA device"),
    ("train.py --ablation=with_emma", 2, "--ablation with_emma: choose from .*did you mean with_ema"),
    ("train.py --ablation=with_ema --ema_decay=0", 2, "--ema_decay 0.0: --ablation with_ema sets this key itself"),
    ("task2.py --run_id=gone --output_dir={}", 2, "gone"),
    ("task2.py --output_dir={}", 2, "no finished Task 1 run .*: run python task1.py first"),
    ("task2.py --target=wrong", 2, "--target wrong: choose from predicted, label$"),
    ("task5.py --weights={}/none.pth", 2, r"none\.pth: No such file"),
    ("task5.py --train_part=all --adapt_batchnorm", 2, "--adapt_batchnorm: with --train_part all"),
    ("task5.py --weights=none --train_part=head", 2, "--train_part head: random weights cannot stay frozen"),
    ("study.sweep", 2, "which sweep"),
    ("study.sweep {}/none.yaml", 2, r"none\.yaml: No such file"),
    ("study.sweep ablation.yaml --count=0", 2, "--count 0: must be at least 1"),
    ("study.sweep ablation.yaml -- --sise=28", 2, "unknown key --sise; did you mean --size"),
    ("study.sweep ablation.yaml -- --augmentation=flipp", 2, "--augmentation flipp: .*did you mean flip"),
    ("study.sweep ablation.yaml -- --model_name=resnet17", 2, "--model_name resnet17: .*did you mean resnet"),
    (
        "study.sweep ablation.yaml --workers=0 --output_dir={}",
        2,
        "no run of combined is finished yet, the first row",
    ),
    ("study.report --chek", 2, "unknown key --chek; did you mean --check"),
    ("study.report --output_dir={}", 2, r"runs: no finished run"),
    ("study.__main__ --size=1", 2, "--size 1: choose from"),
]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def text(name: str, content: str) -> Make:
    return lambda folder, _: (folder / name).write_text(content)


def sweep_of(**change: Any) -> Make:
    content = {"program": "train.py", "method": "grid", "parameters": {"seed": {"values": [0]}}, **change}
    return text("s.yaml", yaml.safe_dump(content))


def saved(content: Any, name: str) -> Make:
    """A file with `content`: bytes as they are, anything else as torch.save writes it."""

    def make(folder: Path, _: pytest.MonkeyPatch) -> None:
        if name.startswith("checkpoints"):
            write_run(folder)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(content, folder / name)

    return make


def last_checkpoint(content: dict[str, Any], **keys: Any) -> Make:
    """A run with `content` in its last.pt, whose configuration differs from `RUN` by `keys`."""

    def make(folder: Path, _: pytest.MonkeyPatch) -> None:
        config = task1.Task1Config(**{**AS_RUN, **keys})
        whole = {"state_dict": {}, "evaluated_state_dict": {}, "optimizer": {}, "history": []}
        whole |= {"config": config.as_dict(), **content}
        checkpoint.save(folder / "checkpoints" / "r" / "last.pt", whole)

    return make


def special(name: str, kind: str) -> Make:
    return lambda folder, _: special_file(folder / name, kind)


def linked_lock(folder: Path, _: pytest.MonkeyPatch) -> None:
    """A run whose lock is a symbolic link to a file of the user."""
    (folder / "mine.txt").write_text("mine")
    (folder / "runs" / "r").mkdir(parents=True)
    (folder / "runs" / "r" / ".lock").symlink_to(folder / "mine.txt")


def begun_by_another_task(folder: Path, _: pytest.MonkeyPatch) -> None:
    """An unfinished run of train.py, with the keys of a run of task1.py."""
    arguments = shlex.split(RUN.replace("{}", str(folder)))[1:]
    config = parse(task1.Task1Config, arguments).as_dict()
    (write_run(folder, config, "task3") / "summary.json").unlink()


def nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file."""


AS_RUN = {"dataset": "phantom", "size": 28, "input_size": 28, "train_tiles": 90, "n_epochs": 1, "run_id": "r"}
EXPLAIN = "task2.py --run_id=r --output_dir={} --data_root={}"
TUNE = f"task5.py {PHANTOM} --model_name=resnet18 --data_root={{}} --output_dir={{}} --weights={{}}/w.pth"
OFFICIAL = "task1.py --dataset=pathmnist --size=28 --data_root={} --output_dir={}"
SWEEP = "study.sweep {}/s.yaml --output_dir={}"

# The same with files: what is there, then as above. What else such a file may contain, its module's tests say.
FILES: list[tuple[Make, str, int, str]] = [
    (nothing, OFFICIAL, 1, r"pathmnist\.npz: no such file.*--dataset phantom"),
    (text("pathmnist.npz", "not the official file"), OFFICIAL, 1, r"pathmnist\.npz: its MD5 is"),
    (write_official, f"{OFFICIAL} --train_tiles=8", 2, "--train_tiles 8: must be at least 9"),
    (special("pathmnist.npz", "fifo"), OFFICIAL, 1, r"pathmnist\.npz.*(not a regular file|download failed)"),
    (text("data", ""), "task1.py --data_root={}/data --output_dir={}", 2, "--data_root .*data: not a folder"),
    (text("out", ""), f"task1.py {PHANTOM} --data_root={{}} --output_dir={{}}/out", 1, "out.*: Not a directory"),
    *[
        (special("w.pth", kind), TUNE, 2, r"w\.pth: (not a regular file|Too many levels of symbolic links)")
        for kind in ("fifo", "folder", "zero", "loop")
    ],
    (special("checkpoints/r/last.pt", "fifo"), RUN, 1, r"last\.pt: not a regular file"),
    (special("runs/r/config.json", "zero"), RUN, 1, r"config\.json: not a readable record \(.*not a regular"),
    (linked_lock, RUN, 1, r"\.lock: Too many levels of symbolic links; fix this"),
    (nothing, f"{RUN} --resume", 2, "--resume: run r has no checkpoint"),
    (begun_by_another_task, RUN, 2, "run r is a run of task3: use another --run_id"),
    (last_checkpoint({"history": []}, lr=0.5), RUN, 2, "started with another configuration .*lr was 0.5"),
    (last_checkpoint({"state_dict": {}}), RUN, 1, r"last\.pt: no tensor conv1"),
    (saved(b"torn", "checkpoints/r/best.pt"), EXPLAIN, 1, r"best\.pt: not a readable checkpoint"),
    (saved(Bomb(), "checkpoints/r/best.pt"), EXPLAIN, 1, r"best\.pt: not a readable checkpoint"),
    (saved([1, 2], "checkpoints/r/best.pt"), EXPLAIN, 1, r"best\.pt: not a checkpoint of this project"),
    (saved(b"\x80\x02torn", "w.pth"), TUNE, 2, r"w\.pth: it is damaged, or holds more than tensors"),
    (saved(Bomb(), "w.pth"), TUNE, 2, r"w\.pth: it is damaged, or holds more than tensors"),
    (saved({"a": 1}, "w.pth"), TUNE, 2, r"w\.pth: it holds no tensors by name"),
    (text("s.yaml", "a: ["), SWEEP, 2, r"s\.yaml: not YAML"),
    (text("s.yaml", "!!python/object/apply:os.mkdir [exploded]"), SWEEP, 2, r"s\.yaml: not YAML"),
    (sweep_of(program="none.py"), SWEEP, 2, r"program none\.py: no such file"),
    (sweep_of(parameters={"learn": {"values": [1]}}), SWEEP, 2, "unknown key --learn"),
    (sweep_of(parameters={"lr": {"values": [0.1, -1]}}), SWEEP, 2, r"s\.yaml: --lr -1.0: must be above 0"),
    (
        lambda folder, _: write_run(folder, {**CONFIG, "size": 64, "run_id": "task1-0"}),
        "study.__main__ --dataset=phantom --output_dir={} --data_root={}",
        2,
        "task1-0.*: a run on phantom at 64 pixels; name another --output_dir",
    ),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = OfficialFile("pathmnist.npz", "http://127.0.0.1:9/none.npz", "0" * 32)
    monkeypatch.setattr("common.data.pathmnist.official_file", lambda size: missing)
    monkeypatch.setattr("common.data.dataset.RETRIES", 0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.parametrize(("line", "status", "message"), OPTIONS, ids=[case[0][:60] for case in OPTIONS])
def test_an_impossible_option_is_refused_and_no_file_is_written(
    line: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(line, status, message, tmp_path, capsys)
    assert not contents(tmp_path)


@pytest.mark.parametrize(("make", "line", "status", "message"), FILES, ids=[case[3][:60] for case in FILES])
def test_a_bad_file_is_named_and_does_not_change(
    make: Make,
    line: str,
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path, monkeypatch)
    assert_refused(line, status, message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WANDB_MODE", "offlin", r"WANDB_MODE=offlin is no mode; choose from .*; did you mean offline\?$"),
        (
            "PATHMNIST_ROOT",
            "~nobody-has-this-name",
            "--data_root ~nobody-has-this-name: begins with an unknown home",
        ),
        ("HOME", None, r"--data_root ~/\.medmnist: begins with an unknown home folder; write the whole path$"),
    ],
)
def test_a_wrong_variable_is_named_unless_the_key_is_given(
    variable: str,
    value: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    assert_refused("task1.py", 2, message, tmp_path, capsys)
    assert parse(task1.Task1Config, ["--wandb=disabled", f"--data_root={tmp_path}"]).data_root == tmp_path
