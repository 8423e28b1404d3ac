"""The device that computes, and the precision of its matrix products."""

import ctypes
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from common.cli import UsageError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Compute:
    """The device that the network computes on, and the precision of its matrix products."""

    device: torch.device
    dtype: torch.dtype  # float32, or bfloat16 under autocast

    @classmethod
    def of(cls, device: str, precision: str) -> "Compute":
        """What the keys `device` and `precision` mean here; UsageError for `cuda` where there is no GPU."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        bf16 = precision == "bf16" or (
            precision == "auto" and cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        where = torch.device("cuda", 0) if cuda else torch.device("cpu")
        return cls(where, torch.bfloat16 if bf16 else torch.float32)

    def prepare_process(self) -> Self:
        """Set up the process, and return self; a script calls this before it builds its network.

        On a GPU, float32 is then not rounded to TF32. On a CPU, malloc keeps freed memory: else glibc returns
        blocks above 32 MB, and clearing their pages again takes an eighth of Task 3's time at 64 pixels.
        """
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")  # NVIDIA's containers lower it
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if self.device.type == "cpu" and mallopt:  # only glibc has it
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
        return self

    @property
    def name(self) -> str:
        """The device in words, for records: of a GPU with the precision, of a CPU with its instruction set.

        Different models of CPU have the same name, but round differently with other instructions.
        """
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {str(self.dtype).removeprefix('torch.')}"
        cpuinfo = Path("/proc/cpuinfo")  # on Linux, where platform.processor() is empty
        found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
        cpu, n_threads = found[1] if found else platform.processor() or "CPU", torch.get_num_threads()
        instructions = torch.backends.cpu.get_cpu_capability()
        return f"{cpu} ({instructions}), {n_threads} thread{'' if n_threads == 1 else 's'}"

    def autocast(self) -> torch.autocast:
        """The context manager for a forward pass; it does nothing in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
