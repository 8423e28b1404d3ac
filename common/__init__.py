"""What the task scripts share: data, records, training, fine-tuning and explanations of one run."""

import os

# OpenMP's threads spin while they wait for each other, and take the core from the one that they wait for where other
# programs are at work. It reads this number when PyTorch is imported. docs/speed.md has the measurement.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
