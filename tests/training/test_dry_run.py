"""--dry_run: what it prints agrees with what a run does, and it writes nothing."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, trainer_of

import task1
import task5
import train
from common.config import TrainingConfig, run_script
from common.data.dataset import Dataset
from common.finetune.network import build_fine_tuned
from common.finetune.weights import Preset, Weights
from common.records.read import run_folder
from common.training.device import Compute
from common.training.dry_run import disk_bytes, memory_bytes, planned_dataset
from common.training.models import build_model

MEAN = (0.5, 0.5, 0.5)


def printed(capsys: pytest.CaptureFixture[str], script: str, folder: Path, *arguments: str) -> str:
    main, config_class = {
        "task1": (task1.main, task1.Task1Config),
        "train": (train.main, train.TrainConfig),
        "task5": (task5.main, task5.Task5Config),
    }[script]
    where = [f"--data_root={folder / 'data'}", f"--output_dir={folder / 'out'}", "--dry_run"]
    run_script(main, config_class, [*arguments, *where])  # type: ignore[type-var]
    return " ".join(capsys.readouterr().out.split())


def test_a_dry_run_prints_data_network_steps_and_needs_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "task1", tmp_path, "--size=28", "--train_tiles=9000", "--run_id=r", "--lr=0.5")
    assert "run r: new, on " in text
    assert " lr=0.5 " in text
    assert "PathMNIST (9,000 of 89,996 training tiles, 28 px): 9,000 train, 10,004 val, 7,180 test tiles" in text
    assert re.search(r"data/pathmnist\.npz is missing and will be downloaded from https://zenodo", text)
    assert "resnet18, 11,181,129 parameters, 11,181,129 of them trained, inputs of 28 px" in text
    assert "steps: 141 per epoch, 705 in 5 epochs" in text
    assert "dry run: no file was written" in text
    assert not list(tmp_path.iterdir())


def test_each_run_of_task_5_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [
        "--dataset=phantom",
        "--size=28",
        "--model_name=mobilenet_v3_small",
        "--weights=none",
        "--train_part=all",
    ]
    text = printed(capsys, "task5", tmp_path, *keys, "--run_id=r", "--input_size=32", "--n_seeds=2")
    assert "run r: new" in text
    assert "run r-seed1: new" in text
    assert "phantom (9,000 training tiles, 28 px): 9,000 train, 1,000 val, 1,800 test tiles; generated" in text
    assert not list(tmp_path.iterdir())


def test_weights_that_are_missing_are_named_and_not_downloaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_: pytest.fail("nothing may be downloaded"))
    keys = [
        "--dataset=phantom",
        "--size=28",
        "--input_size=28",
        "--model_name=mobilenet_v3_small",
        "--input_size=32",
        "--run_id=r",
    ]
    text = printed(capsys, "task5", tmp_path, *keys)
    assert re.search(r"mobilenet_v3_small-\w+\.pth is missing and will be downloaded from https://download", text)
    assert "run r: new" in text
    assert not list(tmp_path.iterdir())


def test_a_run_that_could_not_start_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "out", "r")
    folder.mkdir(parents=True)
    (folder / "summary.json").touch()
    for arguments, message in (
        (["--run_id=r"], "run r is finished already"),
        (["--run_id=new", "--resume"], "--resume: run new has no checkpoint"),
        (["--train_tiles=90000"], "--train_tiles 90000: PathMNIST has 89,996 training tiles"),
    ):
        with pytest.raises(SystemExit) as ended:
            printed(capsys, "train", tmp_path, "--size=28", *arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("keys", [{}, {"amsgrad": True}, {"ema_decay": 0.9, "optimizer": "adamw"}])
def test_the_predicted_disk_space_is_that_of_the_checkpoints(
    keys: dict[str, object], tiny: Dataset, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny, tmp_path, n_epochs=1, **keys)
    trainer.fit()
    needed, kept = disk_bytes(trainer.config, trainer.model)
    sizes = {name: (trainer.run.checkpoints / name).stat().st_size for name in ("best.pt", "last.pt")}
    assert kept == pytest.approx(sizes["best.pt"], rel=0.05)
    assert (needed - kept) / 3 == pytest.approx(sizes["last.pt"], rel=0.05)


def memory_of(model: torch.nn.Module, compute: Compute = CPU, **keys: Any) -> tuple[float, float]:
    config = TrainingConfig(**{"size": 28, "run_id": "r", "train_tiles": 1000, **keys})
    return memory_bytes(config, model, planned_dataset(config), compute)


def test_predicted_memory_grows_with_tiles_batch_and_average() -> None:
    model = build_model("resnet18", 9, 28)

    def memory(**keys: Any) -> float:
        return memory_of(model, **keys)[0]

    few = memory(train_tiles=1000)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert memory(train_tiles=2000) - few == pytest.approx(1000 * 3 * 28**2, abs=3e7)  # the process may grow a bit
    assert memory(train_tiles=1000, ema_decay=0.9) - few == pytest.approx(weights, abs=3e7)
    more = memory(train_tiles=1000, batch_size=1064) - few
    assert more == pytest.approx(2.2 * 1000 * 416880, rel=0.1)  # as bench/results/scaling-cpu.json has it


def test_in_bf16_the_copies_of_the_weights_do_not_grow_with_the_batch() -> None:
    def per_tile(compute: Compute) -> float:
        model = build_model("resnet18", 9, 28)
        few, many = (memory_of(model, compute, batch_size=size)[0] for size in (64, 1064))
        return (many - few) / 1000

    assert per_tile(Compute(CPU.device, torch.bfloat16)) < per_tile(CPU)


def test_predicted_memory_of_scoring_follows_the_inputs_and_not_the_batch() -> None:
    model = build_model("resnet18", 9, 28)
    training, scoring = memory_of(model, batch_size=2)
    assert scoring > training  # 512 tiles at once
    assert memory_of(model, batch_size=512)[1] == pytest.approx(scoring, abs=3e7)  # the process may grow a bit
    twice_the_side = memory_of(model, batch_size=2, input_size=56)[1]
    largest = 2 * 64 * 14 * 14 * 4  # bytes that the first BatchNorm takes and gives for a tile of 28 pixels
    assert twice_the_side - scoring == pytest.approx(2 * 512 * 3 * largest, rel=0.1)


def test_predicted_memory_of_task_5_has_the_cached_features() -> None:
    model = build_fine_tuned("mobilenet_v3_small", 9, Weights("w", "test", None, None, Preset(32, MEAN, MEAN)), 32)

    def memory(views: int) -> tuple[float, float]:
        config = task5.Task5Config(
            size=28,
            run_id="r",
            train_tiles=20_000,
            model_name="mobilenet_v3_small",
            augmentation="stain",
            input_size=32,
            cache_features=True,
            feature_views=views,
        )
        return memory_bytes(config, model, planned_dataset(config), CPU)

    for few, many in zip(memory(8), memory(16), strict=True):
        assert many - few == pytest.approx(8 * 20_000 * 576 * 4, abs=3e7)


def test_a_planned_data_set_takes_no_memory() -> None:
    planned = planned_dataset(TrainingConfig(size=224, run_id="r"))
    assert planned.train.images.device == torch.device("meta")
    assert [len(split) for split in (planned.train, planned.val, planned.test)] == [89_996, 10_004, 7_180]
