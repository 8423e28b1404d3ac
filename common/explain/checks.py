"""Can attribution maps be trusted? The first two of these measures decide; the third one is only shown.

- Randomisation (Adebayo et al. 2018): the network's layers are initialised again, one after the other from the
  last to the first. A map of what the network learnt must then rank the pixels in another way.
- Deletion and insertion (Petsiuk et al. 2018): pixels are blurred, or restored, in the map's order. In a faithful
  order the target's probability falls, or rises, sooner than in a random order or in the order of the edges.
- Infidelity (Yeh et al. 2019), by Captum.

Inputs are (N, 3, H, W) float32 in -1..1, targets (N,) int64, maps (N, H, W) float32, as in common/explain/maps.py.
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from captum.metrics import infidelity as captum_infidelity
from numpy.typing import NDArray
from scipy import stats
from torch import nn
from torchvision.transforms.v2.functional import gaussian_blur

from common.data.batches import at_once
from common.explain.maps import METHODS, edge_map, smoothgrad_noise
from common.explain.stages import stages
from common.statistics import spread

FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CONTROLS = {"random": "Random order", "sobel": "Sobel edges"}
# A method fails if its maps keep more than this rank correlation, of either sign, when all weights are random.
RANDOMISATION_LIMIT = 0.5
MIN_CHECKED_TILES = 16  # of fewer tiles, a t interval says too little for a verdict
COSTLY = {"randomisation": 32, "infidelity": 64}  # at most so many tiles for these checks
INFIDELITY_SAMPLES = 16

PASSES, FAILS, TOO_FEW = "passes", "does not pass", "too few tiles to judge"

Array = NDArray[Any]


def area(curves: Array) -> Array:
    """The area under deletion or insertion curves: (…, F) to (…)."""
    return np.asarray(np.trapezoid(curves, FRACTIONS, axis=-1))


def mean_estimate(values: Array) -> dict[str, float]:
    """The mean of one value per tile, and the ends of its 95 % t interval: `value`, `low`, `high`."""
    over_tiles = spread(values.tolist())
    return {"value": over_tiles.mean, "low": over_tiles.low, "high": over_tiles.high}


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> Array:
    """Each tile's Spearman correlation of two maps' absolute values, (N,); 0 where a map is constant."""
    ranks = [stats.rankdata(maps.abs().flatten(1).cpu().numpy(), axis=1) for maps in (first, second)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.asarray(np.divide((a * b).sum(axis=1), scale, out=np.zeros(len(a)), where=scale > 0))


def randomised(model: nn.Module, fresh: nn.Module, image: torch.Tensor) -> dict[str, nn.Module]:
    """For each of the network's `stages`, a copy of `model` that has the weights of `fresh` from this stage on."""
    networks, network, random = {}, model, fresh.state_dict()
    for stage, names in stages(model, image).items():
        network = copy.deepcopy(network)
        network.load_state_dict({name: random[name] for name in names}, strict=False)
        networks[stage] = network
    return networks


def blurred(inputs: torch.Tensor) -> torch.Tensor:
    """The tile after a Gaussian blur whose sigma is an eighth of its side; removed pixels get its values."""
    sigma = inputs.shape[-1] / 8
    width = 2 * round(3 * sigma) + 1
    for kernel in ([width, 1], [1, width]):  # much faster than both axes at once
        inputs = gaussian_blur(inputs, kernel, [sigma, sigma])
    return inputs


@torch.no_grad()
def removal(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, maps: torch.Tensor, seed: int
) -> dict[str, Array]:
    """Blur pixels in the map's order, highest first (`deletion`), or restore them in a blurred tile (`insertion`).

    Each curve is the target's probability at each of `FRACTIONS`, (N, F). Pixels of equal value, of which a
    rectified map has many, are in random order.
    """
    n_pixels = maps[0].numel()
    shuffle = torch.randperm(n_pixels, generator=torch.Generator().manual_seed(seed)).to(maps.device)
    order = shuffle[maps.flatten(1)[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    rank = order.argsort(dim=1).view_as(maps)[:, None]
    without = blurred(inputs)

    def curve(start: torch.Tensor, end: torch.Tensor) -> Array:
        columns = []
        for share in FRACTIONS:
            mixed = torch.where(rank < round(share * n_pixels), end, start)
            parts = torch.split(mixed, at_once(inputs.shape[-1]))
            probabilities = torch.cat([model(part).float().softmax(1) for part in parts])
            columns.append(probabilities.gather(1, targets[:, None])[:, 0])
        return np.asarray(torch.stack(columns, 1).double().cpu())

    return {"deletion": curve(inputs, without), "insertion": curve(without, inputs)}


def infidelity(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, maps: torch.Tensor, seed: int
) -> Array:
    """How badly the map's sum over a square predicts the logit's fall when the square is blurred, (N,), logit².

    Captum's normalised infidelity, so that a map's scale does not matter: the mean squared error over
    `INFIDELITY_SAMPLES` random squares, a quarter to half of the tile wide, the same for every method.
    """
    random = np.random.default_rng(seed)
    size = inputs.shape[-1]

    def remove_squares(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.zeros(len(batch), 1, size, size)
        for square in mask:
            width = int(random.integers(size // 4, size // 2 + 1))
            top, left = random.integers(0, size - width + 1, 2)
            square[:, top : top + width, left : left + width] = 1
        mask = mask.to(batch.device)
        return mask.expand_as(batch), torch.where(mask > 0, blurred(batch), batch)

    attributions = maps[:, None].expand_as(inputs)  # their scale does not matter
    options = {"target": targets, "n_perturb_samples": INFIDELITY_SAMPLES, "normalize": True}
    options["max_examples_per_batch"] = max(len(inputs), at_once(size, INFIDELITY_SAMPLES * len(inputs)))
    with torch.no_grad():
        errors = captum_infidelity(model, remove_squares, inputs, attributions, **options)
    return np.asarray(errors.double().cpu())


@torch.no_grad()
def keeps_class(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, seed: int) -> Array:
    """The share of a tile's copies with SmoothGrad's noise that the network takes for the target, (N,)."""
    kept = [model(inputs + sample).argmax(1) == targets for sample in smoothgrad_noise(inputs, seed)]
    return np.asarray(torch.stack(kept).double().mean(0).cpu())


def control_maps(inputs: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Maps that do not depend on a network: random values, and the tile's edges."""
    random = torch.Generator().manual_seed(seed)
    chance = torch.rand(len(inputs), *inputs.shape[2:], generator=random).to(inputs.device)
    return {"random": chance, "sobel": edge_map(inputs)}


def removal_report(removals: Mapping[str, Mapping[str, Array]]) -> dict[str, Any]:
    """The curves and areas of each map's order, and its lead over the controls: means over tiles with intervals.

    `margin` is insertion area minus deletion area; `margin_over_…` is its paired difference, tile by tile.
    """
    margins = {name: area(curves["insertion"]) - area(curves["deletion"]) for name, curves in removals.items()}
    report: dict[str, Any] = {}
    for name, curves in removals.items():
        report[name] = {
            **{kind: mean_estimate(area(curve)) for kind, curve in curves.items()},
            "margin": mean_estimate(margins[name]),
            **{f"{kind}_curve": [mean_estimate(column) for column in curve.T] for kind, curve in curves.items()},
        }
        if name not in CONTROLS:
            for control in CONTROLS:
                report[name][f"margin_over_{control}"] = mean_estimate(margins[name] - margins[control])
    return report


def judge(method: Mapping[str, Any], n: Mapping[str, int]) -> tuple[str, tuple[str, ...]]:
    """Judge a method by its numbers in attribution.json; `n` are the record's numbers of tiles.

    Returns `PASSES`, `FAILS` or `TOO_FEW`, and which conditions fail, in words. A method passes if its maps lose
    their order when the whole network is random (the interval of the mean rank correlation lies within plus and
    minus `RANDOMISATION_LIMIT`), and its order beats both controls at deletion and insertion (the interval of the
    paired margin starts above 0).
    """
    *_, random = method["randomisation"].values()
    conditions = {
        "maps lose their order with random weights": max(-random["low"], random["high"]) < RANDOMISATION_LIMIT,
        "pixels are better than a random order": method["margin_over_random"]["low"] > 0,
        "pixels are better than plain edges": method["margin_over_sobel"]["low"] > 0,
    }
    failed = tuple(name for name, holds in conditions.items() if not holds)
    few = min(n["randomisation"], n["removal"]) < MIN_CHECKED_TILES
    return TOO_FEW if few else FAILS if failed else PASSES, failed


def chance(n_methods: int) -> str:
    """How many tests the verdicts of so many methods are, and what passing by chance would look like, in words."""
    luck = 1 - 0.975**n_methods
    return (
        f"{n_methods * (1 + len(CONTROLS))} tests, not corrected for their number: if all {n_methods} methods "
        f"were pure noise, one would pass in at most about {luck:.0%} of such studies."
    )


def check_methods(
    model: nn.Module, fresh: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, seed: int
) -> tuple[dict[str, Any], dict[str, list[Array]]]:
    """Every check of every method; `fresh` is the same network with random weights.

    Returns a record, with `methods` and `controls` by name and `n` tiles per check, and the mean absolute map of
    each method, (H, W), of the network and of the random one. The `COSTLY` checks take only the first tiles.
    """
    n = {"removal": len(inputs), **{check: min(most, len(inputs)) for check, most in COSTLY.items()}}
    few = n["randomisation"]
    networks = randomised(model, fresh, inputs[:1])
    maps, methods, means = control_maps(inputs, seed), {}, {}
    for number, (name, method) in enumerate(METHODS.items(), start=1):
        print(f"{method.title} ({number} of {len(METHODS)}): maps of {1 + len(networks)} networks", flush=True)
        maps[name] = method.maps(model, inputs, targets, seed)
        correlations = {}
        for stage, network in networks.items():
            of_random = method.maps(network, inputs[:few], targets[:few], seed)
            correlations[stage] = mean_estimate(rank_correlation(maps[name][:few], of_random))
        # `of_random` is now that of the last stage: a network whose weights are all random.
        means[name] = [some.abs().mean(0).cpu().numpy() for some in (maps[name][:few], of_random)]
        methods[name] = {"title": method.title, "randomisation": correlations}
    controls: dict[str, dict[str, Any]] = {name: {"title": title} for name, title in CONTROLS.items()}
    print(f"deletion, insertion and infidelity of {len(maps)} orders of pixels", flush=True)
    faithful = removal_report(
        {name: removal(model, inputs, targets, values, seed) for name, values in maps.items()}
    )
    few = n["infidelity"]
    for name, found in {**methods, **controls}.items():
        errors = infidelity(model, inputs[:few], targets[:few], maps[name][:few], seed)
        found |= {"infidelity": mean_estimate(errors), **faithful[name]}
    kept = mean_estimate(keeps_class(model, inputs[:few], targets[:few], seed))
    record = {"n": n, "fractions": FRACTIONS, "methods": methods, "controls": controls}
    return {**record, "smoothgrad_keeps_class": kept}, means
