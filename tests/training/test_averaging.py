from pathlib import Path

import pytest
import torch
from conftest import trainer_of
from torch import nn

from common.data.batches import normalise
from common.data.dataset import Dataset
from common.records import checkpoint
from common.training.averaging import ExponentialMovingAverage, reestimate_batchnorm
from common.training.models import build_model


def test_reestimated_statistics_are_those_of_the_tiles() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.01), nn.Dropout(0.5), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    inputs = torch.randn(64, 3, 8, 8) * 3 + 5
    model(inputs - 50)  # statistics of an earlier life, which must be forgotten
    weights = {name: value.clone() for name, value in model.named_parameters()}
    reestimate_batchnorm(model, inputs.split(16))
    first, last = model[0], model[3]
    assert isinstance(first, nn.BatchNorm2d)
    assert isinstance(last, nn.BatchNorm2d)
    torch.testing.assert_close(first.running_mean, inputs.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(first.running_var, inputs.var(dim=(0, 2, 3)), rtol=0.05, atol=0)
    # Behind an active dropout the second layer would have seen a larger spread.
    outputs = model[:3](inputs)
    torch.testing.assert_close(last.running_mean, outputs.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-3)
    assert first.momentum == 0.01
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(weights[name], value) for name, value in model.named_parameters())


def test_the_average_follows_the_weights_by_its_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = ExponentialMovingAverage(model, decay=0.9, n_steps=1000)
    nn.init.ones_(model.weight)
    for step in range(1000, 1010):
        average.update(model, step)
    assert average.model.weight.item() == pytest.approx(1 - 0.9**10, rel=1e-4)
    assert model.weight.item() == 1


def test_the_decay_spans_the_same_share_of_any_run() -> None:
    model = nn.Linear(1, 1)
    decays = {steps: ExponentialMovingAverage(model, 0.99, steps).decay for steps in (100, 1000, 10000)}
    assert decays[1000] == pytest.approx(0.99)
    assert decays[100] ** 100 == pytest.approx(decays[1000] ** 1000)
    assert decays[10000] ** 10000 == pytest.approx(decays[1000] ** 1000)


def test_early_steps_follow_fast() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = ExponentialMovingAverage(model, decay=0.999, n_steps=1000)
    nn.init.ones_(model.weight)
    average.update(model, 0)
    before = average.model.weight.item()
    nn.init.zeros_(model.weight)
    average.update(model, 1)
    assert average.model.weight.item() == pytest.approx(before * 2 / 11, rel=1e-5)


def test_the_evaluated_weights_are_the_averages(tiny: Dataset, tmp_path: Path) -> None:
    name = "shufflenet_v2_x0_5"
    model = build_model(name, 9, 28)
    initial = model.state_dict()["fc.weight"].clone()
    trainer = trainer_of(tiny, tmp_path, model, model_name=name, n_epochs=2, ema_decay=0.999, select_on="last")
    trainer.fit()
    trained, last = model.state_dict()["fc.weight"], trainer.evaluated.state_dict()
    saved = checkpoint.load(trainer.run.checkpoints / "best.pt", "state_dict")["state_dict"]
    assert all(torch.equal(saved[key], last[key]) for key in last)
    # The average has left where the weights began, and is not where they are.
    moved, averaged = (trained - initial).norm(), (last["fc.weight"] - initial).norm()
    assert averaged > 0.5 * moved
    assert not torch.equal(last["fc.weight"], trained)
    network = build_model(name, 9, 28).eval()
    network.load_state_dict(last)
    with torch.no_grad():
        logits = network(normalise(tiny.val.images))
    loss = nn.functional.cross_entropy(logits, tiny.val.labels).item()
    assert trainer.history[-1]["validate/loss"] == pytest.approx(loss, rel=1e-3)
