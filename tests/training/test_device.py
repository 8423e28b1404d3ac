"""What the keys `device` and `precision` mean, and what setting up a process does."""

import platform
import subprocess
import sys

import pytest
import torch
from conftest import CPU

from common.cli import UsageError
from common.training import device
from common.training.device import Compute


def test_naming_a_device_changes_nothing_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(device, "_keep_freed_memory", lambda: done.append("malloc"))
    cpu = Compute.of("cpu", "bf16")
    assert cpu == Compute(torch.device("cpu"), torch.bfloat16)
    assert cpu.name
    assert done == []
    cpu.prepare_process()
    assert done == ["malloc"]


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: PyTorch sees no CUDA device"):
        Compute.of("cuda", "auto")
    assert Compute.of("auto", "auto") == CPU


@pytest.mark.parametrize(("threads", "name"), [(1, "Ten, 1 thread"), (2, "Ten, 2 threads")])
def test_the_name_of_a_cpu_has_its_threads(threads: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_name", lambda: "Ten")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert CPU.name == name


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
