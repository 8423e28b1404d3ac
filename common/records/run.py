"""The records of one run: files under runs/<run_id>/, and the same numbers sent to W&B."""

import importlib.metadata
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from common.cli import Fault, UsageError, first_line, program
from common.config import ScriptConfig, TrainingConfig
from common.data.dataset import SPLITS, Dataset
from common.data.pathmnist import CLASS_NAMES
from common.files import delete_temporary_files, digest, public, write_csv, write_json
from common.records.read import checkpoint_folder, is_finished, read_json, run_folder

WANDB_PROJECT = "hw1"  # the coursework's; $WANDB_PROJECT takes its place
WANDB_PATIENCE = 60.0  # seconds to wait for its server at the start and at the end of a run
REPOSITORY = Path(__file__).resolve().parent.parent.parent
TITLES = {"task1": "Task 1", "task2": "Task 2", "task3": "Task 3", "task5": "Task 5"}
AXIS_LABELS = {
    "train/loss": "Training loss (cross-entropy, nats)",
    "validate/auc": "Validation AUC (mean over classes, one vs rest)",
    "validate/acc": "Validation ACC (share of tiles)",
}
VERSIONED = ("torch", "torchvision", "numpy", "wandb", "matplotlib")


class Run:
    """One run's folders, and its W&B run.

    `folder` is output_dir/runs/<run_id>, `checkpoints` is output_dir/checkpoints/<run_id>. summary.json is
    written last: a folder that has one is a finished run.
    """

    def __init__(
        self,
        task: str,
        config: TrainingConfig,
        dataset: Dataset,
        device_name: str,
        network: str | None = None,
        facts: Mapping[str, Any] = {},
    ) -> None:
        """Open the run and write config.json; `network` describes the network in titles (default: its name).

        Raises UsageError where the run is finished, or is another one than `check_record` allows; Fault where
        another process trains it, or its config.json is damaged or lost.
        """
        self.run_id = config.run_id
        network = network or config.model_name
        self.title = f"{TITLES[task]} · {network} · {dataset.title_at(config.input_size)} · seed {config.seed}"
        self.folder = run_folder(config.output_dir, config.run_id)
        self.checkpoints = checkpoint_folder(config.output_dir, config.run_id)
        self.last_checkpoint = self.checkpoints / "last.pt"
        self.figures = config.output_dir / "fig" / task
        self.facts = {**facts_of(task, config.run_id, dataset, device_name), **facts}
        record = self.folder / "config.json"
        if before := check_record(config, self.facts):
            for name, now in (("device", device_name), ("commit", _commit())):
                if str(now) not in str(before[name]).split(", then "):
                    before[name] = f"{before[name]}, then {now}"
            self.facts = {name: before.get(name, value) for name, value in self.facts.items()}
        elif self.last_checkpoint.exists():
            raise Fault(f"{record}: missing, but the run has a last.pt: restore it, or use another --run_id")
        self.folder.mkdir(parents=True, exist_ok=True)
        # A singleton: the same process may open the run again.
        self._lock = FileLock(self.folder / ".lock", is_singleton=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            problem = f"run {config.run_id} is running in another process"
            raise Fault(f"{problem}: wait for its end, or use another --run_id") from None
        if is_finished(config.output_dir, config.run_id):
            for path in (self.last_checkpoint, self.folder / ".lock"):  # a kill may have left the first one
                path.unlink(missing_ok=True)
            raise UsageError(f"run {config.run_id} is finished already ({self.folder}): use another --run_id")
        for folder in (self.folder, self.checkpoints):
            delete_temporary_files(folder)
        packages = (*VERSIONED, "timm") if "timm" in sys.modules else VERSIONED
        write_json(record, before or {"config": config.as_dict(), **self.facts, **provenance(packages)})
        self._n_sent, self._wandb = 0, start_wandb(task, config.run_id, config, self.facts, network)
        print(f"run {config.run_id}: {dataset.title} on {device_name}; records in {self.folder}", flush=True)

    def log_epoch(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write history.csv, print its last row, and send W&B the rows that it does not have.

        Of a continued run W&B gets all rows: a kill may have lost some. W&B ignores rows that it already has.
        """

        def log(run: Any) -> None:
            for row in history[self._n_sent :]:
                run.log(dict(row), step=int(row["epoch"]), commit=True)  # else W&B sends it after the next one

        write_csv(self.folder / "history.csv", history)
        self._send(log)
        self._n_sent = len(history)
        tqdm.write("  ".join(f"{name} {value:.5g}" for name, value in history[-1].items()))  # print tears the bar
        sys.stdout.flush()

    def finish(self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> None:
        """Draw the figures, write `summary`, delete last.pt, send the results to W&B, and print them."""
        figures = self._draw(history, summary)
        best = digest(self.checkpoints / "best.pt")
        write_json(self.folder / "summary.json", {**self.facts, **summary, "best_sha256": best})
        for path in (self.last_checkpoint, self.folder / ".lock"):  # a finished run is not continued
            path.unlink(missing_ok=True)
        self._send(lambda run: self._send_results(run, summary, figures))
        self._send(lambda run: run.finish())
        if best_scores := summary.get("best"):
            scores = f"test/auc {summary['test/auc']:.4f}  test/acc {summary['test/acc']:.4f}"
            print(f"{scores}  ({best_scores['n']:,} test tiles, weights of epoch {best_scores['epoch']})")
        print(f"{self.title}; records in {self.folder}, figures:", *figures.values(), sep="\n  ")

    def _draw(self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> dict[str, Path]:
        from common import figures  # matplotlib: half a second that training need not wait for

        paths = {}
        for column, ylabel in AXIS_LABELS.items():
            paths[column] = self.figures / f"{self.run_id}-{column.replace('/', '-')}.png"
            values, best = [row[column] for row in history], int(summary["validate"]["epoch"])
            figures.curve(paths[column], values, ylabel=ylabel, title=self.title, best_epoch=best)
        if "best" in summary:
            paths["test/confusion"] = self.figures / f"{self.run_id}-confusion.png"
            matrix = np.array(summary["best"]["confusion_matrix"])
            title = f"{self.title} · confusion matrix, test tiles"
            figures.confusion(paths["test/confusion"], matrix, CLASS_NAMES, title=title)
        return paths

    def _send_results(self, run: Any, summary: Mapping[str, Any], figures: Mapping[str, Path]) -> None:
        import wandb

        # Not under the names of the scores: there an image would replace the sweep's metric in the summary.
        run.log({f"figures/{name.replace('/', '-')}": wandb.Image(str(path)) for name, path in figures.items()})
        # W&B itself takes the last epoch's row for the summary, not the best epoch's.
        tested = {name: summary[name] for name in ("test/auc", "test/acc") if name in summary}
        run.summary.update({**summary["validate"], "best_epoch": summary["validate"]["epoch"], **tested})

    def _send(self, action: Callable[[Any], None]) -> None:
        self._wandb = send(self._wandb, action)


def facts_of(task: str, run_id: str, dataset: Dataset, device_name: str) -> dict[str, Any]:
    """What config.json and summary.json both say of a run."""
    return {
        "task": task,
        "run_id": run_id,
        "dataset": dataset.title,
        "synthetic": dataset.name == "phantom",
        "data_fingerprint": dataset.fingerprint,
        "tiles": {split: len(getattr(dataset, split)) for split in SPLITS},
        "device": device_name,
    }


def check_record(config: TrainingConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The run's config.json, empty where it was not begun.

    Raises UsageError where it has another task, keys, data or initial weights, Fault where it is damaged.
    """
    path = run_folder(config.output_dir, config.run_id) / "config.json"
    if not path.exists():
        return {}
    before: dict[str, Any] = read_json(path, "config", "task", "data_fingerprint", "device", "commit")

    def others(facts: Mapping[str, Any]) -> dict[str, Any]:
        # The source of weights may hold the version of a package, so only their content is compared.
        weights = facts.get("weights", {}).get("sha256")
        return {"task": facts["task"], "data_fingerprint": facts["data_fingerprint"], "weights_sha256": weights}

    check_same(config, {**before["config"], **others(before)}, **others(facts))
    return before


def check_same(
    config: TrainingConfig, before: Mapping[str, Any], remedy: str = "use that, or another --run_id", **more: Any
) -> None:
    """Raise UsageError, naming the differing keys, where `before` has other keys, or other values of `more`."""
    now, before = {**config.identity(), **more}, public(before)
    # An older record may lack a key that is off.
    changed = [name for name in now if before.get(name) != now[name] and (name in before or now[name])]
    if was := ", ".join(f"{name} was {before.get(name)}" for name in changed):
        raise UsageError(f"run {config.run_id} was started with another configuration ({was}): {remedy}")


def send(run: Any, action: Callable[[Any], None]) -> Any:
    """Do something with W&B's run, if there is one. Returns the run, or None after an error, which ends it."""
    try:
        if run is not None:
            action(run)
        return run
    except Exception as error:  # W&B raises many types, and none of them may end a training run
        print(f"W&B stopped ({public(first_line(error))}); the local records continue", file=sys.stderr)
    return None


def start_wandb(task: str, run_id: str, config: ScriptConfig, facts: Mapping[str, Any], network: str) -> Any:
    """A W&B run, offline where W&B cannot be reached or has no API key; None where it is disabled or fails."""
    mode = config.wandb if config.wandb != "auto" else os.environ.get("WANDB_MODE") or "online"
    if mode == "disabled":
        return None
    import wandb  # a second of import that a disabled run does not pay for

    logging.raiseExceptions = False  # else W&B's log on a full disk prints a traceback for each of its lines
    settings = wandb.Settings(
        silent=True,  # so it also never asks for a key
        console="off",
        x_disable_meta=True,  # it holds the paths of this machine; config.json has the command and the commit
        init_timeout=WANDB_PATIENCE,
        finish_timeout=WANDB_PATIENCE,
    )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    project, keys = os.environ.get("WANDB_PROJECT") or WANDB_PROJECT, config.as_dict()
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            wandb.setup(settings)  # silent before init: else W&B prints its server's address with the password
            run = wandb.init(
                project=project,
                id=run_id,
                name=f"{TITLES[task]} · {network} · seed {keys['seed']}",
                job_type=task,
                tags=[tag[:64] for tag in (task, network, facts["dataset"])],  # W&B refuses longer ones
                config=public({**keys, "facts": facts, **provenance(())}),
                dir=str(config.output_dir),
                mode=attempt,  # type: ignore[arg-type]
                resume="allow",
                settings=settings,
            )
        except Exception as error:  # W&B raises many types, and none of them may end a training run
            print(f"W&B {attempt} failed ({public(first_line(error))})", file=sys.stderr)
            wandb.teardown()  # else its service holds the run's id, and the second attempt is refused
            continue
        print(public(f"W&B: {attempt}, project {project}, run {run.dir if run.offline else run.url}"))
        return run
    return None


def provenance(packages: Sequence[str]) -> dict[str, Any]:
    """Where a record comes from: command, commit, time, Python, platform and the packages' versions."""
    return {
        "command": shlex.join([*program(), *sys.argv[1:]]),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _commit() -> str | None:
    """The repository's commit, with `-dirty` where tracked files differ from it; None outside a checkout."""
    where = f"--git-dir={REPOSITORY / '.git'}", f"--work-tree={REPOSITORY}"  # not of a repository around it
    command = ["git", *where, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    return None
