"""Task 2 end to end: from a Task 1 run's files to pictures, table and record."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODEL
from example_records import CONFIG, write_run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

import task1
import task2
import task5
from common.cli import run_script
from common.data.dataset import load_dataset
from common.data.pathmnist import CLASS_NAMES
from common.explain import checks
from common.explain.maps import METHODS
from common.explain.tiles import choose_tiles, find_run
from common.training.models import build_model

PHANTOM = ["--dataset", "phantom", "--size", "28", "--input_size", "28"]


@pytest.fixture(scope="module")
def trained(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with one finished Task 1 run on a small phantom."""
    folder = tmp_path_factory.mktemp("task2")
    where = ["--data_root", str(phantom_root), "--output_dir", str(folder), "--wandb=disabled", "--device=cpu"]
    keys = [*PHANTOM, "--model_name", MODEL, "--train_tiles", "450", "--run_id", "first", "--n_epochs", "2"]
    run_script(task1.main, task1.Task1Config, [*keys, *where])
    return folder


def explain(folder: Path, phantom_root: Path, *more: str) -> None:
    """Run task2.py, with few tiles for the checks that make many maps a tile."""
    where = ["--data_root", str(phantom_root), "--output_dir", str(folder), "--wandb=disabled", "--device=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "COSTLY", dict.fromkeys(checks.COSTLY, 3))
        run_script(task2.main, task2.Task2Config, [*where, *more])


@pytest.fixture(scope="module")
def explained(trained: Path, phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder after task2.py."""
    folder = tmp_path_factory.mktemp("explained") / "out"
    shutil.copytree(trained, folder)
    explain(folder, phantom_root, "--checked_tiles", "8")
    return folder


def record(folder: Path) -> Any:
    return json.loads((folder / "runs" / "first" / "attribution.json").read_text())


def test_the_full_test_split_gives_the_coursework_s_ten_tiles() -> None:
    chosen = choose_tiles(7180, 10, 0)
    assert chosen == [6099, 5839, 4568, 3666, 1935, 294, 118, 2208, 1258, 539]
    assert sorted(choose_tiles(4, 10, 0)) == [0, 1, 2, 3]  # a small split is shown whole


def test_every_file_is_there_and_every_picture_legible(explained: Path) -> None:
    content = record(explained)
    assert content["run_id"] == "first"
    assert content["synthetic"] is True
    assert "phantom" in content["dataset"]
    assert len(content["tiles"]) == 10
    for row in content["tiles"]:
        picture, map_ = (imread(explained / row[part]) for part in ("input", "saliency"))
        assert picture.shape == map_.shape
        assert min(picture.shape[:2]) >= 300
        assert picture.std() > 0.02
        assert row["input"] == f"fig/task2/first/{row['index']:05d}-input.png"
    table = (explained / "runs" / "first" / "saliency.md").read_text().splitlines()
    assert "on phantom (" in table[0]
    assert table[2] == "| Index | Label | Predicted | Input | Saliency |"
    assert len(table) == 14
    for line, row in zip(table[4:], content["tiles"], strict=True):
        assert line.startswith(f"| {row['index']:05d} | {row['label']} | {row['predicted']}")
        assert ("✗" in line) == (row["label"] != row["predicted"])
        for part in ("input", "saliency"):
            link = line.split(f"{row[part].split('/')[-1]}")[0].rsplit("(", 1)[1]
            assert (explained / "runs" / "first" / link / Path(row[part]).name).is_file()
    scores = np.load(explained / "runs/first/scores.npz")
    for row in content["tiles"]:
        logarithms = scores["best_logits"][row["index"]]
        assert row["label"] == CLASS_NAMES[scores["targets"][row["index"]]]
        assert row["predicted"] == CLASS_NAMES[logarithms.argmax()]
        assert row["probability"] == pytest.approx(np.exp(float(logarithms.max())), abs=2e-3)
    for method in content["methods"].values():
        assert list(method["randomisation"].values())[-1]["value"] < 0.99
    assert set(content["figures"]) == {"methods", "all_methods", "means", "randomisation", "removal"}
    sizes = {key: imread(explained / "fig/task2" / name).shape for key, name in content["figures"].items()}
    assert min(width for _, width, _ in sizes.values()) >= 900
    assert sizes["methods"][0] < 0.65 * sizes["all_methods"][0]  # five tiles, and ten


@pytest.mark.slow
def test_the_same_seed_gives_the_same_pictures_and_numbers_and_says_what_it_does(
    trained: Path,
    explained: Path,
    phantom_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    drawn: list[Figure],
) -> None:
    again, classes, found, check = tmp_path / "again", [], [], checks.check_methods

    def check_methods(*given: Any) -> Any:
        classes.extend(given[3].tolist())
        found.append(check(*given))
        return found[0]

    monkeypatch.setattr(checks, "check_methods", check_methods)
    shutil.copytree(trained, again)
    explain(again, phantom_root, "--checked_tiles", "8")
    scores, chosen = np.load(again / "runs/first/scores.npz"), choose_tiles(90, 8, 0)
    assert classes == scores["best_logits"].argmax(1)[chosen].tolist() != scores["targets"][chosen].tolist()
    contents = [record(folder) for folder in (explained, again)]
    for content in contents:
        for name in ("started", "command", "config"):
            content.pop(name)
    assert contents[0] == contents[1]
    pictures = [path.relative_to(again) for path in (again / "fig" / "task2").rglob("*.png")]
    assert len(pictures) == 25
    for path in pictures:
        assert (explained / path).read_bytes() == (again / path).read_bytes(), path
    assert_content(
        drawn, contents[0]["tiles"], load_dataset("phantom", 28, phantom_root, 450).test.images, *found[0]
    )
    said = capsys.readouterr().out.splitlines()
    assert "Integrated Gradients (3 of 5): maps of 7 networks" in said
    assert len([line for line in said if "too few tiles to judge" in line]) == 5  # 8 tiles are too few


def assert_content(
    drawn: list[Figure], rows: list[dict[str, Any]], images: torch.Tensor, record: Any, means: Any
) -> None:
    """The figures of ten tiles, and those of the run: its maps, its mean maps and the curves of its checks."""

    def picture(axes: Axes) -> Any:
        return np.asarray(axes.get_images()[0].get_array())

    *_, panel, mean_maps, randomisation, removal = drawn
    for place, row in enumerate(rows):
        tile, saliency = (figure.axes[0] for figure in drawn[2 * place : 2 * place + 2])
        line = panel.axes[6 * place : 6 * place + 6]
        assert np.array_equal(picture(tile), images[row["index"]].permute(1, 2, 0))
        assert np.array_equal(picture(line[0]), picture(tile))
        assert np.array_equal(picture(line[1]), picture(saliency))
        assert line[0].spines["top"].get_visible() == (row["label"] != row["predicted"])
        assert tile.figure.texts[0].get_text().startswith(f"phantom, true: {row['label']}\npredicted: ")
        assert saliency.figure.axes[1].get_xlabel().startswith("phantom, |∂ logit of ")
        signed = [axes.get_images()[0].get_clim()[0] < 0 for axes in line[1:]]
        assert signed == [False, False, True, False, True]
        assert len({picture(axes).tobytes() for axes in line[1:]}) == 5
    for column, both in enumerate(means.values()):
        for axes, mean in zip((mean_maps.axes[column], mean_maps.axes[5 + column]), both, strict=True):
            assert np.array_equal(picture(axes), mean)
    assert (mean_maps.axes[0].get_ylabel(), mean_maps.axes[5].get_ylabel()) == ("trained", "random weights")
    saliency = record["methods"]["saliency"]
    correlations = [one["value"] for one in saliency["randomisation"].values()]
    assert list(randomisation.axes[0].get_lines()[0].get_ydata()) == [1, *correlations]
    for axes, kind in zip(removal.axes, ("deletion", "insertion"), strict=True):
        curve = saliency[f"{kind}_curve"]
        assert list(axes.get_lines()[0].get_ydata()) == [one["value"] for one in curve]
        bars = axes.collections[0].get_segments()
        assert [tuple(bar[:, 1]) for bar in bars] == [(one["low"], one["high"]) for one in curve]


def test_the_task_1_run_with_most_tiles_is_explained_and_the_newest_of_several(tmp_path: Path) -> None:
    runs = [("old", "task1"), ("new", "task1"), ("unfinished", "task1"), ("x", "task3")]
    for day, (run_id, task) in enumerate(runs, start=1):
        path = write_run(tmp_path, {**CONFIG, "run_id": run_id}, task) / "config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "started": f"2026-01-0{day}T00:00:00+00:00"}))
        (tmp_path / "checkpoints" / run_id).mkdir(parents=True)
        (tmp_path / "checkpoints" / run_id / "best.pt").touch()
    (tmp_path / "runs/unfinished/summary.json").unlink()
    assert find_run(tmp_path, None)["run_id"] == "new"
    assert find_run(tmp_path, "x")["run_id"] == "x"  # a named run may be of another task
    content = json.loads((tmp_path / "runs/old/config.json").read_text())
    content["tiles"]["train"] += 1
    (tmp_path / "runs/old/config.json").write_text(json.dumps(content))
    assert find_run(tmp_path, None)["run_id"] == "old"  # a learning curve's newer runs have fewer training tiles
    shutil.rmtree(tmp_path / "checkpoints/old")
    assert find_run(tmp_path, None)["run_id"] == "new"  # others have no weights


@pytest.mark.slow
def test_a_fine_tuned_network_is_explained(
    trained: Path, phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "METHODS", {"saliency": METHODS["saliency"]})
    folder = tmp_path / "out"
    shutil.copytree(trained, folder)
    where = ["--data_root", str(phantom_root), "--output_dir", str(folder), "--wandb=disabled", "--device=cpu"]
    keys = [*PHANTOM[:4], "--train_tiles", "450", "--run_id", "tuned", "--weights", str(folder / "w.pt")]
    torch.save(build_model(MODEL, 9, 32).state_dict(), folder / "w.pt")
    keys += ["--model_name", MODEL, "--n_epochs", "1", "--scratch", "false", "--input_size", "32"]
    run_script(task5.main, task5.Task5Config, [*keys, *where])
    explain(folder, phantom_root, "--run_id", "tuned", "--checked_tiles", "6")
    content = json.loads((folder / "runs/tuned/attribution.json").read_text())
    data = "phantom (450 training tiles, 28 px tiles, 32 px inputs)"
    assert content["network"] == f"{MODEL}, from w.pt, fine-tuned on {data}, seed 0"
    stages = list(content["methods"]["saliency"]["randomisation"])
    assert stages == ["head", "1", "2", "4", "8", "16"]


def test_an_unfinished_run_and_other_data_are_refused_in_one_line(
    trained: Path, phantom_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(trained, folder)
    path = folder / "runs/first/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data_fingerprint": "another"}))
    weights = folder / "checkpoints/first/best.pt"
    whole = weights.read_bytes()
    weights.write_bytes(whole + b"x")
    for status, message, then in (
        (1, "not the weights with which run first finished", lambda: weights.write_bytes(whole)),
        (
            1,
            "its phantom .* is not what run first was trained on; .*_root$",
            (folder / "runs/first/summary.json").unlink,
        ),
        (2, "--run_id first: no finished run in .*; python task1.py makes one, ", lambda: None),
    ):
        with pytest.raises(SystemExit) as ended:
            explain(folder, phantom_root, "--run_id", "first")
        assert ended.value.code == status
        assert re.search(message, capsys.readouterr().err.strip())
        then()
    assert not (folder / "fig/task2").exists()
