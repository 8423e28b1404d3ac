"""What a finished grid says: the mean of each row over its seeds, and what sets it apart from the first row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.files import atomic_path, write_csv
from common.records import Record
from common.statistics import SIGNIFICANT, Comparison, Spread, compare, interval, spread
from study.trials import Trial, Workplace, markdown_line

METRICS = {"validate/acc": "validation ACC", "test/acc": "test ACC", "test/auc": "test AUC"}


@dataclass(frozen=True)
class Finished:
    """A finished run of the grid, as its records describe it; with `views`, scored over each tile's 8 views."""

    trial: Trial
    record: Record
    views: bool = False

    @property
    def seed(self) -> int:
        """The seed, which pairs the runs of two rows."""
        return int(self.trial.values["seed"])

    def value(self, metric: str) -> float:
        """A metric of the selected epoch's weights; validation tiles are always scored plain."""
        if metric == "validate/acc":
            return float(self.record.summary["validate"][metric])
        scores = self.record.summary["tta" if self.views else "best"]
        return float(scores[metric.removeprefix("test/")]["value"])


def report(trials: Sequence[Trial], workplace: Workplace) -> None:
    """Write runs.csv and, where the grid has seeds, table.md, table.csv and the figure; say where they are."""
    finished = [trial for trial in trials if workplace.is_finished(trial)]
    runs = [Finished(trial, Record.read(workplace.output_dir, trial.run_id)) for trial in finished]
    missing = [trial.run_id for trial in trials if trial not in finished]
    if not runs:
        raise UsageError(f"no run of {workplace.sweep.name} is finished yet")
    folder = workplace.folder
    write_csv(folder / "runs.csv", [_record(run) for run in runs])
    written = [folder / "runs.csv"]
    if "seed" in workplace.sweep.swept:
        # The order of the trials, not of what is finished: the first row is the one to compare with.
        rows: dict[str, list[Finished]] = {_row(trial): [] for trial in trials}
        for run in runs:
            rows[_row(run.trial)].append(run)
        reference = next(iter(rows))
        if not rows[reference]:
            raise UsageError(f"no run of {reference} is finished yet, with which the others are compared")
        rows = {row: members for row, members in rows.items() if members}
        if has_views(rows[reference]):  # test-time augmentation needs no training
            rows[f"{reference}, 8 views"] = [replace(run, views=True) for run in rows[reference]]
        comparisons = {
            metric: compare({row: {run.seed: run.value(metric) for run in rows[row]} for row in rows})
            for metric in METRICS
        }
        write_csv(folder / "table.csv", _table(rows, comparisons))
        with atomic_path(folder / "table.md") as temporary:
            temporary.write_text(_markdown(workplace.sweep.name, rows, comparisons, missing), encoding="utf-8")
        figure = workplace.output_dir / "fig" / "task4" / f"{workplace.sweep.name}.png"
        draw(figure, rows)
        written += [folder / "table.csv", folder / "table.md", figure]
    print(f"{workplace.sweep.name}: {len(runs)} of {len(trials)} runs are finished")
    for path in written:
        print(f"  {path}")


def has_views(runs: Sequence[Finished]) -> bool:
    """Whether all these runs were also scored over the 8 views of each test tile."""
    return all("tta" in run.record.summary for run in runs)


def _row(trial: Trial) -> str:
    return ", ".join(str(value) for name, value in trial.values.items() if name != "seed") or "all runs"


def _record(run: Finished) -> dict[str, Any]:
    """A run's line in runs.csv."""
    summary = run.record.summary
    tta = summary.get("tta")
    return {
        "run_id": run.trial.run_id,
        **run.trial.values,
        "dataset": summary["dataset"],
        "commit": run.record.facts.get("commit"),
        "best epoch": summary["best"]["epoch"],
        "epochs trained": len(run.record.history),
        "stopped": summary["stopped"],
        "validate/acc": summary["validate"]["validate/acc"],
        "validate/auc": summary["validate"]["validate/auc"],
        "test/auc": summary["test/auc"],
        "test/acc": summary["test/acc"],
        "tta test/auc": tta["auc"]["value"] if tta else None,
        "tta test/acc": tta["acc"]["value"] if tta else None,
        "wall_seconds": summary["wall_seconds"],
    }


def _table(
    rows: Mapping[str, Sequence[Finished]], comparisons: Mapping[str, Mapping[str, Comparison]]
) -> list[dict[str, Any]]:
    """The lines of table.csv: all that table.md says, with full precision."""
    lines = []
    for row, runs in rows.items():
        line: dict[str, Any] = {"row": row, "n": len(runs)}
        for metric in METRICS:
            values = spread([run.value(metric) for run in runs])
            line |= {f"{metric} mean": values.mean, f"{metric} sd": values.sd}
            line |= {f"{metric} low": values.low, f"{metric} high": values.high}
            comparison = comparisons[metric].get(row)
            line |= {
                f"{metric} pairs": comparison.differences.n if comparison else None,
                f"{metric} difference": comparison.differences.mean if comparison else None,
                f"{metric} difference low": comparison.differences.low if comparison else None,
                f"{metric} difference high": comparison.differences.high if comparison else None,
                f"{metric} p": comparison.p if comparison else None,
                f"{metric} p holm": comparison.p_holm if comparison else None,
                f"{metric} verdict": comparison.verdict if comparison else None,
            }
        for metric in ("test/acc", "test/auc"):
            views = _over_views(runs, metric)
            line |= {f"{metric} 8 views mean": views.mean if views else None}
            line |= {f"{metric} 8 views sd": views.sd if views else None}
        lines.append(line)
    return lines


def _markdown(
    name: str,
    rows: Mapping[str, Sequence[Finished]],
    comparisons: Mapping[str, Mapping[str, Comparison]],
    missing: Sequence[str],
) -> str:
    """The caption, the scores with what test ACC says, then the same comparison for the other metrics."""
    reference = next(iter(rows))
    lines = [caption(name, [run for runs in rows.values() for run in runs]), ""]
    lines += markdown_line("row", "seeds", *METRICS.values(), "test ACC, 8 views")
    lines += markdown_line("---", *["---:"] * 5)
    for row, runs in rows.items():
        scores = [_score(spread([run.value(metric) for run in runs])) for metric in METRICS]
        views = _over_views(runs, "test/acc")
        lines += markdown_line(row, str(len(runs)), *scores, _score(views) if views else "")
    for metric in ("test/acc", "validate/acc", "test/auc"):
        lines += ["", f"Difference in {METRICS[metric]} to `{reference}`, seed by seed:", ""]
        lines += markdown_line("row", "pairs", "difference [95 % interval]", "p", "p (Holm)", "verdict")
        lines += markdown_line("---", *["---:"] * 4, "---")
        for row, comparison in comparisons[metric].items():
            lines += markdown_line(row, str(comparison.differences.n), *_comparison(comparison))
    lines += [
        "",
        "± is the standard deviation over the seeds (n - 1). Intervals are t intervals over the seeds alone: "
        "they do not tell how the numbers would change with other tiles. p is the paired t test's, then with "
        f"Holm's correction over the rows; the verdict is by the corrected one, at {SIGNIFICANT}. 8 views: the "
        "same networks' predictions averaged over each test tile's flips and quarter turns.",
    ]
    if missing:
        lines += ["", f"**Incomplete**: {len(missing)} runs are missing: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def caption(name: str, runs: Sequence[Finished]) -> str:
    """What the numbers are of: data, tiles, resolution, seeds; and what sets the runs apart that must not."""
    first = runs[0]
    tiles = first.record.summary["tiles"]
    seeds = sorted({run.seed for run in runs})
    text = (
        f"**{name}**: {' / '.join(_titles(runs))}; {tiles['train']:,} training, {tiles['val']:,} validation and "
        f"{tiles['test']:,} test tiles of {first.record.config['size']} pixels; {len(seeds)} seeds "
        f"({', '.join(map(str, seeds))}); intervals are over seeds."
    )
    if any(run.record.summary["synthetic"] for run in runs):
        text += " The tiles are generated: these are no results on PathMNIST."
    commits = sorted({str(run.record.facts.get("commit")) for run in runs})
    text += f" Commit {commits[0]}." if len(commits) == 1 else ""
    fingerprints = {run.record.summary["data_fingerprint"] for run in runs}
    if len(_titles(runs)) > 1 or len(fingerprints) > 1:
        text += " **The runs come from different data sets: they cannot be compared.**"
    if len(commits) > 1:
        text += f" **The runs come from different commits: {', '.join(commits)}.**"
    return text


def _titles(runs: Sequence[Finished]) -> list[str]:
    return sorted({run.record.summary["dataset"] for run in runs})


def _score(values: Spread) -> str:
    return f"{values.mean:.4f}" + ("" if values.n < 2 else f" ± {values.sd:.4f}")


def _over_views(runs: Sequence[Finished], metric: str) -> Spread | None:
    """A test metric over the 8 views of each tile; None where a run lacks it, or the row is of them already."""
    if not has_views(runs) or any(run.views for run in runs):
        return None
    return spread([replace(run, views=True).value(metric) for run in runs])


def _comparison(comparison: Comparison) -> list[str]:
    differences = comparison.differences
    if differences.n < 2:
        return [f"{differences.mean:+.4f}", "", "", comparison.verdict]
    difference = interval(differences.mean, differences.low, differences.high, sign="+")
    return [difference, _probability(comparison.p), _probability(comparison.p_holm), comparison.verdict]


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def draw(path: Path, rows: Mapping[str, Sequence[Finished]]) -> None:
    """A dot per seed, and the mean with its interval, of every row: validation ACC beside test ACC."""
    from matplotlib import style
    from matplotlib.figure import Figure

    from common.figures import BLUE, STYLE, VERMILLION, save, wrap

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 1.6 + 0.3 * len(rows)))
        panels = figure.subplots(1, 2, sharey=True)
        places = range(len(rows))
        for axes, metric in zip(panels, ("validate/acc", "test/acc"), strict=True):
            for place, runs in zip(places, rows.values(), strict=True):
                values = [run.value(metric) for run in runs]
                over_seeds = spread(values)
                axes.plot(values, [place] * len(values), "o", color=BLUE, alpha=0.5, markersize=4)
                if len(values) > 1:
                    bounds = [over_seeds.low, over_seeds.high]
                    axes.plot(bounds, [place + 0.25] * 2, color=VERMILLION, linewidth=1.5)
                axes.plot(over_seeds.mean, place + 0.25, "D", color=VERMILLION, markersize=4)
                if place == 0:
                    axes.axvline(over_seeds.mean, color="#888888", linestyle="--", linewidth=1, zorder=0)
            axes.set_xlabel(METRICS[metric])
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(places, [row.replace("_", " ") for row in rows])
        panels[0].invert_yaxis()
        titles = " / ".join(_titles([run for runs in rows.values() for run in runs]))
        explained = f"blue: one seed; red: mean and 95 % interval over seeds; dashed: {next(iter(rows))}"
        figure.suptitle(f"{wrap(titles, 85)}\n{wrap(explained, 85)}", fontsize=9)
        save(figure, path)
