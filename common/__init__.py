"""What the task scripts share: data, records, training, fine-tuning and explanations of one run."""

import os

# OpenMP's threads spin while they wait for each other. Where other programs are at work, they so take the core
# from the thread that they wait for. PyTorch's import reads this number. docs/speed.md has the measurement.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
