"""Search a sweep's parameters with Optuna, all workers sharing one journal file, and rank what was found."""

import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from common.errors import Fault, UsageError
from common.files import atomic_path, locked, write_csv
from common.records import read_json
from study.sweep_file import Range, Sweep
from study.trials import Trial, Workers, Workplace, markdown_line, say

STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def search(workplace: Workplace, count: int, n_workers: int) -> None:
    """Run trials until `count` have ended, those of other commands and of earlier starts included."""
    study = _open_study(workplace)
    asked: dict[str, optuna.Trial] = {}
    with (
        tqdm(total=count, desc=workplace.sweep.name, unit=" trials", disable=None) as bar,
        Workers(workplace, n_workers) as workers,
    ):
        while True:
            ended = study.get_trials(deepcopy=False, states=tuple(STATES))
            bar.update(len(ended) - bar.n)
            if len(ended) >= count and not workers.running:
                break
            while len(ended) < count and workers.have_room():
                with ExitStack() as claim:
                    taken = _take(study, workplace, count, claim)
                    if taken is None:
                        break  # other commands are at the last ones; should one die, its trial is ours
                    new, trial, lock = taken
                    if workplace.is_finished(trial):  # its process outlived the command that started it
                        say(f"{trial.run_id}: {_tell(new, trial, workplace)}")
                    else:
                        asked[trial.run_id] = new
                        workers.start(trial, lock, claim)
            for running, status in workers.wait():
                trial = running.trial
                with running.claim:
                    outcome = _tell(asked[trial.run_id], trial, workplace, status, pruned=running.stopped)
                say(f"{trial.run_id}: {outcome} ({running.seconds:.0f} s)")
            for running in workers.running:
                if _report(asked[running.trial.run_id], workplace.history(running.trial)):
                    running.stop()
    if all(trial.state == TrialState.FAIL for trial in ended):
        raise Fault(f"all {len(ended)} trials failed")


def _open_study(workplace: Workplace) -> Study:
    """The search in the sweep's journal; UsageError where it was started with other parameters."""
    sweep = workplace.sweep
    workplace.folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with locked(workplace.folder / "search.lock", wait=True):
        study = optuna.create_study(
            storage=JournalStorage(_Journal(_journal(workplace))),
            study_name=sweep.name,
            direction=_direction(sweep),
            pruner=_pruner(sweep),
            load_if_exists=True,
        )
        space = {"metric": sweep.metric, "fixed": dict(sweep.fixed), "swept": str(dict(sweep.swept))}
        if study.user_attrs.setdefault("space", space) != space:
            raise UsageError(
                f"search {sweep.name} was started with other parameters: use another --output_dir, or another "
                "name in the sweep file"
            )
        study.set_user_attr("space", space)
    return study


def _journal(workplace: Workplace) -> Path:
    return workplace.folder / "search.journal"


class _Journal(JournalFileBackend):
    """Optuna's journal file, written under a lock that ends with its process.

    Optuna's own lock is a symbolic link that a kill leaves behind: the next process waits for it 30 seconds or,
    where the journal's path is relative, for ever.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append a line of JSON for each; OSError, with the file's name, where the disk is full."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        try:
            with locked(self._path.with_name("journal.lock"), wait=True), open(self._path, "r+b") as file:
                # What a full disk has left of a line must not be joined to the next one.
                file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise


def _direction(sweep: Sweep) -> StudyDirection:
    return StudyDirection.MAXIMIZE if sweep.maximize else StudyDirection.MINIMIZE


def _pruner(sweep: Sweep) -> BasePruner:
    """W&B's hyperband with `min_iter` is one bracket of successive halving."""
    if sweep.min_iter is None:
        return NopPruner()
    return SuccessiveHalvingPruner(min_resource=sweep.min_iter, reduction_factor=sweep.eta)


def _sampler(method: str, seed: int) -> BaseSampler:
    if method == "random":
        return RandomSampler(seed=seed)
    # The constant liar keeps trials that run at the same time from trying the same place.
    return TPESampler(seed=seed, constant_liar=True)


def _take(
    study: Study, workplace: Workplace, count: int, claim: ExitStack
) -> tuple[optuna.Trial, Trial, int] | None:
    """Claim a trial that a dead command left, else a new one; None where the rest is claimed already.

    One command at a time, so that no trial is seen before the command that asked for it has locked it.
    """
    with locked(workplace.folder / "search.lock", wait=True):
        trials = study.get_trials(deepcopy=False)
        for left in trials:
            if left.state == TrialState.RUNNING:
                run_id = f"{workplace.sweep.name}-{left.number}"
                lock = claim.enter_context(locked(workplace.lock_path(Trial(run_id, {}))))
                if lock is not None:
                    resumed = optuna.Trial(study, left._trial_id)
                    return resumed, Trial(run_id, _suggest(resumed, workplace.sweep)), lock
        if all(trial.state != TrialState.WAITING for trial in trials):
            if len(trials) >= count:
                return None
            # In one write with its values: a trial that a kill left with half of them would draw others.
            study.enqueue_trial(_draw(trials, workplace.sweep))
        new = study.ask()
        trial = Trial(f"{workplace.sweep.name}-{new.number}", _suggest(new, workplace.sweep))
        lock = claim.enter_context(locked(workplace.lock_path(trial), wait=True))
        assert lock is not None
        return new, trial, lock


def _draw(trials: Sequence[FrozenTrial], sweep: Sweep) -> dict[str, Any]:
    """The values of the trial after these, by the sweep's method.

    Seeded by the trial's number: the draws do not depend on kills, and no two of them are the same.
    """
    scratch = optuna.create_study(direction=_direction(sweep), sampler=_sampler(sweep.method, seed=len(trials)))
    scratch.add_trials(trials)
    return _suggest(scratch.ask(), sweep)


def _suggest(trial: optuna.Trial, sweep: Sweep) -> dict[str, Any]:
    """The trial's values: drawn for the first time, or those that it was enqueued with."""
    return {name: _suggest_one(trial, name, values) for name, values in sweep.swept.items()}


def _suggest_one(trial: optuna.Trial, name: str, values: tuple[Any, ...] | Range) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(name, values)
    if values.distribution == "int_uniform":
        return trial.suggest_int(name, int(values.low), int(values.high))
    return trial.suggest_float(name, values.low, values.high, log=values.distribution == "log_uniform_values")


def _tell(asked: optuna.Trial, trial: Trial, workplace: Workplace, status: int = 0, pruned: bool = False) -> str:
    """Tell the study how a trial ended; the outcome in words."""
    _report(asked, workplace.history(trial))  # the epochs since the last look
    best = workplace.best(trial)
    if workplace.is_finished(trial) and best is not None:
        asked.study.tell(asked, best)
        return workplace.outcome(trial, "finished")
    if pruned:
        asked.study.tell(asked, state=TrialState.PRUNED)
        return workplace.outcome(trial, "pruned")
    asked.study.tell(asked, state=TrialState.FAIL)
    return workplace.failure(trial, status)


def _report(asked: optuna.Trial, history: dict[int, float]) -> bool:
    """Report each epoch that the study does not know yet; whether it says to give the trial up."""
    known = asked.study.get_trials(deepcopy=False)[asked.number].intermediate_values
    give_up = False
    for epoch in sorted(history.keys() - known.keys()):
        asked.report(history[epoch], epoch)
        give_up |= asked.should_prune()
    return give_up


def rank(workplace: Workplace) -> None:
    """Write the trials, best first, as table.md and table.csv, draw both figures, and say where they are."""
    name, metric = workplace.sweep.name, workplace.sweep.metric
    if not _journal(workplace).exists():
        raise UsageError(f"no trial of {name} has ended yet")
    study = _open_study(workplace)
    ended = study.get_trials(deepcopy=False, states=tuple(STATES))
    if not ended:
        raise UsageError(f"no trial of {name} has ended yet")
    ended.sort(key=lambda trial: _place(trial, workplace))
    lines = [_line(place, trial, workplace) for place, trial in enumerate(ended, start=1)]
    write_csv(workplace.folder / "table.csv", lines)
    data = _data(ended, workplace)
    with atomic_path(workplace.folder / "table.md") as temporary:
        temporary.write_text(_markdown(workplace, lines, data), encoding="utf-8")
    written = [workplace.folder / "table.csv", workplace.folder / "table.md"]
    figures = workplace.output_dir / "fig" / "task4"
    finished = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    if finished:
        written.append(figures / f"{name}-parallel-coordinates.png")
        draw_parallel_coordinates(written[-1], ended, workplace.sweep, data)
    if len({trial.value for trial in finished}) > 1:
        written.append(figures / f"{name}-importance.png")
        draw_importance(written[-1], study, workplace.sweep, data)
    else:
        print(f"{name}: too few trials finished to tell which parameters matter")
    print(f"{name}: {len(ended)} trials, {len(finished)} finished; best first by {metric}:")
    for path in written:
        print(f"  {path}")


def _run_of(trial: FrozenTrial, workplace: Workplace) -> Trial:
    return Trial(f"{workplace.sweep.name}-{trial.number}", trial.params)


def _data(trials: Sequence[FrozenTrial], workplace: Workplace) -> str:
    """The title of the data set that the trials ran on, as their records give it."""
    configs = [workplace.record(_run_of(trial, workplace), "config.json") for trial in trials]
    titles = {read_json(config)["dataset"] for config in configs if config.exists()}
    return " / ".join(sorted(titles)) or "no trial came to its data"


def _place(trial: FrozenTrial, workplace: Workplace) -> tuple[int, float]:
    """The key to sort by: finished, then pruned, then failed trials, each best first."""
    best = workplace.best(_run_of(trial, workplace))
    value = math.inf if best is None else -best if workplace.sweep.maximize else best
    return list(STATES).index(trial.state), value


def _line(place: int, trial: FrozenTrial, workplace: Workplace) -> dict[str, Any]:
    """A trial's line of the table. Without test numbers: a search that looked at them would choose by them."""
    run = _run_of(trial, workplace)
    history, best = workplace.history(run), workplace.best(run)
    reached = [epoch for epoch, value in history.items() if value == best]
    return {
        "rank": place,
        "run_id": run.run_id,
        "state": STATES[trial.state],
        workplace.sweep.metric or "": best,
        "best epoch": reached[0] if reached else None,
        "epochs": len(history),
        **trial.params,
    }


def _markdown(workplace: Workplace, lines: Sequence[dict[str, Any]], data: str) -> str:
    sweep = workplace.sweep
    fixed = ", ".join(f"{name} {value}" for name, value in sweep.fixed.items()) or "none"
    text = [
        f"**{sweep.name}**: {data}; {len(lines)} trials of a {sweep.method} search, the best over a trial's "
        f"epochs of {sweep.metric}; keys that all share: {fixed}. A pruned trial was given up early, and its "
        "value is that of the epochs it had.",
        "",
        *markdown_line(*lines[0]),
        *markdown_line(*["---"] * len(lines[0])),
    ]
    for line in lines:
        text += markdown_line(*[_cell(value) for value in line.values()])
    return "\n".join(text) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_parallel_coordinates(path: Path, trials: Sequence[FrozenTrial], sweep: Sweep, data: str) -> None:
    """One line a trial through its parameters to the metric: coloured if it finished, else grey."""
    from matplotlib import colormaps, style
    from matplotlib.figure import Figure

    from common.figures import STYLE, save

    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    scores = [trial.value or 0.0 for trial in finished]
    low, high = min(scores), max(scores)
    places = range(len(sweep.swept) + 1)
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.add_subplot()
        for trial in trials:
            heights = [_height(trial.params[name], values) for name, values in sweep.swept.items()]
            if trial.state == TrialState.COMPLETE:
                share = 0.5 if high == low else ((trial.value or 0.0) - low) / (high - low)
                axes.plot(places, [*heights, share], color=colormaps["viridis"](share), linewidth=1.5, alpha=0.8)
            else:
                axes.plot(places[:-1], heights, color="#BBBBBB", linewidth=0.8, zorder=1)
        for place, values in enumerate(sweep.swept.values()):
            for height, label in _ticks(values):
                axes.text(place, height, label, fontsize=8, ha="center", va="center", bbox=_PAPER)
        for height, score in ((0.0, low), (1.0, high)) if high > low else ((0.5, low),):
            axes.text(places[-1], height, f"{score:.3f}", fontsize=8, ha="center", va="center", bbox=_PAPER)
        for place in places:
            axes.axvline(place, color="#888888", linewidth=0.8, zorder=0)
        names = [name.replace("_", "\n") for name in sweep.swept]
        axes.set_xticks(places, [*names, str(sweep.metric)], fontsize=9)
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)
        other = len(trials) - len(finished)
        axes.set_title(f"{sweep.name} · {data}\n{len(finished)} finished trials, {other} pruned or failed (grey)")
        save(figure, path)


_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}


def _height(value: Any, values: tuple[Any, ...] | Range) -> float:
    """Where on its axis, from 0 to 1, a value lies."""
    if not isinstance(values, Range):
        return values.index(value) / max(len(values) - 1, 1)
    scale = math.log if values.distribution == "log_uniform_values" else float
    return (scale(value) - scale(values.low)) / (scale(values.high) - scale(values.low))


def _ticks(values: tuple[Any, ...] | Range) -> list[tuple[float, str]]:
    shown = (values.low, values.high) if isinstance(values, Range) else values
    return [(_height(value, values), _cell(value).replace(",", ",\n")) for value in shown]


def draw_importance(path: Path, study: Study, sweep: Sweep, data: str) -> None:
    """How much of the finished trials' variance each parameter explains, by functional ANOVA."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    from common.figures import BLUE, STYLE, save

    importances = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    n_finished = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 1.4 + 0.3 * len(importances)))
        axes = figure.add_subplot()
        bars = axes.barh(list(importances), list(importances.values()), color=BLUE)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"share of the variance of {sweep.metric} (fANOVA)")
        axes.set_title(f"{sweep.name} · {data}\nwhich parameters mattered in {n_finished} finished trials")
        save(figure, path)
