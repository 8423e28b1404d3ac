"""The search, with a program that only imitates training: kills, full disks, machines that share a database."""

import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from processes import end, start
from sweep_runs import SEARCH, Write, begin, run, starts, table, wait_for, wait_for_starts

from common.config import run_script
from common.errors import Fault, UsageError
from study import ranking, search, sweep
from study.ranking import importances
from study.sweep_file import read_sweep


def test_the_importance_is_drawn_only_if_the_same_parameter_comes_first_with_every_seed() -> None:
    def shares(n_trials: int) -> list[dict[str, float]]:
        optuna_study = optuna.create_study()
        for number in range(n_trials):
            trial = optuna_study.ask({name: FloatDistribution(0, 1) for name in ("strong", "weak", "none")})
            optuna_study.tell(trial, 3 * trial.params["strong"] + trial.params["weak"] + 0.01 * number % 2)
        return importances(optuna_study)

    many = shares(60)
    assert len(many) > 1
    assert {max(share, key=share.__getitem__) for share in many} == {"strong"}
    assert many[0] != many[1]  # the seeds of the estimate differ


@pytest.mark.parametrize("method", ["bayes", "random"])
def test_a_search_ranks_its_trials(write_sweep: Write, tmp_path: Path, method: str) -> None:
    output = tmp_path / "out"
    run(write_sweep({**SEARCH, "method": method}), output, count=4)
    assert starts(output) == [f"try-{number}" for number in range(4)]
    values = [float(line["validate/acc"]) for line in table(output)]
    assert values == sorted(values, reverse=True)
    assert values == [float(line["quality"]) for line in table(output)]
    text = (output / "sweeps/try/table.md").read_text()
    assert text.count("finished") == 4
    assert text.startswith("**try**: no data; 4 trials")
    last_line = text.splitlines()[-1]
    assert last_line.startswith("The best trial's configuration, on all training tiles: `python ")
    assert f" --quality={max(values)}" in last_line
    assert (output / "fig/task4/try-parallel-coordinates.png").exists()
    assert (output / "fig/task4/try-importance.png").exists()


def test_an_importance_that_more_trials_no_longer_give_is_removed(
    write_sweep: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, figure = write_sweep(SEARCH), tmp_path / "out/fig/task4/try-importance.png"
    run(path, tmp_path / "out", count=3)
    assert figure.exists()
    monkeypatch.setattr(ranking, "importances", lambda _: [{"quality": 1, "row": 0}, {"quality": 0, "row": 1}])
    run(path, tmp_path / "out", count=3)
    assert not figure.exists()
    assert "3 finished trials do not tell which parameter" in capsys.readouterr().out


def test_finished_trials_come_before_pruned_ones_and_have_their_best_epoch(write_sweep: Write) -> None:
    content = read_sweep(write_sweep(SEARCH))

    def trial(state: TrialState, *values: float) -> FrozenTrial:
        epochs = dict(enumerate(values, start=1))
        return create_trial(state=state, value=values[-1], intermediate_values=epochs)

    pruned, finished = trial(TrialState.PRUNED, 0.9), trial(TrialState.COMPLETE, 0.5, 0.8, 0.6)
    assert sorted([pruned, finished], key=lambda one: ranking._order(one, content)) == [finished, pruned]
    line = ranking._line(finished, content)
    assert (line["validate/acc"], line["best epoch"], line["epochs"]) == (0.8, 2, 3)


def test_a_search_may_minimise(write_sweep: Write, tmp_path: Path) -> None:
    run(write_sweep({**SEARCH, "metric": {"name": "validate/acc"}}), tmp_path / "out", count=3)
    values = [float(line["validate/acc"]) for line in table(tmp_path / "out")]
    assert values == sorted(values)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_search_resumes_its_trials_and_has_the_same_samples(
    write_sweep: Write, tmp_path: Path, workers: int
) -> None:
    path, output = write_sweep(SEARCH, {"pause": {"value": 0.3}}), tmp_path / "out"
    run(path, tmp_path / "whole", count=4)
    killed = begin(path, output, count=4, workers=workers)
    wait_for_starts(output, 2)
    os.kill(killed, signal.SIGKILL)
    assert end(killed) == -signal.SIGKILL
    run(path, output, count=4, workers=workers)
    assert Counter(starts(output)) == {f"try-{number}": 1 for number in range(4)}
    assert table(output) == table(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_killed_after_any_write_continues_with_the_same_samples(
    write_sweep: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    path = write_sweep(SEARCH)
    run(path, tmp_path / "whole", count=workers + 1)
    monkeypatch.chdir(tmp_path)  # the journal's path is relative, as by default
    fsync = os.fsync
    for n_writes in itertools.count(1, workers):
        output, written = Path(str(n_writes)), itertools.count(1)

        def die(descriptor: int) -> None:
            fsync(descriptor)
            if next(written) == n_writes:  # noqa: B023 (the command is forked in this iteration)
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", die)
            status = end(begin(path, output, count=workers, workers=workers))
        run(path, output, count=workers + 1, workers=workers)
        assert table(output) == table(tmp_path / "whole"), n_writes
        if status == 0:  # it made fewer writes than this
            break
    assert n_writes > 10


def test_a_search_names_its_journal_when_the_disk_is_full_and_continues_when_there_is_room(
    write_sweep: Write, tmp_path: Path
) -> None:
    path, output = write_sweep(SEARCH), tmp_path / "out"
    run(path, tmp_path / "whole", count=3)
    run(path, output, count=2)
    journal, log = output / "sweeps/try/search.journal", tmp_path / "log.txt"

    def with_full_disk() -> None:
        room = journal.stat().st_size + 20  # part of a line
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # makes write_sweep() fail, as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        run_script(sweep.main, sweep.SweepConfig, [f"--file={path}", f"--output_dir={output}", "--count=3"])

    assert end(start(with_full_disk, log)) == 1
    assert f"{journal}: File too large; fix this, then start the same command" in log.read_text()
    assert not journal.read_text().endswith("\n")
    run(path, output, count=3)
    assert table(output) == table(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
def test_a_search_without_its_journal_refuses_records_of_other_values(
    write_sweep: Write, tmp_path: Path, finished: bool
) -> None:
    output = tmp_path / "out"
    run(write_sweep(SEARCH), output, count=2)
    before = (output / "sweeps/try/table.md").read_bytes()
    (output / "sweeps/try/search.journal").unlink()  # as in a clone: it has the runs, but not the journal
    first = output / "runs/try-0"
    record = json.loads((first / "config.json").read_text())
    record["config"]["quality"] = 0.99  # the sample of another machine
    (first / "config.json").write_text(json.dumps(record))
    if not finished:  # it was pruned
        (first / "summary.json").unlink()
    with pytest.raises(UsageError, match=r"run try-0 .*\(quality was 0\.99\): use another --output_dir"):
        run(write_sweep(SEARCH), output, count=2)
    assert (output / "sweeps/try/table.md").read_bytes() == before


def test_two_commands_share_a_search(write_sweep: Write, tmp_path: Path) -> None:
    path, output = write_sweep(SEARCH, {"pause": {"value": 0.2}}), tmp_path / "out"
    commands = [begin(path, output, count=6, workers=workers) for workers in (1, 2)]
    assert [end(command) for command in commands] == [0, 0]
    assert Counter(starts(output)) == {f"try-{number}": 1 for number in range(6)}
    assert len({line["quality"] for line in table(output)}) == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_trial_is_pruned(write_sweep: Write, tmp_path: Path, workers: int) -> None:
    early = {"type": "hyperband", "min_iter": 2, "eta": 2}
    content = {**SEARCH, "method": "random", "early_terminate": early}
    path, output = write_sweep(content, {"n_epochs": {"value": 6}, "pause": {"value": 0.25}}), tmp_path / "out"
    run(path, output, count=5, workers=workers)
    pruned = [line for line in table(output) if line["state"] == "pruned"]
    assert pruned
    assert all(int(line["epochs"]) < 6 for line in pruned)
    assert all(not (output / "runs" / line["run_id"] / "summary.json").exists() for line in pruned)
    assert table(output)[0]["state"] == "finished"


def test_a_trial_that_its_configuration_makes_fail_is_named_and_the_search_continues(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {"quality": {"values": [-2.0, -1.0, 0.5]}, "seed": {"min": 0, "max": 50}}
    run(write_sweep({**SEARCH, "method": "random", "parameters": parameters}), tmp_path / "out", count=9)
    assert {line["state"] for line in table(tmp_path / "out")} == {"finished", "failed"}
    printed = capsys.readouterr().out
    assert "FAILED with exit status 2: fake_program.py: --quality -1.0: broken" in printed
    assert "FAILED with exit status 3: fake_program.py: the loss became nan" in printed


def test_trials_that_a_full_disk_made_fail_are_tried_again(write_sweep: Write, tmp_path: Path) -> None:
    path, output = write_sweep(SEARCH), tmp_path / "out"
    run(path, tmp_path / "whole", count=5)
    output.mkdir()
    (output / "disk-is-full").touch()
    with pytest.raises(
        Fault, match="try-0, try-1, try-2 failed: see their logs; the same command tries them again"
    ):
        run(path, output, count=5)  # and stops there: the other trials would fail as well
    assert starts(output) == ["try-0", "try-1", "try-2"]
    (output / "disk-is-full").unlink()
    run(path, output, count=5)
    assert [line["state"] for line in table(output)] == ["finished"] * 5
    assert len(starts(output)) == 3 + 5


def test_a_trial_whose_process_was_killed_is_tried_again(write_sweep: Write, tmp_path: Path) -> None:
    path, output = write_sweep(SEARCH, {"pause": {"value": 0.5}}), tmp_path / "out"
    command = begin(path, output, count=2)
    wait_for_starts(output, 1)
    os.kill(int((output / "processes.txt").read_text()), signal.SIGKILL)  # as the kernel does without memory
    assert end(command) == 1
    assert "try-0 failed: see their logs" in (output / "log.txt").read_text()
    run(path, output, count=2)
    assert sorted(starts(output)) == ["try-0", "try-0", "try-1"]
    assert [line["state"] for line in table(output)] == ["finished"] * 2


def test_another_search_of_the_same_name_or_an_unknown_metric_is_refused(
    write_sweep: Write, tmp_path: Path
) -> None:
    run(write_sweep(SEARCH), tmp_path / "out", count=1)
    with pytest.raises(UsageError, match="search try was started with other parameters"):
        run(write_sweep(SEARCH, {"n_epochs": {"value": 2}}), tmp_path / "out", count=2)
    other_goal = {**SEARCH, "metric": {"name": "validate/acc", "goal": "minimize"}}
    with pytest.raises(UsageError, match="search try was started with other parameters"):
        run(write_sweep(other_goal), tmp_path / "out", count=2)
    with pytest.raises(Fault, match=r"history\.csv has no column validate/f1, the sweep's metric"):
        run(write_sweep({**SEARCH, "name": "other", "metric": {"name": "validate/f1"}}), tmp_path / "out", count=2)


# Machines that share a database: each has a folder for itself


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server that runs for these tests."""
    found = [shutil.which("initdb"), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    programs = next((Path(path).parent for path in found if path), None)
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp())
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    if user:
        shutil.chown(folder, user)

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, "-D", folder / "data", *arguments],
            check=True, cwd=folder, user=user, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    call("initdb", "--username=student", "--auth=trust", "--no-sync")
    call("pg_ctl", "start", "-w", "-l", "log.txt", "-o", f"-p {port} -h 127.0.0.1 -k {folder}")
    try:
        yield f"postgresql+psycopg://student@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "stop", "-m", "immediate")
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database; PostgreSQL's keeps what other tests wrote."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'shared.db'}"
    return str(request.getfixturevalue("postgresql"))


def test_two_machines_share_a_search(write_sweep: Write, tmp_path: Path, database: str) -> None:
    path = write_sweep({**SEARCH, "name": "shared"})
    folders = [tmp_path / "here", tmp_path / "there"]
    roots = [f"--data_root={folder}" for folder in folders]  # as on machines with other folders
    commands = []
    for folder, root in zip(folders, roots, strict=True):
        folder.mkdir()
        for number in range(8):
            (folder / f"hold-shared-{number}").touch()  # so that neither machine ends before the other one starts
        commands.append(begin(path, folder, count=6, storage=database, fixed=root))
    for folder in folders:
        wait_for_starts(folder, 1)
    for held in tmp_path.glob("*/hold-*"):
        held.unlink()
    assert [end(command) for command in commands] == [0, 0]
    begun = [name for folder in folders for name in starts(folder)]
    assert len(begun) in (6, 7)  # both may ask for the last trial at the same moment
    assert len(set(begun)) == len(begun)
    run(path, folders[0], count=6, storage=database, fixed=roots[0])
    lines = table(folders[0], "shared")
    assert {line["run_id"] for line in lines} == set(begun)
    assert len({line["quality"] for line in lines}) == len(begun)  # the machines sample differently
    with pytest.raises(UsageError, match="was started with other parameters"):
        run(path, folders[1], count=7, storage=database, fixed="--seed=3")


def test_a_machine_continues_its_killed_trials_and_another_one_repeats_those_of_a_lost_machine(
    write_sweep: Write, tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "HEARTBEAT", 1)
    monkeypatch.setattr(search, "GRACE", 3)
    path = write_sweep({**SEARCH, "name": "lost"}, {"n_epochs": {"value": 20}, "pause": {"value": 0.5}})
    lost, other = tmp_path / "lost", tmp_path / "other"
    for _ in range(2):
        command = begin(path, lost, count=2, storage=database)
        wait_for(lambda: (lost / "runs/lost-0/history.csv").exists())
        os.kill(command, signal.SIGKILL)
        assert end(command) == -signal.SIGKILL
        os.kill(int((lost / "processes.txt").read_text().split()[-1]), signal.SIGKILL)
        (lost / "runs/lost-0/history.csv").unlink()
    assert starts(lost) == ["lost-0", "lost-0"]
    other.mkdir()
    (other / "no-pause").touch()
    run(path, other, count=2, storage=database)
    lines = table(other, "lost")
    assert [line["state"] for line in lines] == ["finished", "finished"]
    assert sorted(starts(other)) == ["lost-1", "lost-2"]  # one of them repeats lost-0
    trial = json.loads((lost / "runs/lost-0/config.json").read_text())["config"]
    assert trial["quality"] in [float(line["quality"]) for line in lines]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("somewhere", "Could not parse SQLAlchemy URL"),
        ("nosuch://host/name", "nosuch"),
        ("sqlite:////nosuch/folder/shared.db", "unable to open database file"),
        ("postgresql+psycopg://student:secret@127.0.0.1:1/study", "127.0.0.1"),
    ],
)
def test_a_database_that_cannot_be_opened_is_refused(
    write_sweep: Write, tmp_path: Path, url: str, reason: str
) -> None:
    with pytest.raises(UsageError, match=f"--storage: no database can be opened: .*{reason}") as refused:
        run(write_sweep(SEARCH), tmp_path / "out", storage=url)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)
