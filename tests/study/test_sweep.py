"""Sweep files, grids with a program that only imitates training, their table, and the real `wandb agent`."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import example_records
import pytest
import torch
import yaml
from conftest import ROOT
from processes import end
from scipy import stats
from sweep_runs import GRID, SEARCH, Write, begin, run, starts, wait_for_starts
from wandb_server import WandbServer, offline_records

from common.cli import Fault, UsageError
from common.records.read import Record, read_history
from study import processes, sweep
from study.groups import Group
from study.sweep_spec import Hyperband, Metric, read_sweep
from study.tables import grid_table


def test_the_ablation_file_has_its_rows_with_eight_seeds_and_the_seeds_vary_slowest(tmp_path: Path) -> None:
    runs = sweep.grid(read_sweep(ROOT / "ablation.yaml"), tmp_path)
    rows = ["combined", "without_augmentation", "without_early_stopping", "without_lr_strategy"]
    rows += ["with_stain_only", "with_all"]
    assert list(runs) == [f"ablation_64-{row}-{seed}" for seed in range(8) for row in rows]


def test_the_search_file_has_the_courseworks_space() -> None:
    content = read_sweep(ROOT / "sweep.yaml")
    assert content.swept["augmentation"].values == ["auto", "none", "ta_wide", "stain"]
    assert content.swept["batch_size"].values == [32, 64, 128, 256, 512]
    ranges = {name: (one.distribution, one.min, one.max) for name, one in content.swept.items() if not one.values}
    assert ranges == {"lr": ("log_uniform_values", 1e-4, 1), "weight_decay": ("log_uniform_values", 1e-6, 1)}
    assert content.swept["lr"].for_optuna().log
    assert read_sweep(ROOT / "ablation.yaml").metric.goal == "maximize"
    [fixed] = content.parameters.keys() - content.swept.keys()
    assert (fixed, content.parameters["test"].value) == ("test", False)  # no trial is chosen by test tiles
    assert (content.metric.name, content.metric.goal, content.method) == ("validate/acc", "maximize", "bayes")
    assert Hyperband(type="hyperband", min_iter=4).eta == 3  # W&B's default


# Reading a sweep file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("\x00", "not YAML"),
        ("name: café", "not YAML: unacceptable character"),
        ("name: 2001-13-45", "not YAML"),
        ("name: !!bool abc", "not YAML"),
        ("name: !!float ''", "not YAML"),
        # Nine levels of such aliases would unfold to a billion values.
        (
            "program: train.py\nmethod: grid\nparameters: {seed: {values: [&a [1, 2], *a]}}",
            "parameters: seed: values: 0",
        ),
        ("[1]", "should be a valid dictionary"),
        ("name: a", "program: Field required"),
        ({"method": "bayesian"}, "method: Input should be 'grid', 'random' or 'bayes'"),
        ({"parameters": []}, "parameters: Input should be a valid dictionary"),
        ({"parameters": {"row": {"value": 1, "min": 0, "max": 1}}}, "row: needs either value"),
        ({"parameters": {"row": {"values": ["a"], "distribution": "uniform"}}}, "row: needs either value"),
        ({"parameters": {"lr": {"min": 1, "max": 2, "distribution": "categorical"}}}, "lr: needs either value"),
        ({"parameters": {"row": {"valeus": ["a"]}}}, "row: valeus: Extra inputs are not permitted"),
        ({"parameters": {"quality": {"min": 0, "max": 2}}}, "must be less than or equal to 1"),
        ({"parameters": {"quality": {"min": 1, "max": 0}}}, "quality: `low <= high` must hold"),
        (
            {"parameters": {"n_epochs": {"min": 1, "max": 64, "distribution": "log_uniform_values"}}},
            "parameter n_epochs: a whole number; use values, or distribution: int_uniform",
        ),
        (
            {"parameters": {"lr": {"min": 0.5, "max": 2.5, "distribution": "int_uniform"}}},
            "parameters: lr: int_uniform needs whole numbers as min and max",
        ),
        (
            {"program": "train.py", "parameters": {"model_name": {"values": ["resnet17"]}}},
            "did you mean resnet18?",
        ),
        ({"program": "train.py", "parameters": {"augmentation": {"value": "flip"}}}, "unknown part flip;"),
        ({"program": "task5.py", "parameters": {}}, "scratch: a run trains one network; add scratch: {value: "),
        ({"method": "random"}, "test: a search must not score the test tiles; add test: {value: false}"),
        ({"program": "README.md"}, "program README.md: no such Python file"),
        ({"parameters": {"run_id": {"value": "a"}}}, "run_id: the sweep gives each run its own"),
        ({"metric": {"name": "validate/f1"}}, "metric: name: Input should be 'train/loss'"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "early_terminate: min_iter: Field required"),
        ({"command": ["${program}", "--seed=3"]}, "command: 1: Input should be '${env}'"),
        ({"name": "../../x"}, "name: a run id names files"),
    ],
)
def test_a_malformed_sweep_file_is_refused_with_the_reason(
    write_sweep: Write, change: dict[str, Any] | str, message: str
) -> None:
    path = write_sweep(GRID)
    content = change if isinstance(change, str) else yaml.safe_dump({**yaml.safe_load(path.read_text()), **change})
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UsageError) as error:
        read_sweep(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_for_every_run_reach_its_command_unless_the_sweep_varies_them(write_sweep: Write) -> None:
    assert (read_sweep(write_sweep(GRID)).metric.goal, Metric(name="train/loss").goal) == ("maximize", "minimize")
    off = read_sweep(write_sweep(GRID, {"early_stopping_patience": {"value": None}}))
    assert off.command_line({})[2:] == ["--early_stopping_patience=None"]
    command = read_sweep(write_sweep(GRID), ["--dataset=phantom", "--train_tiles=90"]).command_line({"row": "b"})
    assert command[0] == sys.executable
    assert command[2:] == ["--dataset=phantom", "--train_tiles=90", "--row=b"]
    for argument in ("--seed=3", "--run_id=r", "--size", "size=3", "--sise=28"):
        with pytest.raises(UsageError, match=argument.split("=")[0].removeprefix("--")):
            read_sweep(write_sweep(GRID), [argument])


# A grid


def test_a_grid_runs_every_combination_once_and_the_seeds_vary_slowest(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes, "cpu_count", lambda **_: 1)
    path = write_sweep({**GRID, "project": "p"})
    run(path, tmp_path / "out", workers=None)
    expected = ["try-a-0", "try-b-0", "try-c-0", "try-a-1", "try-b-1", "try-c-1"]
    assert starts(tmp_path / "out") == expected
    printed = capsys.readouterr()
    assert [line.split(" (")[0] for line in printed.out.splitlines()[1:-1]] == [
        line for one in expected for line in (f"{one}: started", f"{one}: finished")
    ]
    assert printed.out.splitlines()[-1] == (
        f"6 of 6 runs are finished; python -m study.report --output_dir {tmp_path / 'out'} shows them"
    )
    assert printed.err == ""
    run(path, tmp_path / "out")
    assert starts(tmp_path / "out") == expected
    with pytest.raises(
        UsageError, match=r"run try-a-0 .*\(n_epochs was 1\): use another --output_dir, or another name in"
    ):
        run(path, tmp_path / "out", "--n_epochs=2")
    assert set((tmp_path / "out/environment.txt").read_text().splitlines()) == {"p try 1"}


def test_a_failed_run_is_named_and_the_others_still_run(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's
    parameters = {"quality": {"values": [0.5, -1, 0.7]}, "seed": {"values": [0]}}
    path = write_sweep({"method": "grid", "parameters": parameters})
    with pytest.raises(Fault, match="try-_1-0 failed: see their logs; the same command tries them again"):
        run(path, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "try-_1-0: FAILED with exit status 2: fake_program.py: --quality -1.0: broken" in printed
    assert len(starts(tmp_path / "out")) == 3
    assert set((tmp_path / "out/environment.txt").read_text().splitlines()) == {"None try 3"}


def test_an_impossible_grid_is_refused_before_its_first_run(write_sweep: Write, tmp_path: Path) -> None:
    for content, message in (
        ({"parameters": {"quality": {"min": 0.0, "max": 1.0}}}, "a grid needs values"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1}}, "early_terminate: only the runs of a search"),
        ({"name": "n" * 64}, "a run id names files"),
        ({"parameters": {"row": {"values": ["a/w", "a_w"]}}}, "two combinations have the run id try-a_w"),
    ):
        with pytest.raises(UsageError, match=message):
            run(write_sweep({**GRID, **content}), tmp_path / "out")
    assert not (tmp_path / "out/sweeps").exists()


@pytest.mark.parametrize("content", [GRID, SEARCH])
def test_after_a_kill_only_the_runs_that_are_not_running_are_started(
    write_sweep: Write, tmp_path: Path, content: Mapping[str, Any]
) -> None:
    keys = {"pause": {"value": 1}, "together": {"value": 2}}  # the first one does not end before the kill
    path, output = write_sweep(content, keys), tmp_path / "out"
    killed = begin(path, output, workers=2, count=3)
    wait_for_starts(output, 2)
    os.kill(killed, signal.SIGKILL)
    assert end(killed) == -signal.SIGKILL
    run(path, output, workers=2, count=3)
    begun, others = sorted(starts(output)[:2]), sorted(starts(output)[2:])
    assert begun == (["try-a-0", "try-b-0"] if content is GRID else ["try-0", "try-1"])
    assert others == (["try-a-1", "try-b-1", "try-c-0", "try-c-1"] if content is GRID else ["try-2"])
    assert len(list(output.glob("runs/*/summary.json"))) == len(begun + others)


def test_a_cpu_has_one_run_per_core_with_one_thread_and_a_gpu_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cpu_count", lambda only_physical_cores: 3 if only_physical_cores else 6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert processes.workers("cpu") == (3, {"OMP_NUM_THREADS": "1"})
    assert processes.workers("auto") == processes.workers("cuda") == (1, {})


@pytest.mark.parametrize(
    ("content", "number"), [(GRID, signal.SIGTERM), (GRID, signal.SIGINT), (SEARCH, signal.SIGINT)]
)
def test_a_signal_ends_all_runs_and_the_same_command_continues(
    write_sweep: Write, tmp_path: Path, content: Mapping[str, Any], number: signal.Signals
) -> None:
    path, output = write_sweep(content, {"pause": {"value": 60}}), tmp_path / "out"
    command = begin(path, output, workers=2, count=4)
    wait_for_starts(output, 2)
    (os.killpg if number == signal.SIGINT else os.kill)(command, number)  # as from the keyboard, or by a scheduler
    assert end(command) == 128 + number, (output / "log.txt").read_text()
    assert (output / "log.txt").read_text().endswith(f": ended by {number.name}; start the same command again\n")
    for process in (output / "processes.txt").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)
    (output / "no-pause").touch()
    run(path, output, workers=2, count=4)
    assert {name for name, n in Counter(starts(output)).items() if n == 2} == set(starts(output)[:2])
    assert len(set(starts(output))) == (6 if content is GRID else 4)


def test_the_table_of_a_grid_has_the_hand_made_numbers() -> None:
    scores = {"a": [0.50, 0.60, 0.70], "b": [0.52, 0.61, 0.75], "c": [0.40, 0.51, 0.60]}
    scores |= {"twin": scores["a"], "short": [0.8]}

    def record(seed: int, score: float) -> Record:
        facts = example_records.facts({**example_records.CONFIG, "seed": seed})
        summary = example_records.summary(facts, [example_records.row(1, 0.8)], 0.9, score)
        return Record(Path(), {**facts, **summary}, [])

    rows = {row: Group(row, [record(*one) for one in enumerate(values)]) for row, values in scores.items()}
    text = "\n".join(grid_table(rows))
    # b - a: .02, .01, .05: mean .02667, sd .02082; t(.975, 2) = 4.3027; Holm's factor for the larger p is 1.
    half = 4.302653 * 0.0208167 / math.sqrt(3)
    p = stats.ttest_rel([0.52, 0.61, 0.75], [0.5, 0.6, 0.7]).pvalue
    interval = f"+0.027 [{0.0266667 - half:+.3f}, {0.0266667 + half:+.3f}]"
    cells = "0.800 ± 0.000 | 0.627 ± 0.116 | 0.900 ± 0.000"
    assert f"| b | 3 | {cells} |  | {interval} | {p:.3f} | not decided |" in text
    # c - a is -.10, -.09, -.10. The smaller of two p is doubled: Holm's correction does not count the other rows.
    p = 2 * stats.ttest_rel([0.40, 0.51, 0.60], [0.5, 0.6, 0.7]).pvalue
    assert f"| {p:.3f} | worse |" in text
    assert "| a | 3 | 0.800 ± 0.000 | 0.600 ± 0.100 | 0.900 ± 0.000 |  |  |  |  |" in text
    assert re.search(r"\| twin \| 3 \| .*\+0.000 \[\+0.000, \+0.000\] \|  \| the same \|", text)
    assert re.search(r"\| short \| 1 \| .* \| \+0.300 \|  \| too few seeds \|", text)
    # Both spreads pooled: sqrt((.0208167² + .0057735²) / 2) = .015275. Of 200,000 simulated studies
    # with a difference of .0706, 80.0 % show it at 0.05 / 2.
    assert "needs a true difference of 0.071 in test ACC" in text
    rows = {
        "a": rows["a"],
        "without_augmentation": rows["short"],
        "with_stain_only": Group("", rows["a"].records[1:]),
    }
    assert "against" not in "\n".join(grid_table(rows))  # no common seed


# W&B's own agent


class Sweeper:
    """Answers a W&B agent like W&B's server: one run after the other, then the command to exit."""

    def __init__(self, runs: Mapping[str, Mapping[str, Any]], stopped: Mapping[str, Path]) -> None:
        self.waiting = list(runs.items())
        self.stopped = dict(stopped)  # runs to stop, each when this file of it is there

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        if operation == "SweepWithRuns":
            config = yaml.safe_dump({"method": "bayes", "program": "train.py", "parameters": {"lr": {"value": 1}}})
            found = {"id": "S", "name": "s", "method": "bayes", "state": "RUNNING", "config": config}
            return {"project": {"sweep": {**found, "runs": {"edges": []}}}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "A"}}}
        if operation == "Heartbeat":
            running = json.loads(variables["runState"])
            commands = [] if running else [self._next()]
            for run_id in running:
                if run_id in self.stopped and self.stopped[run_id].exists():
                    commands.append({"type": "stop", "run_id": run_id})
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


def agent_keys(output_dir: Path, data_root: Path) -> dict[str, Any]:
    return {
        "dataset": "phantom",
        "size": 28,
        "train_tiles": 45,
        "model_name": "squeezenet1_1",
        "n_epochs": 2,
        "batch_size": 32,
        "device": "cpu",
        "amsgrad": False,
        "early_stopping_patience": None,
        "output_dir": str(output_dir),
        "data_root": str(data_root),
    }


def run_agent(sweeper: Sweeper, folder: Path) -> tuple[str, list[str]]:
    """W&B's own agent against a server that hands out these runs: its output, and what it asked the server."""
    with WandbServer(sweeper.answer) as server:
        environment = {
            **os.environ,
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "a" * 40,
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(folder),
            "WANDB_AGENT_MAX_INITIAL_FAILURES": "2",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        command = [str(Path(sys.executable).parent / "wandb"), "agent", "me/hw1/s"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    return done.stdout + done.stderr, server.operations


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_wandb_agent_runs_train_and_continues_after_trials_that_its_server_has_stopped(
    tmp_path: Path, phantom_root: Path
) -> None:
    every = agent_keys(tmp_path, phantom_root)
    runs = {"bad": {**every, "lr": -1}, "endless": {**every, "n_epochs": 10_000}, "good": {**every, "lr": 0.01}}
    output, operations = run_agent(Sweeper(runs, {"endless": tmp_path / "runs/endless/history.csv"}), tmp_path)
    assert output.count("ended by SIGTERM") == 1, output
    assert "failed runs" not in output  # the agent gives up after two failures: a stopped run is none
    assert "train.py: --lr -1: must be greater than 0" in output
    assert {"SweepWithRuns", "CreateAgent", "Heartbeat"} <= set(operations)
    assert not (tmp_path / "runs/bad").exists(), output
    assert (tmp_path / "runs/good/summary.json").exists(), output
    history = read_history(tmp_path / "runs/good/history.csv")
    assert [row["epoch"] for row in history] == [1, 2]
    items = [entry["history"]["item"] for entry in offline_records(tmp_path, "good", "history")]
    values = [item["validate/acc"] for item in items if "validate/acc" in item]
    assert values == [row["validate/acc"] for row in history]
    recorded = json.loads((tmp_path / "runs/good/config.json").read_text())["config"]
    assert (recorded["lr"], recorded["amsgrad"], recorded["early_stopping_patience"]) == (0.01, False, None)
