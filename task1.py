"""Task 1: ResNet-18 from scratch on PathMNIST.

    python task1.py                                 # with a GPU: downloads the 64-pixel PathMNIST once
    python task1.py --size 28                       # a CPU: downloads 206 MB once
    python task1.py --size 28 --train_tiles 9000    # a first look: a tenth of the training tiles
    python task1.py --dataset phantom --size 28     # a CPU without any data: generated tiles, minutes

The coursework's recipe: torchvision's ResNet-18, Adam 1e-3, batch 64, 5 epochs, cosine, no augmentation. The
coursework reports test AUC 0.980 and test ACC 0.895 for it on the full PathMNIST at 64 pixels, one seed.

Leaves in my/ (see --output_dir) runs/<run_id>/ (config.json, history.csv, summary.json, scores.npz),
checkpoints/<run_id>/best.pt and four figures in fig/task1/. Killed? The same command with its --run_id continues.
"""

from common.cli import run_script
from common.config import TrainingConfig
from common.training.loop import train_from_scratch


class Task1Config(TrainingConfig):
    """The coursework's recipe for Task 1 is the training loop's default."""


def main(config: Task1Config) -> None:
    """Model → data → fit → test → records and figures: the same for every network that is trained from scratch."""
    train_from_scratch("task1", config)


if __name__ == "__main__":
    run_script(main, Task1Config)
