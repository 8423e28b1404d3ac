"""Search a sweep's parameters with Optuna, all workers sharing one journal file, and rank the trials."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib import colormaps, style
from matplotlib.figure import Figure
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from common.errors import Fault, UsageError
from common.figures import BLUE, STYLE, save
from common.files import locked, write_csv, write_text
from common.markdown import markdown_table
from common.records import read_json, run_folder
from study.sweep_file import Range, Sweep
from study.trials import Running, Trial, TrialRecords, Workers

STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
JOURNAL = "search.journal"
LABEL: dict[str, Any] = {
    "fontsize": 8,
    "ha": "center",
    "va": "center",
    "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
}
FANOVA_SEEDS = 5


def search(records: TrialRecords, count: int, n_workers: int) -> None:
    """Run trials until `count` have ended, including those of other commands and of earlier starts."""
    optuna_study = _open_study(records)
    asked: dict[str, optuna.Trial] = {}
    with Workers(records.sweep.name, count, " trials") as workers:
        while True:
            ended = optuna_study.get_trials(deepcopy=False, states=tuple(STATES))
            workers.bar.update(len(ended) - workers.bar.n)
            if len(ended) >= count and not workers.running:
                break
            while len(ended) < count and len(workers.running) < n_workers:
                with _next_trial(optuna_study, records, count) as found:
                    if found is None:
                        break  # other commands run the last trials; if one is killed, this command takes its trial
                    optuna_trial, lock = found
                    trial = Trial(_run_id(records.sweep, optuna_trial), _suggest(optuna_trial, records.sweep))
                    if records.is_finished(trial):  # its process lived longer than the command that started it
                        workers.print(f"{trial.run_id}: {_end(optuna_trial, trial, records)}")
                    else:
                        asked[trial.run_id] = optuna_trial
                        workers.running.append(Running(trial, records, lock))
            for running, status in workers.wait():
                trial = running.trial
                with running.lock:
                    outcome = _end(asked[trial.run_id], trial, records, status, pruned=running.stopped)
                workers.print(f"{trial.run_id}: {outcome} ({running.seconds:.0f} s)")
            for running in workers.running:
                run_id = running.trial.run_id
                if _report(asked[run_id], records.history(run_id)):
                    running.stop()
    if all(trial.state == TrialState.FAIL for trial in ended):
        raise Fault(f"all {len(ended)} trials failed")


def _open_study(records: TrialRecords) -> optuna.Study:
    """The search in the sweep's journal; UsageError where it was started with other parameters."""
    sweep = records.sweep
    records.folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner: BasePruner = NopPruner()
    if sweep.min_iter is not None:  # W&B's hyperband with `min_iter` is one bracket of successive halving
        pruner = SuccessiveHalvingPruner(min_resource=sweep.min_iter, reduction_factor=sweep.eta)
    with locked(records.folder / "search.lock", wait=True):
        optuna_study = optuna.create_study(
            storage=JournalStorage(_Journal(records.folder / JOURNAL)),
            study_name=sweep.name,
            direction="maximize" if sweep.maximize else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )
        space = {"metric": sweep.metric, "fixed": dict(sweep.fixed), "swept": str(dict(sweep.swept))}
        if optuna_study.user_attrs.setdefault("space", space) != space:
            raise UsageError(
                f"search {sweep.name} was started with other parameters: use another --output_dir, or another "
                "name in the sweep file"
            )
        optuna_study.set_user_attr("space", space)
    return optuna_study


class _Journal(JournalFileBackend):
    """Optuna's journal file, with a lock that the kernel releases when its process ends.

    Optuna's own lock is a symbolic link that stays after a kill. Then the next process waits for 30 seconds or, if
    the journal's path is relative, forever.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append each log as a line of JSON; OSError with the file's name where the disk is full."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        try:
            with locked(self._path.with_name("journal.lock"), wait=True), open(self._path, "r+b") as file:
                # A full disk or a kill may have left part of a line: remove it before appending.
                file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise


def _run_id(sweep: Sweep, trial: optuna.Trial | FrozenTrial) -> str:
    return f"{sweep.name}-{trial.number}"


@contextmanager
def _next_trial(
    optuna_study: optuna.Study, records: TrialRecords, count: int
) -> Iterator[tuple[optuna.Trial, int] | None]:
    """Yield the trial of a killed command, else a new one, with its lock; None where others run the last ones.

    Only one command at a time does this. So no command sees a new trial before its lock is taken.
    """
    with locked(records.folder / "search.lock", wait=True):
        trials = optuna_study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                with locked(records.lock_path(_run_id(records.sweep, trial))) as lock:
                    if lock is not None:
                        yield optuna.Trial(optuna_study, trial._trial_id), lock
                        return
        if all(trial.state != TrialState.WAITING for trial in trials):
            if len(trials) >= count:
                yield None
                return
            # One write holds all values: after a kill between two writes, the rest would be sampled differently.
            optuna_study.enqueue_trial(_sample(optuna_study, records.sweep))
        new = optuna_study.ask()
        with locked(records.lock_path(_run_id(records.sweep, new)), wait=True) as lock:
            assert lock is not None
            yield new, lock


def _sample(optuna_study: optuna.Study, sweep: Sweep) -> dict[str, Any]:
    """The values of the next trial, by the sweep's method.

    The trial's number is the seed: so kills do not change the samples, and each trial has other ones.
    """
    trials = optuna_study.get_trials(deepcopy=False)
    sampler: BaseSampler = RandomSampler(seed=len(trials))
    if sweep.method == "bayes":  # with the constant liar, trials at the same time do not try the same values
        sampler = TPESampler(seed=len(trials), constant_liar=True)
    in_memory = optuna.create_study(direction=optuna_study.direction, sampler=sampler)
    in_memory.add_trials(trials)
    return _suggest(in_memory.ask(), sweep)


def _suggest(trial: optuna.Trial, sweep: Sweep) -> dict[str, Any]:
    """The trial's values: those in the queue, or new samples."""
    chosen: dict[str, Any] = {}
    for name, values in sweep.swept.items():
        if not isinstance(values, Range):
            chosen[name] = trial.suggest_categorical(name, values)
        elif values.distribution == "int_uniform":
            chosen[name] = trial.suggest_int(name, int(values.low), int(values.high))
        else:
            log = values.distribution == "log_uniform_values"
            chosen[name] = trial.suggest_float(name, values.low, values.high, log=log)
    return chosen


def _end(
    optuna_trial: optuna.Trial, trial: Trial, records: TrialRecords, status: int = 0, pruned: bool = False
) -> str:
    """Tell Optuna how a trial ended; returns the outcome in words."""
    _report(optuna_trial, records.history(trial.run_id))  # the epochs since the last report
    best = records.best(trial.run_id)
    if records.is_finished(trial) and best is not None:
        optuna_trial.study.tell(optuna_trial, best)
        return records.outcome(trial.run_id, "finished")
    optuna_trial.study.tell(optuna_trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
    return records.outcome(trial.run_id, "pruned") if pruned else records.failure(trial.run_id, status)


def _report(optuna_trial: optuna.Trial, history: dict[int, float]) -> bool:
    """Report each new epoch to Optuna; returns whether the trial is to be pruned."""
    known = optuna_trial.study.get_trials(deepcopy=False)[optuna_trial.number].intermediate_values
    prune = False
    for epoch in sorted(history.keys() - known.keys()):
        optuna_trial.report(history[epoch], epoch)
        prune |= optuna_trial.should_prune()
    return prune


def rank(records: TrialRecords) -> None:
    """Write the trials, best first, as table.md and table.csv, draw both figures, and print where they are."""
    sweep, folder = records.sweep, records.folder
    ended: list[FrozenTrial] = []
    if (folder / JOURNAL).exists():
        optuna_study = _open_study(records)
        ended = optuna_study.get_trials(deepcopy=False, states=tuple(STATES))
    if not ended:
        raise UsageError(f"no trial of {sweep.name} has ended yet")
    ended.sort(key=lambda trial: _order(trial, records))
    lines = [_line(place, trial, records) for place, trial in enumerate(ended, start=1)]
    write_csv(folder / "table.csv", lines)
    data = _data(ended, records)
    write_text(folder / "table.md", _markdown(sweep, lines, data))
    written = [folder / "table.csv", folder / "table.md"]
    figures = records.output_dir / "fig" / "task4"
    finished = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    if finished:
        written.append(figures / f"{sweep.name}-parallel-coordinates.png")
        draw_parallel_coordinates(written[-1], ended, sweep, data)
    shares = importances(optuna_study) if len({trial.value for trial in finished}) > 1 else []
    first = {max(share, key=share.__getitem__) for share in shares}
    if len(first) == 1:
        written.append(figures / f"{sweep.name}-importance.png")
        draw_importance(
            written[-1], shares, f"{sweep.name} · {data}\n{len(finished)} finished trials", sweep.metric
        )
    else:
        print(
            f"{sweep.name}: too few finished trials for the importance of the parameters: "
            f"with {len(finished)}, the most important one depends on the seed of the estimate"
        )
    print(f"{sweep.name}: {len(ended)} trials, {len(finished)} finished; best first by {sweep.metric}:")
    for path in written:
        print(f"  {path}")


def _data(trials: Sequence[FrozenTrial], records: TrialRecords) -> str:
    """The titles of the data sets in the trials' records."""
    facts = [run_folder(records.output_dir, _run_id(records.sweep, trial)) / "config.json" for trial in trials]
    titles = {read_json(path)["dataset"] for path in facts if path.exists()}
    return " / ".join(sorted(titles)) or "no trial has loaded its data"


def _order(trial: FrozenTrial, records: TrialRecords) -> tuple[int, float]:
    """The key to sort by: finished, then pruned, then failed trials, and the best ones first."""
    best = records.best(_run_id(records.sweep, trial))
    value = math.inf if best is None else -best if records.sweep.maximize else best
    return list(STATES).index(trial.state), value


def _line(place: int, trial: FrozenTrial, records: TrialRecords) -> dict[str, Any]:
    """A trial's line of the table. It has no test scores: nobody may choose a trial by them."""
    run_id = _run_id(records.sweep, trial)
    history, best = records.history(run_id), records.best(run_id)
    return {
        "rank": place,
        "run_id": run_id,
        "state": STATES[trial.state],
        records.sweep.metric or "": best,
        "best epoch": next((epoch for epoch, value in history.items() if value == best), None),
        "epochs": len(history),
        **trial.params,
    }


def _markdown(sweep: Sweep, lines: Sequence[dict[str, Any]], data: str) -> str:
    fixed = ", ".join(f"{name} {value}" for name, value in sweep.fixed.items()) or "none"
    caption = (
        f"**{sweep.name}**: {data}; {len(lines)} trials of a {sweep.method} search, the best over a trial's "
        f"epochs of {sweep.metric}; keys that all share: {fixed}. A pruned trial was stopped early; its value "
        "is the best of the epochs before."
    )
    rows = [[_cell(value) for value in line.values()] for line in lines]
    return "\n".join([caption, "", *markdown_table(list(lines[0]), "l" * len(lines[0]), rows)]) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_parallel_coordinates(path: Path, trials: Sequence[FrozenTrial], sweep: Sweep, data: str) -> None:
    """A line per trial through its parameters to the metric: coloured if it finished, else grey."""
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    scores = [trial.value or 0.0 for trial in finished]
    scales = {**sweep.swept, str(sweep.metric): Range("uniform", min(scores), max(scores))}
    places = range(len(scales))
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.add_subplot()
        for trial in trials:
            heights = [_height(trial.params[name], values) for name, values in sweep.swept.items()]
            if trial.state == TrialState.COMPLETE:
                heights.append(_height(trial.value, scales[str(sweep.metric)]))
                axes.plot(places, heights, color=colormaps["viridis"](heights[-1]), linewidth=1.5, alpha=0.8)
            else:
                axes.plot(places[:-1], heights, color="#BBBBBB", linewidth=0.8, zorder=1)
        for place, values in enumerate(scales.values()):
            axes.axvline(place, color="#888888", linewidth=0.8, zorder=0)
            for value in (values.low, values.high) if isinstance(values, Range) else values:
                axes.text(place, _height(value, values), _cell(value).replace(",", ",\n"), **LABEL)
        axes.set_xticks(places, [name.replace("_", "\n") for name in scales], fontsize=9)
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)
        other = len(trials) - len(finished)
        axes.set_title(f"{sweep.name} · {data}\n{len(finished)} finished trials, {other} pruned or failed (grey)")
        save(figure, path)


def _height(value: Any, values: tuple[Any, ...] | Range) -> float:
    """The position of a value on its axis, from 0 to 1."""
    if not isinstance(values, Range):
        return values.index(value) / max(len(values) - 1, 1)
    scale = math.log if values.distribution == "log_uniform_values" else float
    low, high = scale(values.low), scale(values.high)
    return 0.5 if low == high else (scale(value) - low) / (high - low)


def importances(optuna_study: optuna.Study) -> list[dict[str, float]]:
    """For each seed of the random forest: the share of the variance that each parameter explains (fANOVA).

    Functional ANOVA: Hutter, Hoos, Leyton-Brown 2014. With few trials, the result depends on the seed.
    In simulated searches of four parameters, all 5 seeds had the same most important parameter in 3 of 8 searches
    of 4 trials, and in 8 of 8 searches of 12, 20 and 40 trials; shares still differed by 0.1 between seeds.
    """
    return [
        get_param_importances(optuna_study, evaluator=FanovaImportanceEvaluator(seed=seed))
        for seed in range(FANOVA_SEEDS)
    ]


def draw_importance(path: Path, shares: Sequence[Mapping[str, float]], title: str, metric: str | None) -> None:
    """A bar per parameter: its mean share of the metric's variance, and the range over the estimate's seeds."""
    names = list(shares[0])
    values = np.array([[share[name] for name in names] for share in shares])
    mean = values.mean(axis=0)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 1.4 + 0.3 * len(names)))
        axes = figure.add_subplot()
        bars = axes.barh(names, mean, color=BLUE, xerr=[mean - values.min(axis=0), values.max(axis=0) - mean])
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"share of the variance of {metric} (fANOVA, mean and range of {len(shares)} seeds)")
        axes.set_title(title)
        save(figure, path)
