"""What is true for every input, tested with random inputs from hypothesis."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import TrainingConfig
from common.data.batches import batches
from common.training.optimizer import learning_rate_factor

settings.register_profile("no deadline", deadline=None)  # a slow machine must not fail a test
settings.load_profile("no deadline")


@given(
    n_epochs=st.integers(1, 200),
    steps=st.integers(1, 50),
    warmup=st.integers(0, 20),
    lr_min=st.floats(0, 1),
    start=st.floats(0.01, 1),
)
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_minimum(
    n_epochs: int, steps: int, warmup: int, lr_min: float, start: float
) -> None:
    config = TrainingConfig(
        n_epochs=n_epochs, lr_warmup_epochs=warmup, lr_min=lr_min, lr_warmup_decay=start, run_id="r"
    )
    factors = [learning_rate_factor(step, steps, config) for step in range(n_epochs * steps)]
    peak = config.lr_warmup_epochs * steps
    assert peak < len(factors)  # every run leaves the warm-up
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if peak:
        assert math.isclose(factors[0], start)
    assert math.isclose(factors[peak], 1)
    if peak < len(factors) - 1:
        assert math.isclose(factors[-1], lr_min, abs_tol=1e-12)


@given(n_tiles=st.integers(1, 3000), batch_size=st.integers(2, 600), seed=st.integers(0, 2**31))
def test_an_epoch_has_every_tile_once_in_batches_of_equal_size(n_tiles: int, batch_size: int, seed: int) -> None:
    parts = batches(n_tiles, batch_size, torch.device("cpu"), torch.Generator().manual_seed(seed))
    assert sorted(torch.cat(parts).tolist()) == list(range(n_tiles))
    sizes = {len(part) for part in parts}
    assert max(sizes) <= max(batch_size, 3)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 1 or n_tiles == 1
    again = batches(n_tiles, batch_size, torch.device("cpu"), torch.Generator().manual_seed(seed))
    assert all(map(torch.equal, parts, again))
