"""Whether a study's records agree with one another: every score is computed again from the runs' outputs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from common.errors import Fault
from common.files import digest
from common.records.read import METRICS, Record, read_history, run_folder
from common.training.evaluation import Evaluation, best_epoch
from study.comparison import comparison
from study.report_selection import Study

TOLERANCE = 1e-9
ROUNDED = 5e-4  # share of tiles whose two best classes are so close that rounding may change the class


def check_study(
    study: Study, ablation: Mapping[str, Sequence[Record]], compared: Mapping[str, Sequence[Record]]
) -> None:
    """Raise Fault where a record that the page shows contradicts another one, naming both.

    `ablation` and `compared` are the runs of Tasks 4 and 5, by row and by kind.
    """
    for record in study.read.values():
        try:
            check_run(study, record)
        except KeyError as error:
            raise Fault(f"{record.folder}: a record lacks {error}; restore it or train the run again") from error
    if analysis := study.analysis():
        check_analysis(study, analysis)
    for line in study.sweep_table("ablation", "table.csv", "ablation.yaml") if ablation else []:
        for metric in ("validate/acc", "test/acc", "test/auc") if line["row"] in ablation else ():
            mean = fmean(record.scores[metric] for record in ablation[line["row"]])
            if difference(float(line[f"{metric} mean"]), mean):
                raise Fault(
                    f"table.csv: {metric} of {line['row']} is not its runs'; python -m study.sweep writes it again"
                )
    for line in study.search():
        path = run_folder(study.folder, line["run_id"]) / "history.csv"
        if not line["best epoch"] or not path.parent.exists():  # it failed at once, or ran on another machine
            continue
        history = read_history(path)
        best = {metric: history[int(line["best epoch"]) - 1][metric] for metric in METRICS if line.get(metric)}
        if difference({metric: float(line[metric]) for metric in best}, best):
            raise Fault(
                f"table.csv: trial {line['run_id']} is not its run's; python -m study.sweep writes it again"
            )
    if compared and (where := difference(study.comparison(), comparison(compared))):
        raise Fault(f"comparison.json: {where}, its runs give another value; python task5.py writes it again")


def check_analysis(study: Study, analysis: Mapping[str, Any]) -> None:
    """Raise Fault where the record of study/analysis.py contradicts the runs that it names, or its figure."""
    path, remedy = study.folder / "analysis.json", "python -m study.analysis writes it again"
    records = [study.read[run_id] for run_id in analysis["runs"] if run_id in study.read]
    published, hard = analysis["published"], analysis["hard"]
    for record in records:
        if digest(record.folder / "scores.npz") != analysis["runs"][record.run_id]:
            raise Fault(f"{path}: run {record.run_id} had other outputs when it was analysed; {remedy}")
    for record in records if published else ():
        right, n = published["only_right"][record.run_id], published["scores"]["n"]
        gain = (record.scores["test/acc"] - published["scores"]["acc"]["value"]) * n
        if difference(float(right["ours"] - right["theirs"]), round(gain, 6)):
            raise Fault(
                f"{path}: the tiles that only one network gets right are not those of {record.run_id}; {remedy}"
            )
    if records and len(records) == len(analysis["runs"]):
        arrays = [record.arrays() for record in records]
        targets = arrays[0]["targets"]
        wrong = np.all([one["best_logits"].argmax(1) != targets for one in arrays], axis=0)
        counts = np.bincount(targets[wrong], minlength=len(hard["per_class"]))
        ours = hard["networks"] == len(records)  # else the published network is one of them
        found = np.array(list(hard["per_class"].values()))
        if (found > counts).any() or (ours and (found != counts).any()):
            raise Fault(f"{path}: the tiles that all networks get wrong are not those of the runs; {remedy}")
    if "figure" in hard:
        check_figure(study.folder / hard["figure"], hard["sha256"], "the analysis")


def check_figure(path: Path, sha256: str, drawn_by: str) -> None:
    """Raise Fault where a figure is there, but is not the one that was drawn."""
    if path.exists() and digest(path) != sha256:
        raise Fault(f"{path}: not the figure that {drawn_by} has drawn; restore it")


def check_run(study: Study, record: Record) -> None:
    """Raise Fault where a run's summary is not what its outputs, its history and its figures give."""
    summary, path = record.summary, record.folder / "summary.json"
    arrays = record.arrays()

    def fail(what: str) -> Fault:
        return Fault(f"{path}: {what}; the record has been changed, restore it or train the run again")

    if record.history:  # a baseline has no epochs
        best = best_epoch(record.history, record.config["select_on"])
        if summary["best"]["epoch"] != best or difference(summary["validate"], record.history[best - 1]):
            raise fail("its best epoch is not that of history.csv")
    for weights in ("last", "best", "tta"):
        if weights in summary:
            names = tuple(summary[weights]["auc_per_class"])
            try:
                outputs = Evaluation(arrays[f"{weights}_logits"], arrays["targets"].astype(np.int64))
                scores = outputs.described(names)
            except (KeyError, ValueError, IndexError) as error:
                raise fail(f"scores.npz does not hold the outputs of the {weights} weights") from error
            recorded = {name: value for name, value in summary[weights].items() if name in scores}
            # A record from before a score existed lacks it.
            if where := difference(recorded, {name: scores[name] for name in recorded}):
                raise fail(f"{weights}, {where}, scores.npz gives another value")
    if any(summary[f"test/{name}"] != summary["best"][name]["value"] for name in ("acc", "auc")):
        raise fail("test/acc and test/auc are not those of the best weights")
    targets = arrays["validate_targets"]
    accuracies = {"validate/acc": (summary["validate"]["validate/acc"], arrays["validate_logits"].argmax(1))}
    accuracies |= {
        f"shifted {name}": (value, arrays[f"shifted_{name}"]) for name, value in summary["shifted"].items()
    }
    for name, (value, classes) in accuracies.items():
        if abs(value - np.mean(classes == targets)) > ROUNDED + 1 / len(targets):
            raise fail(f"{name} is {value:.4f}, scores.npz gives {np.mean(classes == targets):.4f}")
    for name, sha256 in summary.get("figure_sha256", {}).items():
        figure = study.folder / "fig" / record.facts["task"] / summary["figures"][name]
        check_figure(figure, sha256, f"run {record.run_id}")


def difference(recorded: Any, computed: Any) -> str:
    """Where two JSON values differ, by more than rounding, in words; an empty string where they do not."""
    if isinstance(recorded, Mapping) and isinstance(computed, Mapping):
        pairs: Iterable[tuple[Any, Any, Any]] = (
            (name, recorded.get(name), computed.get(name)) for name in {**recorded, **computed}
        )
    elif isinstance(recorded, list) and isinstance(computed, list) and len(recorded) == len(computed):
        pairs = zip(range(len(recorded)), recorded, computed, strict=True)
    elif isinstance(recorded, int | float) and isinstance(computed, int | float):
        return "" if math.isclose(recorded, computed, rel_tol=TOLERANCE, abs_tol=TOLERANCE) else f"is {recorded}"
    else:
        return "" if recorded == computed else f"is {recorded}"
    for name, one, other in pairs:
        if where := difference(one, other):
            return f"{name} {where}"
    return ""
