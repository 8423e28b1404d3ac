import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_input import damaged
from conftest import COUNTS, official_arrays, write_official
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.data import dataset as module
from common.data import download, pathmnist, phantom
from common.data.batches import DeviceTiles
from common.data.dataset import load_dataset, stratified_part
from common.errors import Fault, UsageError
from common.files import digest, locked


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
        assert (file.url, file.md5) == (info[f"url{suffix}"], info[f"MD5{suffix}"])
        assert file.name == f"pathmnist{suffix}.npz"


def test_a_file_of_the_official_layout_and_counts_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = pathmnist.COUNTS
    write_official(tmp_path, monkeypatch, official_arrays(counts))
    monkeypatch.setattr(pathmnist, "COUNTS", counts)
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


def test_a_later_start_maps_the_arrays_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_official(tmp_path, monkeypatch)
    first = load_dataset("pathmnist", 28, tmp_path)
    monkeypatch.setattr(module, "_unpack", no_build)
    again = load_dataset("pathmnist", 28, tmp_path)
    assert torch.equal(first.test.images, again.test.images)
    assert first.fingerprint == again.fingerprint == digest(path, "md5")
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
    (folder / "meta.json").write_text('{"version": 2, ')


def remove_labels(folder: Path) -> None:
    (folder / "val_labels.npy").unlink()


def change_meta(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def foreign_version(folder: Path) -> None:
    flip_a_byte(folder)  # with right checksums, so that only the version is wrong
    change_meta(folder, version=module.CACHE_VERSION + 1, checksums=module._checksums(folder))


def nothing_to_check(folder: Path) -> None:
    remove_labels(folder)
    change_meta(folder, checksums={})


def another_shape(folder: Path) -> None:
    images = np.load(folder / "train_images.npy")
    np.save(folder / "train_images.npy", images.reshape(-1, 14, 56, 3))


def swapped_halves(folder: Path) -> None:
    images = np.load(folder / "train_images.npy")
    np.save(folder / "train_images.npy", np.roll(images, len(images) // 2, axis=0))


def other_array(name: str, values: np.ndarray) -> Callable[[Path], None]:
    """An array of another type or range, with right checksums."""

    def change(folder: Path) -> None:
        np.save(folder / f"{name}.npy", values, allow_pickle=True)
        change_meta(folder, checksums=module._checksums(folder))

    return change


def junk_header(folder: Path) -> None:
    content = bytearray((folder / "val_labels.npy").read_bytes())
    content[10:60] = b"(" * 50
    (folder / "val_labels.npy").write_bytes(content)
    change_meta(folder, checksums=module._checksums(folder))


def nested_meta(folder: Path) -> None:
    (folder / "meta.json").write_text("[" * 100_000)


def fifo_for_labels(folder: Path) -> None:
    remove_labels(folder)
    os.mkfifo(folder / "val_labels.npy")


DAMAGE = [
    other_array("val_labels", np.full(30, 99)),
    other_array("val_labels", np.full(30, -1)),
    other_array("val_labels", np.zeros(30)),
    other_array("val_labels", np.array([None] * 30)),
    other_array("val_labels", np.zeros((30, 1), int)),
    other_array("val_images", np.zeros((30, 28, 28, 3), np.int8)),
    other_array("val_images", np.zeros((30, 14, 56, 3), np.uint8)),
    junk_header,
    nested_meta,
    fifo_for_labels,
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
    assert "is damaged or outdated; building it again" in capsys.readouterr().err


def test_arrays_that_cannot_be_read_for_a_while_are_not_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_official(tmp_path, monkeypatch)
    load_dataset("pathmnist", 28, tmp_path)

    def too_many(path: Path) -> Any:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Too many open files"):
        patched.setattr(module, "open_regular", too_many)
        load_dataset("pathmnist", 28, tmp_path)
    monkeypatch.setattr(module, "_unpack", no_build)
    load_dataset("pathmnist", 28, tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_any_damage_of_the_arrays_is_noticed(draw: st.DataObject, phantom_root: Path) -> None:
    whole = load_dataset("phantom", 28, phantom_root, train_tiles=45)
    folder = phantom_root / f"phantom-v{phantom.VERSION}_28_45.arrays"
    path = folder / draw.draw(st.sampled_from(["meta.json", "val_labels.npy", "val_images.npy"]))
    content = path.read_bytes()
    place, length = draw.draw(st.integers(0, len(content) - 1)), draw.draw(st.integers(0, 40))
    path.write_bytes(content[:place] + draw.draw(st.binary(max_size=40)) + content[place + length :])
    try:
        found = module._map_splits(folder, module.Layout(whole.fingerprint, 28, phantom.split_sizes(45)))
        assert found is None or torch.equal(found["val"].images, whole.val.images)
        assert found is None or torch.equal(found["val"].labels, whole.val.labels)
    finally:
        path.write_bytes(content)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_any_damage_of_an_official_file_is_a_fault_or_changes_nothing(
    draw: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_official(tmp_path, monkeypatch)
    path.write_bytes(damaged(path.read_bytes(), draw))
    arrays = tmp_path / "arrays"
    shutil.rmtree(arrays, ignore_errors=True)
    arrays.mkdir()
    try:
        module._unpack(path, module.Layout("", 28, COUNTS), arrays)
    except Fault:
        return
    for name, expected in official_arrays(COUNTS).items():
        assert np.array_equal(np.load(arrays / f"{name}.npy").reshape(expected.shape), expected)


def test_nothing_is_written_into_a_read_only_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    write_official(root, monkeypatch)
    root.chmod(0o555)
    try:
        first = load_dataset("pathmnist", 28, root)
        assert [path.name for path in root.iterdir()] == ["pathmnist.npz"]
        monkeypatch.setattr(module, "_unpack", no_build)
        assert torch.equal(load_dataset("pathmnist", 28, root).val.images, first.val.images)
    finally:
        root.chmod(0o755)


def test_arrays_of_earlier_versions_of_the_project_stay_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_official(tmp_path, monkeypatch)
    first = load_dataset("pathmnist", 28, tmp_path)
    change_meta(tmp_path / "pathmnist.arrays", source=[path.name, 12345, 67890])
    monkeypatch.setattr(module, "_unpack", no_build)
    assert torch.equal(load_dataset("pathmnist", 28, tmp_path).val.images, first.val.images)


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".phantom-v{phantom.VERSION}_28_45.arrays.part"
    left.mkdir()
    (left / "train_images.npy").write_bytes(b"half")
    (left / "more.npy").write_bytes(b"half")
    other = tmp_path / ".pathmnist_64.arrays.part"  # of a build that nobody may ever start again
    running = tmp_path / ".pathmnist_224.arrays.part"
    other.mkdir()
    running.mkdir()
    with locked(tmp_path / ".pathmnist_224.arrays.lock"):
        load_dataset("phantom", 28, tmp_path, train_tiles=45)
    folder = tmp_path / f"phantom-v{phantom.VERSION}_28_45.arrays"
    assert not left.exists()
    assert not other.exists()
    assert running.exists()
    assert len(list(folder.iterdir())) == 7


def test_a_mistyped_data_root_is_not_created_by_a_failed_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_official(tmp_path / "right", monkeypatch)
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(Fault, match=r"wrong/root/pathmnist\.npz: no such file, and the download failed") as fault:
        load_dataset("pathmnist", 28, tmp_path / "wrong" / "root")
    assert "by hand into" in str(fault.value)
    assert "--dataset phantom" in str(fault.value)
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


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
    assert len(list((Path(os.environ["XDG_CACHE_HOME"]) / "pathmnist-study").glob("*.arrays"))) == 2


def test_a_full_disk_is_named_and_no_folder_remains(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        remedy = "make room there, or name another --data_root"
        with pytest.raises(Fault, match=rf"phantom-.*\.arrays: cannot be built .*too large.*; {remedy}"):
            load_dataset("phantom", 28, tmp_path, train_tiles=45)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "pathmnist.npz").mkdir()
    with pytest.raises(Fault, match=r"pathmnist\.npz: not a regular file: delete it, and the same"):
        load_dataset("pathmnist", 28, tmp_path)


def test_a_source_without_the_right_to_read_it_is_no_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path, algorithm: str) -> str:  # root may read everything
        raise PermissionError(errno.EACCES, "Permission denied", path)

    (tmp_path / "pathmnist.npz").touch()
    monkeypatch.setattr(module, "digest", forbidden)
    with pytest.raises(
        Fault, match=r"pathmnist\.npz: Permission denied; make it readable, or name another"
    ) as fault:
        load_dataset("pathmnist", 28, tmp_path)
    assert "delete" not in str(fault.value)
    assert "make room" not in str(fault.value)


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


@pytest.mark.parametrize("damage", [cut_short, empty, not_a_zip, damaged_data])
def test_a_damaged_file_is_refused_with_the_remedy(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_official(tmp_path, monkeypatch)
    expected = digest(path, "md5")
    damage(path)
    with pytest.raises(Fault) as fault:
        load_dataset("pathmnist", 28, tmp_path)
    size = path.stat().st_size
    found = f"its MD5 is {digest(path, 'md5')}, not {expected}; it is damaged or another file ({size:,} bytes)"
    assert str(fault.value) == (
        f"{path}: {found}: delete it, and the same command fetches it again, or fetch "
        f"http://127.0.0.1:9/pathmnist.npz (MD5 {expected}) by hand into {tmp_path}, or use --dataset phantom"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["pathmnist.npz"]


# -------------------------------------------------------------------------------- a part of the training tiles


def test_a_part_is_a_copy_of_the_chosen_training_tiles_and_the_other_splits_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_official(tmp_path, monkeypatch)
    part, whole = load_dataset("pathmnist", 28, tmp_path, 300), load_dataset("pathmnist", 28, tmp_path)
    assert part.title == "PathMNIST (300 of 1,200 training tiles, 28 px)"
    assert part.fingerprint == f"{digest(path, 'md5')}-300-of-1200-order{module.ORDER_VERSION}"
    chosen = stratified_part(whole.train.labels.numpy(), 300)
    images = part.train.images
    assert (images[:, 0, 0, 0].int() + 251 * images[:, 1, 0, 0].int()).tolist() == chosen.tolist()
    assert torch.equal(images, whole.train.images[chosen])
    assert torch.equal(part.train.labels, torch.from_numpy(chosen) % 9)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert DeviceTiles(part.train, torch.device("cpu"), 28).tiles.is_contiguous()
    for split in ("val", "test"):
        assert torch.equal(getattr(part, split).images, getattr(whole, split).images)
        assert torch.equal(getattr(part, split).labels, getattr(whole, split).labels)
    assert [folder.name for folder in tmp_path.glob("*.arrays")] == ["pathmnist.arrays"]


def test_a_part_as_large_as_the_whole_is_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_official(tmp_path, monkeypatch)
    for train_tiles in (None, 1200):
        dataset = load_dataset("pathmnist", 28, tmp_path, train_tiles)
        assert dataset.title == "PathMNIST (1,200 training tiles, 28 px)"
        assert dataset.fingerprint == digest(path, "md5")
    assert load_dataset("pathmnist", 28, tmp_path, 1199).fingerprint.startswith(
        f"{digest(path, 'md5')}-1199-of-1200-"
    )


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


# ------------------------------------------------------------------------------------------------- phantom


def test_the_phantom_is_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_dataset("phantom", 28, tmp_path, train_tiles=90)
    assert (len(first.train), len(first.val), len(first.test)) == (90, 10, 18)
    assert first.title == "phantom (90 training tiles, 28 px)"
    assert "phantom" in first.fingerprint
    monkeypatch.setattr(module, "_generate_phantom", no_build)
    monkeypatch.setattr(module, "PHANTOM_TRAIN_TILES", 90)
    again = load_dataset("phantom", 28, tmp_path)
    assert torch.equal(first.train.images, again.train.images)
    assert json.loads(next(tmp_path.glob("*.arrays/meta.json")).read_text())["fingerprint"] == first.fingerprint


def test_a_data_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("not a folder")
    with pytest.raises(UsageError, match="not a folder"):
        load_dataset("phantom", 28, tmp_path / "root", train_tiles=45)


def test_batches_are_the_tiles_asked_for(tiny: module.Dataset) -> None:
    tiles = DeviceTiles(tiny.train, torch.device("cpu"), 28)
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
    share: float, tiny: module.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESIDENT_SHARE", share)
    tiles = DeviceTiles(tiny.train, torch.device("cuda"), 28)
    assert tiles.index_device.type == ("cuda" if share else "cpu")
    indices = torch.tensor([5, 0, 5, 100])
    images, labels = tiles.batch(indices.to(tiles.index_device))
    assert images.device.type == labels.device.type == "cuda"
    assert torch.equal(images.cpu(), tiny.train.images[indices])
