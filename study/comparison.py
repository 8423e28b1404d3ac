"""Fine-tuned runs beside runs from scratch: a table of convergence and scores, and the curves in one figure."""

from collections.abc import Sequence
from pathlib import Path

from common.files import write_text
from common.records.read import Record, run_folder
from study.figures import draw_curves
from study.groups import CONVERGED_WITHIN, Group
from study.tables import difference_table


def compare_runs(name: str, tuned: Sequence[str], scratch: Sequence[str], output_dir: Path) -> None:
    """Compare finished runs, one of each kind per seed; print the table and where it is.

    Writes runs/<name>/comparison.md and fig/task5/<name>-comparison.png. Raises Fault where a record is missing.
    """
    groups = [
        Group(kind, [Record.read(output_dir, run_id) for run_id in run_ids])
        for kind, run_ids in (("fine-tuned", tuned), ("from scratch", scratch))
    ]
    summary, config = groups[0].first.summary, groups[0].first.config
    words = (
        f"{config['model_name']}, {summary['dataset']}; seeds: {', '.join(map(str, groups[0].seeds))}. Brackets: "
        "95 % intervals over the seeds, from three seeds on. Epoch of convergence: the first epoch whose "
        f"validation ACC is within {CONVERGED_WITHIN:g} of the run's best one."
    )
    lines = [words, "", *difference_table(*groups)]
    table = run_folder(output_dir, name) / "comparison.md"
    figure = output_dir / "fig" / "task5" / f"{name}-comparison.png"
    write_text(table, "\n".join(lines) + "\n")
    title = f"Task 5 · {config['model_name']} · {summary['dataset']}"
    draw_curves(figure, {group.title: group.records for group in reversed(groups)}, title)
    print("\n".join([*lines, "", f"table and figure:\n  {table}\n  {figure}"]))
