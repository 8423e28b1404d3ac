import pytest
import torch

from common.training.loss import Mixed, cross_entropy, mix


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def constant_tiles(n: int = 400) -> torch.Tensor:
    """Tile i is i everywhere, so that a mixed pixel tells where it came from."""
    return torch.arange(float(n))[:, None, None, None].expand(n, 3, 28, 28).contiguous()


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_the_share_is_what_the_pixels_say(mixup: float, cutmix: float) -> None:
    inputs = constant_tiles()
    mixed = mix(inputs, draws(), mixup, cutmix)
    assert mixed.partners is not None
    assert mixed.shares is not None
    own, partner = torch.arange(400.0), mixed.partners.float()
    expected = mixed.shares * own + (1 - mixed.shares) * partner
    torch.testing.assert_close(mixed.inputs.mean(dim=(1, 2, 3)), expected, rtol=1e-4, atol=1e-2)


def test_mixup_blends_and_cutmix_patches() -> None:
    inputs = constant_tiles()
    for tile, values in enumerate(map(torch.unique, mix(inputs, draws(), 1.0, 0.0).inputs)):
        assert len(values) == 1, tile
    mixed = mix(inputs, draws(), 0.0, 1.0)
    assert mixed.partners is not None
    for tile, values in enumerate(map(torch.unique, mixed.inputs)):
        assert set(values.tolist()) <= {float(tile), float(mixed.partners[tile])}


def test_every_tile_has_its_own_share_spread_as_beta() -> None:
    shares = mix(constant_tiles(4000), draws(), 0.5, 0.0).shares
    assert shares is not None
    assert len(shares.unique()) > 3900
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.5 + 1)), abs=0.01)  # Beta(a, a)'s variance


def test_switched_off_it_is_the_identity_and_draws_nothing() -> None:
    inputs, generator = constant_tiles(8), draws()
    before = generator.get_state()
    mixed = mix(inputs, generator, 0.0, 0.0)
    assert mixed.inputs is inputs
    assert mixed.partners is None
    assert mixed.shares is None
    assert torch.equal(generator.get_state(), before)


def test_the_cut_rectangles_area_is_the_partners_share() -> None:
    # Beta(10 000, 10 000) is one half, nearly: a rectangle that the border does not clip has half of the tile.
    shares = mix(constant_tiles(), draws(), 0.0, 1e4).shares
    assert shares is not None
    assert shares.min().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_the_loss_of_a_mixed_tile_has_its_labels_and_its_partners_share(label_smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator)
    labels, partners = torch.arange(6), torch.tensor([3, 4, 5, 0, 1, 2])
    shares = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.2, 0.0])

    def smoothed(classes: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(classes, 9) * (1 - label_smoothing) + label_smoothing / 9

    def loss(targets: torch.Tensor) -> torch.Tensor:
        return -(targets * logits.log_softmax(1)).sum(1).mean()

    mixed_targets = shares[:, None] * smoothed(labels) + (1 - shares)[:, None] * smoothed(labels[partners])
    mixed = Mixed(torch.empty(0), partners, shares)
    torch.testing.assert_close(cross_entropy(logits, labels, mixed, label_smoothing), loss(mixed_targets))
    plain = Mixed(torch.empty(0))
    torch.testing.assert_close(cross_entropy(logits, labels, plain, label_smoothing), loss(smoothed(labels)))
