"""Where a network computes, and in which precision."""

import ctypes
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from common import distributed
from common.errors import UsageError


@dataclass(frozen=True)
class Compute:
    """Where the network computes, and in which precision its matrix products run."""

    device: torch.device
    dtype: torch.dtype  # float32, or bfloat16 under autocast

    @classmethod
    def of(cls, device: str, precision: str) -> "Compute":
        """Resolve the keys `device` and `precision`; UsageError where CUDA is asked for and absent."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
        name = kind(device)
        distributed.join(name == "cuda")
        bf16 = precision == "bf16" or (
            precision == "auto" and name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        if name == "cpu":
            _keep_freed_memory()
        where = torch.device(name, distributed.local_rank()) if name == "cuda" else torch.device(name)
        return cls(where, torch.bfloat16 if bf16 else torch.float32)

    @property
    def name(self) -> str:
        """The device in words, as records carry it."""
        processes = distributed.world_size()
        prefix = f"{processes} × " if processes > 1 else ""
        if self.device.type == "cuda":
            return prefix + torch.cuda.get_device_name(self.device)
        threads = torch.get_num_threads()
        return f"{prefix}{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"

    def autocast(self) -> torch.autocast:
        """The context of a forward pass; off in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def kind(device: str) -> str:
    """What the key `device` means on this machine: `cpu` or `cuda`."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def physical_cores(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many cores this process may use; the hyper-threads of one core count once."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # only Linux has it
        return os.cpu_count() or 1
    # A CPU's file lists all CPUs of its core, so those of one core have the same text.
    files = [cpus / f"cpu{number}" / "topology" / "thread_siblings_list" for number in allowed]
    return len({file.read_text() if file.exists() else str(file) for file in files})


def _keep_freed_memory() -> None:
    """Let memory that is freed be used again, instead of going back to the system.

    glibc returns blocks above 32 MB, such as a large batch's activations, as soon as they are freed, and the
    system clears every page of them anew at the next step: 180,000 page faults a step of MobileNetV3-Large at 64
    pixels and batch 512, and about an eighth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt:  # other C libraries have none; the numbers are those of glibc's malloc.h
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def _cpu_name() -> str:
    try:  # Linux; platform.processor() says nothing there
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or "CPU"
