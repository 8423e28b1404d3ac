"""The records of one run: files under runs/<run_id>/, and the same numbers sent to W&B."""

import hashlib
import importlib.metadata
import json
import logging
import netrc
import os
import platform
import shlex
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from common.cli import UsageError, first_line, program
from common.config import Config, ScriptConfig, TrainingConfig
from common.data import pathmnist
from common.data.dataset import Dataset
from common.files import atomic_path, digest, public, sweep_up, write_csv, write_json
from common.records.read import checkpoint_folder, is_finished, read_json, run_folder

WANDB_PROJECT = "hw1"  # the coursework's; $WANDB_PROJECT takes its place
WANDB_PATIENCE = 60.0  # seconds to wait for its server at the start and at the end of a run
REPOSITORY = Path(__file__).resolve().parent.parent.parent
CODE = ("*.py", ":(glob)*.yaml", "constraints.txt")  # as git takes paths: what a result depends on
TITLES = {"task1": "Task 1", "task2": "Task 2", "task3": "Task 3", "task5": "Task 5"}
RESUMABLE = ("last.pt", "previous.pt")  # the checkpoints to continue from, the newer one first
AXIS_LABELS = {
    "train/loss": "Training loss (cross-entropy, nats)",
    "validate/auc": "Validation AUC (mean over classes, one vs rest)",
    "validate/acc": "Validation ACC (share of tiles)",
}
UNDER_AGENT = "WANDB_SWEEP_ID" in os.environ
PARENT = os.getppid()
VERSIONED = ("torch", "torchvision", "numpy", "medmnist", "wandb", "matplotlib")


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
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the run and write config.json.

        `network` describes the network in titles (default: its name); the records carry the task's own `facts`.
        Raises what `check_startable` does, and UsageError where another process trains the run.
        """
        self.run_id = config.run_id
        self.dataset = dataset
        network = network or config.model_name
        data = f"{dataset.title.removesuffix(')')} tiles, {config.input_size} px inputs)"
        self.title = f"{TITLES[task]} · {network} · {data} · seed {config.seed}"
        self.folder = run_folder(config.output_dir, config.run_id)
        self.checkpoints = checkpoint_folder(config.output_dir, config.run_id)
        self.upload_model = config.wandb_model
        self.figures = config.output_dir / "fig" / task
        self.facts = {
            "task": task,
            "run_id": config.run_id,
            "dataset": dataset.title,
            "synthetic": dataset.name == "phantom",
            "data_fingerprint": dataset.fingerprint,
            "tiles": {split: len(getattr(dataset, split)) for split in ("train", "val", "test")},
            "input_size": config.input_size,
            "device": device_name,
            **(facts or {}),
        }
        check_startable(config, self.facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        # A singleton: the same process may open the run again.
        self._lock = FileLock(self.folder / ".lock", is_singleton=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            problem = f"run {config.run_id} is running in another process"
            raise UsageError(f"{problem}: wait for its end, or use another --run_id") from None
        # Another process may have started the run, or ended it, since the first check.
        check_startable(config, self.facts)
        for folder in (self.folder, self.checkpoints):
            sweep_up(folder)
        self._write_config(config)
        self._wandb: Any = start_wandb(task, config.run_id, config, self.facts, network)
        self.url = address(self._wandb) if self._wandb else None  # None without W&B, and offline
        print(f"run {config.run_id}: {dataset.title} on {device_name}; records in {self.folder}", flush=True)

    def _write_config(self, config: TrainingConfig) -> None:
        """Write config.json; of a run that is continued on another device, add this one's name there."""
        path = self.folder / "config.json"
        if not path.exists():
            packages = (*VERSIONED, "timm") if "timm" in sys.modules else VERSIONED
            write_json(path, {"config": config.as_dict(), **self.facts, **provenance(packages)})
            return
        before = read_json(path)
        if self.facts["device"] not in before["device"].split(", then "):
            before["device"] += f", then {self.facts['device']}"
            write_json(path, before)
        self.facts["device"] = before["device"]

    @property
    def resumable(self) -> tuple[Path, Path]:
        """The checkpoints from which the run can be resumed; see RESUMABLE."""
        return self.checkpoints / RESUMABLE[0], self.checkpoints / RESUMABLE[1]

    def continue_from(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write history.csv and send W&B all its rows: the run may have been killed before it did this."""
        write_csv(self.folder / "history.csv", history)
        for row in history:
            self._send_row(row)

    def log_epoch(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write history.csv, and pass its last row on to W&B and to the terminal."""
        write_csv(self.folder / "history.csv", history)
        row = history[-1]
        self._send_row(row)
        tqdm.write(  # print would tear the bar
            f"epoch {row['epoch']:3.0f}  train/loss {row['train/loss']:.4f}  "
            + "  ".join(f"{name} {row[name]:.4f}" for name in row if name.startswith("validate/"))
            + f"  {row['tiles_per_second']:,.0f} tiles/s  {row['seconds']:.1f} s"
        )
        sys.stdout.flush()

    def stop(self, number: signal.Signals) -> None:
        """End the W&B run of a training that a signal has stopped; mark it where a machine was taken away.

        W&B starts a marked run of a sweep again on another machine.
        """
        if number == signal.SIGTERM and not (UNDER_AGENT and os.getppid() == PARENT):
            self._send(lambda run: run.mark_preempting())
        self._send(lambda run: run.finish(exit_code=128 + number))

    def save_scores(self, **arrays: np.ndarray) -> None:
        """Write scores.npz: logits (N, C) and targets (N,) of the scored splits; see `Trainer.test`."""
        with atomic_path(self.folder / "scores.npz") as temporary:
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]

    def finish(self, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> None:
        """Draw the figures, write summary.json, delete last.pt, send the results to W&B, and print them.

        `summary` is what `Trainer.test` returns; after --test=False it has no test scores.
        """
        figures = self._draw(history, summary)
        best = self.checkpoints / "best.pt"
        record = {
            **self.facts,
            "wandb": self.url,
            **summary,
            "best_sha256": digest(best),
            "figures": {name: path.name for name, path in figures.items()},
            "figure_sha256": {name: digest(path) for name, path in figures.items()},
        }
        write_json(self.folder / "summary.json", record)
        for path in (*self.resumable, self.folder / ".lock"):  # a finished run is not continued
            path.unlink(missing_ok=True)
        self._send(lambda run: self._send_results(run, summary, figures))
        self._send(lambda run: run.finish())
        for weights in ("best", "last") if "best" in summary else ():
            auc, acc = summary[weights]["auc"], summary[weights]["acc"]
            print(
                f"{weights} weights (epoch {summary[weights]['epoch']}), {summary[weights]['n']:,} test tiles: "
                f"test/auc {auc['value']:.4f} (95 % {auc['low']:.4f} to {auc['high']:.4f})  "
                f"test/acc {acc['value']:.4f} (95 % {acc['low']:.4f} to {acc['high']:.4f})"
            )
        print(f"{self.title}; records in {self.folder}, figures:")
        for path in figures.values():
            print(f"  {path}")

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
            figures.confusion(paths["test/confusion"], matrix, self.dataset.class_names, title=title)
        return paths

    def _send_results(self, run: Any, summary: Mapping[str, Any], figures: Mapping[str, Path]) -> None:
        import wandb

        # Not under the names of the scores: there an image would replace the sweep's metric in the summary.
        run.log({f"figures/{name.replace('/', '-')}": wandb.Image(str(path)) for name, path in figures.items()})
        if "best" in summary:
            names = self.dataset.class_names
            rows = [
                [name, *counts] for name, counts in zip(names, summary["best"]["confusion_matrix"], strict=True)
            ]
            run.log({"test/confusion": wandb.Table(columns=["true \\ predicted", *names], data=rows)})
        # W&B takes the last epoch's row for the summary. The test scores are those of the best epoch, so its row
        # takes that one's place.
        tested = {name: summary[name] for name in ("test/auc", "test/acc") if name in summary}
        run.summary.update({**summary["validate"], "best_epoch": summary["validate"]["epoch"], **tested})
        if self.upload_model:
            run.log_model(str(self.checkpoints / "best.pt"), name=self.run_id)

    def _send_row(self, row: Mapping[str, float]) -> None:
        """Send an epoch's row; W&B drops a row of a step that it has."""
        self._send(lambda run: run.log(dict(row), step=int(row["epoch"])))

    def _send(self, action: Callable[[Any], None]) -> None:
        self._wandb = send(self._wandb, action)


def check_startable(config: TrainingConfig, facts: Mapping[str, Any]) -> None:
    """Raise UsageError if the run is finished, if `resume` finds no checkpoint, or if `check_record` does."""
    folder = run_folder(config.output_dir, config.run_id)
    checkpoints = checkpoint_folder(config.output_dir, config.run_id)
    if is_finished(config.output_dir, config.run_id):
        raise UsageError(f"run {config.run_id} is finished already ({folder}): use another --run_id")
    if config.resume and not any((checkpoints / name).exists() for name in RESUMABLE):
        raise UsageError(f"--resume: run {config.run_id} has no checkpoint in {checkpoints}")
    if (folder / "config.json").exists():
        check_record(config, read_json(folder / "config.json"), facts)


def check_record(config: Config, before: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raise UsageError where `before`, the run's config.json, is of another run than `config` and `facts`.

    It may have another task, other keys, other data, or other weights to start from.
    """
    if before["task"] != facts["task"]:
        raise UsageError(f"run {config.run_id} is a run of {before['task']}: use another --run_id")
    check_same(config, before["config"])
    # The source of weights may hold the version of a package, so only their content is compared.
    weights, own_weights = (content.get("weights", {}).get("sha256") for content in (before, facts))
    data = before["data_fingerprint"]
    problem = ""
    if data != facts["data_fingerprint"]:
        problem = f"started on other data (its fingerprint was {data}): use that data"
    elif weights != own_weights:
        problem = f"started from other weights (their sha256 was {weights}): use those"
    if problem:
        raise UsageError(f"run {config.run_id} was {problem} or another --run_id")


def check_same(
    config: Config, before: Mapping[str, Any], remedy: str = "use that one or another --run_id"
) -> None:
    """Raise UsageError, naming the differing keys, where the run was started with another configuration."""
    now, before = config.identity(), public(before)
    differing = [f"{name} was {before.get(name)}" for name in now if before.get(name) != now[name]]
    if differing:
        raise UsageError(
            f"run {config.run_id} was started with another configuration ({', '.join(differing)}): {remedy}"
        )


def send(run: Any, action: Callable[[Any], None]) -> Any:
    """Do something with W&B's run, if there is one. An error there ends W&B's run, never ours.

    Returns the run, or None after an error.
    """
    if run is None:
        return None
    try:
        action(run)
    except Exception as error:  # W&B raises many types, and none of them may end a training run
        print(f"W&B stopped ({public(first_line(error))}); the local records continue", file=sys.stderr)
        return None
    return run


def wandb_mode(asked: str) -> str:
    """Resolve `auto`: $WANDB_MODE, else online where an API key is configured, else offline."""
    if asked != "auto":
        return asked
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    known = None
    with suppress(OSError, netrc.NetrcParseError):  # where `wandb login` keeps the key
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host or "")
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"


def start_wandb(task: str, run_id: str, config: ScriptConfig, facts: Mapping[str, Any], network: str) -> Any:
    """A W&B run, or None where W&B is disabled or cannot start; `network` is described in its displayed name."""
    mode = wandb_mode(config.wandb)
    if mode == "disabled":
        return None
    import wandb  # a second of import that a disabled run does not pay for

    logging.raiseExceptions = False  # else W&B's log on a full disk prints a traceback for each of its lines
    settings = wandb.Settings(
        silent=True,
        console="off",
        save_code=False,
        x_disable_meta=True,  # it holds the paths of this machine; config.json has the command and the commit
        x_disable_stats=os.environ.get("WANDB_X_DISABLE_STATS", "true").lower() != "false",
        init_timeout=WANDB_PATIENCE,
        finish_timeout=WANDB_PATIENCE,
        finish_timeout_raises=False,
    )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    project = os.environ.get("WANDB_PROJECT") or WANDB_PROJECT
    keys, source = config.as_dict(), provenance(())
    tags = [task, keys.get("model_name", network)[:64], pathmnist.NAME if not facts["synthetic"] else "phantom"]
    for attempt in (mode, "offline"):
        try:
            wandb.setup(settings)  # silent before init: else W&B prints its server's address with the password
            run = wandb.init(
                project=project,
                id=run_id,
                name=f"{TITLES[task]} · {network} · seed {config.seed}",
                tags=tags,
                group=os.environ.get("WANDB_RUN_GROUP") or group(task, config),
                job_type=task,
                config=public({**keys, "facts": facts, "commit": source["commit"], "command": source["command"]}),
                dir=str(config.output_dir),
                mode=attempt,  # type: ignore[arg-type]
                resume="allow",
                settings=settings,
            )
        except Exception as error:  # W&B raises many types, and none of them may end a training run
            print(f"W&B {attempt} failed ({public(first_line(error))})", file=sys.stderr)
            wandb.teardown()  # else its service holds the run's id, and the second attempt is refused
            continue
        run.define_metric("*", step_metric="epoch")
        print(public(f"W&B: {attempt}, project {project}, run {address(run) or run.dir}"))
        return run
    return None


def address(run: Any) -> str | None:
    """The address of W&B's run; None offline, where W&B would print a warning if it were asked."""
    return None if run.offline else public(run.url)


def group(task: str, config: ScriptConfig) -> str:
    """The W&B group of a run: runs that differ in the seed alone share it."""
    same = {name: value for name, value in config.identity().items() if name not in ("seed", "run_id")}
    return f"{task}-{hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]}"


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
    """The repository's commit, with `-dirty` where tracked code differs from it; None outside a checkout.

    Records, figures and tables may differ: the files that one run writes do not make the next run's commit dirty.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
