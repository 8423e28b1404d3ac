import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from bad_input import special_file

from common.errors import Fault
from common.files import atomic_path, locked, open_regular, process_lock, sweep_up, write_csv, write_json
from common.records import checkpoint


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


def test_an_error_of_the_temporary_file_names_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=f"Is a directory: '{tmp_path}/folder'"):
        write_json(tmp_path / "folder", 1)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_table_keeps_every_digit(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": None}])
    assert (tmp_path / "table.csv").read_bytes() == b"epoch,loss\n1,0.30000000000000004\n2,\n"


def test_only_one_at_a_time_has_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with locked(path) as first:
        assert first is not None
        with locked(path) as second:
            assert second is None
    with locked(path) as again:
        assert again is not None


def test_waiting_for_a_lock_ends_when_it_is_released(tmp_path: Path) -> None:
    path, log = tmp_path / "lock", tmp_path / "log"

    def work(name: str) -> None:
        with locked(path, wait=True), open(log, "a") as file:
            for _ in range(3):
                file.write(name)
                file.flush()
                time.sleep(0.05)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(name,)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert log.read_text() in ("aaabbb", "bbbaaa")


def test_a_process_that_has_the_descriptor_keeps_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as descriptor:
        assert descriptor is not None
        orphan = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    with locked(tmp_path / "lock") as taken:
        assert taken is None
    orphan.communicate()
    with locked(tmp_path / "lock") as free:
        assert free is not None


def test_a_process_lock_excludes_other_processes_but_not_its_own(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"

    def other_process_is_refused() -> bool:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as other:
            return other.submit(process_lock, path).result() is None

    locks = [process_lock(path), process_lock(path)]
    assert None not in locks
    assert other_process_is_refused()


def test_a_lock_follows_no_link_and_names_its_file_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for lock in (lambda path: locked(path).__enter__(), process_lock):
        with pytest.raises(OSError, match=r"a lock must not be a symbolic link; delete it: .*/link"):
            lock(tmp_path / "link")
    assert (tmp_path / "mine").read_text() == "mine"
    with locked(tmp_path / "mine"):
        assert (tmp_path / "mine").read_text() == "mine"

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(OSError, match=r"No locks available: .*/lock"):
        process_lock(tmp_path / "lock")


def test_only_files_that_our_own_writer_can_have_left_are_swept_up(tmp_path: Path) -> None:
    kept = {".lock", ".my-notes.txt", ".draft-20261124.txt", ".my.unfinished-notes.txt", "a.unfinished-0123abcd.t"}
    for name in kept:
        (tmp_path / name).write_text("mine")
    killed = [atomic_path(tmp_path / name) for name in ("summary.json", "best.pt", "scores.npz", "name")]
    for context in killed:
        context.__enter__().write_text("half")
    assert len(list(tmp_path.iterdir())) == len(kept) + 4
    sweep_up(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_content_and_names_are_flushed_to_disk_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_json(tmp_path / "new" / "record.json", {"one": 1})
    made, content, *rest = calls
    assert made == ("fsync", tmp_path.name)  # the name of the new folder
    assert content[0] == "fsync"
    assert content[1].startswith(".record.unfinished-")
    assert rest == [("rename", "record.json"), ("fsync", "new")]


def test_a_record_shows_no_home_folder_and_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    write_json(
        tmp_path / "record.json",
        {
            "data_root": "/home/someone/data",
            "home": ["/home/someone", "/home/someone-else", "/mnt/home/someone/x"],
            "command": "task1.py --output_dir=/home/someone/out '/home/someone/a b'",
            "wandb": "https://me:secret@wandb.example/hw1",
        },
    )
    assert json.loads((tmp_path / "record.json").read_text()) == {
        "data_root": "~/data",
        "home": ["~", "/home/someone-else", "/mnt/home/someone/x"],
        "command": "task1.py --output_dir=~/out '~/a b'",
        "wandb": "https://wandb.example/hw1",
    }


@pytest.mark.parametrize("kind", ["fifo", "folder", "zero", "loop"])
def test_only_a_regular_file_is_opened(kind: str, tmp_path: Path) -> None:
    special_file(tmp_path / "file", kind)
    with pytest.raises(OSError, match=r"(not a regular file|Too many levels of symbolic links): .*/file"):
        open_regular(tmp_path / "file")


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
