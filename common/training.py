"""The one training loop: fit a network, keep its best and last weights, score the test split once."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import checkpoint, distributed, metrics
from common.augment import Augmentation, build_augmentation, dihedral_views
from common.averaging import ExponentialMovingAverage, reestimate_batchnorm
from common.compute import Compute
from common.config import TrainingConfig
from common.data import Dataset, DeviceTiles
from common.errors import Fault, first_line
from common.features import CachedFeatures
from common.interruption import Interruption
from common.mixing import Mixed, mix
from common.models import normalise
from common.shift import shifted
from common.tracking import Run

Tiles = DeviceTiles | CachedFeatures
EVALUATION_BATCH = 512
BATCHNORM_TILES = 2048  # enough for statistics good to a few percent, at a small part of an epoch's cost
HISTORY_COLUMNS = (
    "epoch",
    "train/loss",
    "validate/loss",
    "validate/auc",
    "validate/acc",
    "lr",
    "tiles_per_second",
    "seconds",
)


@dataclass(frozen=True)
class Evaluation:
    """A split's logits (N, C) float32 and targets (N,) int64, in the split's own order."""

    logits: np.ndarray
    targets: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits, (N, C) float64."""
        return metrics.softmax(self.logits)

    def summary(self, split: str) -> dict[str, float]:
        """Loss (mean cross-entropy), AUC and ACC under the coursework's keys, such as `validate/auc`."""
        loss = F.cross_entropy(torch.from_numpy(self.logits), torch.from_numpy(self.targets)).item()
        probabilities = self.probabilities
        return {
            f"{split}/loss": loss,
            f"{split}/auc": metrics.auc(probabilities, self.targets),
            f"{split}/acc": metrics.accuracy(probabilities, self.targets),
        }


@dataclass(frozen=True)
class Fitted:
    """What `fit` returns: copies of the best and the last judged weights, and how they came about.

    Judged weights are those that validation sees: the EMA where there is one.
    """

    best: dict[str, torch.Tensor]
    last: dict[str, torch.Tensor]
    best_epoch: int
    history: list[dict[str, float]]
    stopped: str  # why training ended


class EpochCut(Exception):
    """An epoch was left after a step; `begun` is what `train_one_epoch` needs to go on from there."""

    def __init__(self, begun: dict[str, Any]) -> None:
        super().__init__()
        self.begun = begun


def derived_seed(seed: int, epoch: int, purpose: str) -> int:
    """A seed of its own for each epoch and purpose, so that a run can be resumed at any epoch."""
    entropy = [seed, epoch, *purpose.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`: a GPU run shuffles and augments as a CPU run does."""
    return torch.Generator().manual_seed(derived_seed(seed, epoch, purpose))


def _draws_state(draws: torch.Generator, device: torch.device) -> dict[str, torch.Tensor]:
    """Where the augmentation's generator and those of dropout stand."""
    state = {"augment": draws.get_state(), "cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore_draws(draws: torch.Generator, device: torch.device, state: Mapping[str, torch.Tensor]) -> None:
    draws.set_state(state["augment"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def batches(
    n_tiles: int, batch_size: int, device: torch.device, shuffle: torch.Generator | None = None
) -> list[torch.Tensor]:
    """Cut 0..n_tiles-1 into batches of int64 indices on `device`, each index once, shuffled if asked.

    The fewest batches that `batch_size` allows, equal in size up to one tile: a last batch of a few leftover
    tiles would spoil BatchNorm's running statistics, and of a single tile could not be trained on at all.
    """
    order = torch.randperm(n_tiles, generator=shuffle) if shuffle else torch.arange(n_tiles)
    n_batches = max(1, min(math.ceil(n_tiles / batch_size), n_tiles // 2))
    return list(order.to(device).tensor_split(n_batches))


def learning_rate_factor(step: int, steps_per_epoch: int, config: TrainingConfig) -> float:
    """The factor of lr at `step`: a linear warm-up to 1, then half a cosine to `lr_min` at the last step.

    Warm-up after Goyal et al. 2017, cosine after Loshchilov & Hutter 2017, both by the step.
    """
    warmup = config.lr_warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr_warmup_decay + (1 - config.lr_warmup_decay) * step / warmup
    progress = (step - warmup) / max(1, config.n_epochs * steps_per_epoch - 1 - warmup)
    return config.lr_min + (1 - config.lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    model: nn.Module, config: TrainingConfig, lr_factors: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The fused optimiser that the configuration names, over every trainable parameter.

    Parameters of one dimension (norm layers' and biases) form a group of their own with `norm_weight_decay`.
    `lr_factors` multiply the learning rate of the parameters that they name; each factor has its groups.
    """
    norm_decay = config.weight_decay if config.norm_weight_decay is None else config.norm_weight_decay
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    factors = {name: (lr_factors or {}).get(name, 1.0) for name, _ in trainable}
    groups = []
    for factor in dict.fromkeys(factors.values()):
        members = [parameter for name, parameter in trainable if factors[name] == factor]
        shared = {} if factor == 1 else {"lr_factor": factor}
        groups += [
            {"params": [p for p in members if p.ndim > 1], "weight_decay": config.weight_decay, **shared},
            {"params": [p for p in members if p.ndim <= 1], "weight_decay": norm_decay, **shared},
        ]
    optimizers: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer: torch.optim.Optimizer
    optimizer = optimizers[config.optimizer](groups, lr=config.lr, amsgrad=config.amsgrad, fused=True)
    return optimizer


def train_one_epoch(
    model: nn.Module,
    tiles: Tiles,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    config: TrainingConfig,
    compute: Compute,
    average: ExponentialMovingAverage | None = None,
    interruption: Interruption | None = None,
    begun: Mapping[str, Any] | None = None,
) -> float:
    """One pass over the training tiles; returns the mean loss a tile. `epoch` counts from 1.

    Of each batch a process takes its share, with draws of its own, and gradients are as those of the whole batch.

    The loss stays on the device: it is read once a second, for the progress bar and to stop a run whose
    loss is no longer finite (Fault), and once at the end. Raises EpochCut after the step in which an
    `interruption` came; what that holds goes on, as `begun`, as if nothing had been.
    """
    model.train()
    augment = build_augmentation(config.augmentation)
    own = f"-{distributed.rank()}" if distributed.rank() else ""
    draws = generator(config.seed, epoch, f"augment{own}")
    torch.manual_seed(derived_seed(config.seed, epoch, f"dropout{own}"))
    shuffle = generator(config.seed, epoch, "shuffle")
    parts = batches(len(tiles), config.batch_size, tiles.index_device, shuffle)
    total = torch.zeros((), device=compute.device)
    done = 0
    if begun:
        done, total = begun["steps"], begun["total"].to(compute.device)
        _restore_draws(draws, compute.device, begun["draws"])
    seen = sum(map(len, parts[:done]))
    looked = time.monotonic()
    with _bar(f"epoch {epoch}/{config.n_epochs}", len(tiles)) as bar:
        bar.update(seen)
        first = (epoch - 1) * len(parts)
        for step, part in enumerate(parts[done:], start=first + done):
            for group in optimizer.param_groups:
                peak = config.lr * group.get("lr_factor", 1.0)
                group["lr"] = peak * learning_rate_factor(step, len(parts), config)
            shared = distributed.share(part)
            inputs, targets = _inputs(tiles, shared, augment, draws)
            mixed = mix(inputs, draws, config.mixup_alpha, config.cutmix_alpha)
            with compute.autocast():
                loss = _loss(model(mixed.inputs), targets, mixed, config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            # The mean over processes that follows is the batch's only if every tile weighs the same.
            weight = len(shared) * distributed.world_size() / len(part)
            (loss * weight if weight != 1 else loss).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if average:
                average.update(model, step)
            total += loss.detach() * len(shared)
            seen += len(shared)
            bar.update(len(part))
            if time.monotonic() - looked > 1:
                bar.set_postfix(loss=f"{_finite(total, epoch) / seen:.3f}")
                looked = time.monotonic()
            if interruption and interruption.came and distributed.world_size() == 1:
                _finite(total, epoch)
                state = _draws_state(draws, compute.device)
                raise EpochCut({"steps": step + 1 - first, "total": total.cpu(), "draws": state})
        return _finite(distributed.total(total), epoch) / len(tiles)


@torch.no_grad()
def evaluate(model: nn.Module, tiles: Tiles, compute: Compute, tta: bool = False) -> Evaluation:
    """The logits of every tile, in order, from the model in eval mode; Fault where they are not finite.

    With `tta` the logits are the logarithm of the mean probability over the tile's 8 dihedral views. Processes
    share the tiles, and each gets all logits.
    """
    model.eval()
    logits, targets = [], []
    own = distributed.share(torch.arange(len(tiles), device=tiles.index_device))
    with _bar("evaluate", len(own)) as bar:
        for number in batches(len(own), EVALUATION_BATCH, tiles.index_device):
            part = own[number]
            with compute.autocast():
                if tta:
                    inputs, labels = _views(tiles, part)
                    views = [model(view).float().log_softmax(1) for view in inputs]
                    logits.append(torch.stack(views).logsumexp(0) - math.log(len(views)))
                else:
                    images, labels = _inputs(tiles, part)
                    logits.append(model(images).float())
            targets.append(labels)
            bar.update(len(part))
    scores = distributed.gathered(torch.cat(logits), len(tiles))
    if not scores.isfinite().all():
        raise Fault("the network's outputs are no longer finite; lower --lr")
    labels = distributed.gathered(torch.cat(targets), len(tiles))
    return Evaluation(scores.cpu().numpy(), labels.cpu().numpy())


def fit(
    model: nn.Module,
    dataset: Dataset,
    config: TrainingConfig,
    compute: Compute,
    run: Run,
    *,
    train: Tiles | None = None,
    val: Tiles | None = None,
    lr_factors: Mapping[str, float] | None = None,
    before_epoch: Callable[[nn.Module, int], None] | None = None,
) -> Fitted:
    """Train for the configured epochs, or on from the run's last checkpoint, and keep the best weights.

    After each epoch best.pt (if the epoch is the best so far), last.pt and history.csv are written whole, so
    that a kill loses at most the epoch in progress; the last.pt before stays as previous.pt, in case. Ctrl-C and
    SIGTERM lose nothing: after the step in progress last.pt is written, and Stopped raised. `train` and `val`
    stand in for the data set's tiles. `before_epoch` gets the network, and its EMA, with the number of the epoch
    about to start. Raises Fault where the loss is no longer finite, or no checkpoint can be read.
    """
    model.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = distributed.synchronised(model, compute.device)
    train = train or DeviceTiles(dataset.train, compute.device)
    val = val or DeviceTiles(dataset.val, compute.device)
    optimizer = build_optimizer(model, config, lr_factors)
    average = None
    if config.ema_decay:
        steps = config.n_epochs * len(batches(len(train), config.batch_size, train.index_device))
        average = ExponentialMovingAverage(model, config.ema_decay, steps)
    judged = average.model if average else model
    last_path, previous_path = run.resumable
    best_path = run.checkpoints / "best.pt"
    history, begun = _restore(run, config, model, judged, optimizer)
    trained = distributed.parallel(model, changing=before_epoch is not None)

    def save(begun: Mapping[str, Any] | None = None) -> None:
        if not distributed.is_first():
            return
        content = {
            "state_dict": model.state_dict(),
            "judged_state_dict": judged.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
            "begun": begun,
            "config": config.as_dict(),
        }
        checkpoint.save(last_path, content, previous_path)

    with Interruption() as interruption:
        while not (stopped := reason_to_stop(history, config)):
            started = time.perf_counter()
            epoch = len(history) + 1
            if before_epoch:
                for network in {model, judged}:
                    before_epoch(network, epoch)
            try:
                loss = train_one_epoch(
                    trained, train, optimizer, epoch, config, compute, average, interruption, begun
                )
            except EpochCut as cut:
                save(cut.begun)
                done = f"after epoch {len(history)} and {cut.begun['steps']} steps"
                raise interruption.stopped(f"run {run.run_id} is saved {done}") from None
            begun = None
            seconds = time.perf_counter() - started
            distributed.same_buffers(model)
            if average or config.reestimate_batchnorm:
                reestimate_batchnorm(judged, _clean_inputs(train, config.seed))
            row = {
                "epoch": epoch,
                "train/loss": loss,
                **evaluate(judged, val, compute).summary("validate"),
                "lr": max(group["lr"] for group in optimizer.param_groups),
                "tiles_per_second": len(train) / seconds,
                "seconds": time.perf_counter() - started,
            }
            history.append({column: row[column] for column in HISTORY_COLUMNS})
            if best_epoch(history, config.select_on) == epoch and distributed.is_first():
                checkpoint.save(best_path, _best_content(judged, dataset, config, epoch))
            save()
            run.log_epoch(history)
            if distributed.any_of_all(interruption.came is not None, compute.device):
                raise interruption.stopped(f"run {run.run_id} is saved after epoch {epoch}")
    best = best_epoch(history, config.select_on)
    print(f"training ended: {stopped}; best epoch {best} by {config.select_on}")
    best_weights = checkpoint.load(best_path)["state_dict"]
    return Fitted(best_weights, checkpoint.copy_weights(judged), best, history, stopped)


def _restore(
    run: Run, config: TrainingConfig, model: nn.Module, judged: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[dict[str, float]], Mapping[str, Any] | None]:
    """Put the run's last checkpoint, if it has one, into place; its history, and the epoch that it has begun."""
    saved = checkpoint.load_newest(*run.resumable)
    if saved is None:
        return [], None
    try:
        run.check_same(config, saved["config"])
        model.load_state_dict(saved["state_dict"])
        judged.load_state_dict(saved["judged_state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
        history, begun = saved["history"], saved["begun"]
    except (KeyError, RuntimeError, ValueError) as error:
        raise Fault(
            f"{run.resumable[0]}: not a checkpoint that a run can go on from ({first_line(error)}); train anew "
            "under another --run_id"
        ) from error
    print(
        f"continuing run {run.run_id} after epoch {len(history)}"
        + (f" and {begun['steps']} steps" if begun else "")
    )
    if history:
        run.write_history(history)  # the kill may have come between last.pt and it
    return history, begun


def best_epoch(history: list[dict[str, float]], select_on: str) -> int:
    """The number of the epoch with the least error by `select_on`, the first of equals; or the last epoch."""
    if select_on == "last":
        return len(history)
    errors = [_error(row, select_on) for row in history]
    return errors.index(min(errors)) + 1


def reason_to_stop(history: list[dict[str, float]], config: TrainingConfig) -> str:
    """Why training is over, or an empty string while it goes on.

    Early stopping counts the epochs since the error last fell by the fraction `early_stopping_delta`. It is a
    fraction because ACC saturates: from .98 on, no epoch gains .01 twice. Epochs of the warm-up do not count.
    With `select_on=last` the validation loss is watched.
    """
    if len(history) >= config.n_epochs:
        return f"all {config.n_epochs} epochs done"
    if config.early_stopping_patience is None:
        return ""
    metric = "validate/loss" if config.select_on == "last" else config.select_on
    reference, reference_epoch = math.inf, config.lr_warmup_epochs
    for epoch, row in enumerate(history, start=1):
        error = _error(row, metric)
        if error < reference * (1 - config.early_stopping_delta):
            reference, reference_epoch = error, max(epoch, config.lr_warmup_epochs)
    if len(history) - reference_epoch < config.early_stopping_patience:
        return ""
    return (
        f"early stopping after epoch {len(history)}: none since epoch {reference_epoch} cut the error by "
        f"{metric} by {config.early_stopping_delta:.0%}"
    )


def score_test_split(
    model: nn.Module,
    fitted: Fitted,
    dataset: Dataset,
    config: TrainingConfig,
    compute: Compute,
    run: Run,
    *,
    val: Tiles | None = None,
    test: Tiles | None = None,
) -> dict[str, Any]:
    """Score the test tiles once, with the best weights and with the last ones; write scores.npz.

    The best weights are also scored on the validation tiles, plain and under each shift of common/shift.py.

    Returns the content of summary.json but for the run's own facts. The model is left with its best weights.
    `val` and `test` stand in for the data set's tiles.
    """
    started = time.perf_counter()
    test = test or DeviceTiles(dataset.test, compute.device)
    val = val or DeviceTiles(dataset.val, compute.device)
    scores: dict[str, Evaluation] = {}
    model.load_state_dict(fitted.last)
    scores["last"] = evaluate(model, test, compute)
    model.load_state_dict(fitted.best)
    scores["best"] = evaluate(model, test, compute)
    if config.tta:
        scores["tta"] = evaluate(model, test, compute, tta=True)
    validation = evaluate(model, val, compute)
    foreign = {
        name: evaluate(model, DeviceTiles(split, compute.device), compute) for name, split in shifted(dataset.val)
    }
    run.save_scores(
        **{f"{name}_logits": evaluation.logits for name, evaluation in scores.items()},
        targets=scores["best"].targets,
        validate_logits=validation.logits,
        validate_targets=validation.targets,
        **{
            f"shifted_{name}": evaluation.logits.argmax(1).astype(np.uint8) for name, evaluation in foreign.items()
        },
    )
    shifted_acc = {
        name: metrics.accuracy(evaluation.probabilities, evaluation.targets)
        for name, evaluation in foreign.items()
    }
    described = {name: _described(evaluation, dataset.class_names) for name, evaluation in scores.items()}
    epochs = {"best": fitted.best_epoch, "tta": fitted.best_epoch, "last": len(fitted.history)}
    return {
        "test/auc": described["best"]["auc"]["value"],
        "test/acc": described["best"]["acc"]["value"],
        **{name: {"epoch": epochs[name], **described[name]} for name in described},
        "validate": fitted.history[fitted.best_epoch - 1],
        "validate/shifted_acc": fmean(shifted_acc.values()),
        "shifted": shifted_acc,
        "select_on": config.select_on,
        "stopped": fitted.stopped,
        "wall_seconds": sum(row["seconds"] for row in fitted.history) + time.perf_counter() - started,
    }


def _described(scores: Evaluation, class_names: tuple[str, ...]) -> dict[str, Any]:
    probabilities, targets = scores.probabilities, scores.targets
    per_class = metrics.auc_per_class(probabilities, targets)
    return {
        "n": len(targets),
        "auc": vars(metrics.auc_estimate(probabilities, targets)),
        "acc": vars(metrics.accuracy_estimate(probabilities, targets)),
        "expected_calibration_error": metrics.expected_calibration_error(probabilities, targets),
        "auc_per_class": {
            name: None if math.isnan(value) else value
            for name, value in zip(class_names, per_class.tolist(), strict=True)
        },
        "confusion_matrix": metrics.confusion_matrix(probabilities, targets).tolist(),
    }


def _error(row: dict[str, float], metric: str) -> float:
    """What selection minimises: the loss, or what AUC or ACC lack to 1; NaN counts as worst."""
    error = row[metric] if metric == "validate/loss" else 1 - row[metric]
    return math.inf if math.isnan(error) else error


def _best_content(model: nn.Module, dataset: Dataset, config: TrainingConfig, epoch: int) -> dict[str, Any]:
    return {
        "state_dict": model.state_dict(),
        "epoch": epoch,
        "model_name": config.model_name,
        "class_names": list(dataset.class_names),
        "dataset": dataset.title,
        "size": dataset.size,
        "config": config.as_dict(),
    }


def _inputs(
    tiles: Tiles, part: torch.Tensor, augment: Augmentation | None = None, draws: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network takes in the place of these tiles, augmented if asked, and their labels."""
    if isinstance(tiles, CachedFeatures):
        return tiles.batch(part, draws)
    images, targets = tiles.batch(part)
    if augment and draws:
        images = augment(images, draws)
    return normalise(images), targets


def _views(tiles: Tiles, part: torch.Tensor) -> tuple[torch.Tensor | Iterator[torch.Tensor], torch.Tensor]:
    """The 8 dihedral views of these tiles as the network takes them, one after the other, and their labels."""
    if isinstance(tiles, CachedFeatures):
        return tiles.views(part)
    images, targets = tiles.batch(part)
    return map(normalise, dihedral_views(images)), targets


def _clean_inputs(tiles: Tiles, seed: int) -> Iterator[torch.Tensor]:
    """The same random training tiles each time, not augmented, as BatchNorm re-estimation takes them."""
    order = torch.randperm(len(tiles), generator=generator(seed, 0, "batchnorm"))[:BATCHNORM_TILES]
    for part in torch.split(order, EVALUATION_BATCH):
        inputs, _ = _inputs(tiles, part.to(tiles.index_device))
        yield inputs


def _loss(logits: torch.Tensor, targets: torch.Tensor, mixed: Mixed, label_smoothing: float) -> torch.Tensor:
    """Mean cross-entropy, each tile's own label and its partner's weighted by their shares."""
    if mixed.partners is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    own, partners = (
        F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
        for labels in (targets, targets[mixed.partners])
    )
    return (mixed.shares * own + (1 - mixed.shares) * partners).mean()


def _finite(total: torch.Tensor, epoch: int) -> float:
    loss = float(total)
    if not math.isfinite(loss):
        raise Fault(
            f"the loss became {loss} in epoch {epoch}; lower --lr. last.pt keeps the epoch before it, if any"
        )
    return loss


def _bar(description: str, n_tiles: int) -> Any:
    return tqdm(total=n_tiles, desc=description, unit=" tiles", leave=False, disable=None, dynamic_ncols=True)
