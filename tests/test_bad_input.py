"""Every mistake of a user ends with one line that names it and the right exit status; no file changes."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_records import write_run

import task1
import task2
import task5
import train
from common.cli import run_script
from study import report, sweep

COMMANDS: dict[str, tuple[Any, Any]] = {
    "task1.py": (task1.main, task1.Task1Config),
    "task2.py": (task2.main, task2.Task2Config),
    "train.py": (train.main, train.TrainConfig),
    "task5.py": (task5.main, task5.Task5Config),
    "study.sweep": (sweep.main, sweep.SweepConfig),
    "study.report": (report.main, report.ReportConfig),
}
PHANTOM = "--dataset=phantom --size=28 --input_size=28 --train_tiles=90 --n_epochs=1"
RUN = f"task1.py {PHANTOM} --data_root={{}} --output_dir={{}} --run_id=r"
OFFICIAL = "task1.py --dataset=pathmnist --size=28 --data_root={} --output_dir={}"
NO_NETWORK = "--model_name resnet17: torchvision has no .* name; timm's are timm:NAME; did you mean resnet"
MEMORY = r"out of memory \(.*\): lower --input_size or lower --batch_size, with another --run_id$"

# The command, its exit status, and a pattern of its one line. {} is the folder of the case.
OPTIONS: list[tuple[str, int, str]] = [
    ("task1.py --batchsize=3", 2, r"unknown key --batchsize; did you mean --batch_size\?$"),
    ("task1.py --quux=3", 2, "unknown key --quux; --help lists the keys$"),
    ("task1.py lr=0.1", 2, "unknown key lr; write --lr=0.1$"),
    ("task1.py quux", 2, "unknown key quux; --help lists the keys$"),
    ("task1.py --lr", 2, "--lr: expected one argument$"),
    ("task1.py --lr=fast", 2, "--lr fast: must be a valid number"),
    ("task1.py --lr=0", 2, "--lr 0: must be greater than 0$"),
    ("task1.py --lr=nan", 2, "--lr nan: must be a finite number$"),
    ("task1.py --n_epochs=2.5", 2, "--n_epochs 2.5: must be a valid integer"),
    ("task1.py --amsgrad=perhaps", 2, "--amsgrad perhaps: must be a valid boolean"),
    ("task1.py --output_dir=~nobody-here", 2, "--output_dir ~nobody-here: Could not determine home directory"),
    ("task1.py --size=30", 2, "--size 30: choose from 28, 64, 128, 224$"),
    ("task1.py --dataset=pathmist", 2, r"choose from pathmnist, phantom; did you mean pathmnist\?$"),
    ("task1.py --batch_size=2", 2, "--batch_size 2: must be greater than or equal to 3$"),
    ("task1.py --train_tiles=44", 2, "--train_tiles 44: must be greater than or equal to 45$"),
    ("task1.py --size=28 --train_tiles=89997", 2, "--train_tiles 89997: PathMNIST has 89996$"),
    ("task1.py --run_id=../mine", 2, r"--run_id \.\./mine: a run id names files"),
    (f"{RUN} --model_name=resnet17", 2, NO_NETWORK),
    (f"{RUN} --augmentation=stain,flipp", 2, "--augmentation stain,flipp: unknown part flipp; choose from none, "),
    (f"{RUN} --augmentation=stain,", 2, "--augmentation stain,: unknown part ; choose from none, dihedral"),
    (f"{RUN} --input_size=1000000", 3, MEMORY),
    ("train.py --ablation=with_emma", 2, "--ablation with_emma: choose from .*did you mean with_ema"),
    ("train.py --ablation=with_ema --ema_decay=0", 2, "--ema_decay 0.0: --ablation with_ema sets this key itself"),
    ("task2.py --output_dir={}", 2, "no finished Task 1 run .*; python task1.py makes one"),
    ("task5.py --weights={}/none.pth", 2, r"none\.pth: No such file"),
    ("task5.py --weights=none --train_part=head", 2, "--train_part head: random weights cannot stay frozen"),
    ("study.sweep", 2, "which sweep"),
    ("study.sweep {}/none.yaml --size=28", 2, "unknown key --size; keys of the runs come after --, as in"),
    ("study.sweep {}/none.yaml", 1, r"none\.yaml: No such file"),
    ("study.report --output_dir={}", 2, r"/runs: no finished run with test scores; python task1\.py makes one"),
]


def assert_refused(line: str, status: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(line.replace("{}", str(folder)))
    main, config_class = COMMANDS[program]
    before = contents(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(main, config_class, arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert re.search(message, said[0]), said[0]
    assert ended.value.code == status
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def empty_record(folder: Path) -> None:
    (folder / "runs/r").mkdir(parents=True)
    (folder / "runs/r/config.json").write_text("{}")


def torn_weights(folder: Path) -> None:
    write_run(folder)
    (folder / "checkpoints" / "r").mkdir(parents=True)
    (folder / "checkpoints" / "r" / "best.pt").write_bytes(b"torn")


# The same with files: what is there, then as above. What else such a file may contain, its module's tests say.
FILES: list[tuple[Callable[[Path], Any], str, int, str]] = [
    (lambda _: None, OFFICIAL, 1, r"pathmnist\.npz: missing or damaged.*--dataset phantom"),
    (text("pathmnist.npz", "torn"), OFFICIAL, 1, r"pathmnist\.npz: missing or damaged.*--dataset phantom"),
    (text("data", ""), "task1.py --data_root={}/data --output_dir={}", 1, "data/.*: cannot be read or built"),
    (text("out", ""), f"task1.py {PHANTOM} --data_root={{}} --output_dir={{}}/out", 1, "out.*: Not a directory"),
    (
        empty_record,
        f"task1.py {PHANTOM} --run_id=r --output_dir={{}}",
        1,
        r"config\.json: .*config: it is missing",
    ),
    (
        torn_weights,
        "task2.py --run_id=r --output_dir={} --data_root={}",
        1,
        r"best\.pt: not a readable checkpoint",
    ),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = ("pathmnist.npz", "http://127.0.0.1:9/none.npz", "0" * 32)
    monkeypatch.setattr("common.data.pathmnist.official_file", lambda size: missing)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.parametrize(("line", "status", "message"), OPTIONS, ids=[case[0][:60] for case in OPTIONS])
def test_an_impossible_option_is_refused_and_no_file_is_written(
    line: str,
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # also on a machine with a GPU
    assert_refused(line, status, message, tmp_path, capsys)
    assert not contents(tmp_path)


@pytest.mark.parametrize(("make", "line", "status", "message"), FILES, ids=[case[3][:60] for case in FILES])
def test_a_bad_file_is_named_and_does_not_change(
    make: Callable[[Path], Any],
    line: str,
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path)
    assert_refused(line, status, message, tmp_path, capsys)
