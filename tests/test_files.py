import os
from pathlib import Path

import pytest
import torch

from common import checkpoint
from common.errors import Fault
from common.files import atomic_folder, atomic_path, write_json


def test_a_failed_write_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"one": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"one": float("nan")})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n  "one": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert temporary.suffix == ".txt"
        assert not path.exists()
    assert path.read_text() == "whole"


def test_a_record_is_as_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "record.json", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == 0o640


def test_the_first_of_two_builders_wins(tmp_path: Path) -> None:
    path = tmp_path / "arrays"
    with atomic_folder(path) as slow:
        (slow / "who").write_text("slow")
        with atomic_folder(path) as quick:
            (quick / "who").write_text("quick")
    assert (path / "who").read_text() == "quick"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "arrays"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    content = {"weights": {"a": torch.arange(6.0).reshape(2, 3)}, "epoch": 3, "names": ["x"], "none": None}
    checkpoint.save(tmp_path / "c.pt", content)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert torch.equal(loaded.pop("weights")["a"], content.pop("weights")["a"])  # type: ignore[index, attr-defined]
    assert loaded == content


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_a_faulty_checkpoint_is_one_line_and_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "whole.pt"
    checkpoint.save(whole, {"weights": torch.zeros(1000)})
    (tmp_path / "torn.pt").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save(Bomb(), tmp_path / "bomb.pt")
    torch.save([1], tmp_path / "list.pt")
    for name in ("torn", "empty", "text", "bomb", "list", "missing"):
        with pytest.raises(Fault, match=rf"{name}\.pt: (not a|no such)") as fault:
            checkpoint.load(tmp_path / f"{name}.pt")
        assert "\n" not in str(fault.value)
    assert not (tmp_path / "exploded").exists()
