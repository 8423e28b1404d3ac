"""Which file may import which: no circle, packages in one order, and task1.py loads neither Task 5 nor Task 2.

Every `import` statement in common/, study/ and the scripts counts, within functions too. An __init__.py does not
count as a file: those of this project import no module of it.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

from conftest import ROOT

ORDER = ("data", "records", "training", "finetune", "explain")  # a package imports those left of it
SCRIPTS = ("task1", "train", "task2", "task5")
LONGEST = 11


def files() -> dict[str, Path]:
    """Every file by its module's name."""
    paths = [ROOT / f"{name}.py" for name in SCRIPTS]
    paths += [path for folder in ("common", "study") for path in (ROOT / folder).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name: path for path, name in names.items() if path.name != "__init__.py"}


@cache
def imports() -> dict[str, set[str]]:
    """The modules of this project that each module imports."""
    known, found = files(), {}
    for name, path in known.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found[name] |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] &= known.keys()
    return found


@cache
def longest_chain(name: str) -> tuple[str, ...]:
    """The longest chain of imports that begins at a module. A circle is a RecursionError."""
    return (name, *max(map(longest_chain, imports()[name]), key=len, default=()))


def floor(name: str) -> int:
    """0 for a module directly in common/ and for the facts of PathMNIST, then the packages, then all others."""
    package, *rest = name.split(".")
    if name == "common.data.pathmnist":
        return 0
    return len(ORDER) + 1 if package != "common" else 0 if len(rest) == 1 else 1 + ORDER.index(rest[0])


def test_there_is_no_circle_and_no_long_chain_of_imports() -> None:
    chain = max(map(longest_chain, files()), key=len)
    assert len(chain) <= LONGEST, " → ".join(chain)


def test_a_module_imports_its_own_floor_and_those_below() -> None:
    up = [f"{name} → {other}" for name in files() for other in imports()[name] if floor(name) < floor(other)]
    assert up == []


def test_task1_loads_no_module_of_task_5_or_task_2() -> None:
    code = "import sys, task1; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()
    assert "common.training.loop" in loaded
    assert [name for name in loaded if name.startswith(("common.finetune", "common.explain", "study"))] == []
    assert [name for name in loaded if name.split(".")[0] in ("wandb", "matplotlib", "captum", "optuna")] == []
