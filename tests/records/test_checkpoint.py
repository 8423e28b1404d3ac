"""A damaged or foreign checkpoint is refused, or gives exactly what was saved."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import plain
from torch import nn

from common.cli import Fault
from common.records import checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(2, 4)}, "size mismatch for weight"),
        ({"extra": torch.zeros(1)}, 'Unexpected key.* "extra"'),
    ],
)
def test_weights_of_another_network_are_refused(changes: dict[str, Any], message: str) -> None:
    state = {**nn.Linear(3, 2).state_dict(), **changes}
    with pytest.raises(Fault, match=rf"last\.pt: {message}.*; train again with another --run_id"):
        checkpoint.load_state_dict(nn.Linear(3, 2), state, Path("last.pt"))


class Bomb:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a readable checkpoint"),
        (lambda path: torch.save([1, 2], path), "not a checkpoint of this project"),
        (lambda path: torch.save({"config": {}}, path), "not a checkpoint of this project"),  # a part of its keys
        (lambda path: torch.save({"a": Bomb(path.with_name("boom"))}, path), "not a readable checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_and_no_code_of_it_runs(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "c.pt")
    with pytest.raises(Fault, match=message) as refused:
        checkpoint.load(tmp_path / "c.pt", "config", "history")
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "boom").exists()


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.manual_seed(0)
    checkpoint.save(path, {"weights": nn.Linear(30, 20).state_dict(), "epoch": 3})
    content, expected = path.read_bytes(), plain(checkpoint.load(path))
    rng, refused = random.Random(0), 0
    for place in (rng.randrange(8 * len(content)) for _ in range(300)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            assert plain(checkpoint.load(path)) == expected
        except Fault:
            refused += 1
    assert refused > 150
