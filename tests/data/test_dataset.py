"""The data sets: found, downloaded, unpacked once, then mapped; and parts of the training tiles."""

import errno
import hashlib
import http.server
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import end, start

from common.cli import Fault, UsageError
from common.data import dataset as module
from common.data import pathmnist, phantom
from common.data.batches import DeviceTiles
from common.data.dataset import Dataset, load_dataset, stratified_part
from common.finetune.weights import load_weights
from common.records import checkpoint

PHANTOM = f"phantom-v{phantom.VERSION}_28_45.arrays"
COUNTS = {"train": 1200, "val": 30, "test": 60}  # the tiles of a small file in the official layout


def write_official(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a small pathmnist.npz and make its counts and its MD5 the official ones; returns its path.

    The first bytes of a tile give its index.
    """
    arrays: dict[str, Any] = {}
    for split, count in COUNTS.items():
        index = np.arange(count)
        images = np.zeros((count, 28, 28, 3), np.uint8)
        images[:, 0, 0, 0], images[:, 0, 0, 1] = index % 251, index // 251
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = (index % 9).astype(np.uint8)[:, None]
    root.mkdir(parents=True, exist_ok=True)
    path = root / "pathmnist.npz"
    np.savez_compressed(path, **arrays)
    official = (path.name, "http://127.0.0.1:9/pathmnist.npz", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(pathmnist, "COUNTS", COUNTS)
    monkeypatch.setattr(pathmnist, "official_file", lambda size: official)
    return path


def no_build(*arguments: Any) -> None:
    raise AssertionError("the arrays were built again")


def test_names_addresses_and_counts_are_medmnists() -> None:
    from medmnist import INFO

    info = INFO[pathmnist.NAME]
    assert {str(label): name for label, name in enumerate(pathmnist.CLASS_NAMES)} == info["label"]
    assert info["n_samples"] == pathmnist.COUNTS
    assert info["python_class"] == pathmnist.TITLE
    for size, suffix in ((28, ""), (64, "_64"), (128, "_128"), (224, "_224")):
        file = pathmnist.official_file(size)
        assert file[1:] == (info[f"url{suffix}"], info[f"MD5{suffix}"])
        assert file[0] == f"pathmnist{suffix}.npz"


# ---------------------------------------------------------------------------------------------------- arrays


def test_the_official_file_becomes_splits_in_the_layout_that_training_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_official(tmp_path, monkeypatch)
    dataset = load_dataset("pathmnist", 28, tmp_path)
    assert dataset.title == "PathMNIST (1,200 training tiles, 28 px)"
    assert dataset.fingerprint == hashlib.md5(path.read_bytes()).hexdigest()
    for split, count in COUNTS.items():
        tiles = getattr(dataset, split)
        assert tiles.images.shape == (count, 3, 28, 28)
        assert tiles.images.dtype == torch.uint8
        assert tiles.images.is_contiguous(memory_format=torch.channels_last)
        assert tiles.labels.dtype == torch.int64
        assert tiles.labels.tolist() == [index % 9 for index in range(count)]
    tile = dataset.train.images[1000]
    assert (int(tile[0, 0, 0]), int(tile[1, 0, 0])) == (1000 % 251, 1000 // 251)


def test_a_later_start_maps_the_arrays_even_without_file_and_write_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_official(tmp_path, monkeypatch)
    first = load_dataset("pathmnist", 28, tmp_path)
    monkeypatch.setattr(module, "_unpack", no_build)
    path.unlink()
    monkeypatch.setattr(module, "FileLock", no_build)  # in a folder of another user it could not be created
    again = load_dataset("pathmnist", 28, tmp_path)
    assert torch.equal(first.test.images, again.test.images)
    assert first.fingerprint == again.fingerprint


def test_another_official_file_is_unpacked_anew_and_its_labels_have_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_official(tmp_path, monkeypatch)
    load_dataset("pathmnist", 28, tmp_path)
    monkeypatch.setitem(COUNTS, "val", 45)
    write_official(tmp_path, monkeypatch)
    assert len(load_dataset("pathmnist", 28, tmp_path).val) == 45
    monkeypatch.setattr(pathmnist, "CLASS_NAMES", pathmnist.CLASS_NAMES[:8])
    with pytest.raises(UsageError, match=r"arrays: label 8 has no name in common/data/pathmnist\.py"):
        load_dataset("pathmnist", 28, tmp_path)


def test_processes_that_start_at_once_build_the_arrays_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(split: str, n_tiles: int, size: int) -> Any:
        with open(tmp_path / "built", "a", encoding="utf-8") as file:
            print(split, file=file)
        return original(split, n_tiles, size)

    original = phantom.generate
    monkeypatch.setattr(phantom, "generate", noted)
    pids = [start(lambda: load_dataset("phantom", 28, tmp_path, 45), tmp_path / f"log{n}") for n in range(4)]
    assert [end(pid) for pid in pids] == [0] * 4
    assert (tmp_path / "built").read_text().split() == ["train", "val", "test"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "train_images.npy", 500_000),
        lambda folder: (folder / "val_labels.npy").unlink(),
        lambda folder: (folder / "val_labels.npy").write_bytes(b""),
    ],
)
def test_damaged_arrays_are_named(
    damage: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_official(tmp_path, monkeypatch)
    load_dataset("pathmnist", 28, tmp_path)
    (folder,) = tmp_path.glob("pathmnist-*.arrays")
    damage(folder)
    with pytest.raises(
        Fault, match=r"pathmnist-\w{8}\.arrays: cannot be read .*; if this folder exists, delete it"
    ):
        load_dataset("pathmnist", 28, tmp_path)


def test_too_little_memory_is_not_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    load_dataset("phantom", 28, tmp_path, train_tiles=45)
    torch.save({}, tmp_path / "a.pt")
    monkeypatch.setattr(np, "load", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for read in (
        lambda: load_dataset("phantom", 28, tmp_path, train_tiles=45),
        lambda: checkpoint.load(tmp_path / "a.pt"),
        lambda: load_weights(str(tmp_path / "a.pt"), "resnet18"),
    ):
        with pytest.raises(OSError, match="Cannot allocate memory"):
            read()


def test_a_full_disk_is_named_and_no_folder_remains(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(Fault) as fault:
            load_dataset("phantom", 28, tmp_path, train_tiles=45)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(fault.value).startswith(f"{tmp_path / PHANTOM}: cannot be read or built (")
    assert str(fault.value).endswith("if not, choose another one with --data_root")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_phantom_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathmnist, "PHANTOM_TRAIN_TILES", 90)
    (tmp_path / ".phantom-v3_28_90.arrays.part").mkdir()  # a killed process has left it
    first = load_dataset("phantom", 28, tmp_path)
    assert (len(first.train), len(first.val), len(first.test)) == (90, 10, 18)
    assert first.title == "phantom (90 training tiles, 28 px)"
    assert first.fingerprint == "phantom-v3-90x28px"
    monkeypatch.setattr(phantom, "generate", no_build)
    assert torch.equal(load_dataset("phantom", 28, tmp_path, 90).train.images, first.train.images)


# -------------------------------------------------------------------------------------------- the official file


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The answers of a server to the official file's address: a content, or b"" for an error."""
    answers = [write_official(tmp_path / "server", monkeypatch).read_bytes()]

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            [answer] = answers
            self.send_response(200 if answer else 503)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}/pathmnist.npz?download=1"
    official = ("pathmnist.npz", address, pathmnist.official_file(28)[2])
    monkeypatch.setattr(pathmnist, "official_file", lambda size: official)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("there", [None, b"damaged"])
def test_a_missing_or_damaged_file_is_downloaded(there: bytes | None, tmp_path: Path, serve: list[bytes]) -> None:
    whole, path = serve[0], tmp_path / "new" / "pathmnist.npz"
    if there:
        path.parent.mkdir()
        path.write_bytes(there)
    assert len(load_dataset("pathmnist", 28, tmp_path / "new").train) == 1200
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(b"", "503 Server Error"), (b"something else", "MD5 hash of downloaded file .* does not match")],
)
def test_a_file_that_cannot_be_downloaded_is_named_with_every_remedy(
    answer: bytes, reason: str, tmp_path: Path, serve: list[bytes]
) -> None:
    serve[:] = [answer]
    official = pathmnist.official_file(28)
    with pytest.raises(Fault, match=rf"its download failed \({reason}") as fault:
        load_dataset("pathmnist", 28, tmp_path / "new")
    assert str(fault.value).startswith(
        f"{tmp_path}/new/pathmnist.npz: missing or damaged, and its download failed"
    )
    assert str(fault.value).endswith(
        f": try again, or fetch {official[1]} (MD5 {official[2]}) by hand into --data_root {tmp_path}/new, or "
        "use --dataset phantom"
    )
    assert not list(tmp_path.glob("new/pathmnist*"))


# -------------------------------------------------------------------------------- a part of the training tiles


def test_a_part_is_a_copy_of_the_chosen_training_tiles_and_the_other_splits_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_official(tmp_path, monkeypatch)
    part, whole = load_dataset("pathmnist", 28, tmp_path, 300), load_dataset("pathmnist", 28, tmp_path, 1200)
    assert part.title == "PathMNIST (300 of 1,200 training tiles, 28 px)"
    assert part.fingerprint == f"{whole.fingerprint}-300-of-1200-order1"
    chosen = stratified_part(whole.train.labels.numpy(), 300)
    images = part.train.images
    assert (images[:, 0, 0, 0].int() + 251 * images[:, 1, 0, 0].int()).tolist() == chosen.tolist()
    assert torch.equal(images, whole.train.images[chosen])
    assert torch.equal(part.train.labels, torch.from_numpy(chosen) % 9)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(part.val.images, whole.val.images)
    assert torch.equal(part.test.labels, whole.test.labels)


LABELS = st.lists(st.integers(0, 8), max_size=400).map(lambda labels: np.array(labels + [*range(9)] * 9))


@settings(deadline=None)
@given(LABELS, st.data())
def test_a_part_is_stratified_and_lies_within_every_larger_one(labels: np.ndarray, draw: st.DataObject) -> None:
    fewer, more = sorted(draw.draw(st.tuples(*[st.integers(9, len(labels))] * 2)))
    small, large = stratified_part(labels, fewer), stratified_part(labels, more)
    assert len(small) == fewer
    assert np.array_equal(small, np.unique(small))
    assert np.isin(small, large).all()
    counts = np.bincount(labels)
    # Each of the 9 classes is rounded by half a tile at most, and shares the sum of these.
    allowed = 0.5 + 4.5 * counts / len(labels) + 1e-9
    assert (abs(np.bincount(labels[small], minlength=9) - fewer * counts / len(labels)) <= allowed).all()


def test_the_order_of_the_tiles_is_random_and_never_changes() -> None:
    labels = np.arange(9000) % 9
    part = stratified_part(labels, 18)
    frozen = [76, 1069, 1488, 2319, 2362, 2678, 2789, 2907, 4122, 4368, 4757, 5771, 5860, 5905, 6632, 7458, 8723]
    assert part.tolist() == [*frozen, 8818]
    assert np.array_equal(stratified_part(labels.astype(np.uint8), 18), part)
    assert 4000 < stratified_part(labels, 900).mean() < 5000


# ---------------------------------------------------------------------------------------------------- batches


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.6, 0.0])
def test_tiles_come_to_the_gpu_resident_or_from_the_host(
    share: float, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.data.batches.RESIDENT_SHARE", share)
    tiles = DeviceTiles(tiny.train, torch.device("cuda"), 28)
    assert tiles.labels.device.type == ("cuda" if share else "cpu")
    indices = torch.tensor([5, 0, 5, 100])
    images, labels = tiles.batch(indices)
    assert images.device.type == labels.device.type == "cuda"
    assert torch.equal(images.cpu(), tiny.train.images[indices])
