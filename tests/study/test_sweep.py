"""Sweep files, the local sweep with a program that only imitates training, and the real `wandb agent`."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import example_records
import pytest
import torch
import yaml
from bad_input import damaged
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import end
from scipy import stats
from sweep_runs import (
    EVERY_RUN_ONCE,
    GRID,
    SEARCH,
    Write,
    begin,
    is_locked,
    most_at_once,
    read_csv,
    run,
    starts,
    table,
    wait_for,
    wait_for_starts,
)
from tqdm import tqdm
from wandb_server import WandbServer

from common.config import parse
from common.errors import Fault, UsageError
from common.files import write_csv
from common.records.read import Record
from common.training.device import physical_cores
from study import ablation, sweep, trials
from study.sweep_file import Range, read_sweep
from study.trials import Running, Trial, TrialRecords, Workers, locked
from train import ABLATIONS

# The sweep files of the project


def test_the_ablation_file_has_every_row_with_five_seeds_and_the_seeds_vary_slowest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    trials = sweep.grid(read_sweep(Path("ablation.yaml")))
    rows = [row for row in ABLATIONS if row != "without_weight_decay"]  # the same as combined: test_train.py
    assert [trial.values["ablation"] for trial in trials[: len(rows)]] == rows
    assert [trial.values["seed"] for trial in trials] == [seed for seed in range(5) for _ in rows]
    assert trials[0].run_id == "ablation-combined-0"


def test_the_search_file_has_the_courseworks_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    content = read_sweep(Path("sweep.yaml"))
    assert {"auto", "none", "ta_wide", "stain", "ta_wide,stain"} == set(content.swept["augmentation"])
    assert content.swept["batch_size"] == (32, 64, 128, 256, 512)
    assert content.swept["lr"] == Range("log_uniform_values", 1e-4, 1)
    assert content.swept["weight_decay"] == Range("log_uniform_values", 1e-6, 1)
    assert content.fixed == {"n_epochs": 20}
    assert (content.metric, content.maximize, content.method) == ("validate/acc", True, "bayes")


def test_a_recipe_is_for_all_training_tiles_and_does_not_say_where_the_run_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    machine = ["--data_root=/data", "--wandb=disabled", "--device=cpu"]
    sweep = read_sweep(Path("sweep.yaml"), ["--size=28", "--train_tiles=9000", *machine])
    assert sweep.recipe({"lr": 0.1}) == ["--n_epochs=20", "--size=28", "--lr=0.1"]


# Reading a sweep file


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_of_a_sweep_file_is_refused_or_leaves_a_sweep(
    data: st.DataObject, write_sweep: Write, tmp_path: Path
) -> None:
    path = write_sweep(SEARCH)
    path.write_bytes(damaged(path.read_bytes(), data))
    with suppress(UsageError):
        assert read_sweep(path).swept.keys() <= {"quality", "row"}


@pytest.mark.parametrize(  # test_bad_input.py has more of them
    ("change", "message"),
    [
        ({"method": "bayesian"}, "unknown method bayesian: choose from grid, random, bayes; did you mean bayes?"),
        ({"parameters": []}, "parameters must hold"),
        ({"parameters": {"row": "a"}}, "row must hold"),
        ({"parameters": {"row": {"values": "a"}}}, "parameter row: values must be a list"),
        ({"parameters": {"row": {"value": 1, "min": 0, "max": 1}}}, "parameter row needs either value"),
        (
            {"parameters": {"row": {"valeus": ["a"]}}},
            "parameter row has an unknown key valeus; did you mean values?",
        ),
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
        ({"metric": {"name": "validate/acc", "goal": "max"}}, "unknown goal of metric: max"),
        ({"early_terminate": {"type": "median"}}, "unknown type of early_terminate: median"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "early_terminate has an unknown key max_iter"),
        ({"early_terminate": {"type": "hyperband"}}, "min_iter None must be a whole number"),
        ({"command": ["${interpreter}", "${program}", "${args_json}"]}, "unknown macro ${args_json}"),
        ({"early_terminate": {"type": "hyperband", "min_iter": True}}, "min_iter True must be a whole number"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "min_iter 0 must be a whole number"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 1}}, "eta 1 must be a whole number"),
        (
            {"parameters": {"quality": {"min": 0.1, "max": 1, "distribution": "int_uniform"}}},
            "int_uniform needs whole numbers, not 0.1 and 1",
        ),
        ({"parameters": {"run_id": {"value": "a"}}}, "parameter run_id: the sweep gives each run its own"),
        ({"command": ["${program}"]}, "command has no ${args}"),
        ({"command": "python train.py"}, "command must be a list"),
        ({"name": "../../x"}, "name '../../x': a run id names files"),
        ({"name": "a\nb"}, "name 'a\\nb': a run id names files"),
        ({"name": "x" * 65}, "a run id names files: use up to 64"),
        ({"parameters": {"quality": {"min": float("nan"), "max": 1}}}, "min and max must be numbers"),
        ({"parameters": {"quality": {"min": 0, "max": float("inf")}}}, "min and max must be numbers"),
        ({"parameters": {"quality": {"min": 0, "max": 10**400}}}, "min and max must be numbers"),
        ({"parameters": {"quality": {"min": False, "max": True}}}, "False is not a number"),
    ],
)
def test_a_malformed_sweep_file_is_refused_with_the_reason(
    write_sweep: Write, change: dict[str, Any], message: str
) -> None:
    path = write_sweep(GRID)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(UsageError) as error:
        read_sweep(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\x00", "not YAML"),
        ("1: 2", "must hold"),
        ("[" * 20_000, "nested too deep"),
        ("method: grid\nname: a\nmethod: random", "key method stands twice"),
        ("parameters: {lr: {value: 1}, lr: {value: 2}}", "key lr stands twice"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=rf"bad\.yaml: .*{message}") as error:
        read_sweep(tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [("def", "invalid syntax"), ("import nosuch", "No module named 'nosuch'"), ("1 / 0", "division by zero")],
)
def test_a_program_that_python_cannot_load_is_named(
    tmp_path: Path, write_sweep: Write, code: str, message: str
) -> None:
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(UsageError, match=rf"program .*broken\.py: Python cannot load it: .*{message}"):
        read_sweep(write_sweep({**GRID, "program": str(tmp_path / "broken.py")}))


def test_a_grid_of_too_many_runs_and_keys_with_an_open_quote_are_refused(
    write_sweep: Write, tmp_path: Path
) -> None:
    numbers = {"values": list(range(1, 102))}
    path = write_sweep({"method": "grid", "parameters": {"seed": numbers, "n_epochs": numbers}})
    with pytest.raises(UsageError, match="the grid has 10,201 runs; at most 10,000"):
        run(path, tmp_path / "out")
    with pytest.raises(UsageError, match="--fixed --row='a: No closing quotation"):
        run(path, tmp_path / "out", fixed="--row='a")
    assert not (tmp_path / "out/sweeps").exists()


def test_the_command_line_has_the_file_first_and_the_runs_keys_after_two_hyphens() -> None:
    given = sweep.as_keys(["s.yaml", "--count", "3", "--", "--size=28", "--row=a b"])
    config = parse(sweep.SweepConfig, given, "")
    assert (config.file, config.count, config.fixed) == (Path("s.yaml"), 3, "--size=28 '--row=a b'")


def test_a_metric_that_train_py_does_not_record_is_refused_before_any_run(write_sweep: Write) -> None:
    content = {**SEARCH, "metric": {"name": "validate/accuracy"}, "parameters": {"lr": {"min": 0.1, "max": 1.0}}}
    path = write_sweep({**content, "program": str(ROOT / "train.py")})
    with pytest.raises(UsageError, match="unknown metric validate/accuracy: choose from train/loss"):
        read_sweep(path)


def test_runs_get_the_project_and_entity_of_the_sweep_unless_the_user_names_others(
    write_sweep: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = {"seed": {"values": [0]}}
    path = write_sweep(
        {"method": "grid", "project": "p", "entity": "e", "description": "d", "parameters": parameters}
    )
    run(path, tmp_path / "one")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(path, tmp_path / "other")
    assert (tmp_path / "one/wandb.txt").read_text() == "p e\n"
    assert (tmp_path / "other/wandb.txt").read_text() == "mine e\n"


def test_keys_for_every_run_reach_its_command_unless_the_sweep_varies_them(write_sweep: Write) -> None:
    path = write_sweep({**GRID, "command": ["${env}", "nice", "${interpreter}", "${program}", "${args}"]})
    command = read_sweep(path, ["--dataset=phantom", "--train-tiles=90"]).command_line({"row": "b"})
    assert command[:3] == ["/usr/bin/env", "nice", sys.executable]
    assert command[4:] == ["--dataset=phantom", "--train_tiles=90", "--row=b"]
    for argument in ("--seed=3", "--run_id=r", "--size", "size=3", "--sise=28"):
        with pytest.raises(UsageError, match=argument.split("=")[0]):
            read_sweep(path, [argument])


# A grid


def test_a_grid_runs_every_combination_and_the_seeds_vary_slowest(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write_sweep(GRID), tmp_path / "out")
    expected = ["try-a-0", "try-b-0", "try-c-0", "try-a-1", "try-b-1", "try-c-1"]
    assert starts(tmp_path / "out") == expected
    printed = capsys.readouterr()
    assert [line.split(":")[0] for line in printed.out.splitlines()[:6]] == expected
    assert printed.err == ""
    assert (tmp_path / "out/fig/task4/try.png").exists()
    assert len(read_csv(tmp_path / "out/sweeps/try/runs.csv")) == 6


def test_rows_with_the_same_outputs_are_called_identical_and_are_not_tested(
    write_sweep: Write, tmp_path: Path
) -> None:
    parameters = {"row": {"values": ["a", "b", "twin-of-a"]}, "seed": {"values": [0, 1, 2]}}
    run(write_sweep({"method": "grid", "parameters": parameters}), tmp_path / "out")
    rows = {line["row"]: line for line in read_csv(tmp_path / "out/sweeps/try/table.csv")}
    assert [rows[row]["test/acc verdict"] for row in ("b", "twin-of-a")] == ["the same", "identical"]
    assert rows["twin-of-a"]["test/acc p"] == "nan"
    text = (tmp_path / "out/sweeps/try/table.md").read_text()
    assert "Identical: the selected networks of both rows give the same recorded outputs after as many" in text
    run(write_sweep({**GRID, "name": "other"}), tmp_path / "out")
    assert "Identical" not in (tmp_path / "out/sweeps/other/table.md").read_text()
    # A longer training that selects the same network is not identical.
    parameters = {"n_epochs": {"values": [1, 2]}, "seed": {"values": [0, 1, 2]}}
    run(write_sweep({"method": "grid", "name": "long", "parameters": parameters}), tmp_path / "out")
    assert read_csv(tmp_path / "out/sweeps/long/table.csv")[1]["test/acc verdict"] == "the same"


def test_finished_runs_are_skipped_and_another_configuration_is_refused(
    write_sweep: Write, tmp_path: Path
) -> None:
    path, output = write_sweep(GRID), tmp_path / "out"
    run(path, output)
    run(path, output)
    assert len(starts(output)) == 6
    with pytest.raises(UsageError, match=r"run try-a-0 .*\(n_epochs was 1\): use another --output_dir"):
        run(path, output, fixed="--n_epochs=2")


def test_a_failed_run_is_named_and_the_others_still_run(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {"quality": {"values": [0.5, -1, 0.7]}, "seed": {"values": [0]}}
    with pytest.raises(Fault, match="try-_1-0 failed: see their logs; the same command tries them again"):
        run(write_sweep({"method": "grid", "parameters": parameters}), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "try-_1-0: FAILED with exit status 2: fake_program.py: --quality -1.0: broken" in printed
    assert len(starts(tmp_path / "out")) == 3
    assert (
        "**Incomplete**: 1 of 3 runs are missing, with the seeds: -1 (0)."
        in (tmp_path / "out/sweeps/try/table.md").read_text()
    )


def test_a_failed_reference_is_named_too(write_sweep: Write, tmp_path: Path) -> None:
    parameters = {"quality": {"values": [-1, 0.5]}, "seed": {"values": [0]}}
    with pytest.raises(Fault, match="try-_1-0 failed: see their logs"):
        run(write_sweep({"method": "grid", "parameters": parameters}), tmp_path / "out")


def test_a_sweep_fails_if_all_its_runs_fail(write_sweep: Write, tmp_path: Path) -> None:
    path = write_sweep({"method": "grid", "parameters": {"quality": {"value": -1}, "seed": {"values": [0, 1]}}})
    with pytest.raises(Fault, match="try-0, try-1 failed"):
        run(path, tmp_path / "out")
    path = write_sweep({**SEARCH, "name": "other"}, {"quality": {"value": -1}})
    with pytest.raises(Fault, match="all 2 trials failed"):
        run(path, tmp_path / "out", count=2)


def test_a_grid_with_a_range_or_bad_run_ids_is_refused(write_sweep: Write) -> None:
    with pytest.raises(UsageError, match="a grid needs values"):
        sweep.grid(read_sweep(write_sweep({**GRID, "parameters": {"quality": {"min": 0.0, "max": 1.0}}})))
    with pytest.raises(UsageError, match="listed twice"):
        sweep.grid(read_sweep(write_sweep({**GRID, "parameters": {"row": {"values": ["a+b", "a b"]}}})))
    with pytest.raises(UsageError, match="a run id names files"):
        sweep.grid(read_sweep(write_sweep({**GRID, "name": "n" * 64})))


@pytest.mark.parametrize("workers", [1, 2])
def test_after_a_kill_a_grid_does_not_start_a_run_that_is_still_running(
    write_sweep: Write, tmp_path: Path, workers: int
) -> None:
    path, output = write_sweep(GRID, {"pause": {"value": 0.5}}), tmp_path / "out"
    killed = begin(path, output, workers=workers)
    wait_for_starts(output, 2)
    os.kill(killed, signal.SIGKILL)  # its runs keep running, with their locks
    assert end(killed) == -signal.SIGKILL
    run(path, output, workers=workers)
    assert Counter(starts(output)) == EVERY_RUN_ONCE
    assert len(read_csv(output / "sweeps/try/runs.csv")) == 6


@pytest.mark.parametrize(("workers", "again"), [(1, ["try-b-0"]), (2, ["try-a-0", "try-b-0"])])
def test_runs_that_were_killed_with_their_command_are_started_again(
    write_sweep: Write, tmp_path: Path, workers: int, again: list[str]
) -> None:
    path, output = write_sweep(GRID, {"pause": {"value": 0.5 * workers}}), tmp_path / "out"
    killed = begin(path, output, workers=workers)
    wait_for_starts(output, 2)
    end(killed, within=0)
    for number in (output / "processes.txt").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)
    run(path, output, workers=workers)
    assert sorted(run_id for run_id, times in Counter(starts(output)).items() if times == 2) == again
    assert len(starts(output)) == 6 + len(again)
    assert len(read_csv(output / "sweeps/try/runs.csv")) == 6


def test_two_commands_share_a_grid(write_sweep: Write, tmp_path: Path) -> None:
    path, output = write_sweep(GRID, {"pause": {"value": 0.3}}), tmp_path / "out"
    commands = [begin(path, output, workers=workers) for workers in (1, 2)]
    assert [end(command) for command in commands] == [0, 0]
    assert Counter(starts(output)) == EVERY_RUN_ONCE
    assert "Incomplete" not in (output / "sweeps/try/table.md").read_text()


# Several workers


@pytest.mark.parametrize("content", [GRID, SEARCH])
def test_exactly_as_many_runs_as_workers_are_at_work(
    write_sweep: Write, tmp_path: Path, content: Mapping[str, Any]
) -> None:
    # The first two runs wait for each other.
    path, output = write_sweep(content, {"pause": {"value": 0.2}, "together": {"value": 2}}), tmp_path / "out"
    run(path, output, workers=2, count=6)
    assert len(starts(output)) == len(set(starts(output))) == 6
    assert most_at_once(output) == 2


@pytest.mark.parametrize(
    ("device", "cuda", "workers", "given", "at_once", "threads"),
    [
        ("auto", False, None, None, 3, "1"),
        ("cpu", True, None, None, 3, "1"),
        ("auto", True, None, None, 1, "None"),
        ("cuda", True, None, None, 1, "None"),
        ("cpu", False, 1, None, 1, "1"),
        ("cpu", False, 1, "3", 1, "3"),
    ],
)
def test_a_cpu_has_one_run_per_core_with_one_thread_each_and_a_gpu_one_run(
    write_sweep: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    cuda: bool,
    workers: int | None,
    given: str | None,
    at_once: int,
    threads: str,
) -> None:
    monkeypatch.setattr(sweep, "physical_cores", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    path = write_sweep(
        GRID, {"device": {"value": device}, "together": {"value": at_once}, "pause": {"value": 0.1}}
    )
    run(path, tmp_path / "out", workers=workers)
    assert most_at_once(tmp_path / "out") == at_once
    assert {line.split()[2] for line in (tmp_path / "out/spans.txt").open()} == {threads}


def test_the_number_of_cores_leaves_out_hyper_threads_and_cpus_of_other_processes(
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


def test_the_progress_bar_counts_the_finished_runs_of_all_workers(
    write_sweep: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {"quality": {"values": [0.5, -1]}, "seed": {"values": [0, 1]}}
    contents = (GRID, {**SEARCH, "name": "other"}, {"method": "grid", "name": "third", "parameters": failing})
    for content, last in zip(contents, ("6/6", "6/6", "2/4"), strict=True):
        shown = io.StringIO()
        drawn = partial(tqdm, file=shown)
        monkeypatch.setattr(trials, "tqdm", lambda drawn=drawn, **keys: drawn(**{**keys, "disable": False}))
        with suppress(Fault):  # of the failing runs
            run(write_sweep(content), tmp_path / "out", workers=2, count=6)
        assert f"| {last} [" in shown.getvalue().split("\r")[-1]


@pytest.mark.parametrize(
    ("content", "number", "send"),
    [
        (GRID, signal.SIGTERM, os.kill),
        (SEARCH, signal.SIGINT, os.kill),
        (GRID, signal.SIGINT, os.killpg),  # as from the keyboard
        (SEARCH, signal.SIGINT, os.killpg),
    ],
)
def test_a_signal_ends_all_runs_and_the_same_command_continues(
    write_sweep: Write,
    tmp_path: Path,
    content: Mapping[str, Any],
    number: signal.Signals,
    send: Callable[[int, int], None],
) -> None:
    slow = {"pause": {"value": 60}, "lingering": {"value": 0.2}}
    path, output = write_sweep(content, slow), tmp_path / "out"
    log = output / "log.txt"
    command = begin(path, output, workers=2, count=4)
    wait_for_starts(output, 2)
    send(command, number)
    assert end(command, 20) == 128 + number, log.read_text()
    # Each run has got one signal alone, SIGTERM: so it can save its state.
    assert len((output / "terms.txt").read_text().splitlines()) == 2
    assert f"{number.name}: the sweep ended early; the same command" in log.read_text()
    assert "FAILED" not in log.read_text()
    assert not any(is_locked(output / f"sweeps/try/{run_id}.lock") for run_id in starts(output))

    (tmp_path / "whole").mkdir()
    for folder in (output, tmp_path / "whole"):
        (folder / "no-pause").touch()
        run(path, folder, workers=2, count=4)
    assert table(output) == table(tmp_path / "whole")


@pytest.mark.parametrize("content", [GRID, SEARCH])
def test_a_run_with_complete_records_may_take_its_time_to_end(
    write_sweep: Write, tmp_path: Path, content: Mapping[str, Any]
) -> None:
    path, output = write_sweep(content), tmp_path / "out"
    output.mkdir()
    name = "try-a-0" if content is GRID else "try-0"
    (output / f"hold-{name}").touch()
    # The second command ends the search; the first command's only trial belongs to it.
    commands = [begin(path, output, count=1)]
    wait_for((output / f"runs/{name}/summary.json").exists)
    commands.append(begin(path, output, count=3))
    n_runs = 6 if content is GRID else 3
    wait_for_starts(output, n_runs)
    time.sleep(1.2)
    (output / f"hold-{name}").unlink()
    assert [end(command) for command in commands] == [0, 0]
    assert len((output / "spans.txt").read_text().splitlines()) == n_runs


def test_a_run_that_is_killed_after_its_records_are_complete_has_finished(
    write_sweep: Write, tmp_path: Path
) -> None:
    path, output = write_sweep({**GRID, "parameters": {"row": {"values": ["a"]}}}), tmp_path / "out"
    output.mkdir()
    (output / "hold-try-a").touch()
    command = begin(path, output)
    wait_for((output / "runs/try-a/summary.json").exists)
    os.kill(int((output / "processes.txt").read_text()), signal.SIGKILL)
    assert end(command) == 0
    assert "try-a: finished" in (output / "log.txt").read_text()


def test_a_run_that_another_command_has_just_finished_is_not_started(
    write_sweep: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output, seen = write_sweep(GRID), tmp_path / "out", set()
    run(path, output)
    is_finished = TrialRecords.is_finished

    def finished_at_second_look(records: TrialRecords, trial: Trial) -> bool:
        if trial.run_id in seen:
            return is_finished(records, trial)
        seen.add(trial.run_id)
        return False

    monkeypatch.setattr(TrialRecords, "is_finished", finished_at_second_look)
    run(path, output, workers=2)
    assert len(seen) == len(starts(output)) == 6


def test_a_trial_gets_sigterm_once_and_stays_locked_until_its_lock_is_closed(
    write_sweep: Write, tmp_path: Path
) -> None:
    path = write_sweep(GRID, {"pause": {"value": 60}, "lingering": {"value": 0.3}})
    records = TrialRecords(read_sweep(path), tmp_path)
    trial = sweep.grid(records.sweep)[0]
    lock_path = records.lock_path(trial.run_id)
    with Workers("try", 1, " runs") as workers:
        with locked(lock_path) as lock:
            assert lock is not None
            workers.running.append(Running(trial, records, lock))
        wait_for(lambda: bool(starts(tmp_path)))
        workers.running[0].stop()
        wait_for((tmp_path / "terms.txt").exists)
        workers.running[0].stop()
        while not (ended := workers.wait()):
            pass
        [(running, status)] = ended
        assert (running.trial, running.stopped, status) == (trial, True, 143)
        assert len((tmp_path / "terms.txt").read_text().split()) == 1
        assert is_locked(lock_path)
        running.lock.close()
        assert not is_locked(lock_path)


def test_wandb_shows_the_runs_of_a_sweep_together(
    write_sweep: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, environments = write_sweep(GRID), []
    records = TrialRecords(read_sweep(path), tmp_path)
    records.folder.mkdir(parents=True)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: environments.append(env))
    with locked(tmp_path / "lock") as lock:
        assert lock is not None
        Running(sweep.grid(records.sweep)[0], records, lock).lock.close()
    [environment] = environments
    assert (environment["WANDB_RUN_GROUP"], environment["PYTHONUNBUFFERED"]) == ("try", "1")


def test_sigterm_stops_all_runs_at_the_same_time(write_sweep: Write, tmp_path: Path) -> None:
    path, output = write_sweep(GRID, {"pause": {"value": 60}, "lingering": {"value": 3}}), tmp_path / "out"
    command = begin(path, output, workers=2)
    wait_for_starts(output, 2)
    assert end(command, within=0, send=signal.SIGTERM) == 143
    first, second = (float(moment) for moment in (output / "terms.txt").read_text().split())
    assert abs(first - second) < 2.5  # the second run got its signal before the first one had ended


def test_a_run_that_does_not_end_after_sigterm_is_killed(
    write_sweep: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("study.trials.PATIENCE", 0.3)
    path, output = write_sweep(GRID, {"pause": {"value": 60}, "lingering": {"value": 60}}), tmp_path / "out"
    command = begin(path, output, workers=2)
    wait_for_starts(output, 2)
    os.kill(command, signal.SIGTERM)
    assert end(command, 20) == 143
    assert not any(is_locked(output / f"sweeps/try/{run_id}.lock") for run_id in starts(output))


# The table of a grid

THREE_SEEDS = {
    "method": "grid",
    "parameters": {"row": {"values": ["a", "b", "c"]}, "seed": {"values": [0, 1, 2]}},
}
SCORES: dict[str, dict[int, float | None]] = {
    "a": {0: 0.50, 1: 0.60, 2: 0.70},
    "b": {0: 0.52, 1: 0.61, 2: 0.75},
    "c": {0: 0.40, 1: 0.51, 2: 0.60},
}


def report(
    path: Path,
    output: Path,
    scores: Mapping[str, Mapping[int, float | None]] = SCORES,
    views: bool = False,
    **others: Any,
) -> str:
    """The table.md of a grid whose runs have these test ACCs; None is a missing run, `others` change a summary.

    With `views`, rows a and c are also scored over 8 views, 0.01 better.
    """
    records = TrialRecords(read_sweep(path), output)
    trials = sweep.grid(records.sweep)
    for trial in trials:
        score = scores[trial.values["row"]][trial.values["seed"]]
        if score is None:
            continue
        config = records.sweep.config({**trial.values, "run_id": trial.run_id}).as_dict()
        facts = {**example_records.facts(config, "task3"), "dataset": "no data", "synthetic": False}
        row = {**example_records.row(1, 0.8), "validate/auc": 0.9}
        summary = {
            **example_records.summary(facts, [row], 0.9, score),
            "tiles": {"train": 1000, "val": 10, "test": 20},
            "stopped": "all epochs done",
            "wall_seconds": 1.5,
        }
        if views and trial.values["row"] != "b":
            interval = {"low": 0.0, "high": 1.0}
            better = {"acc": {"value": score + 0.01, **interval}, "auc": {"value": 0.95, **interval}}
            summary |= {"tta": {**summary["best"], **better}}
        summary |= others.get(trial.run_id, {})
        folder = output / "runs" / trial.run_id
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(facts))
        write_csv(folder / "history.csv", [row])
        (folder / "summary.json").write_text(json.dumps(summary))
    ablation.report(trials, records)
    return (output / "sweeps/try/table.md").read_text()


def test_the_table_has_the_hand_made_numbers(write_sweep: Write, tmp_path: Path) -> None:
    report(write_sweep(THREE_SEEDS), tmp_path)
    a, b, c = table(tmp_path)
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
    assert b["test/acc verdict"] == "not decided"
    # c - a is -.10, -.09, -.10. The smaller of two p is doubled.
    assert float(c["test/acc mean"]) == pytest.approx((0.40 + 0.51 + 0.60) / 3)
    assert float(c["test/acc p holm"]) == pytest.approx(2 * float(c["test/acc p"]))
    assert c["test/acc verdict"] == "worse"
    assert c["validate/acc verdict"] == "the same"
    assert (tmp_path / "fig/task4/try.png").stat().st_size > 10_000


def test_scores_over_8_views_have_a_column_and_those_of_the_first_row_a_comparison(
    write_sweep: Write, tmp_path: Path
) -> None:
    text = report(write_sweep(THREE_SEEDS), tmp_path, views=True)
    a, b, c, views = table(tmp_path)
    assert views["row"] == "a, 8 views"
    assert float(a["test/acc mean"]) == pytest.approx(0.6)  # plain, like the other rows
    assert float(views["test/acc mean"]) == pytest.approx(0.61)
    assert float(views["test/acc difference"]) == pytest.approx(0.01)
    assert float(views["test/auc difference"]) == pytest.approx(0.05)
    assert views["validate/acc mean"] == views["validate/acc verdict"] == ""  # only test tiles have 8 views
    assert "| a, 8 views | 3 |  | 0.6100" in text
    assert float(c["test/acc difference"]) == pytest.approx((-0.10 - 0.09 - 0.10) / 3)
    assert float(c["test/acc 8 views mean"]) == pytest.approx((0.41 + 0.52 + 0.61) / 3)
    assert b["test/acc 8 views mean"] == ""
    assert "| b | 3 | 0.8000 ± 0.0000 | 0.6267 ± 0.1159 | 0.9000 ± 0.0000 |  |" in text
    assert "| c | 3 | 0.8000 ± 0.0000 | 0.5033 ± 0.1002 | 0.9000 ± 0.0000 | 0.5133 ± 0.1002 |" in text


def test_the_table_names_its_data_seeds_and_commit(write_sweep: Write, tmp_path: Path) -> None:
    text = report(write_sweep(THREE_SEEDS), tmp_path, views=True)
    assert text.startswith(
        "**try**: no data; 1,000 training, 10 validation and 20 test tiles of 64 pixels; seeds: 0, 1, 2; "
        "intervals are over seeds. Commit abc.\n"
    )
    assert "Incomplete" not in text
    assert "different" not in text
    runs = read_csv(tmp_path / "sweeps/try/runs.csv")
    assert len(runs) == 9
    assert (runs[2]["test/acc"], runs[2]["tta test/acc"], runs[2]["wall_seconds"]) == (
        "0.4",
        "0.41000000000000003",
        "1.5",
    )


def test_the_table_of_an_incomplete_grid_names_the_missing_runs_and_compares_the_others(
    write_sweep: Write, tmp_path: Path
) -> None:
    missing = {**SCORES, "b": {0: 0.52, 1: None, 2: 0.75}, "c": {0: 0.4, 1: None, 2: None}}
    text = report(write_sweep(THREE_SEEDS), tmp_path, missing)
    assert "**Incomplete**: 3 of 9 runs are missing, with the seeds: b (1), c (1, 2)." in text
    assert "| c | 1 | -0.1000 |  |  | too few seeds |" in text
    _, b, c = table(tmp_path)
    assert b["test/acc pairs"] == "2"
    assert float(b["test/acc difference"]) == pytest.approx(0.035)
    assert c["test/acc verdict"] == "too few seeds"


def test_the_first_row_stays_the_reference_where_its_first_seed_is_missing(
    write_sweep: Write, tmp_path: Path
) -> None:
    parameters = {"row": {"values": ["a", "b", "twin-of-a"]}, "seed": {"values": [0, 1, 2]}}
    path = write_sweep({"method": "grid", "parameters": parameters})
    run(path, tmp_path)
    (tmp_path / "runs/try-a-0/summary.json").unlink()
    run(path, tmp_path, table_only=True)
    a, b, twin, *_ = table(tmp_path)
    assert [row["row"] for row in (a, b, twin)] == ["a", "b", "twin-of-a"]
    assert (twin["n"], twin["test/acc pairs"], twin["test/acc verdict"]) == ("3", "2", "identical")
    assert b["test/acc verdict"] == "too few seeds"
    before = (tmp_path / "sweeps/try/runs.csv").read_bytes()
    for seed in (1, 2):
        (tmp_path / f"runs/try-a-{seed}/summary.json").unlink()
    with pytest.raises(UsageError, match="no run of a is finished yet"):
        run(path, tmp_path, table_only=True)
    assert (tmp_path / "sweeps/try/runs.csv").read_bytes() == before


def test_the_table_of_a_learning_curve_names_every_number_of_training_tiles(
    write_sweep: Write, tmp_path: Path
) -> None:
    larger = {"tiles": {"train": 2000, "val": 10, "test": 20}, "dataset": "all data", "data_fingerprint": "all"}
    text = report(write_sweep(THREE_SEEDS), tmp_path, **{f"try-b-{seed}": larger for seed in range(3)})
    assert text.startswith("**try**: no data / all data; 1,000 / 2,000 training, 10 validation")
    assert "cannot be compared" not in text


def test_the_caption_says_generated_tiles_and_different_commits() -> None:
    def caption(*commits: str, synthetic: bool = False) -> str:
        runs = []
        for commit in commits:
            facts = {**example_records.facts(), "commit": commit, "synthetic": synthetic}
            runs.append(Record(Path(), facts, example_records.summary(facts, [example_records.row(1)]), []))
        return ablation._caption("x", runs)

    assert caption("a", "a").endswith(" Commit a.")
    assert caption("b", "a").endswith(" **The runs come from different commits: a, b.**")
    assert "these are no results on PathMNIST" in caption("a", synthetic=True)
    assert "generated" not in caption("a")


def test_the_table_warns_of_runs_on_different_data(write_sweep: Write, tmp_path: Path) -> None:
    other = {"try-b-1": {"dataset": "other data", "data_fingerprint": "g"}}
    text = report(write_sweep(THREE_SEEDS), tmp_path, **other)
    assert "different data sets: they cannot be compared" in text


def test_a_table_without_a_finished_run_is_refused(write_sweep: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run of try is finished yet"):
        run(write_sweep(THREE_SEEDS), tmp_path, table_only=True)
    with pytest.raises(UsageError, match="no trial of try has ended yet"):
        run(write_sweep(SEARCH), tmp_path, table_only=True)
    assert not (tmp_path / "sweeps").exists()
    without_a = {**SCORES, "a": dict.fromkeys(range(3))}
    with pytest.raises(UsageError, match="no run of a is finished yet"):
        report(write_sweep(THREE_SEEDS), tmp_path, without_a)


# W&B's own agent


class Sweeper:
    """Answers a W&B agent like W&B's server: one run after the other, then the command to exit."""

    def __init__(self, runs: Mapping[str, Mapping[str, Any]], stopped: Mapping[str, Path] | None = None) -> None:
        self.waiting = list(runs.items())
        self.stopped = dict(stopped or {})  # runs to stop, each when this file of it is there

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
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        command = [str(Path(sys.executable).parent / "wandb"), "agent", "me/hw1/s"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    return done.stdout + done.stderr, server.operations


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_wandb_agent_continues_after_trials_that_its_server_has_stopped(
    tmp_path: Path, phantom_root: Path
) -> None:
    every = agent_keys(tmp_path, phantom_root)
    runs = {f"t{number}": {**every, "n_epochs": 10_000} for number in range(3)}
    stopped = {run_id: tmp_path / "runs" / run_id / "history.csv" for run_id in runs}
    output, _ = run_agent(Sweeper({**runs, "last": every}, stopped), tmp_path)
    assert output.count("SIGTERM: run t") == 3, output
    assert "failed runs" not in output
    assert (tmp_path / "runs/last/summary.json").exists(), output


@pytest.mark.slow
def test_the_wandb_agent_runs_train(tmp_path: Path, phantom_root: Path) -> None:
    every = agent_keys(tmp_path, phantom_root)
    runs = {"t0": {**every, "lr": 0.01}, "t1": {**every, "lr": -1}, "t2": {**every, "lr": 0.001}}
    output, operations = run_agent(Sweeper(runs), tmp_path)
    assert "train.py: --lr -1.0: must be above 0" in output
    assert {"SweepWithRuns", "CreateAgent", "Heartbeat"} <= set(operations)
    assert not (tmp_path / "runs/t1").exists(), output
    for run_id in ("t0", "t2"):
        assert (tmp_path / "runs" / run_id / "summary.json").exists(), output
        history = read_csv(tmp_path / "runs" / run_id / "history.csv")
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
