"""Can attribution maps be trusted? Checks of every method against a randomised network, removal, and chance.

- Randomisation (Adebayo et al. 2018): the network's layers are initialised afresh, one after the other from the
  last to the first. A map of what the network learnt must lose its order of pixels.
- Deletion and insertion (Petsiuk et al. 2018): pixels are blurred away, or brought back, in the map's order. A
  faithful order makes the target's probability fall, or rise, sooner than a random one, and sooner than edges do.
- Infidelity and maximum sensitivity (Yeh et al. 2019), by Captum.

Inputs are (N, 3, H, W) float32 in -1..1, targets (N,) int64, maps (N, H, W) float32, as in common/attribution.py.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max as captum_sensitivity_max
from numpy.typing import NDArray
from scipy import stats
from torch import nn
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from common.attribution import (
    FORWARD_BATCH,
    INPUT_RANGE,
    METHODS,
    edge_map,
    integrated_gradients_with_error,
)
from common.metrics import Estimate
from common.statistics import spread

# The order in which randomisation proceeds: ResNet's parts from the logits to the tile.
STAGES = ("fc", "layer4", "layer3", "layer2", "layer1", "conv1")
FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CONTROLS = {"random": "Random order", "sobel": "Sobel edges"}
# A method whose maps keep more than this rank correlation on a wholly random network is said to fail.
RANDOMISATION_LIMIT = 0.5
SENSITIVITY_RADIUS = 0.02 * INPUT_RANGE
SENSITIVITY_SAMPLES = 4
INFIDELITY_SAMPLES = 16
RANDOMISED, INFIDELITY_TILES, SENSITIVE = 32, 64, 16  # tiles for the checks that make many maps a tile

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Removal:
    """What one order of pixels does: the target's probability at each of `FRACTIONS`, (N, F) each."""

    deletion: Array
    insertion: Array

    @property
    def deletion_area(self) -> Array:
        """The area under each tile's deletion curve, (N,): the lower, the better."""
        return np.asarray(np.trapezoid(self.deletion, FRACTIONS, axis=1))

    @property
    def insertion_area(self) -> Array:
        """The area under each tile's insertion curve, (N,): the higher, the better."""
        return np.asarray(np.trapezoid(self.insertion, FRACTIONS, axis=1))


def mean_estimate(values: Array) -> Estimate:
    """The mean of values that each come from one tile, with its 95 % t interval."""
    if len(values) < 2:
        raise ValueError("an interval needs at least two tiles")
    over_tiles = spread(values.tolist())
    return Estimate(over_tiles.mean, over_tiles.low, over_tiles.high)


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> Array:
    """Each tile's Spearman correlation of two maps' absolute values, (N,); 0 where a map is constant."""
    ranks = [stats.rankdata(maps.abs().flatten(1).cpu().numpy(), axis=1) for maps in (first, second)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.asarray(np.divide((a * b).sum(axis=1), scale, out=np.zeros(len(a)), where=scale > 0))


def randomised(model: nn.Module, fresh: nn.Module) -> list[tuple[str, nn.Module]]:
    """Copies of `model` whose parts, from `STAGES`' first to each in turn, are those of the untrained `fresh`.

    The first convolution's stage takes the BatchNorm layer after it along.
    """
    networks, state, untrained = [], model.state_dict(), fresh.state_dict()
    for stage in STAGES:
        prefixes = ("conv1.", "bn1.") if stage == "conv1" else (f"{stage}.",)
        state = {name: untrained[name] if name.startswith(prefixes) else state[name] for name in state}
        network = copy.deepcopy(model)
        network.load_state_dict(state)
        networks.append((stage, network.eval()))
    return networks


def blurred(inputs: torch.Tensor) -> torch.Tensor:
    """The tile without detail: a Gaussian of an eighth of its side. It is what removed pixels are replaced by."""
    sigma = inputs.shape[-1] / 8
    radius = min(round(3 * sigma), inputs.shape[-1] - 1)  # reflection needs a radius below the side
    output: torch.Tensor = gaussian_blur(inputs, [2 * radius + 1] * 2, [sigma, sigma])
    return output


@torch.no_grad()
def removal(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, maps: torch.Tensor, seed: int
) -> Removal:
    """Blur pixels away from the map's highest on, and bring them back into the blurred tile likewise.

    Equal values, of which a rectified map has many, are taken in random order.
    """
    n_pixels = maps[0].numel()
    shuffle = torch.randperm(n_pixels, generator=torch.Generator().manual_seed(seed)).to(maps.device)
    order = shuffle[maps.flatten(1)[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n_pixels, device=maps.device).expand_as(order))
    rank = rank.view_as(maps)[:, None]
    without = blurred(inputs)

    def curve(start: torch.Tensor, end: torch.Tensor) -> Array:
        steps = [torch.where(rank < round(share * n_pixels), end, start) for share in FRACTIONS]
        columns = [_probability(model, step, targets) for step in steps]
        return np.asarray(torch.stack(columns, 1).double().cpu())

    return Removal(deletion=curve(inputs, without), insertion=curve(without, inputs))


def infidelity(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, maps: torch.Tensor, seed: int
) -> Array:
    """How badly a map's sum over a square tells how far the logit falls when the square is blurred, (N,), logit².

    Captum's normalised infidelity, so that a map's scale does not matter: the mean squared error over
    `INFIDELITY_SAMPLES` random squares, a quarter to half of the tile wide, the same for every method.
    """
    draws = np.random.default_rng(seed)
    size = inputs.shape[-1]

    def remove_squares(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.zeros(len(batch), 1, size, size)
        for square in mask:
            width = int(draws.integers(size // 4, size // 2 + 1))
            top, left = draws.integers(0, size - width + 1, 2)
            square[:, top : top + width, left : left + width] = 1
        mask = mask.to(batch.device)
        return mask.expand_as(batch), torch.where(mask > 0, blurred(batch), batch)

    attributions = maps[:, None].expand_as(inputs) / inputs.shape[1]
    with torch.no_grad():
        errors = captum_infidelity(
            model,
            remove_squares,
            inputs,
            attributions,
            target=targets,
            n_perturb_samples=INFIDELITY_SAMPLES,
            normalize=True,
        )
    return np.asarray(errors.double().cpu())


def max_sensitivity(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, method: str, seed: int
) -> Array:
    """The largest change of a map, as a share of its norm, under small random changes of the tile, (N,).

    `SENSITIVITY_SAMPLES` changes of at most `SENSITIVITY_RADIUS` a value; Captum's measure.
    """

    def explain(batch: tuple[torch.Tensor], target: torch.Tensor) -> tuple[torch.Tensor]:
        return (METHODS[method].maps(model, batch[0], target, seed),)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changes = captum_sensitivity_max(
            explain,
            inputs,
            perturb_radius=SENSITIVITY_RADIUS,
            n_perturb_samples=SENSITIVITY_SAMPLES,
            target=targets,
        )
    return np.asarray(changes.double().cpu())


def control_maps(inputs: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """The two orders that know no network: chance, and the tile's own edges."""
    draws = torch.Generator().manual_seed(seed)
    random = torch.rand(len(inputs), *inputs.shape[2:], generator=draws).to(inputs.device)
    return {"random": random, "sobel": edge_map(inputs)}


def removal_report(removals: Mapping[str, Removal]) -> dict[str, Any]:
    """Each order's curves and areas as means over tiles with intervals, and what sets it apart from the controls.

    `margin` is insertion area minus deletion area; `margin_over_random` and `margin_over_sobel` are the paired
    differences, tile by tile.
    """
    margins = {name: order.insertion_area - order.deletion_area for name, order in removals.items()}
    report: dict[str, Any] = {}
    for name, order in removals.items():
        report[name] = {
            "deletion": vars(mean_estimate(order.deletion_area)),
            "insertion": vars(mean_estimate(order.insertion_area)),
            "margin": vars(mean_estimate(margins[name])),
            "deletion_curve": [vars(mean_estimate(column)) for column in order.deletion.T],
            "insertion_curve": [vars(mean_estimate(column)) for column in order.insertion.T],
        }
        for control in CONTROLS:
            if name not in CONTROLS:
                report[name][f"margin_over_{control}"] = vars(mean_estimate(margins[name] - margins[control]))
    return report


def judge(
    title: str, randomisation: Mapping[str, Mapping[str, float]], faithful: Mapping[str, Any]
) -> dict[str, Any]:
    """Whether a method passes, and why, in words made from the numbers.

    It passes where its maps lose their order on the wholly randomised network (the interval's upper end of the
    mean rank correlation lies below `RANDOMISATION_LIMIT`) and its order beats both controls at deletion and
    insertion (the paired margin's interval lies above 0).
    """
    last = randomisation[STAGES[-1]]
    forgets = last["high"] < RANDOMISATION_LIMIT
    beats = {name: faithful[f"margin_over_{name}"]["low"] > 0 for name in CONTROLS}
    passes = forgets and all(beats.values())
    order = "lose" if forgets else "keep much of" if last["low"] >= RANDOMISATION_LIMIT else "do not surely lose"
    reasons = [f"its maps {order} their order when the network is randomised (rank correlation {_words(last)})"]
    for control, words in (("random", "chance"), ("sobel", "plain edges")):
        margin = faithful[f"margin_over_{control}"]
        verb = "find what the network relies on better than" if beats[control] else "do not surely beat"
        reasons.append(f"its pixels {verb} {words} (margin {_words(margin, signed=True)})")
    return {
        "passes": passes,
        "verdict": f"{title} {'passes' if passes else 'does not pass'}: {'; '.join(reasons)}.",
    }


def check_methods(
    model: nn.Module, fresh: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, seed: int
) -> dict[str, Any]:
    """Every check of every method, as a record: `methods` and `controls` by name, `n` tiles a check, `seconds`.

    The costly checks take the first tiles only: `RANDOMISED`, `INFIDELITY_TILES`, `SENSITIVE`.
    """
    n = {
        "removal": len(inputs),
        "randomisation": min(RANDOMISED, len(inputs)),
        "infidelity": min(INFIDELITY_TILES, len(inputs)),
        "max_sensitivity": min(SENSITIVE, len(inputs)),
    }
    clock = _Clock(len(METHODS) * (len(STAGES) + 4) + len(CONTROLS) * 2)
    maps: dict[str, torch.Tensor] = {}
    removals: dict[str, Removal] = {}
    errors: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    ranks: dict[str, dict[str, Any]] = {}
    networks = randomised(model, fresh)
    for name, method in METHODS.items():
        with clock.part(f"maps: {method.title}"):
            maps[name] = in_batches(lambda x, y: method.maps(model, x, y, seed), inputs, targets)  # noqa: B023
        with clock.part(f"sensitivity: {method.title}"):
            some = slice(n["max_sensitivity"])
            values = max_sensitivity(model, inputs[some], targets[some], name, seed)
            changes[name] = vars(mean_estimate(values))
        ranks[name] = {}
        some = slice(n["randomisation"])
        for stage, network in networks:
            with clock.part(f"randomisation: {method.title}"):
                other = in_batches(lambda x, y: method.maps(network, x, y, seed), inputs[some], targets[some])  # noqa: B023
                ranks[name][stage] = vars(mean_estimate(rank_correlation(maps[name][some], other)))
    maps.update(control_maps(inputs, seed))
    for name in maps:
        with clock.part("deletion and insertion"):
            removals[name] = removal(model, inputs, targets, maps[name], seed)
        with clock.part("infidelity"):
            some = slice(n["infidelity"])
            values = infidelity(model, inputs[some], targets[some], maps[name][some], seed)
            errors[name] = vars(mean_estimate(values))
    faithful = removal_report(removals)
    some = slice(n["infidelity"])
    relative_error = in_batches(
        lambda x, y: integrated_gradients_with_error(model, x, y)[1], inputs[some], targets[some]
    )
    clock.close()
    return {
        "n": n,
        "fractions": FRACTIONS,
        "randomisation_limit": RANDOMISATION_LIMIT,
        "methods": {
            name: {
                "title": method.title,
                "description": method.description,
                **judge(method.title, ranks[name], faithful[name]),
                "randomisation": ranks[name],
                "edge_correlation": vars(mean_estimate(rank_correlation(maps[name], maps["sobel"]))),
                "infidelity": errors[name],
                "max_sensitivity": changes[name],
                **faithful[name],
            }
            for name, method in METHODS.items()
        },
        "controls": {
            name: {"title": title, "infidelity": errors[name], **faithful[name]}
            for name, title in CONTROLS.items()
        },
        "integrated_gradients_error": {
            "median": relative_error.median().item(),
            "percentile_90": relative_error.quantile(0.9).item(),
            "n": len(relative_error),
        },
        "seconds": clock.seconds,
    }


class _Clock:
    """A progress bar over the parts of a long computation that also adds up where the time goes."""

    def __init__(self, n_parts: int) -> None:
        self.seconds: dict[str, float] = {}
        self._bar: Any = tqdm(total=n_parts, unit=" parts", leave=False, disable=None, dynamic_ncols=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._bar.set_description(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def in_batches(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    batch: int = 64,
) -> torch.Tensor:
    """`function(inputs, targets)` over parts of a batch, joined; it bounds the memory that methods need."""
    parts = zip(torch.split(inputs, batch), torch.split(targets, batch), strict=True)
    return torch.cat([function(images, labels) for images, labels in parts])


def _probability(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    probabilities = torch.cat([model(part).float().softmax(1) for part in torch.split(inputs, FORWARD_BATCH)])
    return probabilities.gather(1, targets[:, None])[:, 0]


def _words(estimate: Mapping[str, float], signed: bool = False) -> str:
    value, low, high = (f"{estimate[end]:{'+' if signed else ''}.2f}" for end in ("value", "low", "high"))
    return f"{value}, 95 % {low} to {high}"
