"""What the keys `device` and `precision` mean, and what setting up a process does."""

import platform
import subprocess
import sys

import pytest
import torch
from conftest import CPU

from common.cli import UsageError
from common.training.device import Compute


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: PyTorch sees no CUDA device"):
        Compute.of("cuda", "auto")
    assert Compute.of("auto", "auto") == CPU
    assert Compute.of("cpu", "bf16") == Compute(torch.device("cpu"), torch.bfloat16)
    assert CPU.name.endswith(", 1 thread")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to")
def test_a_cpu_run_uses_freed_memory_again() -> None:
    program = """
import resource, torch
from common.training.device import Compute
Compute.of("cpu", "fp32").prepare_process()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    torch.ones(20_000_000)  # 80 MB: 20,000 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # Not one: until a gap is large enough for the next block and its alignment, the heap grows by a few.
    assert int(done.stdout) < 25 * 20_000
