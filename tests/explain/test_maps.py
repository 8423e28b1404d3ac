"""The attribution methods and their checks, on networks for which the right answer is known."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from common.explain import checks
from common.explain import maps as methods
from common.explain.checks import (
    FRACTIONS,
    area,
    blurred,
    chance,
    check_methods,
    control_maps,
    infidelity,
    judge,
    keeps_class,
    mean_estimate,
    randomised,
    rank_correlation,
    removal,
    removal_report,
)
from common.explain.maps import METHODS, edge_map
from common.explain.stages import stages
from common.training.models import build_model

SIZE = 28


class Corner(nn.Module):
    """Class 1's logit is the darkness of the 7x7 corner at the top left; class 0's is always 0."""

    def __init__(self, scale: float = 5.0) -> None:
        super().__init__()
        self.scale = scale
        self.unchanged = nn.Conv2d(3, 3, 1, bias=False)  # Grad-CAM's layer
        nn.init.eye_(self.unchanged.weight[:, :, 0, 0])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        darkness = 1 - self.unchanged(inputs)[:, :, :7, :7].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(darkness), self.scale * darkness - self.scale / 2], 1)


@pytest.fixture
def corner() -> nn.Module:
    return Corner().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet18", 9, SIZE).eval().requires_grad_(False)


def tiles(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def dark_corner(count: int) -> torch.Tensor:
    """Mid-grey noise with a nearly black corner."""
    inputs = tiles(count) * 0.2
    inputs[:, :, :7, :7] -= 0.7
    return inputs


@pytest.mark.parametrize("name", METHODS)
def test_a_map_has_the_tile_s_shape_a_known_range_and_depends_on_the_class_and_not_on_the_batch(
    name: str, resnet: nn.Module
) -> None:
    inputs, targets = tiles(4), torch.tensor([0, 3, 5, 8])
    maps = METHODS[name].maps(resnet, inputs, targets, 0)
    assert maps.shape == (4, SIZE, SIZE)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert maps.abs().amax((1, 2)).min() > 0
    assert (maps.min() < 0) == METHODS[name].signed
    alone = METHODS[name].maps(resnet, inputs[2:3], targets[2:3], 0)
    assert (alone - maps[2:3]).abs().max() < 1e-3 * maps[2].abs().max()
    other_class = METHODS[name].maps(resnet, inputs[2:3], targets[3:], 0)
    assert not torch.allclose(alone, other_class)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "grad_cam"])
def test_a_map_is_high_at_the_pixels_that_the_logit_depends_on(name: str, corner: nn.Module) -> None:
    maps = METHODS[name].maps(corner, dark_corner(3), torch.ones(3, dtype=torch.int64), 0).abs()
    white = METHODS[name].maps(corner, torch.ones(1, 3, SIZE, SIZE), torch.ones(1, dtype=torch.int64), 0)
    assert (white.abs().max() == 0) == METHODS[name].signed  # white is the baseline of the signed maps
    inside = maps[:, :7, :7].sum((1, 2)) / maps.sum((1, 2))
    assert inside.min() > (0.5 if name == "occlusion" else 0.999)  # occlusion's squares overlap the border
    assert maps[0, 0].count_nonzero() == (11 if name == "occlusion" else 7)  # squares of 7 pixels, from 0, 4, 8 …


@pytest.mark.parametrize(
    ("name", "limit"), [*zip(METHODS, (16, 16, 128, 16, 128), strict=True), ("removal", 128), ("infidelity", 72)]
)
def test_fewer_large_inputs_pass_through_the_network_at_once(
    name: str, limit: int, corner: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "blurred", torch.zeros_like)  # seconds faster
    sizes: list[int] = []
    corner.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    inputs, targets = torch.zeros(130, 3, 128, 128), torch.ones(130, dtype=torch.int64)
    if name == "removal":
        removal(corner, inputs, targets, inputs[:, 0], 0)
    elif name == "infidelity":  # 4 of 16 squares at once, as at half the side all 16
        infidelity(corner, inputs[:18], targets[:18], inputs[:18, 0], 0)
    else:
        METHODS[name].maps(corner, inputs[:18], targets[:18], 0)
    assert max(sizes) == limit


def test_the_settings_of_methods_and_checks_are_those_of_the_papers_and_of_the_page() -> None:
    assert (methods.SMOOTHGRAD_SAMPLES, methods.SMOOTHGRAD_NOISE, methods.INTEGRATION_STEPS) == (16, 0.3, 48)
    assert (checks.COSTLY, checks.INFIDELITY_SAMPLES) == ({"randomisation": 32, "infidelity": 64}, 16)


def test_saliency_is_the_largest_gradient_of_a_pixel_s_channels(resnet: nn.Module) -> None:
    leaf, targets = tiles(2).requires_grad_(), torch.tensor([0, 3])
    resnet(leaf).gather(1, targets[:, None]).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(METHODS["saliency"].maps(resnet, tiles(2), targets, 0), leaf.grad.abs().amax(1))


def test_grad_cam_is_high_at_the_right_place_in_the_layer(corner: nn.Module) -> None:
    # With a negative scale, a bright corner speaks for class 1.
    bright = -dark_corner(2)
    network = Corner(-5.0).eval()
    maps = METHODS["grad_cam"].maps(network, bright, torch.ones(2, dtype=torch.int64), 0)
    assert maps[:, :7, :7].mean() > 3 * maps[:, 7:, 7:].mean()


def test_smoothgrad_depends_on_its_seed_and_not_on_the_global_random_generator(resnet: nn.Module) -> None:
    targets = torch.tensor([0, 1])
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    maps = [METHODS["smoothgrad"].maps(resnet, tiles(2), targets, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(maps[0], maps[1])
    assert not torch.allclose(maps[0], maps[2])
    noise = torch.randn(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 0.3
    leaf = (tiles(2)[:1] + noise).requires_grad_()
    resnet(leaf)[:, 0].sum().backward()
    torch.testing.assert_close(maps[0][0], leaf.grad.abs().mean(0).amax(0))


def test_the_class_must_survive_smoothgrad_s_noise() -> None:
    def network(inputs: torch.Tensor) -> torch.Tensor:
        """Class 1 where the first pixel is brighter than grey."""
        return torch.stack([torch.zeros(len(inputs)), inputs[:, 0, 0, 0]], 1)

    inputs = torch.zeros(4, 3, SIZE, SIZE)
    inputs[2:] = torch.tensor([1.0, -1.0])[:, None, None, None]  # noise of 0.3 does not change these
    kept = keeps_class(network, inputs, torch.tensor([0, 1, 1, 1]), 0)
    assert kept.tolist() == [0.625, 0.375, 1, 0]  # 10 and 6 of 16 copies


def test_integrated_gradients_add_up_to_the_logit_s_difference(corner: nn.Module) -> None:
    inputs = dark_corner(3)
    targets = torch.ones(3, dtype=torch.int64)
    maps = METHODS["integrated_gradients"].maps(corner, inputs, targets, 0)
    difference = corner(inputs)[:, 1] - corner(torch.ones_like(inputs))[:, 1]
    torch.testing.assert_close(maps.sum((1, 2)), difference, rtol=1e-4, atol=1e-4)


def test_edges_are_sobel_s() -> None:
    step = torch.full((1, 3, SIZE, SIZE), -1.0)
    step[..., 14:] = 1.0
    edges = edge_map(step)[0]
    assert edges[:, 13:15].min() == 8  # 1 + 2 + 1 times the step of 2
    assert edges[:, :13].max() == 0 == edges[:, 15:].max()


def test_rank_correlation_is_spearman_s_of_absolute_values() -> None:
    from scipy.stats import spearmanr

    first, second = tiles(4)[:, 0], tiles(4, seed=1)[:, 0]
    second[0] = -first[0]
    second[3] = 0.5
    pairs = zip(first[:3].abs().flatten(1), second[:3].abs().flatten(1), strict=True)
    expected = [spearmanr(*pair).statistic for pair in pairs]
    got = rank_correlation(first, second)
    np.testing.assert_allclose(got[:3], expected, atol=1e-9)
    assert got[0] == pytest.approx(1)
    assert got[3] == 0  # a constant map has no order


def test_randomisation_cascades_from_the_last_layer_to_the_first(resnet: nn.Module) -> None:
    torch.manual_seed(1)
    fresh = build_model("resnet18", 9, SIZE)
    learnt = copy.deepcopy(resnet)
    with torch.no_grad():  # otherwise the BatchNorm layers would be equal in both
        for value in learnt.state_dict().values():
            value.add_(1)
    networks = randomised(learnt, fresh, tiles(1))
    order = ["fc", "layer4", "layer3", "layer2", "layer1", "conv1"]
    assert len(networks) == len(order)
    trained, untrained = learnt.state_dict(), fresh.state_dict()
    for number, network in enumerate(networks.values(), start=1):
        assert not network.training
        random_stages = order[:number]
        for name, value in network.state_dict().items():
            stage = {"bn1": "conv1"}.get(name.split(".")[0], name.split(".")[0])
            assert torch.equal(value, (untrained if stage in random_stages else trained)[name]), name


def test_removal_follows_the_map_and_ends_at_the_blurred_tile(corner: nn.Module) -> None:
    inputs, targets = dark_corner(4), torch.ones(4, dtype=torch.int64)
    inside = torch.zeros(4, SIZE, SIZE)
    inside[:, :7, :7] = 1
    good, bad = (removal(corner, inputs, targets, maps, 0) for maps in (inside, -inside))
    probabilities = [corner(images).softmax(1)[:, 1].double().numpy() for images in (inputs, blurred(inputs))]
    for order in (good, bad):
        np.testing.assert_allclose(order["deletion"][:, [0, -1]].T, probabilities, rtol=1e-6)
        np.testing.assert_allclose(order["insertion"][:, [-1, 0]].T, probabilities, rtol=1e-6)
    tenth = FRACTIONS.index(0.1)  # the corner is a sixteenth of the tile
    np.testing.assert_allclose(good["deletion"][:, tenth], good["deletion"][:, -1], rtol=1e-6)
    np.testing.assert_allclose(bad["deletion"][:, tenth], bad["deletion"][:, 0], rtol=1e-6)
    assert (area(good["deletion"]) < area(bad["deletion"])).all()
    assert (area(good["insertion"]) > area(bad["insertion"])).all()


def test_equal_values_are_removed_in_random_order(corner: nn.Module) -> None:
    inputs, targets = dark_corner(1), torch.ones(1, dtype=torch.int64)
    flat = removal(corner, inputs, targets, torch.zeros(1, SIZE, SIZE), 0)
    start, half, end = flat["deletion"][0, [0, FRACTIONS.index(0.5), -1]]
    assert 0.2 < (half - end) / (start - end) < 0.95  # row by row, the whole corner would already be blurred


def test_infidelity_is_lowest_for_the_map_that_predicts_the_fall(corner: nn.Module) -> None:
    inputs, targets = dark_corner(4), torch.ones(4, dtype=torch.int64)
    true_effect = (corner.scale / 147) * (blurred(inputs) - inputs).sum(1)
    true_effect[:, 7:] = 0
    true_effect[:, :, 7:] = 0
    right, scaled, wrong = (
        infidelity(corner, inputs, targets, maps, 0)
        for maps in (true_effect, 100 * true_effect, control_maps(inputs, 0)["random"])
    )
    assert right.max() < 1e-6
    np.testing.assert_allclose(scaled, right, atol=1e-6)
    assert wrong.mean() > 0.01  # the mean, because a tile whose squares all miss the corner has no fall


def test_infidelity_is_a_mean_of_squares() -> None:
    def network(inputs: torch.Tensor) -> torch.Tensor:
        """Logits of 0, or of 3 for a tile that is not changed."""
        return (3.0 * (inputs.abs().amin((1, 2, 3)) == 1))[:, None].expand(-1, 2)

    inputs = tiles(2).sign()
    errors = infidelity(network, inputs, torch.ones(2, dtype=torch.int64), torch.zeros(2, SIZE, SIZE), 0)
    assert errors.tolist() == [9, 9]  # a map of zeros predicts no fall, but each square makes the logit fall by 3


def test_the_blur_s_deviation_is_an_eighth_of_the_side() -> None:
    point = torch.zeros(1, 3, 32, 32)
    point[..., 16, 16] = 1
    spread = blurred(point)[0, 0]
    for off_centre in (spread[20, 16], spread[16, 20]):
        assert off_centre / spread[16, 16] == pytest.approx(0.6065, abs=1e-4)  # exp(-1/2) at 4 pixels
    assert spread[26, 16] / spread[16, 16] == pytest.approx(0.0439, abs=1e-4)  # exp(-100/32) at 10


def test_every_check_gets_its_tiles_maps_and_networks(
    resnet: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saliency = METHODS["saliency"]
    monkeypatch.setattr(checks, "METHODS", {"saliency": saliency})
    monkeypatch.setattr(checks, "COSTLY", {"randomisation": 3, "infidelity": 3})
    torch.manual_seed(1)
    fresh = build_model("resnet18", 9, SIZE).eval().requires_grad_(False)
    inputs, targets = tiles(4), torch.tensor([0, 3, 5, 8])
    checked, means = check_methods(resnet, fresh, inputs, targets, 0)
    assert capsys.readouterr().out.splitlines()[0] == "Saliency (1 of 1): maps of 7 networks"
    assert checked["n"] == {"removal": 4, "randomisation": 3, "infidelity": 3}
    maps = saliency.maps(resnet, inputs, targets, 0)
    got = checked["methods"]["saliency"]
    assert list(got["randomisation"]) == list(stages(resnet, inputs[:1]))
    for stage, network in randomised(resnet, fresh, inputs[:1]).items():
        of_random = saliency.maps(network, inputs[:3], targets[:3], 0)
        assert got["randomisation"][stage] == mean_estimate(rank_correlation(maps[:3], of_random))
    for mean, of in zip(
        means["saliency"], (maps[:3], saliency.maps(fresh, inputs[:3], targets[:3], 0)), strict=True
    ):
        np.testing.assert_allclose(mean, of.mean(0), rtol=1e-5)
    kept = keeps_class(resnet, inputs[:3], targets[:3], 0)
    assert checked["smoothgrad_keeps_class"] == mean_estimate(kept)
    assert got["infidelity"] == mean_estimate(infidelity(resnet, inputs[:3], targets[:3], maps[:3], 0))
    edges = removal(resnet, inputs, targets, edge_map(inputs), 0)
    assert checked["controls"]["sobel"]["deletion"] == mean_estimate(area(edges["deletion"]))


@pytest.mark.parametrize(
    ("correlation", "over_random", "over_sobel", "failed"),
    [
        (0.4, 0.1, 0.1, []),
        (0.48, 0.1, 0.1, ["maps lose their order with random weights"]),
        (-0.48, 0.1, 0.1, ["maps lose their order with random weights"]),  # the reverse order is the order, too
        (0.4, 0.02, 0.1, ["pixels are better than a random order"]),
        (0.4, -0.1, 0.02, ["pixels are better than a random order", "pixels are better than plain edges"]),
    ],
)
def test_a_method_passes_only_if_every_interval_is_on_the_right_side(
    correlation: float, over_random: float, over_sobel: float, failed: list[str]
) -> None:
    def around(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.05, "high": value + 0.05}

    method = {
        "randomisation": {"head": around(0.95), "14": around(correlation)},  # in the last one, all weights
        "margin_over_random": around(over_random),
        "margin_over_sobel": around(over_sobel),
    }
    outcome = "does not pass" if failed else "passes"
    assert judge(method, {"randomisation": 16, "removal": 16}) == (outcome, tuple(failed))
    assert judge(method, {"randomisation": 15, "removal": 256})[0] == "too few tiles to judge"


def test_the_reader_is_told_what_passing_by_chance_looks_like() -> None:
    assert chance(5).startswith("15 tests, not corrected for their number: if all 5 methods were pure noise,")
    assert chance(5).endswith("one would pass in at most about 12% of such studies.")


def test_margins_are_paired_tile_by_tile() -> None:
    rising = np.linspace(0, 1, len(FRACTIONS))
    level = np.array([[0.2], [0.6], [0.4]])  # the tiles differ much more than the orders

    def order(gain: float) -> dict[str, np.ndarray]:
        return {"deletion": level - gain * rising, "insertion": level + 0 * rising}

    report = removal_report({"saliency": order(0.1), "random": order(0.0), "sobel": order(0.05)})
    margin = report["saliency"]["margin_over_random"]
    area = 0.1 * np.trapezoid(rising, FRACTIONS)
    assert [margin[end] for end in ("value", "low", "high")] == pytest.approx([area] * 3)
    assert report["saliency"]["margin_over_sobel"]["value"] == pytest.approx(area / 2)
    assert report["saliency"]["deletion"]["high"] - report["saliency"]["deletion"]["low"] > 0.5
