import http.server
import io
import json
import multiprocessing
import os
import pickle
import resource
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COUNTS, official_arrays, write_official
from hypothesis import given, settings
from hypothesis import strategies as st

from common import data
from common.data import load_dataset, stratified_part
from common.errors import Fault, UsageError
from common.tiles import DeviceTiles


def no_build(*arguments: Any) -> str:
    raise AssertionError("the arrays were built again")


def test_names_and_addresses_are_medmnists() -> None:
    from medmnist import INFO

    info = INFO["pathmnist"]
    assert list(data.class_names()) == [info["label"][str(label)] for label in range(9)]
    assert info["n_samples"] == data.OFFICIAL_COUNTS
    for size, suffix in ((28, ""), (64, "_64"), (128, "_128"), (224, "_224")):
        assert data._official_address(size) == (info[f"url{suffix}"], info[f"MD5{suffix}"])
        assert data.official_name(size) == f"pathmnist{suffix}.npz"
        assert f"/{data.official_name(size)}?" in info[f"url{suffix}"]


def test_a_file_of_the_official_layout_and_counts_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = data.OFFICIAL_COUNTS
    write_official(tmp_path, monkeypatch, official_arrays(counts))
    monkeypatch.setattr(data, "OFFICIAL_COUNTS", counts)
    dataset = load_dataset("pathmnist", 28, tmp_path)
    assert dataset.title == "PathMNIST (89,996 training tiles, 28 px)"
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (89_996, 10_004, 7_180)
    assert dataset.train.images.shape == (89_996, 3, 28, 28)
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.train.images.is_contiguous(memory_format=torch.channels_last)
    assert dataset.train.labels.dtype == torch.int64
    tile = dataset.train.images[50_000]
    assert (int(tile[0, 0, 0]), int(tile[1, 0, 0])) == (50_000 % 251, 50_000 // 251)
    assert int(dataset.train.labels[50_000]) == 50_000 % 9


def test_a_later_start_maps_the_arrays_and_needs_the_file_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_official(tmp_path, monkeypatch)
    first = load_dataset("pathmnist", 28, tmp_path)
    monkeypatch.setattr(data, "_unpack_official", no_build)
    again = load_dataset("pathmnist", 28, tmp_path)
    assert torch.equal(first.test.images, again.test.images)
    assert first.fingerprint == again.fingerprint == data._md5(path)
    path.unlink()
    assert torch.equal(load_dataset("pathmnist", 28, tmp_path).val.images, first.val.images)


def test_another_file_is_unpacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(tmp_path, monkeypatch)
    load_dataset("pathmnist", 28, tmp_path)
    arrays = official_arrays(COUNTS)
    arrays["val_images"] += 1
    write_official(tmp_path, monkeypatch, arrays)
    assert load_dataset("pathmnist", 28, tmp_path).val.images.min() == 1


def flip_a_byte(folder: Path) -> None:
    with open(folder / "train_images.npy", "r+b") as file:
        file.seek(500_000)
        file.write(b"\x77")


def truncate(folder: Path) -> None:
    os.truncate(folder / "train_images.npy", 500_000)


def tear_meta(folder: Path) -> None:
    (folder / "meta.json").write_text('{"version": 1, ')


def remove_labels(folder: Path) -> None:
    (folder / "val_labels.npy").unlink()


def change_meta(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def foreign_version(folder: Path) -> None:
    flip_a_byte(folder)  # with checksums that fit, so that the version alone gives it away
    change_meta(folder, version=data.CACHE_VERSION + 1, checksums=data._checksums(folder))


def nothing_to_check(folder: Path) -> None:
    remove_labels(folder)
    change_meta(folder, checksums={})


def another_shape(folder: Path) -> None:
    images = np.load(folder / "train_images.npy")
    np.save(folder / "train_images.npy", images.reshape(-1, 14, 56, 3))


def swapped_halves(folder: Path) -> None:
    images = np.load(folder / "train_images.npy")
    np.save(folder / "train_images.npy", np.roll(images, len(images) // 2, axis=0))


DAMAGE = [
    flip_a_byte,
    truncate,
    tear_meta,
    remove_labels,
    foreign_version,
    nothing_to_check,
    another_shape,
    swapped_halves,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_built_anew(
    damage: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_official(tmp_path, monkeypatch)
    whole = load_dataset("pathmnist", 28, tmp_path).train.images.clone()
    damage(tmp_path / "pathmnist.arrays")
    assert torch.equal(load_dataset("pathmnist", 28, tmp_path).train.images, whole)
    assert "is damaged or outdated; building it anew" in capsys.readouterr().err


def test_a_data_root_that_cannot_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    write_official(root, monkeypatch)
    root.chmod(0o555)
    try:
        first = load_dataset("pathmnist", 28, root)
        assert [path.name for path in root.iterdir()] == ["pathmnist.npz"]
        monkeypatch.setattr(data, "_unpack_official", no_build)
        assert torch.equal(load_dataset("pathmnist", 28, root).val.images, first.val.images)
    finally:
        root.chmod(0o755)


def test_two_data_roots_do_not_share_a_folder_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (0, 1):
        root = tmp_path / f"root{value}"
        arrays = official_arrays(COUNTS)
        arrays["val_images"][:, 5, 5, 0] = value
        os.utime(write_official(root, monkeypatch, arrays), (0, 0))
        root.chmod(0o555)
        try:
            assert int(load_dataset("pathmnist", 28, root).val.images[0, 0, 5, 5]) == value
        finally:
            root.chmod(0o755)
    assert len(list(data._user_cache().glob("*.arrays"))) == 2


def test_a_full_disk_leaves_no_folder_and_a_clear_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(Fault, match=r"phantom-.*\.arrays: cannot be built .*too large.*--data_root"):
            load_dataset("phantom", 28, tmp_path, train_tiles=45)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "pathmnist.npz").mkdir()
    with pytest.raises(Fault, match=r"Is a directory: .*pathmnist\.npz"):
        load_dataset("pathmnist", 28, tmp_path)


def load_in_a_process(root: str, barrier: Any, results: Any) -> None:
    barrier.wait()
    dataset = load_dataset("phantom", 28, Path(root), train_tiles=90)
    results.put(int(dataset.train.images.sum()))


def test_processes_that_build_at_once_share_one_whole_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=load_in_a_process, args=(str(tmp_path), barrier, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    sums = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(sums) == 1
    assert [path.suffix for path in tmp_path.iterdir() if not path.name.startswith(".")] == [".arrays"]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in official_arrays(COUNTS).items() if key != name}


def changed(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    return {**official_arrays(COUNTS), name: array}


FOREIGN = {
    "missing array": (without("val_labels"), "no array val_labels in it"),
    "wrong type": (
        changed("val_images", np.zeros((30, 28, 28, 3), np.float32)),
        "val_images is float32 (30, 28, 28, 3), should be uint8 (30, 28, 28, 3)",
    ),
    "wrong size": (
        changed("test_images", np.zeros((60, 32, 32, 3), np.uint8)),
        "test_images is uint8 (60, 32, 32, 3), should be uint8 (60, 28, 28, 3)",
    ),
    "wrong count": (
        changed("train_labels", np.zeros((7, 1), np.uint8)),
        "train_labels is uint8 (7, 1), should be uint8 (1200, 1)",
    ),
    "label out of range": (
        changed("val_labels", np.full((30, 1), 9, np.uint8)),
        "val_labels has 30 labels up to 9, should have 30 from 0 to 8",
    ),
    "pickled objects": (
        changed("val_labels", np.array([[Bomb()]] * 30, dtype=object)),
        "val_labels is object (30, 1)",
    ),
    "column order": (
        changed("train_images", np.asfortranarray(official_arrays(COUNTS)["train_images"])),
        "train_images is stored column by column",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_file_is_refused_with_what_was_found_and_the_remedy(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, found = FOREIGN[case]
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    path = write_official(root, monkeypatch, arrays)
    with pytest.raises(Fault) as fault:
        load_dataset("pathmnist", 28, root)
    assert_tells_everything(str(fault.value), path, found)
    assert not (tmp_path / "exploded").exists()
    assert not list(root.glob("*.arrays"))


def assert_tells_everything(message: str, path: Path, found: str) -> None:
    assert message.startswith(f"{path}: ")
    assert found in message
    assert f"by hand into {path.parent}" in message
    assert "http" in message
    assert "--dataset phantom" in message
    assert "\n" not in message


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def not_a_zip(path: Path) -> None:
    path.write_bytes(pickle.dumps(list(range(1000))))


def damaged_data(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("train_images.npy").header_offset
    with open(path, "r+b") as file:
        file.seek(offset + 2000)
        file.write(b"\x00" * 64)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (cut_short, "not a whole npz file"),
        (empty, "not a whole npz file, 0 bytes"),
        (not_a_zip, "not a whole npz file"),
        (damaged_data, "its MD5 is"),
    ],
)
def test_a_damaged_file_is_refused(
    damage: Callable[[Path], None], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_official(tmp_path, monkeypatch)
    damage(path)
    with pytest.raises(Fault) as fault:
        load_dataset("pathmnist", 28, tmp_path)
    assert_tells_everything(str(fault.value), path, found)
    assert path.exists()
    assert not list(tmp_path.glob("*.arrays"))


def test_damage_that_no_md5_guards_against_is_found_when_unpacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_official(tmp_path, monkeypatch)
    damaged_data(path)
    md5 = data._md5(path)
    monkeypatch.setattr(data, "_official_address", lambda size: ("http://127.0.0.1:9/", md5))
    with pytest.raises(Fault, match=r"pathmnist\.npz: (not a whole npz file|train_images)"):
        load_dataset("pathmnist", 28, tmp_path)


def test_an_encrypted_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_official(tmp_path, monkeypatch)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = archive.start_dir
    content[entry + 8] |= 1  # the first member's flag in the archive's table of contents
    path.write_bytes(content)
    with pytest.raises(Fault, match="encrypted"):
        load_dataset("pathmnist", 28, tmp_path)


# -------------------------------------------------------------------------------- a part of the training tiles


def test_a_part_is_a_copy_of_the_chosen_training_tiles_and_the_other_splits_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_official(tmp_path, monkeypatch)
    part, whole = load_dataset("pathmnist", 28, tmp_path, 300), load_dataset("pathmnist", 28, tmp_path)
    assert part.title == "PathMNIST (300 of 1,200 training tiles, 28 px)"
    assert part.fingerprint == f"{data._md5(path)}-300-of-1200-order{data.ORDER_VERSION}"
    chosen = stratified_part(whole.train.labels.numpy(), 300)
    images = part.train.images
    assert (images[:, 0, 0, 0].int() + 251 * images[:, 1, 0, 0].int()).tolist() == chosen.tolist()
    assert torch.equal(images, whole.train.images[chosen])
    assert torch.equal(part.train.labels, torch.from_numpy(chosen) % 9)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert DeviceTiles(part.train, torch.device("cpu")).tiles.is_contiguous()
    for split in ("val", "test"):
        assert torch.equal(getattr(part, split).images, getattr(whole, split).images)
        assert torch.equal(getattr(part, split).labels, getattr(whole, split).labels)
    assert [folder.name for folder in tmp_path.glob("*.arrays")] == ["pathmnist.arrays"]


def test_a_part_as_large_as_the_whole_is_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_official(tmp_path, monkeypatch)
    for train_tiles in (None, 1200):
        dataset = load_dataset("pathmnist", 28, tmp_path, train_tiles)
        assert dataset.title == "PathMNIST (1,200 training tiles, 28 px)"
        assert dataset.fingerprint == data._md5(path)
    assert load_dataset("pathmnist", 28, tmp_path, 1199).fingerprint.startswith(f"{data._md5(path)}-1199-of-1200-")


def test_more_tiles_than_there_are_are_refused_before_any_download(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        load_dataset("pathmnist", 28, tmp_path, 100_000)
    assert str(refused.value) == "--train_tiles 100000: PathMNIST has 89,996 training tiles"
    assert not list(tmp_path.iterdir())


def test_a_part_without_a_tile_of_every_class_is_refused_with_the_least_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_official(tmp_path, monkeypatch)
    with pytest.raises(UsageError) as refused:
        load_dataset("pathmnist", 28, tmp_path, 8)
    assert str(refused.value) == "--train_tiles 8: must be at least 9, so that every class has a tile"
    assert len(load_dataset("pathmnist", 28, tmp_path, 9).train.labels.unique()) == 9
    rare = np.repeat([0, 1], [100, 1])
    with pytest.raises(UsageError, match="at least 51"):
        stratified_part(rare, 50)
    assert 100 in stratified_part(rare, 51)


LABELS = st.lists(st.integers(0, 8), max_size=400).map(lambda labels: np.array(labels + [*range(9)] * 9))


@settings(deadline=None)
@given(LABELS, st.data())
def test_a_part_is_stratified_and_lies_within_every_larger_one(labels: np.ndarray, draw: st.DataObject) -> None:
    least = len(labels) // 18 + 6  # with 9 tiles of the rarest class, so many hold one of every class
    fewer, more = sorted(draw.draw(st.tuples(*[st.integers(least, len(labels))] * 2)))
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


# ------------------------------------------------------------------------------------------------ download


class FileServer:
    """Serves one file on loopback; `ranges` lists what was asked for, `resumable` honours it."""

    def __init__(self, content: bytes, resumable: bool = True, cut: int = 0) -> None:
        self.ranges: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                outer.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and resumable else 0
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                # The first answer may end after `cut` bytes, as a failing connection does.
                end = start + cut if cut and len(outer.ranges) == 1 else len(content)
                self.wfile.write(content[start:end])

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/pathmnist.npz"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def content() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **official_arrays(COUNTS))
    return buffer.getvalue()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, content: bytes) -> Iterator[Callable[..., FileServer]]:
    servers = []

    def start(**options: Any) -> FileServer:
        server = FileServer(content, **options)
        servers.append(server)
        md5 = data.hashlib.md5(content).hexdigest()
        monkeypatch.setattr(data, "OFFICIAL_COUNTS", COUNTS)
        monkeypatch.setattr(data, "_official_address", lambda size: (server.url, md5))
        monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
        return server

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def test_a_missing_file_is_downloaded_once(
    tmp_path: Path, serve: Callable[..., FileServer], content: bytes
) -> None:
    server = serve()
    load_dataset("pathmnist", 28, tmp_path / "new")
    load_dataset("pathmnist", 28, tmp_path / "new")
    assert server.ranges == [None]
    assert (tmp_path / "new" / "pathmnist.npz").read_bytes() == content


def test_a_broken_connection_is_resumed(tmp_path: Path, serve: Callable[..., FileServer], content: bytes) -> None:
    server = serve(cut=1000)
    load_dataset("pathmnist", 28, tmp_path)
    assert server.ranges == [None, "bytes=1000-"]
    assert (tmp_path / "pathmnist.npz").read_bytes() == content


@pytest.mark.parametrize("resumable", [True, False])
def test_an_earlier_part_is_completed_or_replaced(
    resumable: bool, tmp_path: Path, serve: Callable[..., FileServer], content: bytes
) -> None:
    server = serve(resumable=resumable)
    (tmp_path / "pathmnist.npz.part").write_bytes(content[:2000])
    load_dataset("pathmnist", 28, tmp_path)
    assert server.ranges == ["bytes=2000-"]
    assert (tmp_path / "pathmnist.npz").read_bytes() == content
    assert not (tmp_path / "pathmnist.npz.part").exists()


def test_a_part_that_is_already_whole_is_taken(
    tmp_path: Path, serve: Callable[..., FileServer], content: bytes
) -> None:
    serve()
    (tmp_path / "pathmnist.npz.part").write_bytes(content)
    load_dataset("pathmnist", 28, tmp_path)
    assert (tmp_path / "pathmnist.npz").read_bytes() == content


def test_a_download_of_the_wrong_md5_is_dropped(
    tmp_path: Path, serve: Callable[..., FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    monkeypatch.setattr(data, "_official_address", lambda size: (server.url, "0" * 32))
    with pytest.raises(Fault) as fault:
        load_dataset("pathmnist", 28, tmp_path)
    assert_tells_everything(str(fault.value), tmp_path / "pathmnist.npz", f"not {'0' * 32}")
    assert not list(tmp_path.glob("pathmnist*"))


def test_without_network_one_line_tells_what_to_do(tmp_path: Path, serve: Callable[..., FileServer]) -> None:
    server = serve()
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(Fault) as fault:
        load_dataset("pathmnist", 28, tmp_path)
    assert_tells_everything(str(fault.value), tmp_path / "pathmnist.npz", "refused")


# ------------------------------------------------------------------------------------------------- phantom


def test_the_phantom_is_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_dataset("phantom", 28, tmp_path, train_tiles=90)
    assert (len(first.train), len(first.val), len(first.test)) == (90, 10, 18)
    assert first.title == "phantom (90 training tiles, 28 px)"
    assert "phantom" in first.fingerprint
    monkeypatch.setattr(data, "_generate_phantom", no_build)
    monkeypatch.setattr(data, "PHANTOM_TRAIN_TILES", 90)
    again = load_dataset("phantom", 28, tmp_path)
    assert torch.equal(first.train.images, again.train.images)
    assert json.loads(next(tmp_path.glob("*.arrays/meta.json")).read_text())["fingerprint"] == first.fingerprint


def test_a_data_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("not a folder")
    with pytest.raises(UsageError, match="not a folder"):
        load_dataset("phantom", 28, tmp_path / "root", train_tiles=45)


def test_batches_are_the_tiles_asked_for(tiny: data.Dataset) -> None:
    tiles = DeviceTiles(tiny.train, torch.device("cpu"))
    indices = torch.tensor([5, 0, 5, 100])
    images, labels = tiles.batch(indices)
    assert len(tiles) == len(tiny.train)
    assert torch.equal(images, tiny.train.images[indices])
    assert torch.equal(labels, tiny.train.labels[indices])
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.uint8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.6, 0.0])
def test_tiles_come_to_the_gpu_resident_or_from_the_host(
    share: float, tiny: data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "RESIDENT_SHARE", share)
    tiles = DeviceTiles(tiny.train, torch.device("cuda"))
    assert tiles.index_device.type == ("cuda" if share else "cpu")
    indices = torch.tensor([5, 0, 5, 100])
    images, labels = tiles.batch(indices.to(tiles.index_device))
    assert images.device.type == labels.device.type == "cuda"
    assert torch.equal(images.cpu(), tiny.train.images[indices])
