"""Every mistake of a user ends with one line that names it and the right exit status; no file changes."""

import os
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from bad_input import PHANTOM, RUN, assert_refused, contents, npy, special_file
from conftest import COUNTS, official_arrays, write_official
from example_records import CONFIG, write_run

import task1
from common.config import parse
from common.data import pathmnist
from common.data.pathmnist import OfficialFile
from common.files import digest
from common.records import checkpoint
from common.training.models import build_model

Make = Callable[[Path, pytest.MonkeyPatch], Any]  # puts a file into the folder of a case

LITE0 = "--model_name=tf_efficientnet_lite0"

# The command, its exit status, and a pattern of its one line. {} is the folder of the case.
OPTIONS: list[tuple[str, int, str]] = [
    ("task1.py --batchsize=3", 2, "unknown key --batchsize; did you mean --batch_size"),
    ("task1.py --quux=3", 2, "unknown key --quux; --help lists the keys"),
    ("task1.py lr=3", 2, "unknown key lr=3|unknown key lr"),
    ("task1.py --lr", 2, "--lr: expected one argument"),
    ("task1.py --lr=fast", 2, "--lr: 'fast' is not a number"),
    ("task1.py --lr=-1", 2, "--lr -1.0: must be above 0"),
    ("task1.py --lr=nan", 2, "--lr nan: must be a finite number"),
    ("task1.py --lr=inf", 2, "--lr inf: must be a finite number"),
    ("task1.py --n_epochs=0", 2, "--n_epochs 0: must be at least 1"),
    ("task1.py --n_epochs=2.5", 2, "--n_epochs: '2.5' is not a whole number"),
    ("task1.py --batch_size=1", 2, "--batch_size 1: must be at least 2"),
    ("task1.py --label_smoothing=1", 2, "--label_smoothing 1.0: must be at least 0 and below 1"),
    ("task1.py --weight_decay=-0.1", 2, "--weight_decay"),
    ("task1.py --seed=-1", 2, "--seed -1: must be at least 0"),
    ("task1.py --seed=99999999999", 2, "--seed 99999999999: must be at least 0 and at most"),
    ("task1.py --amsgrad=perhaps", 2, "--amsgrad: 'perhaps' is neither True nor False"),
    ("task1.py --dataset=pathmist", 2, "did you mean pathmnist"),
    ("task1.py --size=30", 2, "--size 30: choose from 28, 64, 128, 224"),
    ("task1.py --dataset=phantom --train_tiles=44", 2, "--train_tiles 44: must be at least 45 on the phantom"),
    ("task1.py --train_tiles=0", 2, "--train_tiles 0: must be at least 1"),
    ("task1.py --train_tiles=100000", 2, "--train_tiles 100000: PathMNIST has 89,996 training tiles"),
    ("task1.py --train_tile=9", 2, "unknown key --train_tile; did you mean --train_tiles"),
    ("task1.py --model_name=resnet17", 2, "--model_name resnet17: .*did you mean resnet"),
    ("task1.py --run_id=../mine", 2, r"--run_id \.\./mine: a run id names files"),
    (f"task1.py --run_id={'x' * 65}", 2, "a run id names files"),
    ("task1.py --resume", 2, "--resume needs --run_id"),
    ("task1.py --device=tpu", 2, "--device tpu: choose from auto, cpu, cuda"),
    ("task1.py --precision=fp16", 2, "--precision fp16: choose from auto, fp32, bf16"),
    ("task1.py --wandb=on", 2, "--wandb on: choose from"),
    ("task1.py --optimizer=sgd", 2, "--optimizer sgd: choose from adam, adamw"),
    ("task1.py --early_stopping_patience=0", 2, "--early_stopping_patience 0: must be at least 1"),
    ("task1.py --augmentation=tawide", 2, "--augmentation tawide: "),
    ("task1.py --augmentation=dihedral,none", 2, "--augmentation dihedral,none: "),
    ("task1.py --select_on=test/acc", 2, "--select_on test/acc: choose from"),
    ("train.py --ablation=without_everything", 2, "--ablation without_everything: choose from"),
    ("train.py --ablation=with_ema --ema_decay=0", 2, "--ablation with_ema sets this key itself"),
    ("train.py --ema_decay=1", 2, "--ema_decay 1.0: must be at least 0 and below 1"),
    ("train.py --lr_min=2", 2, "--lr_min 2.0: must be at least 0 and at most 1"),
    ("train.py --mixup_alpha=-1", 2, "--mixup_alpha"),
    ("task2.py --run_id=gone", 2, "gone"),
    ("task2.py --output_dir={}", 2, "Task 1"),
    ("task2.py --target=wrong", 2, "--target wrong: choose from predicted, label"),
    ("task2.py --checked_tiles=1", 2, "--checked_tiles 1: must be at least 6"),
    ("task5.py --weights=ResNet18_Weights.IMAGENET1K_V9", 2, "ResNet18_Weights.IMAGENET1K_V9"),
    ("task5.py --weights={}/none.pth", 2, r"none\.pth: No such file"),
    ("task5.py --weights=no-such-run --output_dir={}", 2, "no-such-run"),
    ("task5.py --train_part=half", 2, "--train_part half: choose from head, classifier, all"),
    ("task5.py --train_part=all --adapt_batchnorm", 2, "--adapt_batchnorm: with --train_part all"),
    ("task5.py --train_part=all --cache_features", 2, "--cache_features: not possible"),
    ("task5.py --unfreeze_epoch=3", 2, "--unfreeze_epoch 3: only --train_part all"),
    ("task5.py --feature_views=3", 2, "--feature_views 3: with augmentation dihedral it is 8"),
    ("task5.py --weights=none --train_part=head", 2, "--train_part head: random weights cannot stay frozen"),
    ("task5.py --input_size=4", 2, "--input_size 4: must be at least 8"),
    ("task5.py --n_seeds=0", 2, "--n_seeds 0: must be at least 1"),
    ("task1.py --n_epochs=1e308", 2, r"--n_epochs 1e\+308: must be at least 1 and at most 1,000,000"),
    ("task1.py --n_epochs=100000000", 2, "--n_epochs 100000000: must be at least 1 and at most 1,000,000"),
    ("task1.py --n_epochs=nan", 2, "--n_epochs: 'nan' is not a whole number"),
    ("task1.py --n_epochs=inf", 2, "--n_epochs: 'inf' is not a whole number"),
    ("task1.py --batch_size=1e12", 2, "--batch_size 1000000000000: must be at least 2 and at most 1,000,000"),
    ("task1.py --lr_warmup_epochs=1e308", 2, r"--lr_warmup_epochs 1e\+308: must be at least 0 and at most"),
    ("task1.py --early_stopping_patience=1e30", 2, r"--early_stopping_patience 1e\+30: must be"),
    (
        "task1.py --dataset=phantom --train_tiles=1e300",
        2,
        r"--train_tiles 1e\+300: must be at least 1",
    ),
    ("task1.py --input_size=1000000", 3, "out of memory .*: lower --input_size or "),
    ("task1.py --input_size=1e12", 2, "--input_size 1000000000000: must be at least 8 and at most"),
    ("task1.py --seed=1e300", 2, r"--seed 1e\+300: must be at least 0 and at most 4,294,967,295"),
    ("task1.py --lr=1e999", 2, "--lr inf: must be a finite number"),
    ("task1.py --data_root=~nobody-has-this-name/x", 2, "begins with an unknown home folder"),
    ("task2.py --checked_tiles=1e308", 2, r"--checked_tiles 1e\+308: must be at least 6 and at most"),
    ("task5.py --n_seeds=100000000", 2, "--n_seeds 100000000: must be at least 1 and at most 1,000"),
    ("task5.py --unfreeze_epoch=1e308", 2, r"--unfreeze_epoch 1e\+308: must be"),
    ("task5.py --feature_views=1e9", 2, "--feature_views 1000000000: must be at least 1 and at most"),
    ("study.sweep ablation.yaml --count=1e300", 2, r"--count 1e\+300: must be"),
    ("study.sweep", 2, "which sweep"),
    ("study.sweep {}/none.yaml", 2, r"none\.yaml: No such file"),
    ("study.sweep ablation.yaml --count=0", 2, "--count 0: must be at least 1"),
    ("study.sweep ablation.yaml -- --seed=3", 2, "--seed=3: the sweep gives each run its own seed"),
    ("study.sweep ablation.yaml -- --sise=28", 2, "unknown key --sise; did you mean --size"),
    ("study.sweep ablation.yaml --table_only --output_dir={}", 2, "no run of ablation is finished yet"),
    ("study.report --output_dir={}", 2, r"runs: no finished run"),
    ("study.report --chek", 2, "unknown key --chek; did you mean --check"),
    ("study.__main__ --dataset=mnist", 2, "--dataset mnist: choose from"),
    ("study.__main__ --size=1", 2, "--size 1: choose from"),
]


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def text(name: str, content: str) -> Make:
    return lambda folder, _: (folder / name).write_text(content)


def sweep_of(**change: Any) -> Make:
    content = {"program": "train.py", "method": "grid", "parameters": {"seed": {"values": [0]}}, **change}
    return text("s.yaml", yaml.safe_dump(content))


def damaged(change: Callable[[Path], Any]) -> Make:
    """An official file that `change` has damaged."""
    return lambda folder, monkeypatch: change(write_official(folder, monkeypatch))


def arrays(**changes: Any) -> Make:
    """An official file with other arrays and the expected MD5."""
    return lambda folder, monkeypatch: write_official(folder, monkeypatch, {**official_arrays(COUNTS), **changes})


def weights(content: Any, name: str = "w.pth") -> Make:
    """A file with `content`: bytes as they are, anything else as torch.save writes it."""

    def make(folder: Path, _: pytest.MonkeyPatch) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(content, folder / name)

    return make


def finished_task1(content: Any) -> Make:
    """A finished Task 1 run with `content` in its best.pt; see `weights`."""

    def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_run(folder)
        weights(content, "checkpoints/r/best.pt")(folder, monkeypatch)

    return make


def last_checkpoint(content: dict[str, Any], **keys: Any) -> Make:
    """A run with `content` in its last.pt, whose configuration differs from `RUN` by `keys`."""

    def make(folder: Path, _: pytest.MonkeyPatch) -> None:
        config = task1.Task1Config(dataset="phantom", size=28, input_size=28, train_tiles=90, run_id="r", **keys)
        whole = {"state_dict": {}, "evaluated_state_dict": {}, "optimizer": {}, "history": []}
        whole |= {"config": config.as_dict(), **content}
        checkpoint.save(folder / "checkpoints" / "r" / "last.pt", whole)

    return make


def special(name: str, kind: str) -> Make:
    return lambda folder, _: special_file(folder / name, kind)


def member(name: str, content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Make:
    """An official file, with the expected MD5, whose array `name` is `content`."""

    def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        without = {key: value for key, value in official_arrays(COUNTS).items() if key != name}
        path = write_official(folder, monkeypatch, without)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{name}.npy", content, compression)
        official = OfficialFile(path.name, "http://127.0.0.1:9/pathmnist.npz", digest(path, "md5"))
        monkeypatch.setattr(pathmnist, "official_file", lambda size: official)

    return make


def linked_lock(folder: Path, _: pytest.MonkeyPatch) -> None:
    """A run whose lock is a symbolic link to a file of the user."""
    (folder / "mine.txt").write_text("mine")
    (folder / "runs" / "r").mkdir(parents=True)
    (folder / "runs" / "r" / ".lock").symlink_to(folder / "mine.txt")


def begun_by_another_task(folder: Path, _: pytest.MonkeyPatch) -> None:
    """An unfinished run of train.py, with the keys of a run of task1.py."""
    arguments = shlex.split(RUN.replace("{}", str(folder)))[1:]
    config = parse(task1.Task1Config, arguments, "").as_dict()
    (write_run(folder, config, "task3") / "summary.json").unlink()


def baseline_of_another_task(folder: Path, _: pytest.MonkeyPatch) -> None:
    """Weights to start from, and a finished Task 1 run that has the name of the run from scratch."""
    write_run(folder, {**CONFIG, "run_id": "q-scratch"})
    torch.save(build_model("shufflenet_v2_x0_5", 1000, 64).state_dict(), folder / "w.pth")


def nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file."""


EXPLAIN = "task2.py --run_id=r --output_dir={} --data_root={}"
TUNE = f"task5.py {PHANTOM} --model_name=resnet18 --data_root={{}} --output_dir={{}} --weights={{}}/w.pth"
OFFICIAL = "task1.py --dataset=pathmnist --size=28 --data_root={} --output_dir={}"
SWEEP = "study.sweep {}/s.yaml --output_dir={}"

# The same with files: what is there, then as above.
FILES: list[tuple[Make, str, int, str]] = [
    (nothing, OFFICIAL, 1, r"pathmnist\.npz: no such file.*--dataset phantom"),
    (damaged(lambda path: os.truncate(path, 0)), OFFICIAL, 1, r"pathmnist\.npz: its MD5 is .* \(0 bytes\)"),
    (damaged(lambda path: path.write_bytes(torn(path.read_bytes()))), OFFICIAL, 1, r"pathmnist\.npz: its MD5 is"),
    (damaged(lambda path: path.write_text("hello")), OFFICIAL, 1, r"pathmnist\.npz: its MD5 is"),
    (damaged(lambda path: zipfile.ZipFile(path, "w").close()), OFFICIAL, 1, r"pathmnist\.npz: its MD5 is"),
    (damaged(lambda path: path.open("ab").write(b"x")), OFFICIAL, 1, r"pathmnist\.npz: its MD5 is"),
    (arrays(), f"{OFFICIAL} --train_tiles=8", 2, "--train_tiles 8: must be at least 9"),
    (text("pathmnist.npz", "not the official file"), OFFICIAL, 1, r"pathmnist\.npz: its MD5 is"),
    *[
        (arrays(**{name: values}), OFFICIAL, 1, rf"pathmnist\.npz: not an official file \(.*{message}.*delete it")
        for name, values, message in (
            ("train_labels", np.full((COUNTS["train"], 1), 99, np.uint8), "labels from 99 to 99"),
            ("val_labels", np.zeros((COUNTS["val"], 1)), "dtype float64"),
            ("val_labels", np.zeros((COUNTS["val"], 2), np.uint8), r"\(30, 2\)"),
            ("test_labels", np.array([[None]] * COUNTS["test"]), "dtype object"),
            ("test_labels", np.array([["a"]] * COUNTS["test"]), "dtype <U1"),
            ("test_images", np.zeros((COUNTS["test"], 28, 28), np.uint8), "another layout"),
            ("test_images", np.zeros((COUNTS["test"], 28, 28, 3), np.float32), "longer|another layout"),
            ("train_images", np.zeros((3, 28, 28, 3), np.uint8), "another layout"),
        )
    ],
    *[
        (member(name, content, compression), OFFICIAL, 1, rf"pathmnist\.npz: not an official file \({message}")
        for name, content, compression, message in (
            ("val_labels", b"", zipfile.ZIP_STORED, ""),
            ("val_labels", b"not an array", zipfile.ZIP_DEFLATED, ""),
            ("val_labels", npy("{'descr': '|u1', 'fortran_order': False, 'shape': (30,"), zipfile.ZIP_STORED, ""),
            ("val_labels", npy("((((((((((" * 11), zipfile.ZIP_STORED, ""),
            ("val_labels", npy("{'descr': '|u1', 'fortran_order': 0, 'shape': (30, 1)}"), zipfile.ZIP_STORED, ""),
            ("val_labels", b"\x00" * 9_000_000, zipfile.ZIP_DEFLATED, "val_labels is longer than an array"),
            ("val_labels", b"\x00" * 100, zipfile.ZIP_LZMA, "val_labels is compressed in an unknown way"),
            ("val_labels", b"\x00" * 100, zipfile.ZIP_BZIP2, "val_labels is compressed in an unknown way"),
            ("val_images", b"\x00" * 100, zipfile.ZIP_DEFLATED, ""),
        )
    ],
    *[
        (special("pathmnist.npz", kind), OFFICIAL, 1, r"pathmnist\.npz.*(not a regular file|download failed)")
        for kind in ("fifo", "folder", "zero", "loop")
    ],
    *[
        (special("w.pth", kind), TUNE, 2, r"w\.pth: (not a regular file|Too many levels of symbolic links)")
        for kind in ("fifo", "folder", "zero", "loop")
    ],
    *[
        (special("checkpoints/r/last.pt", kind), RUN, 1, r"last\.pt: not a regular file")
        for kind in ("fifo", "folder", "zero")
    ],
    *[
        (special("runs/r/config.json", kind), RUN, 1, r"config\.json: not a readable record \(.*not a regular")
        for kind in ("fifo", "folder", "zero")
    ],
    (special("runs/r/.lock", "fifo"), RUN, 1, r"\.lock: (not a regular file|No such device)"),
    (special("runs/r/.lock", "folder"), RUN, 1, r"\.lock: Is a directory"),
    (special("runs/r/.lock", "loop"), RUN, 1, r"\.lock: a lock must not be a symbolic link; delete it"),
    (linked_lock, RUN, 1, r"\.lock: a lock must not be a symbolic link; delete it"),
    (
        lambda folder, _: write_run(folder, {**CONFIG, "size": 64, "run_id": "task1-0"}),
        "study.__main__ --dataset=phantom --output_dir={} --data_root={}",
        2,
        "task1-0: a run on phantom at 64 pixels, not phantom at 28: name another --output_dir",
    ),
    (begun_by_another_task, RUN, 2, "run r is a run of task3: use another --run_id"),
    (
        baseline_of_another_task,
        f"{TUNE.replace('resnet18', 'shufflenet_v2_x0_5')} --run_id=q",
        2,
        "run q-scratch is a run of task1: use another --run_id",
    ),
    (text("data", ""), "task1.py --data_root={}/data --output_dir={}", 2, "--data_root .*data: not a folder"),
    (text("out", ""), f"task1.py {PHANTOM} --data_root={{}} --output_dir={{}}/out", 1, "out.*: Not a directory"),
    (text("runs", ""), RUN, 1, "runs.*: Not a directory"),
    (last_checkpoint({"history": []}, lr=0.5), RUN, 2, "started with another configuration .*lr was 0.5"),
    (last_checkpoint({"state_dict": {}}, n_epochs=1), RUN, 1, r"last\.pt: no tensor conv1"),
    (nothing, f"{RUN} --resume", 2, "--resume: run r has no checkpoint"),
    (nothing, f"{RUN} --device=cuda", 2, "--device cuda: PyTorch sees no CUDA device"),
    (finished_task1(b"torn"), EXPLAIN, 1, r"best\.pt: not a readable checkpoint"),
    (finished_task1(b""), EXPLAIN, 1, r"best\.pt: not a readable checkpoint"),
    (finished_task1(Bomb()), EXPLAIN, 1, r"best\.pt: not a readable checkpoint"),
    (finished_task1([1, 2]), EXPLAIN, 1, r"best\.pt: not a checkpoint of this project"),
    (finished_task1({"state_dict": {"a": torch.zeros(1)}}), EXPLAIN, 1, r"best\.pt: has no 'model_name'"),
    (weights(b""), TUNE, 2, r"w\.pth: not a file of weights"),
    (weights(b"\x80\x02torn"), TUNE, 2, r"w\.pth: not a file of weights"),
    (weights(Bomb()), TUNE, 2, r"w\.pth: not a file of weights"),
    (weights([1]), TUNE, 2, r"w\.pth: not a state dict"),
    (weights({"a": 1}), TUNE, 2, r"w\.pth: not a state dict"),
    (weights({"fc.bias": torch.zeros(9).to_sparse()}), TUNE, 2, r"w\.pth"),
    (weights({"a": torch.zeros(1)}), TUNE, 2, r"w\.pth"),
    (text("s.yaml", "a: ["), SWEEP, 2, r"s\.yaml: not YAML"),
    (text("s.yaml", "[1, 2]"), SWEEP, 2, r"s\.yaml: the file must hold"),
    (text("s.yaml", ""), SWEEP, 2, r"s\.yaml: the file must hold"),
    (sweep_of(programme="x"), SWEEP, 2, "unknown key programme; did you mean program"),
    (sweep_of(program="none.py"), SWEEP, 2, r"program none\.py: no such file"),
    (sweep_of(method="gird"), SWEEP, 2, "unknown method gird: .*did you mean grid"),
    (sweep_of(parameters={"lr": {"min": 1, "max": 2}}), SWEEP, 2, "parameter lr: a grid needs values"),
    (sweep_of(parameters={"lr": {"values": []}}), SWEEP, 2, "parameter lr: values must be a list"),
    (sweep_of(parameters={"learn": {"values": [1]}}), SWEEP, 2, "unknown key --learn"),
    (sweep_of(parameters={"lr": {"values": [-1]}}), SWEEP, 2, "--lr -1.0: must be above 0"),
    (sweep_of(parameters={"run_id": {"value": "a"}}), SWEEP, 2, "parameter run_id"),
    (sweep_of(method="bayes"), SWEEP, 2, "metric is missing"),
    (sweep_of(command=["python"]), SWEEP, 2, r"command has no \$\{args\}"),
    (text("s.yaml", "!!python/object/apply:os.mkdir [exploded]"), SWEEP, 2, r"s\.yaml: not YAML"),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = OfficialFile("pathmnist.npz", "http://127.0.0.1:9/none.npz", "0" * 32)
    monkeypatch.setattr("common.data.pathmnist.official_file", lambda size: missing)
    monkeypatch.setattr("common.data.download.TRIES", 1)
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
