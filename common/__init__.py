"""What the task scripts share: data, records, training, fine-tuning and explanations of one run."""

import os

# OpenMP's threads keep their cores busy while they wait for each other. Beside other programs, a waiting thread
# can block the one that it waits for. PyTorch's import reads this number. docs/speed.md has the measurement.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
