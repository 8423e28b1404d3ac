"""report.md, made from the records in runs/ and sweeps/ alone.

    python -m common.report                      # report.toml and runs/ here → report.md
    python -m common.report --check              # exit status 1, naming the first difference, if it is out of date
    python -m common.report --output_dir FOLDER  # the same for the study in FOLDER

report.toml names the runs that each section shows. No number in the page is typed by hand but the published ones,
which stand below with their sources.
"""

import csv
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common.ablation import spread
from common.config import Keys, key, run_script
from common.errors import Fault, UsageError
from common.files import atomic_path
from common.tracking import read_history, read_json
from common.trials import markdown_line

SECTIONS = ("task1", "task2", "task3", "task4", "task5")

# What others report, each on the full PathMNIST: 89,996 training tiles, official test split, n = 7,180.
COURSEWORK = {  # the coursework's own report, 64 px, one seed each
    "Task 1": (0.9803411316742444, 0.895125348189415),
    "Task 3": (0.9875522243532489, 0.9132311977715878),
    "Task 5": (0.9889362648935928, 0.9122562674094707),
}
PUBLISHED = {
    "Task 1": "ResNet-18 from scratch, 28 px: AUC 0.983, ACC 0.907 (Yang et al., MedMNIST v2, 2023)",
    "Task 3": "MedMamba-T from scratch, 224 px: AUC 0.997, ACC 0.953 (Yue & Li, MedMamba, 2024)",
    "Task 5": "ResNet-18 fine-tuned, 64 px: AUC 0.994, ACC 0.934 ± 0.007, 3 seeds (Doerrich et al. 2025)",
}
AUGMENTATIONS = (
    ("ta_wide", "flips, one of TrivialAugmentWide's 14 operations at random strength, random erasing"),
    ("auto", "flips, one of AutoAugment's 25 ImageNet policies, random erasing"),
    ("dihedral", "one of the 8 flips and quarter turns"),
    ("stain", "dihedral, random haematoxylin and eosin strengths, a turn of the hue, a mild zoom"),
)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Keys):
    """Where the study is, and whether to write or to check."""

    output_dir: Path = key(Path(), "folder of the study: has report.toml, runs/, sweeps/ and fig/, gets report.md")
    check: bool = key(False, "write nothing: exit with 1 if report.md is not what the records give")


@dataclass(frozen=True)
class Record:
    """A finished run: its configuration, history and scores."""

    run_id: str
    facts: Mapping[str, Any]  # config.json
    summary: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's keys."""
        content: Mapping[str, Any] = self.facts["config"]
        return content

    @property
    def link(self) -> str:
        """Markdown: where the run's record is, and its W&B page if it was online."""
        url = self.summary.get("wandb")
        return f"[{self.run_id}](runs/{self.run_id}/)" + (f" ([W&B]({url}))" if url else "")

    def figure(self, name: str) -> str:
        """The path of one of the run's figures, from the study's folder."""
        return f"fig/{self.facts['task']}/{self.summary['figures'][name]}"


class Study:
    """A study's folder: reads what the selection names, and remembers which files the page links to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.linked: list[str] = []
        path = folder / "report.toml"
        try:
            self.selection = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file; it names the runs to show (make report writes one)") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: {error}") from None
        for name in self.selection:
            if name not in SECTIONS:
                raise UsageError(f"{path}: unknown section {name}; known are {', '.join(SECTIONS)}")

    def named(self, section: str, name: str, kind: type) -> Any:
        """What report.toml says in a section; UsageError where it is missing or of another type."""
        value = self.selection.get(section, {}).get(name)
        if not isinstance(value, kind) or not value:
            raise UsageError(f"{self.folder / 'report.toml'}: [{section}] needs {name} = {_example(name, kind)}")
        return value

    def run(self, run_id: str) -> Record:
        """A finished run; UsageError where there is none."""
        folder = self.folder / "runs" / run_id
        if not (folder / "summary.json").exists():
            raise UsageError(
                f"report.toml names run {run_id}, which is not finished in {folder.parent}: make report"
            )
        history = read_history(folder / "history.csv")
        return Record(run_id, read_json(folder / "config.json"), read_json(folder / "summary.json"), history)

    def runs(self, section: str) -> list[Record]:
        """The runs of a section, which must be of one data set."""
        records = [self.run(run_id) for run_id in self.named(section, "runs", list)]
        if len({record.summary["data_fingerprint"] for record in records}) > 1:
            raise UsageError(f"report.toml: the runs of [{section}] come from different data sets")
        return records

    def image(self, path: str, alt: str) -> str:
        """Markdown of a figure; Fault where its file is missing."""
        if not (self.folder / path).is_file():
            raise Fault(f"{self.folder / path}: the report shows this figure, and it is missing: make report")
        self.linked.append(path)
        return f"![{alt}]({path})"


def build(study: Study) -> str:
    """The page. Raises UsageError or Fault naming the first thing that is missing."""
    writers: dict[str, Callable[[Study], list[str]]] = {
        "task1": _task1,
        "task2": _task2,
        "task3": _task3,
        "task4": _task4,
        "task5": _task5,
    }
    lines = _opening(study)
    for name in SECTIONS:
        if name in study.selection:
            lines += ["", *writers[name](study)]
    lines += ["", *_beyond(study), "", *_closing(study)]
    return "\n".join(lines) + "\n"


def _opening(study: Study) -> list[str]:
    everything = _trained(study)
    first = next(iter(everything.values()))[0]
    tiles = first.summary["tiles"]
    lines = ["# PathMNIST study: report", ""]
    lines += [
        f"> **What was measured on what.** Every number of ours below comes from **{first.summary['dataset']}**: "
        f"{tiles['train']:,} training, {tiles['val']:,} validation and {tiles['test']:,} test tiles, on "
        f"{first.summary['device']}."
        + (
            " **The tiles are generated: they are not tissue, and nothing here is a result on PathMNIST.**"
            if first.summary["synthetic"]
            else ""
        ),
        ">",
        "> The coursework's and the published numbers come from the **full PathMNIST** (89,996 training tiles): "
        "another experiment, shown for orientation. On a GPU box `make report DATASET=pathmnist SIZE=64` repeats "
        "everything on the full data.",
        ">",
        "> Networks and epochs were chosen on validation; the test split was scored once a run, at its end.",
        "",
        "## Summary",
        "",
    ]
    lines += markdown_line("", f"ours: {first.summary['dataset']}", "test ACC", "test AUC", "seeds")
    lines += markdown_line("---", "---", "---:", "---:", "---:")
    for name, records in everything.items():
        network = records[0].facts.get("network", records[0].config["model_name"])
        scores = [
            _over_seeds([record.summary[metric] for record in records]) for metric in ("test/acc", "test/auc")
        ]
        lines += markdown_line(name, network, *scores, str(len(records)))
    lines += [
        "",
        "Mean over seeds [95 % t interval of that mean]; each seed's interval over test tiles stands in the "
        "sections.",
        "",
        "Not comparable with the above, the full PathMNIST (89,996 training tiles; test n = 7,180):",
        "",
    ]
    lines += markdown_line("", "coursework, 64 px, 1 seed: ACC", "AUC", "published")
    lines += markdown_line("---", "---:", "---:", "---")
    for name, (auc, acc) in COURSEWORK.items():
        lines += markdown_line(name, f"{acc:.4f}", f"{auc:.4f}", PUBLISHED[name])
    return lines


def _task1(study: Study) -> list[str]:
    records = study.runs("task1")
    return [
        "## Task 1: ResNet-18 from scratch",
        "",
        "torchvision's ResNet-18 from random weights: Adam, a cosine over the epochs, no augmentation, the epoch "
        "of the best validation ACC. Code: `task1.py`.",
        *_training_section(study, records),
    ]


def _task2(study: Study) -> list[str]:
    run_id = study.named("task2", "run", str)
    path = study.folder / "runs" / run_id / "attribution.json"
    if not path.exists():
        raise UsageError(
            f"report.toml names run {run_id} for Task 2, which is not explained yet: {path} is missing"
        )
    content = read_json(path)
    n = content["n"]
    lines = [
        "## Task 2: saliency, and whether it can be trusted",
        "",
        f"Captum's Saliency of one Task 1 network ([{run_id}](runs/{run_id}/): {content['network']}), in eval "
        f"mode; the explained class is the {content['target']} one. Code: `task2.py`, `common/attribution.py`.",
        "",
    ]
    lines += markdown_line("Index", "Label", "Predicted", "Input", "Saliency")
    lines += markdown_line(*["---"] * 5)
    for row in content["tiles"]:
        tile = f"{row['index']:05d}"
        mark = "" if row["label"] == row["predicted"] else " ✗"
        lines += markdown_line(
            tile,
            row["label"],
            f"{row['predicted']} ({row['probability']:.2f}){mark}",
            study.image(row["input"], f"Test tile {tile}: {row['label']}"),
            study.image(row["saliency"], f"Saliency map of test tile {tile}"),
        )
    figures = {name: f"fig/task2/{file}" for name, file in content["figures"].items()}
    lines += [
        "",
        study.image(figures["methods"], "Ten test tiles, a row each, and their maps by five methods"),
        "",
        study.image(figures["classes"], "For each class a tile classified rightly and one wrongly, with saliency"),
        "",
        "### Can the maps be trusted?",
        "",
        f"Randomised layers: {n['randomisation']} test tiles. Deletion and insertion: {n['removal']}. Infidelity: "
        f"{n['infidelity']}. Maximum sensitivity: {n['max_sensitivity']}. Means over tiles [95 % intervals].",
        "",
    ]
    lines += markdown_line(
        "method", "passes", "correlation with a random network's map", "insertion − deletion", "over chance",
        "over edges", "infidelity", "max. sensitivity",
    )  # fmt: skip
    lines += markdown_line("---", "---", *["---:"] * 6)
    for method in content["methods"].values():
        cells = [method["randomisation"]["conv1"], method["margin"], method["margin_over_random"]]
        cells += [method["margin_over_sobel"], method["infidelity"], method["max_sensitivity"]]
        lines += markdown_line(method["title"], "yes" if method["passes"] else "no", *map(_interval, cells))
    for control in content["controls"].values():
        cells = [_interval(control["margin"]), "", "", _interval(control["infidelity"]), ""]
        lines += markdown_line(control["title"], "control", "", *cells)
    error = content["integrated_gradients_error"]
    lines += [
        "",
        study.image(figures["randomisation"], "Rank correlation of maps as more layers are randomised, by method"),
        "",
        study.image(figures["removal"], "Deletion and insertion curves of five methods and two controls"),
        "",
        *(f"- {method['verdict']}" for method in content["methods"].values()),
        "",
        f"Integrated Gradients' convergence error: {error['median']:.1%} of the logit's difference in the median, "
        f"{error['percentile_90']:.1%} at the 90th percentile, {error['n']} tiles.",
    ]
    return lines


def _task3(study: Study) -> list[str]:
    records = study.runs("task3")
    return [
        "## Task 3: MobileNetV3-Large from scratch",
        "",
        "torchvision's MobileNetV3-Large from random weights with the coursework's techniques: AdamW, label "
        "smoothing, warm-up, cosine, TrivialAugmentWide, early stopping. Code: `train.py`.",
        *_training_section(study, records),
    ]


def _task4(study: Study) -> list[str]:
    name = study.named("task4", "ablation", str)
    folder = study.folder / "sweeps" / name
    if not (folder / "table.md").exists():
        raise UsageError(f"{folder / 'table.md'}: missing; python -m common.sweep ablation.yaml makes it")
    first = study.runs("task3")[0].config
    lines = [
        "## Task 4: which technique helps",
        "",
        "**Augmentation**, for each tile on its own, on the computing device (`common/augment.py`):",
        "",
        *(f"- `{part}`: {words}" for part, words in AUGMENTATIONS),
        "",
        study.image("fig/report/augmentations.png", "Generated tiles before and after each augmentation"),
        "",
        f"**Learning rate**: a linear warm-up over {first['lr_warmup_epochs']} epochs from "
        f"{first['lr_warmup_decay']:g} of its peak {first['lr']:.3g}, then half a cosine down "
        f"to {first['lr_min']:g} of it.",
        "",
        study.image("fig/report/learning_rate.png", "The learning rate by epoch: warm-up, then cosine"),
        "",
        "### Ablation",
        "",
        *(folder / "table.md").read_text(encoding="utf-8").rstrip().splitlines(),
        "",
        study.image(f"fig/task4/{name}.png", "Validation and test ACC of every row, a dot a seed"),
        "",
        "Runs: " + ", ".join(study.run(run_id).link for run_id in _column(folder / "runs.csv", "run_id")) + ".",
    ]
    search = study.selection["task4"].get("search")
    if search:
        table = study.folder / "sweeps" / search / "table.md"
        if not table.exists():
            raise UsageError(f"{table}: missing; python -m common.sweep sweep.yaml makes it")
        lines += ["", "### Search", "", *table.read_text(encoding="utf-8").rstrip().splitlines()]
    return lines


def _task5(study: Study) -> list[str]:
    name = study.named("task5", "comparison", str)
    path = study.folder / "runs" / name / "comparison.json"
    if not path.exists():
        raise UsageError(f"{path}: missing; python task5.py --run_id {name} makes it")
    content = read_json(path)
    records = [study.run(run["run_id"]) for run in content["runs"]["fine-tuned"]]
    lines = [
        "## Task 5: fine-tuning against training from scratch",
        "",
        f"{content['dataset']}; the network is {records[0].config['model_name']}, its weights come from "
        f"{_weights(content['weights'])}. Code: `task5.py`. Convergence epoch: {content['convergence_rule']}.",
        "",
    ]
    metrics = list(content["over_seeds"])
    lines += markdown_line("", "seeds", *metrics)
    lines += markdown_line("---", *["---:"] * (len(metrics) + 1))
    for kind, runs in content["runs"].items():
        cells = [_spread(content["over_seeds"][metric][kind]) for metric in metrics]
        lines += markdown_line(kind, str(len(runs)), *cells)
    cells = [_spread(content["differences"][metric]) for metric in metrics]
    lines += markdown_line("difference, paired by seed", str(len(records)), *cells)
    lines += ["", study.image(f"fig/task5/{name}-comparison.png", "Curves of both kinds over the epochs"), ""]
    lines += [*_training_section(study, records)]
    return lines


def _training_section(study: Study, records: Sequence[Record]) -> list[str]:
    """Configuration, the three curves of the first run, every run's test performance, in words."""
    first = records[0]
    lines = ["", "<details><summary>Configuration</summary>", ""]
    lines += markdown_line("key", "value")
    lines += markdown_line("---", "---")
    hidden = ("run_id", "seed", "data_root", "output_dir", "wandb", "resume", "device")
    for name, value in first.config.items():
        if name not in hidden:
            lines += markdown_line(f"`{name}`", f"`{value}`")
    lines += ["", "</details>", "", f"Curves of seed {first.config['seed']}:", ""]
    for column, alt in (
        ("train/loss", "Training loss by epoch"),
        ("validate/auc", "Validation AUC by epoch"),
        ("validate/acc", "Validation ACC by epoch"),
    ):
        lines += [study.image(first.figure(column), f"{alt}, run {first.run_id}"), ""]
    lines += markdown_line(
        "run", "seed", "best epoch", "validation ACC", "test ACC", "test AUC", "last weights' ACC"
    )
    lines += markdown_line("---", *["---:"] * 6)
    for record in records:
        best = record.summary["best"]
        lines += markdown_line(
            record.link,
            str(record.config["seed"]),
            f"{best['epoch']} of {len(record.history)}",
            f"{record.summary['validate']['validate/acc']:.4f}",
            _interval(best["acc"], 4),
            _interval(best["auc"], 4),
            f"{record.summary['last']['acc']['value']:.4f}",
        )
    accuracies = [record.summary["test/acc"] for record in records]
    lines += [
        "",
        f"Test n = {first.summary['best']['n']:,} tiles of {first.summary['dataset']}; brackets: 95 % intervals "
        f"over test tiles (Wilson, DeLong). Over {len(records)} seed{'s' if len(records) > 1 else ''}: test ACC "
        f"{_over_seeds(accuracies)}, test AUC {_over_seeds([record.summary['test/auc'] for record in records])}.",
    ]
    return lines


def _beyond(study: Study) -> list[str]:
    """What the coursework lacks: per class, calibration, the validation-test gap, noise between seeds, cost."""
    lines = ["## Beyond the scores"]
    everything = _trained(study)
    first = next(iter(everything.values()))[0]
    names = list(first.summary["best"]["auc_per_class"])
    lines += [
        "",
        "### By class",
        "",
        f"Mean over seeds, {first.summary['dataset']}: recall, then one-vs-rest AUC.",
        "",
    ]
    lines += markdown_line("class", "test tiles", *everything)
    lines += markdown_line("---", *["---:"] * (len(everything) + 1))
    for label, name in enumerate(names):
        cells = []
        for records in everything.values():
            recalls = [
                record.summary["best"]["confusion_matrix"][label][label]
                / max(1, sum(record.summary["best"]["confusion_matrix"][label]))
                for record in records
            ]
            areas = [record.summary["best"]["auc_per_class"][name] for record in records]
            area = "–" if None in areas else f"{sum(areas) / len(areas):.3f}"
            cells.append(f"{sum(recalls) / len(recalls):.2f}, {area}")
        lines += markdown_line(name, str(sum(first.summary["best"]["confusion_matrix"][label])), *cells)
    for task, records in everything.items():
        alt = f"Confusion matrix of {task}, run {records[0].run_id}"
        lines += ["", study.image(records[0].figure("test/confusion"), alt)]
    lines += ["", "### Validation against test, calibration, noise, cost", ""]
    lines += markdown_line(
        "", "validation ACC", "test ACC", "gap", "last − best weights", "sd over seeds",
        "calibration error", "tiles/s", "seconds a run", "device",
    )  # fmt: skip
    lines += markdown_line("---", *["---:"] * 8, "---")
    for task, records in everything.items():
        validation = fmean([record.summary["validate"]["validate/acc"] for record in records])
        test = fmean([record.summary["test/acc"] for record in records])
        last = fmean([record.summary["last"]["acc"]["value"] for record in records])
        error = fmean([record.summary["best"]["expected_calibration_error"] for record in records])
        speeds = [row["tiles_per_second"] for record in records for row in record.history]
        noise = spread([record.summary["test/acc"] for record in records])
        lines += markdown_line(
            task,
            f"{validation:.3f}",
            f"{test:.3f}",
            f"{test - validation:+.3f}",
            f"{last - test:+.3f}",
            f"{noise.sd:.3f}" if noise.n > 1 else "one seed",
            f"{error:.3f}",
            f"{sorted(speeds)[len(speeds) // 2]:,.0f}",
            f"{fmean([record.summary['wall_seconds'] for record in records]):.0f}",
            records[0].summary["device"],
        )
    lines += [
        "",
        "Gap: test minus validation ACC. Validation tiles share their slides with training tiles; test tiles "
        "come from another clinical centre (on the phantom, a synthetic one). The last columns: expected "
        "calibration error on test tiles, tiles/s while training (median over epochs), and a run's time; runs may "
        "have shared their machine with others.",
    ]
    return lines


def _closing(study: Study) -> list[str]:
    lines = ["## Provenance", ""]
    lines += markdown_line("", "commit", "date", "Python", "versions")
    lines += markdown_line(*["---"] * 5)
    for task, records in _trained(study).items():
        commits = sorted({str(record.facts["commit"])[:12] for record in records})
        dates = sorted(record.facts["started"][:10] for record in records)
        versions = ", ".join(f"{name} {version}" for name, version in records[0].facts["versions"].items())
        span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        lines += markdown_line(task, ", ".join(commits), span, records[0].facts["python"], versions)
    lines += [
        "",
        "PathMNIST: J. Yang et al., *MedMNIST v2*, Scientific Data 2023, from NCT-CRC-HE-100K and CRC-VAL-HE-7K "
        "(J. N. Kather et al., PLoS Medicine 2019), CC BY 4.0. Published numbers: J. Yang et al. 2023; "
        "S. Doerrich et al., Scientific Reports 2025; Y. Yue and Z. Li, *MedMamba*, 2024.",
        "",
        "Made by `python -m common.report` from report.toml and runs/; `--check` tells whether it still is.",
    ]
    return lines


def _trained(study: Study) -> dict[str, list[Record]]:
    """The runs of every section that trains, by the task's name."""
    everything = {
        title: study.runs(section)
        for title, section in (("Task 1", "task1"), ("Task 3", "task3"))
        if section in study.selection
    }
    if "task5" in study.selection:
        path = study.folder / "runs" / study.named("task5", "comparison", str) / "comparison.json"
        if path.exists():
            everything["Task 5"] = [study.run(run["run_id"]) for run in read_json(path)["runs"]["fine-tuned"]]
    if not everything:
        raise UsageError("report.toml: needs at least one of [task1], [task3] and [task5]")
    return everything


def _weights(weights: Any) -> str:
    if isinstance(weights, Mapping):
        return ", ".join(f"{name} {value}" for name, value in weights.items())
    return str(weights)


def _interval(estimate: Mapping[str, float], digits: int = 2) -> str:
    return f"{estimate['value']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def _spread(values: Mapping[str, float]) -> str:
    interval = "" if values["n"] < 2 else f" [{values['low']:.4g}, {values['high']:.4g}]"
    return f"{values['mean']:.4g}{interval}"


def _over_seeds(values: Sequence[float]) -> str:
    over = spread(values)
    return f"{over.mean:.4f}" + (f" [{over.low:.4f}, {over.high:.4f}]" if over.n > 1 else " (one seed)")


def _column(path: Path, name: str) -> list[str]:
    with open(path, newline="", encoding="utf-8") as file:
        return [row[name] for row in csv.DictReader(file)]


def _example(name: str, kind: type) -> str:
    return '["RUN_ID", …]' if kind is list else f'"{name.upper()}"'


def first_difference(page: str, made: str) -> str | None:
    """Where two pages differ first, in words; None where they don't."""
    there, here = page.splitlines(), made.splitlines()
    for number, (old, new) in enumerate(zip(there, here, strict=False), start=1):
        if old != new:
            return f"line {number} says {old[:80]!r}, the records give {new[:80]!r}"
    if len(there) != len(here):
        return f"it has {len(there)} lines, the records give {len(here)}"
    return None


def main(config: ReportConfig) -> None:
    """report.toml and the records → report.md, or a check of it."""
    study = Study(config.output_dir)
    path = config.output_dir / "report.md"
    if not config.check:
        from common import report_figures  # matplotlib

        report_figures.draw(study.folder / "fig" / "report", _trained(study).get("Task 3", []))
    page = build(study)
    if config.check:
        if not path.exists():
            raise Fault(f"{path}: missing; python -m common.report makes it")
        difference = first_difference(path.read_text(encoding="utf-8"), page)
        if difference:
            raise Fault(f"{path} is out of date: {difference}; python -m common.report makes it anew")
        print(f"{path} is what the records give")
        return
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{path}: {len(study.linked)} figures")


if __name__ == "__main__":
    run_script(main, ReportConfig)
