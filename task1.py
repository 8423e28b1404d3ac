"""Task 1: ResNet-18 from scratch on PathMNIST.

    python task1.py                                 # a GPU box: downloads the 64-pixel PathMNIST once
    python task1.py --size 28                       # a CPU: downloads 206 MB once
    python task1.py --size 28 --train_tiles 9000    # a first look: a tenth of the training tiles
    python task1.py --dataset phantom --size 28     # a CPU without any data: generated tiles, three minutes

The coursework's recipe: torchvision's ResNet-18, Adam 1e-3, batch 64, 5 epochs, cosine, no augmentation. The
coursework reports test AUC 0.980 and test ACC 0.895 for it on the full PathMNIST at 64 pixels, one seed. Expect
test ACC 0.88 to 0.90 on the phantom, whose tiles are not tissue.

Leaves runs/<run_id>/ (config.json, history.csv, summary.json, scores.npz), checkpoints/<run_id>/best.pt and four
figures in fig/task1/. Killed? The same command with the same --run_id continues.
"""

from dataclasses import dataclass

import torch

from common.config import TrainingConfig, run_script
from common.data.batches import device_splits
from common.data.dataset import load_dataset
from common.data.pathmnist import CLASS_NAMES
from common.records.run import Run
from common.training.device import Compute
from common.training.loop import Trainer
from common.training.models import build_model


@dataclass(frozen=True, kw_only=True)
class Task1Config(TrainingConfig):
    """The coursework's recipe for Task 1 is the training loop's default."""


def main(config: Task1Config) -> None:
    """Configuration → model → data → fit → test → records and figures."""
    compute = Compute.of(config.device, config.precision)
    compute.prepare_process()
    torch.manual_seed(config.seed)
    model = build_model(config.model_name, len(CLASS_NAMES), config.input_size)
    dataset = load_dataset(config.dataset, config.size, config.data_root, config.train_tiles)
    run = Run("task1", config, dataset, compute.name)
    splits = device_splits(dataset, compute.device, config.input_size, config.augmentation)
    trainer = Trainer(model, splits, config, compute, run)
    trainer.fit()
    run.finish(trainer.history, trainer.test())


if __name__ == "__main__":
    run_script(main, Task1Config)
