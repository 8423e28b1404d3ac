"""The files around the code: what pip installs, and what the guide names."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_a_wheel_carries_every_file_of_the_packages(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    needed = {name for name in listed if name.startswith(("common/", "study/"))}
    needed |= {f"{name}.py" for name in ("task1", "task2", "task5", "train")}
    for name in (*needed, "pyproject.toml", "README.md", "LICENSE"):  # pip leaves build/ where it builds
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, tmp_path / "source"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert needed - set(zipfile.ZipFile(wheel).namelist()) == set()
    assert "study/page.html" in needed


def test_every_file_that_the_guide_names_exists() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    names = {word for word in guide.split("`") if word.endswith((".py", ".yaml", ".html")) and " " not in word}
    assert names
    assert not [name for name in names if not (ROOT / name).exists()]
