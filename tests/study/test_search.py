"""The search, with a program that only imitates training: early termination, full disks, two commands."""

import json
import re
from functools import partial, partialmethod
from pathlib import Path

import pytest
from conftest import ROOT
from optuna import samplers
from optuna.storages.journal import _file
from optuna.trial import create_trial
from processes import end
from sweep_runs import SEARCH, Write, begin, most_at_once, run, starts, table

from common.cli import Fault, UsageError
from common.files import write_text
from study.processes import Processes
from study.sweep import Search
from study.sweep_spec import read_sweep

SYMLINK_LOCK = _file.JournalFileSymlinkLock.__init__


@pytest.mark.parametrize(("method", "goal"), [("bayes", "maximize"), ("random", "minimize")])
def test_a_search_ranks_its_trials(
    write_sweep: Write, tmp_path: Path, method: str, goal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {**SEARCH, "method": method, "metric": {"name": "validate/acc", "goal": goal}}
    # The first two trials wait for each other.
    path, output = write_sweep(content, {"together": {"value": 2}}), tmp_path / "out"
    run(path, output, count=4, workers=2)
    assert most_at_once(output) == 2
    expected = [f"try-{number}" for number in range(4)]
    assert sorted(starts(output)) == expected
    printed = capsys.readouterr().out.splitlines()
    assert sorted(line.split(":")[0] for line in printed if ": finished (" in line) == expected
    assert printed[0] == f"try-0: started (log: {output / 'sweeps/try/try-0.log'})"
    values = [float(line["best validate/acc"]) for line in table(output)]
    ranked = sorted(values, reverse=goal == "maximize")
    assert values == ranked == [float(line["quality"]) for line in table(output)]
    configs = [json.loads(path.read_text())["config"] for path in output.glob("runs/*/config.json")]
    assert len({config["quality"] for config in configs}) == 4  # the table has four digits of each
    assert [line["state"] for line in table(output)] == ["complete"] * 4
    text = (output / "sweeps/try/table.md").read_text()
    assert text.startswith(f"**try**: no data; 4 trials of a {method} search")
    config = json.loads((output / "runs" / table(output)[0]["run_id"] / "config.json").read_text())["config"]
    assert f" --quality={config['quality']} --row={config['row']}`" in text.splitlines()[-1]
    run(path, output, count=5)  # and goes on
    assert len(starts(output)) == 5


def test_a_new_trial_learns_from_those_before(
    write_sweep: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "TPESampler", partial(samplers.TPESampler, seed=0))
    distances = {}
    for goal in ("maximize", "minimize"):
        content = {**SEARCH, "metric": {"name": "validate/acc", "goal": goal}}
        search = Search(read_sweep(write_sweep(content)), Processes(tmp_path, tmp_path / goal, {}), 1)
        for place in range(31):
            params = {"quality": 0.1 + 0.9 * place / 30, "row": "a"}
            value = -abs(params["quality"] - 0.4)
            search.study.add_trial(create_trial(params=params, distributions=search.space, value=value))
        asked = [search.study.ask(search.space).params["quality"] for _ in range(21)]
        distances[goal] = sorted(abs(quality - 0.4) for quality in asked)[10]
    assert distances["maximize"] < 0.15 < 0.3 < distances["minimize"]


def test_the_worse_half_ends_after_the_first_epochs(write_sweep: Write, tmp_path: Path) -> None:
    early = {"early_terminate": {"type": "hyperband", "min_iter": 3, "eta": 2}}
    search = Search(read_sweep(write_sweep({**SEARCH, **early})), Processes(tmp_path, tmp_path, {}), 1)
    ends = []
    for score in (0.1, 0.2, 0.9, 0.5, 0.3):
        trial, epoch = search.study.ask(search.space), 0
        while epoch < 6 and not trial.should_prune():
            epoch += 1
            trial.report(score, epoch)
        ends.append(epoch)
    assert ends == [6, 6, 6, 6, 3]


def test_a_bad_trial_is_pruned(write_sweep: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Qualities .90, .14, .58, .66: whichever of the first two is first, the third one is worse than the best.
    monkeypatch.setattr(samplers, "RandomSampler", partial(samplers.RandomSampler, seed=6))
    early = {"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2}}
    content = {**SEARCH, **early, "method": "random"}
    path, output = write_sweep(content, {"n_epochs": {"value": 6}, "pause": {"value": 0.8}}), tmp_path / "out"
    last = [output / f"checkpoints/try-{number}/last.pt" for number in range(4)]
    for number in range(4):
        write_text(last[number], "all that training needs")
    run(path, output, count=4, workers=2)
    pruned = [line for line in table(output) if line["state"] == "pruned"]
    assert pruned
    assert all(int(line["epochs"]) in (2, 4) for line in pruned)
    assert all(not (output / "runs" / line["run_id"] / "summary.json").exists() for line in pruned)
    kept = [f"try-{number}" for number in range(4) if last[number].exists()]
    assert sorted([*kept, *(line["run_id"] for line in pruned)]) == ["try-0", "try-1", "try-2", "try-3"]
    qualities = [float(line["quality"]) for line in table(output)]
    assert table(output)[0]["state"] == "complete"
    assert qualities[0] == max(qualities)
    before = starts(output)
    run(path, output, count=4)
    assert starts(output) == before


def test_trials_whose_configuration_is_refused_are_not_tried_again(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "RandomSampler", partial(samplers.RandomSampler, seed=0))  # draws all three
    parameters = {"quality": {"values": [-2.0, -1.0, 0.5]}, "seed": {"min": 0, "max": 50}}
    path = write_sweep({**SEARCH, "method": "random", "parameters": {**parameters, "test": {"value": False}}})
    for _ in range(2):
        run(path, tmp_path / "out", count=12)
    assert {line["state"] for line in table(tmp_path / "out")} == {"complete", "fail"}
    assert len(table(tmp_path / "out")) == len(starts(tmp_path / "out")) == 12
    printed = capsys.readouterr().out
    assert "FAILED with exit status 2: fake_program.py: --quality -1.0: broken" in printed
    assert "FAILED with exit status 3: fake_program.py: the loss became nan" in printed


def test_trials_that_a_full_disk_made_fail_are_tried_again(write_sweep: Write, tmp_path: Path) -> None:
    path, output = write_sweep(SEARCH), tmp_path / "out"
    output.mkdir()
    (output / "disk-is-full").touch()
    with pytest.raises(Fault, match="try-0, try-1 failed: see their logs; the same command tries them again"):
        run(path, output, count=2)
    (output / "disk-is-full").unlink()
    run(path, output, count=2)
    assert starts(output) == ["try-0", "try-1"] * 2
    assert [line["state"] for line in table(output)] == ["complete"] * 2
    (output / "disk-is-full").touch()
    with pytest.raises(Fault, match="try-2 failed"):
        run(path, output, count=3)
    assert [line["state"] for line in table(output)] == ["complete", "complete", "running"]


def test_a_search_that_was_killed_while_it_wrote_its_journal_goes_on(
    write_sweep: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = (
        write_sweep(SEARCH, {"row": {"value": "b"}, "pause": {"min": 0.0, "max": 0.1}}),
        tmp_path / "out",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_file.JournalFileSymlinkLock, "__init__", partialmethod(SYMLINK_LOCK, grace_period=3))
    search = Search(read_sweep(path), Processes(Path("out"), Path("out/sweeps/try"), {}), 2)
    search.study.ask().suggest_float("quality", 0.1, 1.0)  # and no pause
    with open(search.file, "a") as journal:
        journal.write('{"op_code":')
    search.study._storage._backend._lock.acquire()  # type: ignore[attr-defined]
    command = begin(path, Path("out"), count=2)
    assert end(command) == 0, (output / "log.txt").read_text()
    configs = [json.loads((output / f"runs/try-{number}/config.json").read_text())["config"] for number in (0, 1)]
    assert all(0 < config["pause"] < 0.1 for config in configs)
    assert all(map(json.loads, search.file.read_text().splitlines()))


def test_another_search_of_the_same_name_is_refused(write_sweep: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trial of try has finished"):
        run(write_sweep(SEARCH), tmp_path / "out", workers=0)
    run(write_sweep(SEARCH), tmp_path / "out", count=1)
    with pytest.raises(UsageError, match="search try was started with other parameters"):
        run(write_sweep(SEARCH, {"n_epochs": {"value": 2}}), tmp_path / "out", count=2)
    with pytest.raises(UsageError, match="search try was started with other parameters"):
        run(write_sweep({**SEARCH, "metric": {"name": "validate/loss"}}), tmp_path / "out", count=1)
    with pytest.raises(UsageError, match="search try was started with other parameters"):
        run(write_sweep({**SEARCH, "program": f"{ROOT}/./tests/fake_program.py"}), tmp_path / "out", count=1)
    run(write_sweep(SEARCH, {"wandb": {"value": "disabled"}}), tmp_path / "out", count=1)  # the same search
    (tmp_path / "out/sweeps/try/search.jsonl").unlink()
    with pytest.raises(UsageError, match=r"runs/try-0: this run is not in .*search\.jsonl: use another"):
        run(write_sweep(SEARCH), tmp_path / "out", count=2)
    (tmp_path / "out/runs/try-0").rename(tmp_path / "out/runs/try-1")
    with pytest.raises(UsageError, match=r"runs/try-1: this run is not in"):
        run(write_sweep(SEARCH), tmp_path / "out", count=2, workers=2)
    run(write_sweep(SEARCH), tmp_path / "out", count=1)  # does not need it


def test_the_table_is_that_of_the_runs_and_a_damaged_journal_is_named(write_sweep: Write, tmp_path: Path) -> None:
    path, output = write_sweep(SEARCH), tmp_path / "out"
    run(path, output, count=3)
    journal = output / "sweeps/try/search.jsonl"
    whole, before = journal.read_text(), table(output)
    lines = whole.splitlines(keepends=True)
    score, parameter = (
        [line for line in lines if word in line][-1] for word in ('"intermediate_value"', '"param_name":"quality"')
    )
    for old, new in (
        (score, re.sub(r'("intermediate_value":)[\d.]+', r"\g<1>7.5", score)),
        (parameter, re.sub(r'("param_value_internal":)[\d.]+', r"\g<1>0.123", parameter)),
        (score, ""),
    ):
        assert old != new
        journal.write_text(whole.replace(old, new))
        run(path, output, workers=0)
        assert table(output) == before
    journal.write_text(whole.replace('"op_code":4', '"op_code"4', 1))
    with pytest.raises(Fault, match=r"search\.jsonl: damaged \(.*; restore it, or use another"):
        run(path, output, workers=0)


def test_two_commands_share_a_search_from_its_first_moment(write_sweep: Write, tmp_path: Path) -> None:
    path, output = write_sweep(SEARCH, {"pause": {"value": 0.3}}), tmp_path / "out"
    commands = [begin(path, output, count=6, workers=workers) for workers in (1, 2)]
    assert [end(command) for command in commands] == [0, 0], (output / "log.txt").read_text()
    assert sorted(starts(output)) == [f"try-{number}" for number in range(6)]
    configs = (json.loads(path.read_text())["config"] for path in output.glob("runs/*/config.json"))
    assert len({config["quality"] for config in configs}) == 6  # the table rounds them
