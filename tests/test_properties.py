"""What must hold for every input, tried on inputs that hypothesis makes up."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, roc_auc_score

from common import metrics
from common.augment import build_augmentation
from common.config import TrainingConfig
from common.tiles import batches
from common.training import learning_rate_factor

AUGMENTATIONS = ("none", "ta_wide", "auto", "dihedral", "stain", "flip", "erase", "channel", "scale")

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and targets, every class present; few levels, so that there are ties."""
    classes, more = draw(st.integers(2, 9)), draw(st.integers(0, 60))
    levels = draw(st.sampled_from([2, 5, 1000]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    targets = random.permutation(np.concatenate([np.arange(classes), random.integers(classes, size=more)]))
    scores = random.integers(1, levels + 1, size=(len(targets), classes)).astype(np.float64)
    return scores / scores.sum(axis=1, keepdims=True), targets


@given(scored())
def test_auc_and_accuracy_are_sklearns(case: tuple[np.ndarray, np.ndarray]) -> None:
    probabilities, targets = case
    one_against_rest = [
        roc_auc_score(targets == label, probabilities[:, label]) for label in range(probabilities.shape[1])
    ]
    np.testing.assert_allclose(metrics.auc_per_class(probabilities, targets), one_against_rest, atol=1e-12)
    assert math.isclose(metrics.auc(probabilities, targets), np.mean(one_against_rest), abs_tol=1e-12)
    assert metrics.accuracy(probabilities, targets) == accuracy_score(targets, probabilities.argmax(axis=1))


@given(scored(), st.randoms(use_true_random=False))
def test_no_measure_depends_on_the_order_of_the_tiles(case: tuple[np.ndarray, np.ndarray], random) -> None:
    probabilities, targets = case
    order = list(range(len(targets)))
    random.shuffle(order)
    for measure in (metrics.auc, metrics.accuracy, metrics.expected_calibration_error):
        assert math.isclose(
            measure(probabilities, targets), measure(probabilities[order], targets[order]), abs_tol=1e-12
        )
    for estimate in (metrics.auc_estimate, metrics.accuracy_estimate):
        found = estimate(probabilities, targets)
        assert 0 <= found.low <= found.value <= found.high <= 1


@given(
    n_epochs=st.integers(1, 200),
    steps=st.integers(1, 50),
    warmup=st.integers(0, 20),
    lr_min=st.floats(0, 1),
    start=st.floats(0.01, 1),
)
def test_the_schedule_rises_to_one_and_falls_to_its_end(
    n_epochs: int, steps: int, warmup: int, lr_min: float, start: float
) -> None:
    config = TrainingConfig(
        n_epochs=n_epochs, lr_warmup_epochs=warmup, lr_min=lr_min, lr_warmup_decay=start, run_id="r"
    )
    factors = [learning_rate_factor(step, steps, config) for step in range(n_epochs * steps)]
    peak = min(warmup * steps, len(factors))
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if warmup:
        assert math.isclose(factors[0], start)
    if peak < len(factors):
        assert math.isclose(factors[peak], 1)
    if peak < len(factors) - 1:
        assert math.isclose(factors[-1], lr_min, abs_tol=1e-12)


@given(n_tiles=st.integers(1, 3000), batch_size=st.integers(2, 600), seed=st.integers(0, 2**31))
def test_an_epoch_has_every_tile_once_in_even_batches(n_tiles: int, batch_size: int, seed: int) -> None:
    parts = batches(n_tiles, batch_size, torch.device("cpu"), torch.Generator().manual_seed(seed))
    assert sorted(torch.cat(parts).tolist()) == list(range(n_tiles))
    sizes = {len(part) for part in parts}
    assert max(sizes) <= max(batch_size, 3)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 1 or n_tiles == 1
    again = batches(n_tiles, batch_size, torch.device("cpu"), torch.Generator().manual_seed(seed))
    assert all(map(torch.equal, parts, again))


@settings(max_examples=60)
@given(
    name=st.sampled_from((*AUGMENTATIONS, "ta_wide,stain")),
    n_tiles=st.integers(1, 9),
    size=st.sampled_from([8, 28, 33]),
    seed=st.integers(0, 2**31),
)
def test_augmentation_keeps_what_a_batch_is_and_follows_its_generator(
    name: str, n_tiles: int, size: int, seed: int
) -> None:
    augment = build_augmentation(name)
    draws = torch.Generator().manual_seed(seed)
    tiles = torch.randint(0, 256, (n_tiles, 3, size, size), dtype=torch.uint8, generator=draws)
    before = tiles.clone()
    first = augment(tiles, torch.Generator().manual_seed(seed))
    assert (first.shape, first.dtype) == (tiles.shape, torch.uint8)  # uint8: no value outside 0 … 255
    assert torch.equal(first, augment(tiles, torch.Generator().manual_seed(seed)))
    assert torch.equal(tiles, before)
    # Every tile goes its own way: another neighbour changes nothing for the others.
    if n_tiles > 1:
        other = tiles.clone()
        other[-1] = 255 - other[-1]
        assert torch.equal(augment(other, torch.Generator().manual_seed(seed))[:-1], first[:-1])
