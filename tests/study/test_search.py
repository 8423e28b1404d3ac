"""The search, with a program that only imitates training: kills, full disks, damage, a shared database."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import end
from sweep_runs import SEARCH, Write, begin, run, starts, table, wait_for, wait_for_starts

from common.cli import Fault, UsageError
from study import search
from study.sweep_spec import read_sweep
from study.sweep_tables import Ended, ranked, search_table


@pytest.mark.parametrize("method", ["bayes", "random"])
def test_a_search_ranks_its_trials(
    write_sweep: Write, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run(write_sweep({**SEARCH, "method": method}), output, count=4, workers=2)
    assert sorted(starts(output)) == [f"try-{number}" for number in range(4)]
    printed = capsys.readouterr().out.splitlines()
    assert sorted(line.split(",")[0] for line in printed[:4]) == [f"try-{number}: finished" for number in range(4)]
    values = [float(line["validate/acc"]) for line in table(output)]
    assert values == sorted(values, reverse=True)
    assert values == [float(line["quality"]) for line in table(output)]
    assert len(set(values)) == 4
    text = (output / "sweeps/try/table.md").read_text()
    assert text.count("finished") == 4
    assert text.startswith("**try**: no data; 4 trials")
    last_line = text.splitlines()[-1]
    assert last_line.startswith("The best trial's configuration, on all training tiles: `python ")
    config = json.loads((output / "runs" / table(output)[0]["run_id"] / "config.json").read_text())["config"]
    assert f" --quality={config['quality']}" in last_line


def test_finished_trials_come_before_pruned_ones_and_have_their_best_epoch(write_sweep: Write) -> None:
    content = read_sweep(write_sweep(SEARCH))
    pruned, failed = Ended("p", "pruned", {}, {1: 0.9}, None), Ended("f", "failed", {}, {}, None)
    finished = Ended("t", "finished", {"quality": 0.3}, {1: 0.5, 2: 0.8, 3: 0.8, 4: float("nan")}, "data")
    other = Ended("o", "finished", {}, {1: 0.6}, "data")
    assert ranked(content, [failed, pruned, other, finished]) == [finished, other, pruned, failed]
    assert "| 1 | t | finished | 0.8 | 2 | 4 | 0.3 |  |" in search_table(content, [finished])
    minimized = read_sweep(write_sweep({**SEARCH, "metric": {"name": "validate/acc"}}))
    assert ranked(minimized, [other, finished]) == [finished, other]  # 0.5 in its first epoch
    assert "| 1 | t | finished | 0.5 | 1 | 4 | 0.3 |  |" in search_table(minimized, [finished])


def test_a_bad_trial_is_pruned(write_sweep: Write, tmp_path: Path) -> None:
    early = {"type": "hyperband", "min_iter": 2, "eta": 2}
    content = {**SEARCH, "method": "random", "early_terminate": early}
    path, output = write_sweep(content, {"n_epochs": {"value": 6}, "pause": {"value": 0.25}}), tmp_path / "out"
    run(path, output, count=5, workers=2)
    pruned = [line for line in table(output) if line["state"] == "pruned"]
    assert pruned
    assert all(int(line["epochs"]) < 6 for line in pruned)
    assert all(not (output / "runs" / line["run_id"] / "summary.json").exists() for line in pruned)
    assert table(output)[0]["state"] == "finished"


def test_trials_whose_configuration_is_refused_count_as_failed_and_the_search_continues(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {"quality": {"values": [-2.0, -1.0, 0.5]}, "seed": {"min": 0, "max": 50}}
    run(write_sweep({**SEARCH, "method": "random", "parameters": parameters}), tmp_path / "out", count=12)
    assert {line["state"] for line in table(tmp_path / "out")} == {"finished", "failed"}
    assert len(table(tmp_path / "out")) == len(starts(tmp_path / "out")) == 12
    printed = capsys.readouterr().out
    assert "FAILED with exit status 2: fake_program.py: --quality -1.0: broken" in printed
    assert "FAILED with exit status 3: fake_program.py: the loss became nan" in printed


def test_swept_values_that_exclude_each_other_do_not_jam_a_search(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {
        "ablation": {"values": ["with_ema"]},
        "ema_decay": {"values": [0.9]},
        "lr": {"min": 0.1, "max": 0.2},
    }
    path = write_sweep({**SEARCH, "program": "train.py", "parameters": parameters})
    for _ in range(2):
        with pytest.raises(Fault, match="all 3 trials failed"):
            run(path, tmp_path / "out", count=3)
    assert capsys.readouterr().out.count("FAILED: --ema_decay 0.9: --ablation with_ema sets this key itself") == 3
    assert [line["state"] for line in table(tmp_path / "out")] == ["failed"] * 3


def test_trials_that_a_full_disk_made_fail_are_tried_again(write_sweep: Write, tmp_path: Path) -> None:
    path, output = write_sweep(SEARCH), tmp_path / "out"
    output.mkdir()
    (output / "disk-is-full").touch()
    with pytest.raises(
        Fault, match="try-0, try-0, try-0 failed: see their logs; the same command tries them again"
    ):
        run(path, output, count=3)  # and stops there: the other trials would fail as well
    (output / "disk-is-full").unlink()
    run(path, output, count=3)
    assert Counter(starts(output))["try-0"] == 4
    assert [line["state"] for line in table(output)] == ["finished"] * 3
    assert "try-0" in {line["run_id"] for line in table(output)}


@pytest.mark.parametrize("with_its_trial", [False, True])
def test_a_killed_search_continues_its_trials(
    write_sweep: Write, tmp_path: Path, with_its_trial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "HEARTBEAT", 1)
    monkeypatch.setattr(search, "GRACE", 2)
    path, output = write_sweep(SEARCH, {"pause": {"value": 1.5}}), tmp_path / "out"
    killed = begin(path, output, count=3)
    wait_for_starts(output, 1)
    os.kill(killed, signal.SIGKILL)
    assert end(killed) == -signal.SIGKILL
    if with_its_trial:
        os.kill(int((output / "processes.txt").read_text()), signal.SIGKILL)
    run(path, output, count=3)
    assert Counter(starts(output))["try-0"] == (2 if with_its_trial else 1)
    assert len(set(starts(output))) == 3
    assert [line["state"] for line in table(output)] == ["finished"] * 3


def test_a_trial_whose_process_was_killed_is_tried_again(write_sweep: Write, tmp_path: Path) -> None:
    path, output = write_sweep(SEARCH, {"pause": {"value": 0.5}}), tmp_path / "out"
    command = begin(path, output, count=2)
    wait_for_starts(output, 1)
    os.kill(int((output / "processes.txt").read_text()), signal.SIGKILL)  # as the kernel does without memory
    assert end(command) == 1
    assert "try-0: FAILED with exit status -9: it wrote nothing" in (output / "log.txt").read_text()
    assert Counter(starts(output))["try-0"] == 2
    assert [line["state"] for line in table(output)] == ["finished"] * 2


def test_another_search_of_the_same_name_or_an_unknown_metric_is_refused(
    write_sweep: Write, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no trial of try has ended yet"):
        run(write_sweep(SEARCH), tmp_path / "out", workers=0)
    run(write_sweep(SEARCH), tmp_path / "out", count=1)
    for changed in (
        write_sweep(SEARCH, {"n_epochs": {"value": 2}}),
        write_sweep({**SEARCH, "metric": {"name": "validate/acc", "goal": "minimize"}}),
        write_sweep(SEARCH, {"quality": {"min": 0.1, "max": 0.9}}),
    ):
        with pytest.raises(UsageError, match="search try was started with other parameters"):
            run(changed, tmp_path / "out", count=2)
    with pytest.raises(Fault, match=r"history\.csv has no column validate/f1, the sweep's metric"):
        run(write_sweep({**SEARCH, "name": "other", "metric": {"name": "validate/f1"}}), tmp_path / "out", count=2)


def test_a_search_without_its_database_refuses_records_of_other_values(write_sweep: Write, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(write_sweep(SEARCH), output, count=2)
    before = (output / "sweeps/try/table.md").read_bytes()
    (output / "sweeps/try/search.db").unlink()  # as in a clone
    with pytest.raises(UsageError, match=r"run try-0 .*(quality|row) was .*: use another --output_dir"):
        run(write_sweep(SEARCH), output, count=2)
    assert (output / "sweeps/try/table.md").read_bytes() == before


# Its database


def test_the_table_is_that_of_the_runs_records_where_the_database_says_otherwise(
    write_sweep: Write, tmp_path: Path
) -> None:
    path, output = write_sweep(SEARCH), tmp_path / "out"
    run(path, output, count=3)
    before = table(output)
    with sqlite3.connect(output / "sweeps/try/search.db") as database:
        database.execute("UPDATE trial_values SET value = 0.99 - value")
        database.execute("UPDATE trial_intermediate_values SET intermediate_value = 0.5")
        database.execute("UPDATE trial_params SET param_value = 0.1 WHERE param_name = 'quality'")
    run(path, output, workers=0)
    assert table(output) == before


@pytest.mark.parametrize("damage", ["text", "cut", "torn", "values", "folder"])
def test_a_damaged_database_is_one_line_that_names_it(write_sweep: Write, tmp_path: Path, damage: str) -> None:
    path, output = write_sweep(SEARCH), tmp_path / "out"
    run(path, output, count=2)
    file = output / "sweeps/try/search.db"
    before = (output / "sweeps/try/table.md").read_bytes()
    if damage == "text":
        file.write_text("not a database, but a text that is long enough" * 100)
    elif damage == "cut":
        os.truncate(file, 5000)
    elif damage == "torn":
        content = bytearray(file.read_bytes())
        content[4096:40_000] = bytes(40_000 - 4096)
        file.write_bytes(content)
    elif damage == "values":
        with sqlite3.connect(file) as database:
            database.execute("UPDATE trial_params SET distribution_json = '{'")
    else:
        file.unlink()
        file.mkdir()
    with pytest.raises((Fault, UsageError), match=r"search\.db: ") as error:
        run(path, output, count=3)
    assert "\n" not in str(error.value)
    assert len(starts(output)) == 2
    assert (output / "sweeps/try/table.md").read_bytes() == before


@pytest.mark.parametrize(
    ("url", "kind", "reason"),
    [
        ("somewhere", UsageError, "--storage: Could not parse SQLAlchemy URL"),
        ("nosuch://host/name", UsageError, "--storage: .*nosuch"),
        ("sqlite:////nosuch/folder/shared.db", Fault, "unable to open database file"),
        ("postgresql+psycopg://student:secret@127.0.0.1:1/study", Fault, "127.0.0.1"),
    ],
)
def test_a_database_that_cannot_be_opened_is_named_without_its_password(
    write_sweep: Write, tmp_path: Path, url: str, kind: type[Exception], reason: str
) -> None:
    if "psycopg" in url:
        pytest.importorskip("psycopg")
    with pytest.raises(kind, match=reason) as refused:
        run(write_sweep(SEARCH), tmp_path / "out", storage=url)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_two_commands_share_a_search_from_its_first_moment(write_sweep: Write, tmp_path: Path) -> None:
    path, output = write_sweep(SEARCH, {"pause": {"value": 0.3}}), tmp_path / "out"
    commands = [begin(path, output, count=6, workers=workers) for workers in (1, 2)]
    assert [end(command) for command in commands] == [0, 0], (output / "log.txt").read_text()
    assert Counter(starts(output)).most_common(1)[0][1] == 1
    assert 6 <= len(starts(output)) <= 7  # both may ask for the last trial at the same moment
    run(path, output, count=6)
    assert len({line["quality"] for line in table(output)}) == len(starts(output))


def test_workers_never_take_the_same_waiting_trial(write_sweep: Write, tmp_path: Path) -> None:
    file = tmp_path / "search.db"
    study = search._open(read_sweep(write_sweep(SEARCH)), f"sqlite:///{file}", file)
    for _ in range(60):
        study.enqueue_trial({"quality": 0.5})
    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(lambda _: study.ask().number, range(60))) == list(range(60))


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server that runs for these tests."""
    found = [shutil.which("initdb"), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    programs = next((Path(path).resolve().parent for path in found if path), None)
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


def test_a_machine_repeats_the_trial_of_a_lost_one_and_both_agree_on_the_parameters(
    write_sweep: Write, tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "HEARTBEAT", 1)
    monkeypatch.setattr(search, "GRACE", 3)
    path = write_sweep({**SEARCH, "name": "lost"}, {"n_epochs": {"value": 20}, "pause": {"value": 0.5}})
    lost, other = tmp_path / "lost", tmp_path / "other"
    command = begin(path, lost, count=2, storage=database, fixed=f"--data_root={lost}")
    wait_for((lost / "runs/lost-0/history.csv").exists)
    end(command, within=0)
    os.kill(int((lost / "processes.txt").read_text()), signal.SIGKILL)
    other.mkdir()
    (other / "no-pause").touch()
    run(path, other, count=2, storage=database, fixed=f"--data_root={other}")
    assert [line["state"] for line in table(other, "lost")] == ["finished", "finished"]
    assert sorted(starts(other)) == ["lost-0", "lost-1"]
    values = [json.loads((folder / "runs/lost-0/config.json").read_text())["config"] for folder in (lost, other)]
    assert values[0]["quality"] == values[1]["quality"]
    run(path, lost, workers=0, storage=database)
    assert {line["state"] for line in table(lost, "lost")} == {"elsewhere"}  # the other machine has the records
    with pytest.raises(UsageError, match="was started with other parameters"):
        run(path, other, count=3, storage=database, fixed="--seed=3")
