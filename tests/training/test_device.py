"""What the keys `device` and `precision` mean, and what setting up a process does."""

import pytest
import torch
import torch.distributed as dist
from conftest import CPU

from common import distributed
from common.training import device
from common.training.device import Compute


def test_naming_a_device_changes_nothing_and_preparing_the_process_joins_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend: done.append(backend))
    monkeypatch.setattr(device, "_keep_freed_memory", lambda: done.append("malloc"))
    monkeypatch.setattr("atexit.register", lambda function: None)
    cpu = Compute.of("cpu", "bf16")
    assert cpu == Compute(torch.device("cpu"), torch.bfloat16)
    assert cpu.name
    assert done == []
    monkeypatch.setattr("common.distributed.is_first", lambda: True)
    cpu.prepare_process()
    assert done == ["gloo", "malloc"]


@pytest.mark.parametrize(
    ("threads", "processes", "name"),
    [(1, 1, "Ten, 1 thread"), (2, 1, "Ten, 2 threads"), (2, 3, "3 × Ten, 2 threads")],
)
def test_the_name_of_a_cpu_has_processes_and_threads(
    threads: int, processes: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_cpu_name", lambda: "Ten")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    assert CPU.name == name
