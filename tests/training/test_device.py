"""What the keys `device` and `precision` mean, and what setting up a process does."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import CPU, ROOT

from common.cli import UsageError
from common.training.device import Compute


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: PyTorch sees no CUDA device"):
        Compute.of("cuda", "auto")
    assert Compute.of("auto", "auto") == CPU
    assert Compute.of("cpu", "bf16") == Compute(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert CPU.name.endswith(" (AVX2), 1 thread")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    assert Compute(torch.device("cuda", 0), torch.bfloat16).name == "GPU, bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    found = [Compute.of("cuda", precision).dtype for precision in ("auto", "bf16", "fp32")]
    assert found == [torch.bfloat16, torch.bfloat16, torch.float32]
    torch.set_float32_matmul_precision("medium")
    CPU.prepare_process()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


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


def test_waiting_threads_leave_their_core_to_other_programs() -> None:
    found = []
    for given in ({}, {"GOMP_SPINCOUNT": "7"}):
        environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
        program = "import os, common; print(os.environ['GOMP_SPINCOUNT'])"
        command = [sys.executable, "-c", program]
        found.append(subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=True).stdout)
    assert found == [b"1000\n", b"7\n"]
    for script in (*ROOT.glob("*.py"), *ROOT.glob("bench/*.py")):  # OpenMP reads it when PyTorch is imported
        lines = script.read_text(encoding="utf-8").splitlines()
        first = next(
            line
            for line in lines
            if line.startswith(("from common", "import common", "import torch", "import medmnist"))
        )
        assert "common" in first, script
