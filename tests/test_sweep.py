"""Sweep files, the local engine with a program that only pretends to train, and the real `wandb agent`."""

import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from processes import end, start
from scipy import stats
from tqdm import tqdm
from wandb_server import WandbServer

from common.compute import physical_cores
from common.config import parse, run_script
from common.errors import Fault, UsageError
from common.files import locked
from study import ablation, search, sweep
from study.sweep_file import Range, read_sweep
from study.trials import Trial, Workers, Workplace
from train import ABLATIONS, TrainConfig

FAKE_PROGRAM = """
import os
import signal
import sys
import time
from dataclasses import dataclass
from common.config import Config, key, run_script
from common.errors import UsageError
from common.files import atomic_path, write_json


@dataclass(frozen=True, kw_only=True)
class FakeConfig(Config):
    row: str = key("a", "a row of the grid")
    quality: float = key(0.5, "the metric of the last epoch", at_most=1)
    n_epochs: int = key(1, "epochs", at_least=1)
    pause: float = key(0.0, "seconds an epoch")
    together: int = key(1, "wait until so many runs have started")
    lingering: float = key(0.0, "seconds from SIGTERM to the end")


def note(config, name, *what):
    with open(config.output_dir / name, "a") as file:
        file.write(" ".join(map(str, what)) + "\\n")


def main(config):
    begun = time.monotonic()

    def linger(*_):
        note(config, "asked.txt", time.monotonic())
        time.sleep(config.lingering)
        sys.exit(143)

    if config.lingering:
        signal.signal(signal.SIGTERM, linger)
    note(config, "starts.txt", config.run_id)
    while len((config.output_dir / "starts.txt").read_text().split()) < config.together:
        if time.monotonic() > begun + 15:
            raise UsageError("it is alone")
        time.sleep(0.02)
    if config.quality < 0:
        raise UsageError(f"--quality {config.quality}: broken")
    folder = config.output_dir / "runs" / config.run_id
    write_json(folder / "config.json", {"config": config.as_dict(), "commit": "abc", "dataset": "no data"})
    text = "epoch,validate/acc\\n"
    for epoch in range(1, config.n_epochs + 1):
        time.sleep(config.pause)
        text += f"{epoch},{config.quality * epoch / config.n_epochs}\\n"
        with atomic_path(folder / "history.csv") as temporary:
            temporary.write_text(text)
    score = {"auc": {"value": config.quality}, "acc": {"value": config.quality}}
    write_json(folder / "summary.json", {
        "dataset": "no data", "synthetic": True, "data_fingerprint": "f",
        "tiles": {"train": 1000, "val": 10, "test": 20},
        "test/auc": config.quality, "test/acc": config.quality, "best": {"epoch": config.n_epochs, **score},
        "validate": {"validate/acc": config.quality, "validate/auc": config.quality},
        "stopped": "all epochs done", "wall_seconds": 1.0,
    })
    while (config.output_dir / f"hold-{config.run_id}").exists() and time.monotonic() < begun + 60:
        time.sleep(0.02)
    note(config, "spans.txt", begun, time.monotonic(), os.environ.get("OMP_NUM_THREADS"))


if __name__ == "__main__":
    run_script(main, FakeConfig)
"""

GRID = {"method": "grid", "parameters": {"row": {"values": ["a", "b", "c"]}, "seed": {"values": [0, 1]}}}
SEARCH = {
    "method": "bayes",
    "metric": {"name": "validate/acc", "goal": "maximize"},
    "parameters": {"quality": {"min": 0.1, "max": 1.0}, "row": {"values": ["a", "b"]}},
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a sweep file `try.yaml` for the fake program: `content`, with `parameters` added to its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = tmp_path / "fake.py"
    program.write_text(FAKE_PROGRAM)

    def write_sweep(content: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> Path:
        path = tmp_path / "try.yaml"
        together = {**content.get("parameters", {}), **(parameters or {})}
        path.write_text(
            yaml.safe_dump({"program": str(program), **content, "parameters": together}, sort_keys=False)
        )
        return path

    return write_sweep


def run(path: Path, output: Path, **keys: Any) -> None:
    output.mkdir(exist_ok=True)
    sweep.main(sweep.SweepConfig(**{"file": path, "output_dir": output, "workers": 1, **keys}))


def begin(path: Path, output: Path, **keys: Any) -> Any:
    """A started command; forked, so that it need not import PyTorch again."""
    keys = {"file": path, "output_dir": output, "workers": 1, **keys}
    arguments = [f"--{name}={value}" for name, value in keys.items()]
    given = (sweep.main, sweep.SweepConfig, arguments)
    process = multiprocessing.get_context("fork").Process(target=run_script, args=given)
    output.mkdir(exist_ok=True)
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def starts(output: Path) -> list[str]:
    path = output / "starts.txt"
    return path.read_text().split() if path.exists() else []


def at_once(output: Path) -> int:
    """How many runs, at most, were at work at the same time."""
    spans = [[float(moment) for moment in line.split()[:2]] for line in (output / "spans.txt").open()]
    return max(sum(begun <= moment < ended for begun, ended in spans) for moment, _ in spans)


def threads(output: Path) -> set[str]:
    """What the runs' OMP_NUM_THREADS was."""
    return {line.split()[2] for line in (output / "spans.txt").open()}


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# The sweep files of the project


@pytest.mark.parametrize("name", ["sweep.yaml", "ablation.yaml"])
def test_every_value_of_a_sweep_file_is_one_that_train_takes(name: str) -> None:
    content = yaml.safe_load((ROOT / name).read_text())
    for key, parameter in content["parameters"].items():
        for value in [
            *parameter.get("values", []),
            *(parameter[bound] for bound in ("value", "min", "max") if bound in parameter),
        ]:
            parsed = getattr(parse(TrainConfig, [f"--{key}={value}"], ""), key)
            assert parsed == value, (key, value)


def test_the_ablation_file_has_every_row_with_five_seeds_one_seed_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    trials = sweep.grid(read_sweep(Path("ablation.yaml")))
    assert [trial.values["ablation"] for trial in trials[: len(ABLATIONS)]] == list(ABLATIONS)
    assert [trial.values["seed"] for trial in trials] == [seed for seed in range(5) for _ in ABLATIONS]
    assert trials[10].run_id == "ablation-with_ema-0"


def test_the_search_file_holds_the_courseworks_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    content = read_sweep(Path("sweep.yaml"))
    assert {"auto", "none", "ta_wide", "stain", "ta_wide,stain"} == set(content.swept["augmentation"])
    assert content.swept["batch_size"] == (32, 64, 128, 256, 512)
    assert content.swept["lr"] == Range("log_uniform_values", 1e-4, 1)
    assert content.swept["weight_decay"] == Range("log_uniform_values", 1e-6, 1)
    assert content.fixed == {"n_epochs": 20}
    assert (content.metric, content.maximize, content.method) == ("validate/acc", True, "bayes")


# Reading a sweep file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "bayesian"}, "unknown method bayesian: choose from grid, random, bayes; did you mean bayes?"),
        ({"method": "bayes"}, "metric is missing"),
        ({"metod": "grid"}, "unknown key metod; did you mean method?"),
        ({"program": "nowhere.py"}, "program nowhere.py: no such file"),
        ({"parameters": []}, "parameters must hold"),
        ({"parameters": {"rwo": {"values": ["a"]}}}, "unknown key --rwo; did you mean --row?"),
        ({"parameters": {"row": "a"}}, "row must hold"),
        ({"parameters": {"row": {"values": "a"}}}, "parameter row: values must be a list"),
        ({"parameters": {"row": {"value": 1, "min": 0, "max": 1}}}, "parameter row needs either value"),
        ({"parameters": {"row": {"valeus": ["a"]}}}, "unknown entry of parameter row: valeus"),
        ({"parameters": {"quality": {"values": [0.5, 2]}}}, "--quality 2.0: must be at most 1"),
        ({"parameters": {"quality": {"min": 0, "max": 2}}}, "--quality 2.0: must be at most 1"),
        ({"parameters": {"quality": {"min": 0, "max": "1e-4"}}}, "'1e-4' is not a number"),
        ({"parameters": {"quality": {"min": 1, "max": 0}}}, "no int_uniform between 1 and 0"),
        (
            {"parameters": {"quality": {"min": 0.1, "max": 1, "distribution": "normal"}}},
            "unknown distribution of parameter quality: normal",
        ),
        (
            {"parameters": {"quality": {"min": 0, "max": 1, "distribution": "log_uniform_values"}}},
            "no log_uniform_values between 0 and 1",
        ),
        ({"parameters": {"run_id": {"value": "r"}}}, "the sweep gives each run its own"),
        ({"metric": {"name": "validate/acc", "goal": "max"}}, "unknown goal of metric: max"),
        ({"early_terminate": {"type": "median"}}, "unknown type of early_terminate: median"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "unknown entry of early_terminate: max_iter"),
        ({"early_terminate": {"type": "hyperband"}}, "min_iter None must be a whole number"),
        ({"command": ["${interpreter}", "${program}", "${args_json}"]}, "unknown macro ${args_json}"),
        ({"command": ["${interpreter}", "${program}"]}, "command has no ${args}"),
        ({"command": "python train.py"}, "command must be a list"),
    ],
)
def test_a_malformed_sweep_file_is_refused_by_name(
    write: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    path = write(GRID)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(UsageError) as error:
        read_sweep(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00", "1: 2"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml: "):
        read_sweep(tmp_path / "bad.yaml")


def test_the_command_line_takes_the_file_first_and_the_runs_keys_after_two_hyphens() -> None:
    given = sweep.as_keys(["s.yaml", "--count", "3", "--", "--size=28", "--row=a b"])
    config = parse(sweep.SweepConfig, given, "")  # type: ignore[type-var]
    assert (config.file, config.count, config.fixed) == (Path("s.yaml"), 3, "--size=28 '--row=a b'")


@pytest.mark.slow
def test_a_user_error_is_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "study.sweep", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"sweep.py: {tmp_path / 'none.yaml'}: No such file or directory\n"


def test_keys_for_every_run_reach_the_command_and_may_not_be_swept(write: Callable[..., Path]) -> None:
    path = write({**GRID, "command": ["${env}", "nice", "${interpreter}", "${program}", "${args}"]})
    made = read_sweep(path, ["--dataset=phantom", "--train-tiles=90"])
    command = made.command_line({"row": "b"})
    assert command[:3] == ["/usr/bin/env", "nice", sys.executable]
    assert command[4:] == ["--dataset=phantom", "--train_tiles=90", "--row=b"]
    for argument in ("--seed=3", "--run_id=r", "--size", "size=3", "--sise=28"):
        with pytest.raises(UsageError, match=argument.split("=")[0]):
            read_sweep(path, [argument])


# A grid


def test_a_grid_runs_every_combination_one_seed_after_the_other(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write(GRID), tmp_path / "out")
    expected = ["try-a-0", "try-b-0", "try-c-0", "try-a-1", "try-b-1", "try-c-1"]
    assert starts(tmp_path / "out") == expected
    printed = capsys.readouterr()
    assert [line.split(":")[0] for line in printed.out.splitlines()[:6]] == expected
    assert printed.err == ""
    assert (tmp_path / "out/fig/task4/try.png").exists()
    assert len(lines(tmp_path / "out/sweeps/try/runs.csv")) == 6


def test_finished_runs_are_skipped_and_other_configurations_refused(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path, output = write(GRID), tmp_path / "out"
    run(path, output)
    run(path, output)
    assert len(starts(output)) == 6
    with pytest.raises(UsageError, match=r"try-a-0 exists already, with n_epochs 1 instead of 2"):
        run(path, output, fixed="--n_epochs=2")


def test_a_failing_run_is_named_and_the_others_go_on(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        {"method": "grid", "parameters": {"quality": {"values": [0.5, -1, 0.7]}, "seed": {"values": [0]}}}
    )
    run(path, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "try-_1-0: FAILED with exit status 2: fake.py: --quality -1.0: broken" in printed
    assert len(starts(tmp_path / "out")) == 3
    assert "**Incomplete**: 1 runs are missing: try-_1-0." in (tmp_path / "out/sweeps/try/table.md").read_text()


def test_a_grid_or_a_search_whose_runs_all_fail_is_a_fault(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write({"method": "grid", "parameters": {"quality": {"value": -1}, "seed": {"values": [0, 1]}}})
    with pytest.raises(Fault, match="all 2 runs failed"):
        run(path, tmp_path / "out")
    path = write({**SEARCH, "name": "other"}, {"quality": {"value": -1}})
    with pytest.raises(Fault, match="all 2 trials failed"):
        run(path, tmp_path / "out", count=2)


def test_a_grid_that_cannot_be_named_or_enumerated_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="a grid needs values"):
        sweep.grid(read_sweep(write({**GRID, "parameters": {"quality": {"min": 0.0, "max": 1.0}}})))
    with pytest.raises(UsageError, match="listed twice"):
        sweep.grid(read_sweep(write({**GRID, "parameters": {"row": {"values": ["a+b", "a b"]}}})))
    with pytest.raises(UsageError, match="a run id names files"):
        sweep.grid(read_sweep(write({**GRID, "name": "n" * 64})))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_grid_goes_on_and_starts_no_run_beside_its_orphans(
    write: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    path, output = write(GRID, {"pause": {"value": 0.5}}), tmp_path / "out"
    killed = begin(path, output, workers=workers)
    wait_for(lambda: len(starts(output)) == 2)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    run(path, output, workers=workers)
    # What the killed command was at lived on and finished, holding its lock: nobody started it again.
    assert Counter(starts(output)) == {f"try-{row}-{seed}": 1 for row in "abc" for seed in (0, 1)}
    assert len(lines(output / "sweeps/try/runs.csv")) == 6


@pytest.mark.parametrize(("workers", "again"), [(1, ["try-b-0"]), (2, ["try-a-0", "try-b-0"])])
def test_runs_that_died_with_their_command_are_started_again(
    write: Callable[..., Path], tmp_path: Path, workers: int, again: list[str]
) -> None:
    path, output = write(GRID, {"pause": {"value": 0.5 * workers}}), tmp_path / "out"
    killed = begin(path, output, workers=workers)
    wait_for(lambda: len(starts(output)) == 2)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(killed.pid, signal.SIGKILL)
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    killed.join()
    run(path, output, workers=workers)
    assert sorted(run_id for run_id, times in Counter(starts(output)).items() if times == 2) == again
    assert len(starts(output)) == 6 + len(again)
    assert len(lines(output / "sweeps/try/runs.csv")) == 6


def test_two_commands_share_a_grid(write: Callable[..., Path], tmp_path: Path) -> None:
    path, output = write(GRID, {"pause": {"value": 0.3}}), tmp_path / "out"
    commands = [begin(path, output, workers=workers) for workers in (1, 2)]
    for each in commands:
        each.join(60)
    assert [each.exitcode for each in commands] == [0, 0]
    assert Counter(starts(output)) == {f"try-{row}-{seed}": 1 for row in "abc" for seed in (0, 1)}
    assert "Incomplete" not in (output / "sweeps/try/table.md").read_text()


# Several workers


@pytest.mark.parametrize("content", [GRID, SEARCH])
def test_as_many_runs_as_there_are_workers_go_on_at_once_and_no_more(
    write: Callable[..., Path], tmp_path: Path, content: Mapping[str, Any]
) -> None:
    # The first ones wait for each other.
    path, output = write(content, {"pause": {"value": 0.2}, "together": {"value": 2}}), tmp_path / "out"
    run(path, output, workers=2, count=6)
    assert len(starts(output)) == len(set(starts(output))) == 6
    assert at_once(output) == 2


@pytest.mark.parametrize(
    ("device", "cuda", "workers", "omp_num_threads"),
    [("auto", False, 3, "1"), ("cpu", True, 3, "1"), ("auto", True, 1, "None"), ("cuda", True, 1, "None")],
)
def test_by_default_a_cpu_gets_a_run_a_core_with_one_thread_each_and_a_gpu_one_run(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    cuda: bool,
    workers: int,
    omp_num_threads: str,
) -> None:
    monkeypatch.setattr(sweep, "physical_cores", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    path = write(GRID, {"device": {"value": device}, "together": {"value": workers}, "pause": {"value": 0.1}})
    run(path, tmp_path / "out", workers=None)
    assert at_once(tmp_path / "out") == workers
    assert threads(tmp_path / "out") == {omp_num_threads}


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("3", "3")])
def test_a_single_worker_on_a_cpu_has_one_thread_too_unless_the_user_says_otherwise(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    expected: str,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    run(write(GRID, {"device": {"value": "cpu"}}), tmp_path / "out", workers=1)
    assert threads(tmp_path / "out") == {expected}


def test_hyper_threads_and_cpus_of_other_processes_are_no_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(siblings + "\n")
    for allowed, cores in (({0, 1, 2, 3}, 2), ({0, 2}, 1), ({1, 2}, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed)
        assert physical_cores(tmp_path) == cores
        assert physical_cores(tmp_path / "none") == len(allowed)  # where the topology is hidden
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert physical_cores(tmp_path) == 5


def test_no_worker_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="--workers 0: must be at least 1"):
        parse(sweep.SweepConfig, ["--workers=0"], "")  # type: ignore[type-var]


def test_the_bar_counts_the_finished_runs_of_all_workers(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {"quality": {"values": [0.5, -1]}, "seed": {"values": [0, 1]}}
    contents = (GRID, {**SEARCH, "name": "other"}, {"method": "grid", "name": "third", "parameters": failing})
    for content, last in zip(contents, ("6/6", "6/6", "2/4"), strict=True):
        shown = io.StringIO()
        drawn = partial(tqdm, file=shown)
        for module in (sweep, search):
            monkeypatch.setattr(module, "tqdm", lambda drawn=drawn, **keys: drawn(**{**keys, "disable": False}))
        run(write(content), tmp_path / "out", workers=2, count=6)
        assert f"| {last} [" in shown.getvalue().split("\r")[-1]


@pytest.mark.parametrize(
    ("content", "number", "send"),
    [
        (GRID, signal.SIGTERM, os.kill),
        (SEARCH, signal.SIGINT, os.kill),
        (GRID, signal.SIGINT, os.killpg),  # as from the keyboard: the runs get it too
        (SEARCH, signal.SIGINT, os.killpg),
    ],
)
def test_a_signal_ends_all_runs_and_the_same_command_goes_on(
    write: Callable[..., Path],
    tmp_path: Path,
    content: Mapping[str, Any],
    number: signal.Signals,
    send: Callable[[int, int], None],
) -> None:
    path, output, log = write(content, {"pause": {"value": 60}}), tmp_path / "out", tmp_path / "log"
    output.mkdir()
    arguments = [f"--file={path}", f"--output_dir={output}", "--workers=2", "--count=4"]

    def command() -> None:
        run_script(sweep.main, sweep.SweepConfig, arguments)  # type: ignore[type-var]

    pid = start(command, log)
    wait_for(lambda: len(starts(output)) == 2)
    send(pid, number)
    assert end(pid, 20) == 128 + number, log.read_text()
    assert f"{number.name}: the sweep ended early; the same command continues" in log.read_text()
    assert "FAILED" not in log.read_text()
    for trial in starts(output):
        with locked(output / f"sweeps/try/{trial}.lock") as lock:
            assert lock is not None

    (tmp_path / "fake.py").write_text(FAKE_PROGRAM.replace("time.sleep(config.pause)", "pass"))
    assert end(start(command, log)) == 0, log.read_text()
    run(path, tmp_path / "whole", count=4)
    name = "sweeps/try/table.csv"
    assert lines(output / name) == lines(tmp_path / "whole" / name)


@pytest.mark.parametrize("content", [GRID, SEARCH])
def test_a_run_that_has_its_records_may_end_in_peace(
    write: Callable[..., Path], tmp_path: Path, content: Mapping[str, Any]
) -> None:
    path, output = write(content), tmp_path / "out"
    output.mkdir()
    name = "try-a-0" if content is GRID else "try-0"
    (output / f"hold-{name}").touch()
    # The second command ends the search that the first one's only trial belongs to.
    commands = [begin(path, output, count=1)]
    wait_for((output / f"runs/{name}/summary.json").exists)
    commands.append(begin(path, output, count=3))
    n_runs = 6 if content is GRID else 3
    wait_for(lambda: len(starts(output)) == n_runs)
    time.sleep(1.2)
    (output / f"hold-{name}").unlink()
    for each in commands:
        each.join(60)
    assert [each.exitcode for each in commands] == [0, 0]
    assert len((output / "spans.txt").read_text().splitlines()) == n_runs


def test_a_run_that_somebody_has_just_finished_is_not_started(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output, seen = write(GRID), tmp_path / "out", set()
    run(path, output)
    is_finished = Workplace.is_finished

    def finished_since(workplace: Workplace, trial: Trial) -> bool:
        if trial.run_id in seen:
            return is_finished(workplace, trial)
        seen.add(trial.run_id)
        return False

    monkeypatch.setattr(Workplace, "is_finished", finished_since)
    run(path, output, workers=2)
    assert len(seen) == len(starts(output)) == 6


def test_a_trial_is_stopped_once_and_claimed_until_its_end_is_told(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    workplace = Workplace(read_sweep(write(GRID, {"pause": {"value": 60}, "lingering": {"value": 0.3}})), tmp_path)
    trial = sweep.grid(workplace.sweep)[0]
    path = workplace.lock_path(trial)
    with Workers(workplace, 1) as workers:
        with ExitStack() as claim:
            lock = claim.enter_context(locked(path))
            assert lock is not None
            workers.start(trial, lock, claim)
        wait_for(lambda: bool(starts(tmp_path)))
        workers.running[0].stop()
        wait_for((tmp_path / "asked.txt").exists)
        workers.running[0].stop()
        while not (ended := workers.wait()):
            pass
        [(running, status)] = ended
        assert (running.trial, running.stopped, status) == (trial, True, 143)
        assert len((tmp_path / "asked.txt").read_text().split()) == 1
        with locked(path) as taken:
            assert taken is None
        running.claim.close()
        with locked(path) as taken:
            assert taken is not None


def test_sigterm_reaches_all_runs_at_once_and_each_only_once(write: Callable[..., Path], tmp_path: Path) -> None:
    path, output = write(GRID, {"pause": {"value": 60}, "lingering": {"value": 3}}), tmp_path / "out"
    ended = begin(path, output, workers=2)
    wait_for(lambda: len(starts(output)) == 2)
    os.kill(ended.pid, signal.SIGTERM)
    ended.join(20)
    first, second = (float(moment) for moment in (output / "asked.txt").read_text().split())
    assert abs(first - second) < 2.5  # the second one was not asked only when the first had ended


def test_a_run_that_ignores_sigterm_is_killed_in_the_end(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("study.trials.PATIENCE", 0.3)
    path, output = write(GRID, {"pause": {"value": 60}, "lingering": {"value": 60}}), tmp_path / "out"
    ended = begin(path, output, workers=2)
    wait_for(lambda: len(starts(output)) == 2)
    os.kill(ended.pid, signal.SIGTERM)
    ended.join(20)
    assert ended.exitcode == 143
    for trial in starts(output):
        with locked(output / f"sweeps/try/{trial}.lock") as lock:
            assert lock is not None


# What a grid says


def grid_of(
    path: Path, output: Path, scores: Mapping[str, Mapping[int, float | None]], views: bool = False, **others: Any
) -> tuple[list[Trial], Workplace]:
    """A grid whose runs are finished by hand with these test ACCs; None is a missing run.

    With `views` rows a and c are also scored over 8 views, a point better.
    """
    workplace = Workplace(read_sweep(path), output)
    trials = sweep.grid(workplace.sweep)
    for trial in trials:
        score = scores[trial.values["row"]][trial.values["seed"]]
        if score is None:
            continue
        config = workplace.sweep.config({**trial.values, "run_id": trial.run_id}).as_dict()
        summary = {
            "dataset": "no data",
            "synthetic": False,
            "data_fingerprint": "f",
            "tiles": {"train": 1000, "val": 10, "test": 20},
            "test/auc": 0.9,
            "test/acc": score,
            "best": {"epoch": 1, "acc": {"value": score}, "auc": {"value": 0.9}},
            "validate": {"validate/acc": 0.8, "validate/auc": 0.9},
            "stopped": "all 1 epochs done",
            "wall_seconds": 1.5,
        }
        if views and trial.values["row"] != "b":
            summary |= {"tta": {"acc": {"value": score + 0.01}, "auc": {"value": 0.95}}}
        summary |= others.get(trial.run_id, {})
        folder = workplace.record(trial, "")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"config": config, "commit": "abc"}))
        (folder / "history.csv").write_text("epoch,validate/acc\n1,0.8\n")
        (folder / "summary.json").write_text(json.dumps(summary))
    return trials, workplace


THREE_SEEDS = {
    "method": "grid",
    "parameters": {"row": {"values": ["a", "b", "c"]}, "seed": {"values": [0, 1, 2]}},
}
SCORES: dict[str, dict[int, float | None]] = {
    "a": {0: 0.50, 1: 0.60, 2: 0.70},
    "b": {0: 0.52, 1: 0.61, 2: 0.75},
    "c": {0: 0.40, 1: 0.51, 2: 0.60},
}


def test_the_table_has_the_hand_made_numbers(write: Callable[..., Path], tmp_path: Path) -> None:
    ablation.report(*grid_of(write(THREE_SEEDS), tmp_path, SCORES))
    a, b, c = lines(tmp_path / "sweeps/try/table.csv")
    assert [row["n"] for row in (a, b, c)] == ["3", "3", "3"]
    assert float(a["test/acc mean"]) == pytest.approx(0.6)
    assert float(a["test/acc sd"]) == pytest.approx(0.1)
    assert a["test/acc p"] == ""
    # b - a: .02, .01, .05: mean .02667, sd .02082; t(.975, 2) = 4.3027; Holm's factor for the larger p is 1.
    assert float(b["test/acc difference"]) == pytest.approx(0.0266667, abs=1e-6)
    half = 4.302653 * 0.0208167 / math.sqrt(3)
    assert float(b["test/acc difference low"]) == pytest.approx(0.0266667 - half, abs=1e-5)
    assert float(b["test/acc difference high"]) == pytest.approx(0.0266667 + half, abs=1e-5)
    expected = stats.ttest_rel([0.52, 0.61, 0.75], [0.5, 0.6, 0.7]).pvalue
    assert float(b["test/acc p"]) == pytest.approx(expected)
    assert float(b["test/acc p holm"]) == pytest.approx(expected)
    assert b["test/acc verdict"] == "inside the noise"
    # c - a is -.10, -.09, -.10. The smaller of two p is doubled.
    assert float(c["test/acc mean"]) == pytest.approx((0.40 + 0.51 + 0.60) / 3)
    assert float(c["test/acc p holm"]) == pytest.approx(2 * float(c["test/acc p"]))
    assert c["test/acc verdict"] == "worse"
    assert c["validate/acc verdict"] == "the same"
    assert (tmp_path / "fig/task4/try.png").stat().st_size > 10_000


def test_scores_over_8_views_get_a_column_and_the_first_row_s_a_comparison(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    ablation.report(*grid_of(write(THREE_SEEDS), tmp_path, SCORES, views=True))
    a, b, c, views = lines(tmp_path / "sweeps/try/table.csv")
    assert views["row"] == "a, 8 views"
    assert float(a["test/acc mean"]) == pytest.approx(0.6)  # plain, as the other rows
    assert float(views["test/acc mean"]) == pytest.approx(0.61)
    assert float(views["test/acc difference"]) == pytest.approx(0.01)
    assert float(views["test/auc difference"]) == pytest.approx(0.05)
    assert views["validate/acc verdict"] == "the same"
    assert float(c["test/acc difference"]) == pytest.approx((-0.10 - 0.09 - 0.10) / 3)
    assert float(c["test/acc 8 views mean"]) == pytest.approx((0.41 + 0.52 + 0.61) / 3)
    assert b["test/acc 8 views mean"] == ""
    text = (tmp_path / "sweeps/try/table.md").read_text()
    assert "| b | 3 | 0.8000 ± 0.0000 | 0.6267 ± 0.1159 | 0.9000 ± 0.0000 |  |" in text
    assert "| c | 3 | 0.8000 ± 0.0000 | 0.5033 ± 0.1002 | 0.9000 ± 0.0000 | 0.5133 ± 0.1002 |" in text


def test_the_table_says_what_it_is_of(write: Callable[..., Path], tmp_path: Path) -> None:
    ablation.report(*grid_of(write(THREE_SEEDS), tmp_path, SCORES, views=True))
    text = (tmp_path / "sweeps/try/table.md").read_text()
    assert text.startswith(
        "**try**: no data; 1,000 training, 10 validation and 20 test tiles of 64 pixels; 3 seeds (0, 1, 2); "
        "intervals are over seeds. Commit abc.\n"
    )
    assert "| b | 3 | 0.8000 ± 0.0000 | 0.6267 ± 0.1159 | 0.9000 ± 0.0000 |" in text
    assert "Incomplete" not in text
    assert "different" not in text
    runs = lines(tmp_path / "sweeps/try/runs.csv")
    assert len(runs) == 9
    assert (runs[2]["test/acc"], runs[2]["tta test/acc"], runs[2]["wall_seconds"]) == (
        "0.4",
        "0.41000000000000003",
        "1.5",
    )


def test_an_incomplete_grid_says_what_is_missing_and_pairs_what_it_can(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    missing = {**SCORES, "b": {0: 0.52, 1: None, 2: 0.75}, "c": {0: 0.4, 1: None, 2: None}}
    trials, workplace = grid_of(write(THREE_SEEDS), tmp_path, missing)
    ablation.report(trials, workplace)
    text = (tmp_path / "sweeps/try/table.md").read_text()
    assert "**Incomplete**: 3 runs are missing: try-b-1, try-c-1, try-c-2." in text
    _, b, c = lines(tmp_path / "sweeps/try/table.csv")
    assert b["test/acc pairs"] == "2"
    assert float(b["test/acc difference"]) == pytest.approx(0.035)
    assert c["test/acc verdict"] == "too few seeds"


def test_runs_of_different_data_are_told(write: Callable[..., Path], tmp_path: Path) -> None:
    other = {"try-b-1": {"dataset": "other data", "data_fingerprint": "g"}}
    ablation.report(*grid_of(write(THREE_SEEDS), tmp_path, SCORES, **other))
    assert "different data sets: they cannot be compared" in (tmp_path / "sweeps/try/table.md").read_text()


def test_nothing_finished_is_a_clear_error(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run of try is finished yet"):
        run(write(THREE_SEEDS), tmp_path, table_only=True)
    with pytest.raises(UsageError, match="no trial of try has ended yet"):
        run(write(SEARCH), tmp_path, table_only=True)


# A search


@pytest.mark.parametrize("method", ["bayes", "random"])
def test_a_search_ranks_its_trials(write: Callable[..., Path], tmp_path: Path, method: str) -> None:
    run(write({**SEARCH, "method": method}), tmp_path / "out", count=4)
    assert starts(tmp_path / "out") == [f"try-{number}" for number in range(4)]
    table = lines(tmp_path / "out/sweeps/try/table.csv")
    values = [float(line["validate/acc"]) for line in table]
    assert values == sorted(values, reverse=True)
    assert values == [float(line["quality"]) for line in table]
    text = (tmp_path / "out/sweeps/try/table.md").read_text()
    assert text.count("finished") == 4
    assert text.startswith("**try**: no data; 4 trials")
    assert (tmp_path / "out/fig/task4/try-parallel-coordinates.png").exists()
    assert (tmp_path / "out/fig/task4/try-importance.png").exists()


def test_a_search_may_minimise(write: Callable[..., Path], tmp_path: Path) -> None:
    run(write({**SEARCH, "metric": {"name": "validate/acc"}}), tmp_path / "out", count=3)
    values = [float(line["validate/acc"]) for line in lines(tmp_path / "out/sweeps/try/table.csv")]
    assert values == sorted(values)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_search_takes_its_trials_up_again_and_reaches_its_count(
    write: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    run(write(SEARCH, {"pause": {"value": 0.3}}), tmp_path / "whole", count=4)
    path, output = write(SEARCH, {"pause": {"value": 0.3}}), tmp_path / "out"
    killed = begin(path, output, count=4, workers=workers)
    wait_for(lambda: len(starts(output)) == 2)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    run(path, output, count=4, workers=workers)
    assert Counter(starts(output)) == {f"try-{number}": 1 for number in range(4)}
    # The draws are those of an undisturbed search.
    assert lines(output / "sweeps/try/table.csv") == lines(tmp_path / "whole/sweeps/try/table.csv")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_killed_within_any_write_goes_on_and_draws_what_it_would_have_drawn(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    path = write(SEARCH)
    run(path, tmp_path / "whole", count=workers + 1)
    undisturbed = lines(tmp_path / "whole/sweeps/try/table.csv")
    monkeypatch.chdir(tmp_path)  # the journal's path is relative, as it is by default
    fsync = os.fsync
    for n_writes in itertools.count(1, workers):
        output, written = Path(str(n_writes)), itertools.count(1)

        def die(descriptor: int) -> None:
            fsync(descriptor)
            if next(written) == n_writes:  # noqa: B023 (the command is forked in this very turn)
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", die)
            killed = begin(path, output, count=workers, workers=workers)
            killed.join(60)
        run(path, output, count=workers + 1, workers=workers)
        assert lines(output / "sweeps/try/table.csv") == undisturbed, n_writes
        if killed.exitcode == 0:  # it made fewer writes than this
            break
    assert n_writes > 10


def test_a_search_names_its_journal_on_a_full_disk_and_goes_on_with_room(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path, output, log = write(SEARCH), tmp_path / "out", tmp_path / "log"
    run(path, tmp_path / "whole", count=3)
    run(path, output, count=2)
    journal = output / "sweeps/try/search.journal"

    def limited() -> None:
        room = journal.stat().st_size + 20  # part of a line
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of write(), as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        run_script(sweep.main, sweep.SweepConfig, [f"--file={path}", f"--output_dir={output}", "--count=3"])

    assert end(start(limited, log)) == 1
    assert f"{journal}: File too large; the same command continues" in log.read_text()
    assert not journal.read_text().endswith("\n")
    run(path, output, count=3)
    assert lines(output / "sweeps/try/table.csv") == lines(tmp_path / "whole/sweeps/try/table.csv")


@pytest.mark.parametrize("finished", [True, False])
def test_a_search_without_its_journal_takes_no_records_of_other_values(
    write: Callable[..., Path], tmp_path: Path, finished: bool
) -> None:
    run(write(SEARCH), tmp_path / "out", count=2)
    table = (tmp_path / "out/sweeps/try/table.md").read_bytes()
    for record in (tmp_path / "out/sweeps/try").glob("*.journal"):
        record.unlink()  # as in a clone: the journal is not committed, the runs are
    first = json.loads((tmp_path / "out/runs/try-0/config.json").read_text())
    first["config"]["quality"] = 0.99  # another machine drew this
    (tmp_path / "out/runs/try-0/config.json").write_text(json.dumps(first))
    if not finished:  # it was pruned
        (tmp_path / "out/runs/try-0/summary.json").unlink()
    with pytest.raises(UsageError, match=r"run try-0 exists already, with quality 0\.99 instead of"):
        run(write(SEARCH), tmp_path / "out", count=2)
    assert (tmp_path / "out/sweeps/try/table.md").read_bytes() == table


def test_two_commands_share_a_search(write: Callable[..., Path], tmp_path: Path) -> None:
    path, output = write(SEARCH, {"pause": {"value": 0.2}}), tmp_path / "out"
    commands = [begin(path, output, count=6, workers=workers) for workers in (1, 2)]
    for each in commands:
        each.join(60)
    assert [each.exitcode for each in commands] == [0, 0]
    assert Counter(starts(output)) == {f"try-{number}": 1 for number in range(6)}
    assert len({line["quality"] for line in lines(output / "sweeps/try/table.csv")}) == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_trial_is_pruned_early(write: Callable[..., Path], tmp_path: Path, workers: int) -> None:
    content = {
        **SEARCH,
        "method": "random",
        "early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2},
    }
    path = write(content, {"n_epochs": {"value": 6}, "pause": {"value": 0.25}})
    run(path, tmp_path / "out", count=5, workers=workers)
    table = lines(tmp_path / "out/sweeps/try/table.csv")
    pruned = [line for line in table if line["state"] == "pruned"]
    assert pruned
    assert all(int(line["epochs"]) < 6 for line in pruned)
    assert all(not (tmp_path / "out/runs" / line["run_id"] / "summary.json").exists() for line in pruned)
    assert table[0]["state"] == "finished"


def test_a_failing_trial_is_named_and_the_search_goes_on(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {"quality": {"values": [-1.0, 0.5]}, "seed": {"min": 0, "max": 50}}
    run(write({**SEARCH, "method": "random", "parameters": parameters}), tmp_path / "out", count=6)
    states = Counter(line["state"] for line in lines(tmp_path / "out/sweeps/try/table.csv"))
    assert states["failed"] > 0
    assert states["finished"] > 0
    assert "FAILED with exit status 2: fake.py: --quality -1.0: broken" in capsys.readouterr().out


def test_another_search_of_the_same_name_or_an_unknown_metric_is_refused(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    run(write(SEARCH), tmp_path / "out", count=1)
    with pytest.raises(UsageError, match="search try was started with other parameters"):
        run(write(SEARCH, {"n_epochs": {"value": 2}}), tmp_path / "out", count=2)
    with pytest.raises(Fault, match=r"history\.csv has no column validate/f1, the sweep's metric"):
        run(write({**SEARCH, "name": "other", "metric": {"name": "validate/f1"}}), tmp_path / "out", count=2)


# W&B's own agent


class Sweeper:
    """W&B's server as an agent sees it: hands out runs one after the other, then says to exit."""

    def __init__(self, runs: Mapping[str, Mapping[str, Any]]) -> None:
        self.waiting = list(runs.items())

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        if operation == "SweepWithRuns":
            config = yaml.safe_dump({"method": "bayes", "program": "train.py", "parameters": {"lr": {"value": 1}}})
            found = {"id": "S", "name": "s", "method": "bayes", "state": "RUNNING", "config": config}
            return {"project": {"sweep": {**found, "runs": {"edges": []}}}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "A"}}}
        if operation == "Heartbeat":
            commands = [] if json.loads(variables["runState"]) else [self._next()]
            return {"agentHeartbeat": {"agent": {"id": "A"}, "commands": json.dumps(commands)}}
        if "iewer" in operation:
            return {"viewer": {"id": "V", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return None

    def _next(self) -> dict[str, Any]:
        if not self.waiting:
            return {"type": "exit"}
        run_id, values = self.waiting.pop(0)
        args = {name: {"value": value} for name, value in values.items()}
        return {"type": "run", "run_id": run_id, "program": "train.py", "args": args}


@pytest.mark.slow
def test_the_wandb_agent_runs_train(tmp_path: Path, phantom_root: Path) -> None:
    every = {
        "dataset": "phantom",
        "size": 28,
        "train_tiles": 45,
        "model_name": "squeezenet1_1",
        "n_epochs": 2,
        "batch_size": 32,
        "device": "cpu",
        "amsgrad": False,
        "early_stopping_patience": None,
        "output_dir": str(tmp_path),
        "data_root": str(phantom_root),
    }
    runs = {"t0": {**every, "lr": 0.01}, "t1": {**every, "lr": -1}, "t2": {**every, "lr": 0.001}}
    with WandbServer(Sweeper(runs).answer) as server:
        environment = {
            **os.environ,
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "a" * 40,
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        command = [str(Path(sys.executable).parent / "wandb"), "agent", "me/hw1/s"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    output = done.stdout + done.stderr
    assert "train.py: --lr -1.0: must be above 0" in output
    assert {"SweepWithRuns", "CreateAgent", "Heartbeat"} <= set(server.operations)
    assert not (tmp_path / "runs/t1").exists(), output
    for run_id in ("t0", "t2"):
        assert (tmp_path / "runs" / run_id / "summary.json").exists(), output
        history = lines(tmp_path / "runs" / run_id / "history.csv")
        assert [row["epoch"] for row in history] == ["1", "2"]
        (record,) = tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
        assert logged(record) == [float(row["validate/acc"]) for row in history]
    recorded = json.loads((tmp_path / "runs/t0/config.json").read_text())["config"]
    assert (recorded["lr"], recorded["amsgrad"], recorded["early_stopping_patience"]) == (0.01, False, None)


def logged(record: Path) -> list[float]:
    """The values of validate/acc in an offline W&B run's file."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(record)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    records = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    items = [entry["history"]["item"] for entry in records if entry.get("type") == "history"]
    return [item["validate/acc"] for item in items if "validate/acc" in item]
