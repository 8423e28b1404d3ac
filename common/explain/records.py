"""The records of Task 2: the table of the tiles, attribution.json, and a W&B run with the same content."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import ScriptConfig
from common.explain.tiles import Explained
from common.files import write_json, write_text
from common.markdown import markdown_table
from common.records.run import provenance, send, start_wandb

PACKAGES = ("captum", "torch", "torchvision", "numpy", "scipy", "matplotlib")


def write_records(
    folder: Path,
    config: ScriptConfig,
    facts: Mapping[str, Any],
    shown: Sequence[Explained],
    checks: Mapping[str, Any],
    figures: Mapping[str, Path],
) -> None:
    """Write saliency.md and attribution.json into `folder`, and send their content to W&B.

    `facts` are those of task2.py; `checks` is the record that `check_methods` returns.
    """
    rows = [one.row for one in shown]
    write_text(folder / "saliency.md", saliency_table(rows))
    names = {name: path.name for name, path in figures.items()}
    record = {"config": config.as_dict(), **provenance(PACKAGES), "tiles": rows, **checks, "figures": names}
    write_json(folder / "attribution.json", {**facts, **record})
    send_to_wandb(config, facts, rows, checks, figures)


def saliency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table Index / Label / Predicted / Input / Saliency of runs/<run_id>/saliency.md."""
    cells = []
    for row in rows:
        tile = f"{row['index']:05d}"
        mark = "" if row["label"] == row["predicted"] else " ✗"
        images = [
            f"![{what} of tile {tile}, {row['label']}](../../{row[part]})"
            for what, part in (("Tile", "input"), ("Map", "saliency"))
        ]
        cells.append([tile, row["label"], f"{row['predicted']} ({row['probability']:.2f}){mark}", *images])
    return "\n".join(markdown_table(["Index", "Label", "Predicted", "Input", "Saliency"], "lllll", cells)) + "\n"


def send_to_wandb(
    config: ScriptConfig,
    facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    checks: Mapping[str, Any],
    figures: Mapping[str, Path],
) -> None:
    """Make a separate W&B run, named after the explained one, with the table, the figures and the verdicts."""

    def log(run: Any) -> None:
        import wandb

        table = wandb.Table(columns=list(rows[0]))
        for row in rows:
            images = {part: wandb.Image(str(config.output_dir / row[part])) for part in ("input", "saliency")}
            table.add_data(*{**row, **images}.values())
        run.log({"saliency": table})
        run.log({f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()})
        run.summary.update({f"passes/{name}": result["passes"] for name, result in checks["methods"].items()})
        run.finish()

    network = facts["network"].split(" on ")[0]
    send(start_wandb("task2", f"{facts['run_id']}-task2", config, facts, network), log)
