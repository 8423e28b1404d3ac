"""A damaged or foreign checkpoint is refused before anything of it is loaded, or gives exactly what was saved."""

import copy
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trainer_of
from processes import plain
from torch import nn

from common.cli import Fault
from common.data.dataset import Dataset
from common.records import checkpoint
from common.training.loop import Trainer

WEIGHT = "0.weight"  # (4, 3, 3, 3)


@pytest.fixture(scope="module")
def trainer(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer of two steps an epoch, after one epoch; nothing is written but last.pt."""
    convolution = nn.Conv2d(3, 4, 3, stride=9)
    model = nn.Sequential(convolution, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 9))
    trainer = trainer_of(tiny, tmp_path_factory.mktemp("trainer"), model, batch_size=65)
    trainer.history.append(trainer.train_and_validate(1))
    trainer.save_last()
    return trainer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({WEIGHT: None}, f"no tensor {WEIGHT}"),
        ({"extra": torch.zeros(1)}, "an unknown tensor extra"),
        ({WEIGHT: torch.zeros(4, 3)}, r"has the shape \(4, 3\), not \(4, 3, 3, 3\)"),
        ({WEIGHT: torch.zeros(4, 3, 3, 3).double()}, "has the dtype torch.float64, not torch.float32"),
    ],
)
@pytest.mark.parametrize("part", ["state_dict", "evaluated_state_dict"])
def test_weights_that_do_not_fit_are_refused(
    part: str, changes: dict[str, Any], message: str, trainer: Trainer
) -> None:
    last = trainer.run.resumable[0]
    whole, state = last.read_bytes(), plain(copy.deepcopy(trainer.model.state_dict()))
    content = checkpoint.load(last)
    content[part] = {**content[part], **changes}
    checkpoint.save(last, content)
    try:
        with pytest.raises(Fault, match=rf"last\.pt: .*{message}; train again with another --run_id"):
            trainer.restore()
    finally:
        last.write_bytes(whole)
    assert plain(trainer.model.state_dict()) == state


def test_a_checkpoint_of_a_version_that_stopped_within_epochs_is_refused(trainer: Trainer) -> None:
    last = trainer.run.resumable[0]
    whole = last.read_bytes()
    checkpoint.save(last, {**checkpoint.load(last), "begun": None})
    try:
        with pytest.raises(Fault, match=r"last\.pt: of another version of this project; train again"):
            trainer.restore()
    finally:
        last.write_bytes(whole)


def test_the_checkpoint_that_was_read_is_the_one_that_is_blamed(trainer: Trainer) -> None:
    last, previous = trainer.run.resumable
    whole = last.read_bytes()
    checkpoint.save(previous, {**checkpoint.load(last), "state_dict": {}})
    last.write_bytes(whole[:100])
    try:
        with pytest.raises(Fault, match=r"previous\.pt: no tensor"):
            trainer.restore()
    finally:
        last.write_bytes(whole)
        previous.unlink()


def test_a_whole_checkpoint_is_loaded(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    state = plain(copy.deepcopy(trainer.model.state_dict()))
    with torch.no_grad():
        trainer.model[3].bias.add_(1)  # type: ignore[index, union-attr, operator]
    trainer.restore()
    assert plain(trainer.model.state_dict()) == state
    assert "continuing run r after epoch 1" in capsys.readouterr().out


class Bomb:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: None, Fault, "no such checkpoint; train first, or name another --run_id"),
        (lambda path: path.write_bytes(b""), Fault, "not a readable checkpoint"),
        (lambda path: torch.save([1, 2], path), Fault, "not a checkpoint of this project"),
        (lambda path: torch.save({"a": Bomb(path.with_name("boom"))}, path), Fault, "not a readable checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_and_no_code_of_it_runs(
    make: Callable[[Path], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "c.pt")
    with pytest.raises(error, match=message) as refused:
        checkpoint.load(tmp_path / "c.pt")
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "boom").exists()


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.manual_seed(0)
    checkpoint.save(path, {"weights": nn.Linear(3, 2).state_dict(), "epoch": 3, "name": "text"})
    content, expected = path.read_bytes(), plain(checkpoint.load(path))
    draws, refused = random.Random(0), 0
    # Among them the bit that makes a "folder" of a member, of which PyTorch reads nothing: no checksum covers it.
    folder_bits = [8 * (entry.start() + 38) + 4 for entry in re.finditer(b"PK\x01\x02", content)]
    assert len(folder_bits) > 3
    for place in (*folder_bits, *(draws.randrange(8 * len(content)) for _ in range(400))):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = plain(checkpoint.load(path))
        except Fault:
            refused += 1
            continue
        assert found == expected
    assert refused > 200
