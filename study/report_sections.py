"""The sections of report.md: each takes the study's records and returns lines of Markdown.

No number is typed by hand but the published ones, which stand here with their sources.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median

from common.errors import UsageError
from common.pathmnist import COUNTS
from common.records import Record
from common.statistics import interval, spread
from study.report_selection import Study, figure, link
from study.trials import markdown_line

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


def opening(study: Study) -> list[str]:
    """The box that says what was measured on what, and the summary table beside the published numbers."""
    everything = study.trained()
    first = next(iter(everything.values()))[0]
    tiles = first.summary["tiles"]
    full = first.config["dataset"] == "pathmnist" and tiles["train"] == COUNTS["train"]
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
    ]
    if not full:
        lines += [
            "> The coursework's and the published numbers come from the **full PathMNIST** (89,996 training "
            "tiles): another experiment, shown for orientation. On a GPU box `make report "
            "SIZE=64` repeats everything on the full data.",
            ">",
        ]
    lines += [
        "> Networks and epochs were chosen on validation; the test split was scored once a run, at its end.",
        "",
        "## Summary",
        "",
    ]
    lines += markdown_line(
        "", f"ours: {first.summary['dataset']}", "test ACC", "test AUC", "test ACC, 8 views", "seeds"
    )
    lines += markdown_line("---", "---", "---:", "---:", "---:", "---:")
    for name, network, records in _summarised(study):
        cells = [
            _over_seeds([scores["value"] for scores in found]) if all(found) else ""
            for found in (
                [record.summary.get(weights, {}).get(metric) for record in records]
                for weights, metric in (("best", "acc"), ("best", "auc"), ("tta", "acc"))
            )
        ]
        lines += markdown_line(name, network, *cells, str(len(records)))
    lines += [
        "",
        "Mean over seeds [95 % t interval of that mean]; each seed's interval over test tiles stands in the "
        "sections. 8 views: predictions averaged over each tile's flips and quarter turns."
        + (f" {_passing(study)}" if "task2" in study.selection else ""),
        "",
        "The full PathMNIST, other resolutions and code: the coursework's and the published numbers (n = 7,180)."
        if full
        else "Not comparable with the above, the full PathMNIST (89,996 training tiles; test n = 7,180):",
        "",
    ]
    lines += markdown_line("", "coursework, 64 px, 1 seed: ACC", "AUC", "published")
    lines += markdown_line("---", "---:", "---:", "---")
    for name, (auc, acc) in COURSEWORK.items():
        lines += markdown_line(name, f"{acc:.4f}", f"{auc:.4f}", PUBLISHED[name])
    return lines


def _summarised(study: Study) -> Iterator[tuple[str, str, list[Record]]]:
    """The lines of the summary table: the task, its network with where the weights came from, its runs."""
    everything = study.trained()
    for name in ("Task 1", "Task 3"):
        if name in everything:
            yield name, f"{everything[name][0].config['model_name']} from scratch", everything[name]
    if rows := study.ablation():
        best = max(rows, key=lambda row: fmean(record.summary["validate"]["validate/acc"] for record in rows[row]))
        network = rows[best][0].config["model_name"]
        yield "Task 4", f"{network} from scratch, `{best}`: the ablation's best row by validation ACC", rows[best]
    if "task5" in study.selection:
        network = everything["Task 5"][0].config["model_name"]
        scratch = [study.run(run["run_id"]) for run in study.comparison()["runs"]["from scratch"]]
        yield "Task 5", f"{network} from scratch", scratch
        yield (
            "Task 5",
            f"{network} fine-tuned from `{study.comparison()['weights']['name']}`",
            everything["Task 5"],
        )


def _passing(study: Study) -> str:
    """The summary's sentence for Task 2."""
    content = study.attribution()
    passing = [method["title"] for method in content["methods"].values() if method["passes"]]
    return (
        f"Task 2: of {len(content['methods'])} attribution methods on one Task 1 network, "
        f"{' and '.join(passing) or 'none'} passed both checks."
    )


def task1(study: Study) -> list[str]:
    records = study.runs("task1")
    return [
        "## Task 1: ResNet-18 from scratch",
        "",
        "torchvision's ResNet-18 from random weights: Adam, a cosine over the epochs, no augmentation, the epoch "
        "of the best validation ACC. Code: `task1.py`.",
        *_training_section(study, records),
    ]


def task2(study: Study) -> list[str]:
    content = study.attribution()
    run_id = content["run_id"]
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


def task3(study: Study) -> list[str]:
    records = study.runs("task3")
    return [
        "## Task 3: MobileNetV3-Large from scratch",
        "",
        "torchvision's MobileNetV3-Large from random weights with the coursework's techniques: AdamW, label "
        "smoothing, warm-up, cosine, TrivialAugmentWide, early stopping. Code: `train.py`.",
        *_training_section(study, records),
    ]


def task4(study: Study) -> list[str]:
    name = study.named("task4", "ablation", str)
    folder = study.folder / "sweeps" / name
    if not (folder / "table.md").exists():
        raise UsageError(f"{folder / 'table.md'}: missing; python -m study.sweep ablation.yaml makes it")
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
        "Runs: " + ", ".join(link(study.run(row["run_id"])) for row in study.sweep_table("runs.csv")) + ".",
    ]
    search = study.selection["task4"].get("search")
    if search:
        table = study.folder / "sweeps" / search / "table.md"
        if not table.exists():
            raise UsageError(f"{table}: missing; python -m study.sweep sweep.yaml makes it")
        lines += ["", "### Search", "", *table.read_text(encoding="utf-8").rstrip().splitlines()]
        for figure, alt in (
            ("parallel-coordinates", "A line a trial through its parameters to its score"),
            ("importance", "How much of the score each parameter explains"),
        ):
            path = f"fig/task4/{search}-{figure}.png"
            if (study.folder / path).exists():  # a search draws them when trials enough have finished
                lines += ["", study.image(path, alt)]
    return lines


def task5(study: Study) -> list[str]:
    name, content = study.named("task5", "comparison", str), study.comparison()
    records = [study.run(run["run_id"]) for run in content["runs"]["fine-tuned"]]
    lines = [
        "## Task 5: fine-tuning against training from scratch",
        "",
        f"{content['dataset']}; the network is {records[0].config['model_name']}, fine-tuned from "
        f"`{content['weights']['name']}` ({content['weights']['source']}). Code: `task5.py`. "
        f"Convergence epoch: {content['convergence_rule']}.",
        "",
    ]
    kinds = list(content["runs"])
    lines += markdown_line("", *(f"{kind}, {len(content['runs'][kind])} seeds" for kind in kinds), "difference")
    lines += markdown_line("---", *["---:"] * (len(kinds) + 1))
    for metric, by_kind in content["over_seeds"].items():
        cells = [by_kind[kind] for kind in kinds] + [content["differences"][metric]]
        digits = 1 if metric == "convergence epoch" else 4
        lines += markdown_line(
            metric, *(interval(cell["mean"], cell["low"], cell["high"], digits) for cell in cells)
        )
    lines += ["", "Means over seeds [95 % t intervals]; the difference is paired by seed.", ""]
    lines += [study.image(f"fig/task5/{name}-comparison.png", "Curves of both kinds over the epochs"), ""]
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
        lines += [study.image(figure(first, column), f"{alt}, run {first.run_id}"), ""]
    lines += markdown_line(
        "run", "seed", "best epoch", "validation ACC", "test ACC", "test AUC", "last weights' ACC"
    )
    lines += markdown_line("---", *["---:"] * 6)
    for record in records:
        best = record.summary["best"]
        lines += markdown_line(
            link(record),
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


def beyond(study: Study) -> list[str]:
    """What the coursework lacks: per class, the gap to validation, calibration, noise between seeds, cost."""
    everything = study.trained()
    return [
        "## Beyond the scores",
        "",
        *_by_class(study, everything),
        "",
        *_gap(study, everything),
        "",
        *_calibration(study, everything),
        "",
        *_noise_and_cost(everything),
    ]


def _by_class(study: Study, everything: Mapping[str, Sequence[Record]]) -> list[str]:
    first = next(iter(everything.values()))[0].summary
    lines = ["### By class", "", f"Mean over seeds, {first['dataset']}: recall, then one-vs-rest AUC.", ""]
    lines += markdown_line("class", "test tiles", *everything)
    lines += markdown_line("---", *["---:"] * (len(everything) + 1))
    for label, name in enumerate(first["best"]["auc_per_class"]):
        cells = []
        for records in everything.values():
            matrices = [record.summary["best"]["confusion_matrix"] for record in records]
            recall = fmean([matrix[label][label] / max(1, sum(matrix[label])) for matrix in matrices])
            areas = [record.summary["best"]["auc_per_class"][name] for record in records]
            cells.append(f"{recall:.2f}, " + ("–" if None in areas else f"{fmean(areas):.3f}"))
        lines += markdown_line(name, str(sum(first["best"]["confusion_matrix"][label])), *cells)
    for task, records in everything.items():
        alt = f"Confusion matrix of {task}, run {records[0].run_id}"
        lines += ["", study.image(figure(records[0], "test/confusion"), alt)]
    return lines


def _gap(study: Study, everything: Mapping[str, Sequence[Record]]) -> list[str]:
    """Validation against test ACC: of every task, and of every row of the ablation."""
    lines = [
        "### The gap between validation and test",
        "",
        "Validation tiles share their slides with training tiles; test tiles come from another clinical centre "
        "(on the phantom, a synthetic one): a gap is to be expected, and validation ACC is no forecast of test "
        "ACC.",
        "",
        study.image("fig/report/gap.png", "Validation ACC against test ACC, a dot a run, coloured by task"),
        "",
    ]
    lines += markdown_line(
        "", "seeds", "validation ACC", "test ACC", "gap [95 % interval]", "test ACC of the last weights"
    )
    lines += markdown_line("---", *["---:"] * 5)
    rows = {f"Task 4, `{row}`": records for row, records in study.ablation().items()}
    for name, records in {**everything, **rows}.items():
        validation = fmean([record.summary["validate"]["validate/acc"] for record in records])
        test = fmean([record.summary["test/acc"] for record in records])
        last = fmean([record.summary["last"]["acc"]["value"] for record in records])
        gaps = [record.summary["test/acc"] - record.summary["validate"]["validate/acc"] for record in records]
        over = spread(gaps)
        gap = interval(over.mean, over.low, over.high, 3, "+")
        lines += markdown_line(
            name,
            str(len(records)),
            f"{validation:.3f}",
            f"{test:.3f}",
            gap,
            f"{last:.3f}",
        )
    tiles = next(iter(everything.values()))[0].summary["tiles"]
    lines += [
        "",
        f"Gap: test minus validation ACC, each tile scored once, without test-time views. The intervals are over "
        f"seeds; which {tiles['val']:,} validation and {tiles['test']:,} test tiles were drawn adds to them.",
    ]
    return lines


def _calibration(study: Study, everything: Mapping[str, Sequence[Record]]) -> list[str]:
    lines = ["### Calibration", ""]
    lines += [study.image("fig/report/calibration.png", "Accuracy against confidence, a line a task"), ""]
    lines += markdown_line("", "seeds", "expected calibration error, test")
    lines += markdown_line("---", "---:", "---:")
    for task, records in everything.items():
        errors = [record.summary["best"]["expected_calibration_error"] for record in records]
        lines += markdown_line(task, str(len(records)), _over_seeds(errors))
    lines += ["", "15 bins of the top class's probability (Guo et al. 2017); label smoothing makes a network shy."]
    return lines


def _noise_and_cost(everything: Mapping[str, Sequence[Record]]) -> list[str]:
    lines = ["### Noise between seeds, and cost", ""]
    lines += markdown_line("", "seeds", "sd of test ACC", "tiles/s", "seconds a run", "device")
    lines += markdown_line("---", *["---:"] * 4, "---")
    for task, records in everything.items():
        speeds = [row["tiles_per_second"] for record in records for row in record.history]
        noise = spread([record.summary["test/acc"] for record in records])
        lines += markdown_line(
            task,
            str(noise.n),
            f"{noise.sd:.3f}" if noise.n > 1 else "one seed",
            f"{median(speeds):,.0f}",
            f"{median([record.summary['wall_seconds'] for record in records]):,.0f}",
            records[0].summary["device"],
        )
    lines += [
        "",
        "Tiles/s: while training, median over epochs; seconds: median over runs. Runs may have shared their "
        "machine with others.",
    ]
    return lines


def closing(study: Study) -> list[str]:
    """Commit, date and versions of what the page shows, and whose the data and the published numbers are."""
    sources = {task: [record.facts for record in records] for task, records in study.trained().items()}
    if "task2" in study.selection:
        sources["Task 2"] = [study.attribution()]
    if rows := study.ablation():
        sources["Task 4"] = [record.facts for records in rows.values() for record in records]
    lines = ["## Provenance", ""]
    lines += markdown_line("", "runs", "commit", "date", "Python", "versions")
    lines += markdown_line("---", "---:", *["---"] * 4)
    for task, facts in sorted(sources.items()):
        commits = sorted({str(one["commit"])[:12] for one in facts})
        dates = sorted({one["started"][:10] for one in facts})
        versions = ", ".join(f"{name} {version}" for name, version in facts[0]["versions"].items())
        span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        lines += markdown_line(task, str(len(facts)), ", ".join(commits), span, facts[0]["python"], versions)
    lines += [
        "",
        "PathMNIST: J. Yang et al., *MedMNIST v2*, Scientific Data 2023, from NCT-CRC-HE-100K and CRC-VAL-HE-7K "
        "(J. N. Kather et al., PLoS Medicine 2019), CC BY 4.0. Published numbers: J. Yang et al. 2023; "
        "S. Doerrich et al., Scientific Reports 2025; Y. Yue and Z. Li, *MedMamba*, 2024.",
        "",
        "Made by `python -m study.report` from report.toml and runs/; `--check` tells whether it still is.",
    ]
    return lines


def _interval(estimate: Mapping[str, float], digits: int = 2) -> str:
    return interval(estimate["value"], estimate["low"], estimate["high"], digits)


def _over_seeds(values: Sequence[float]) -> str:
    """A score's mean with its interval, which a t interval of few seeds may push out of what a score can be."""
    over = spread(values)
    if over.n == 1:
        return f"{over.mean:.4f} (one seed)"
    return interval(over.mean, max(over.low, 0), min(over.high, 1))
