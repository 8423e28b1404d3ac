"""The one training loop: train an epoch, validate, keep the best weights; at the end score the test split."""

import math
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.cli import Fault, Untrainable, progress
from common.config import TrainingConfig
from common.data.batches import Splits, batches, device_splits
from common.data.dataset import load_dataset
from common.data.pathmnist import CLASS_NAMES
from common.files import atomic_path
from common.records import checkpoint
from common.records.run import Run
from common.training.averaging import ExponentialMovingAverage, reestimate_batchnorm
from common.training.device import Compute
from common.training.evaluation import best_epoch, evaluate, reason_to_stop, scores_of
from common.training.models import build_model
from common.training.optimizer import build_optimizer, learning_rate_factor

BATCHNORM_TILES = 2048  # enough for an error of a few percent, in a small part of an epoch's time


def derived_seed(seed: int, epoch: int, purpose: str) -> int:
    """A different seed for each epoch and purpose, so that a run can be resumed at any epoch."""
    entropy = [seed, epoch, *purpose.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`: a GPU run shuffles and augments as a CPU run does."""
    return torch.Generator().manual_seed(derived_seed(seed, epoch, purpose))


class Trainer:
    """One network in training, with everything that training changes and that a checkpoint must hold.

    `model` is the network that steps change. `evaluated` is the network that is validated and tested: the moving
    average (EMA) of `model` where the configuration asks for one, else `model` itself. `history` has one row for
    each finished epoch, with the columns of history.csv.
    """

    def __init__(
        self,
        model: nn.Module,
        splits: Splits,
        config: TrainingConfig,
        compute: Compute,
        run: Run,
        *,
        lr_factors: Mapping[str, float] = {},
    ) -> None:
        """Move the model to the device, build its optimiser, and load the run's last checkpoint if there is one.

        Raises Fault where the checkpoint cannot be read, or best.pt is missing.
        """
        self.splits, self.config, self.compute, self.run = splits, config, compute, run
        self.model = model.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(self.model, config, lr_factors)
        self.steps_per_epoch = len(batches(len(splits.train), config.batch_size))
        n_steps, decay = config.n_epochs * self.steps_per_epoch, config.ema_decay
        self.average = ExponentialMovingAverage(self.model, decay, n_steps) if decay else None
        self.evaluated = self.average.model if self.average else self.model
        self.history: list[dict[str, float]] = []
        self.bar = progress(disable=True)
        self.restore()

    @property
    def best_epoch(self) -> int:
        """The number of the best epoch so far."""
        return best_epoch(self.history, self.config.select_on)

    def fit(self) -> None:
        """Train until there is a reason to stop; the best weights are then in best.pt.

        After each epoch last.pt and history.csv are written, after a best one also best.pt: a kill loses the epoch
        in progress and no more. Raises Untrainable where loss or outputs are not finite.
        """
        n_tiles = self.steps_per_epoch * math.ceil(len(self.splits.train) / self.steps_per_epoch)  # some twice
        total, done = self.config.n_epochs * n_tiles, len(self.history) * n_tiles
        with progress(total=total, initial=done, unit=" tiles", smoothing=0) as self.bar:
            while not (reason := reason_to_stop(self.history, self.config)):
                self.history.append(self.train_and_validate(len(self.history) + 1))
                self.save_last()
                if self.best_epoch == len(self.history):
                    self.save_best()
                self.run.log_epoch(self.history)
        print(f"training ended: {reason}; best epoch {self.best_epoch} by {self.config.select_on}")

    def train_and_validate(self, epoch: int) -> dict[str, float]:
        """Train one epoch and validate; returns the epoch's row of the history. Raises what `fit` does."""
        started = time.perf_counter()
        loss = self.train_epoch(epoch)
        seconds = time.perf_counter() - started
        if self.average or self.config.reestimate_batchnorm:
            reestimate_batchnorm(self.evaluated, self.clean_inputs())
        return {
            "epoch": epoch,
            "train/loss": loss,
            **evaluate(self.evaluated, self.splits.val).epoch_scores(),
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "tiles_per_second": len(self.splits.train) / seconds,
            "seconds": time.perf_counter() - started,
        }

    def train_epoch(self, epoch: int) -> float:
        """Pass once over the training tiles; returns the mean loss of a tile. `epoch` counts from 1.

        The loss is read once a second and at the end, because a GPU waits while a value is read.
        """
        config, tiles = self.config, self.splits.train
        self.model.train()
        rng = generator(config.seed, epoch, "augment")
        torch.manual_seed(derived_seed(config.seed, epoch, "dropout"))
        shuffle = generator(config.seed, epoch, "shuffle")
        order = batches(len(tiles), config.batch_size, shuffle)
        total, seen, read = torch.zeros((), device=self.compute.device), 0, time.monotonic()
        self.bar.set_description(f"epoch {epoch}/{config.n_epochs}", refresh=False)
        for step, batch in enumerate(order, start=(epoch - 1) * self.steps_per_epoch):
            factor = learning_rate_factor(step, self.steps_per_epoch, config)
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * group.get("lr_factor", 1.0) * factor
            inputs, labels = tiles.inputs(batch, rng)
            with self.compute.autocast():
                loss = F.cross_entropy(self.model(inputs), labels, label_smoothing=config.label_smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            if self.average:
                self.average.update(self.model, step)
            total += loss.detach() * len(batch)
            seen += len(batch)
            self.bar.update(len(batch))
            if time.monotonic() - read > 1:
                self.bar.set_postfix(loss=f"{read_loss(total, epoch) / seen:.3f}", refresh=False)
                read = time.monotonic()
        return read_loss(total, epoch) / seen

    def test(self) -> dict[str, Any]:
        """Score test tiles, unless `test` is off, and validation tiles, plain and shifted, with the best weights.

        Writes scores.npz. Returns the content of summary.json without the facts that `Run` adds; see `scores_of`.
        """
        print("scoring the best weights, also on validation tiles with other colours", flush=True)
        started = time.perf_counter()
        score = partial(evaluate, self.evaluated)
        path = self.run.checkpoints / "best.pt"
        checkpoint.load_state_dict(self.evaluated, checkpoint.load(path, "state_dict")["state_dict"], path)
        arrays = {}
        if self.config.test:
            best = score(test := self.splits.test()).rounded()
            arrays = {"best_logits": best.logits, "targets": best.targets}
            if self.config.tta:
                arrays["tta_classes"] = score(test, tta=True).predicted
        validation = score(self.splits.val)
        arrays |= {"validate_classes": validation.predicted, "validate_targets": validation.targets}
        arrays |= {f"shifted_{name}": score(tiles).predicted for name, tiles in self.splits.shifted()}
        with atomic_path(self.run.folder / "scores.npz") as temporary:
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
        return {
            **scores_of(arrays, history=self.history, select_on=self.config.select_on),
            "select_on": self.config.select_on,
            "stopped": reason_to_stop(self.history, self.config),
            "wall_seconds": sum(row["seconds"] for row in self.history) + time.perf_counter() - started,
        }

    def clean_inputs(self) -> Iterator[torch.Tensor]:
        """Tiles to measure BatchNorm's statistics on: random training tiles, the same each time, not augmented."""
        tiles = self.splits.train
        order = torch.randperm(len(tiles), generator=generator(self.config.seed, 0, "batchnorm"))[:BATCHNORM_TILES]
        for places in batches(len(order), tiles.at_once):
            yield tiles.inputs(order[places])[0]

    def save_best(self) -> None:
        """Write best.pt: the evaluated weights, and the keys that a reader must know to use them."""
        content = {"state_dict": self.evaluated.state_dict(), "config": self.config.as_dict()}
        checkpoint.save(self.run.checkpoints / "best.pt", content)

    def save_last(self) -> None:
        """Write last.pt, all that training needs to continue."""
        content = {
            "state_dict": self.model.state_dict(),
            "evaluated_state_dict": self.evaluated.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }
        checkpoint.save(self.run.last_checkpoint, content)

    def restore(self) -> None:
        """Load the run's last checkpoint, if there is one; raises what the constructor does."""
        path = self.run.last_checkpoint
        if not path.exists():
            return
        saved = checkpoint.load(path, "state_dict", "evaluated_state_dict", "optimizer", "history")
        checkpoint.load_state_dict(self.model, saved["state_dict"], path)
        checkpoint.load_state_dict(self.evaluated, saved["evaluated_state_dict"], path)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.history = saved["history"]
        print(f"continuing run {self.run.run_id} after epoch {len(self.history)}")
        if self.best_epoch == len(self.history):  # a kill may have come after last.pt and before the other two
            self.save_best()
        elif not (best := self.run.checkpoints / "best.pt").exists():  # else a run would fail after hours
            raise Fault(f"{best}: missing; restore it, or train again with another --run_id")
        self.run.log_epoch(self.history)


def read_loss(total: torch.Tensor, epoch: int) -> float:
    """An epoch's sum of losses () as a number; raises Untrainable where it is not finite."""
    loss = float(total)
    if not math.isfinite(loss):
        raise Untrainable(f"the loss became {loss} in epoch {epoch}; start a new run with a lower --lr")
    return loss


def train_from_scratch(task: str, config: TrainingConfig) -> None:
    """A run of Tasks 1, 3 and 4: model → data → fit → test → records and figures."""
    compute = Compute.of(config.device, config.precision).prepare_process()
    torch.manual_seed(config.seed)
    model = build_model(config.model_name, len(CLASS_NAMES), config.input_size)
    dataset = load_dataset(config.dataset, config.size, config.data_root, config.train_tiles)
    run = Run(task, config, dataset, compute.name)
    trainer = Trainer(model, device_splits(dataset, config, compute.device), config, compute, run)
    trainer.fit()
    run.finish(trainer.history, trainer.test())
