"""The name of a device in records; test_training.py tests devices and precision, test_sweep.py counts cores."""

import pytest
import torch
from conftest import CPU

from common import compute, distributed


@pytest.mark.parametrize(
    ("threads", "processes", "name"),
    [(1, 1, "Ten, 1 thread"), (2, 1, "Ten, 2 threads"), (2, 3, "3 × Ten, 2 threads")],
)
def test_the_name_of_a_cpu_has_processes_and_threads(
    threads: int, processes: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "_cpu_name", lambda: "Ten")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    assert CPU.name == name
