"""What a run would do and need, without data and without writing a file: the key --dry_run."""

import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import TrainingConfig
from common.data import pathmnist, phantom
from common.data.batches import batches
from common.data.dataset import Dataset, Split
from common.finetune.features import CACHING_BATCH, feature_bytes, free_memory
from common.finetune.keys import FineTuningConfig
from common.finetune.network import FineTunedNetwork
from common.records.read import read_history, run_folder
from common.records.run import check_startable
from common.statistics import counted
from common.training.device import Compute
from common.training.evaluation import EVALUATION_BATCH


def describe(config: TrainingConfig, model: nn.Module, compute: Compute) -> None:
    """Print the configuration, the data, the network, the steps, the memory and the disk space of a run.

    Raises UsageError where the run could not start.
    """
    check_startable(config)
    dataset = planned_dataset(config)
    values = "  ".join(f"{name}={value}" for name, value in config.as_dict().items() if name != "dry_run")
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    n_steps = len(batches(len(dataset.train), config.batch_size, torch.device("cpu")))
    needed, kept = disk_bytes(config, model)
    training, scoring = memory_bytes(config, model, dataset, compute)
    history = run_folder(config.output_dir, config.run_id) / "history.csv"
    existing = next(
        path for path in (config.output_dir.absolute(), *config.output_dir.absolute().parents) if path.exists()
    )
    splits = ", ".join(f"{len(getattr(dataset, split)):,} {split}" for split in pathmnist.COUNTS)
    start = f"continues after epoch {len(read_history(history))}" if history.exists() else "new"
    lines = {
        f"run {config.run_id}": f"{start}, on {compute.name}",
        "configuration": values,
        "data": f"{dataset.title}: {splits} tiles; {data_source(config)}",
        "network": f"{config.model_name}, {sum(p.numel() for p in parameters):,} parameters, "
        f"{sum(p.numel() for p in trainable):,} of them trained, inputs of {config.input_size} px",
        "steps": f"{n_steps:,} per epoch, {n_steps * config.n_epochs:,} in {counted(config.n_epochs, 'epoch')}",
        "memory": f"about {training / 1e9:.1f} GB while it trains, {scoring / 1e9:.1f} GB while it scores "
        f"({free_memory(compute.device) / 1e9:.1f} GB are free)",
        "disk": f"about {needed / 1e6:,.0f} MB while it trains, {kept / 1e6:,.0f} MB afterwards "
        f"({shutil.disk_usage(existing).free / 1e9:,.1f} GB are free)",
    }
    for name, text in lines.items():
        print(textwrap.fill(f"{name}: {text}", 110, subsequent_indent="  ", break_on_hyphens=False))
    print("this was a dry run: no file was written")


def planned_dataset(config: TrainingConfig) -> Dataset:
    """The run's data set with the right numbers of tiles, on the device `meta`, which keeps no values."""
    counts = dict(pathmnist.COUNTS)
    if config.train_tiles:
        part = {**counts, "train": config.train_tiles}
        counts = phantom.split_sizes(config.train_tiles) if config.dataset == "phantom" else part
    with torch.device("meta"):
        splits = {
            name: Split(torch.empty(n, 3, config.size, config.size, dtype=torch.uint8), torch.empty(n))
            for name, n in counts.items()
        }
    return Dataset(config.dataset, config.size, pathmnist.CLASS_NAMES, **splits, fingerprint="planned")


def data_source(config: TrainingConfig) -> str:
    """Where the tiles come from, in words."""
    if config.dataset == "phantom":
        return f"generated into {config.data_root}, if they are not there"
    file = pathmnist.official_file(config.size)
    path = config.data_root / file.name
    return f"{path}" if path.exists() else f"{path} is missing and will be downloaded from {file.url}"


def disk_bytes(config: TrainingConfig, model: nn.Module) -> tuple[int, int]:
    """The bytes of a run's checkpoints: the most while it trains, and those that are kept."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    last = weights * (2 if config.ema_decay else 1) + trained * (3 if config.amsgrad else 2)  # Adam's moments
    return weights + 3 * last, weights  # last.pt, previous.pt, and the next last.pt while it is written


def memory_bytes(
    config: TrainingConfig, model: nn.Module, dataset: Dataset, compute: Compute
) -> tuple[float, float]:
    """The peak memory of training, as docs/speed.md explains it, and of scoring tiles or computing their features.

    The factor 2 of the largest layer is a fit on a CPU, from 1.5 to 2.5 for four networks.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    base = peak(compute) if compute.device.type == "cpu" else weights  # of a CPU: with the network
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    states = (4 if config.amsgrad else 3) * trained + (weights if config.ema_decay else 0)
    always = base + dataset.train.images.nbytes + states
    model.to(compute.device)
    inputs = torch.zeros(4, 3, config.input_size, config.input_size, device=compute.device)
    # Autocast's copies of the weights are in both numbers of bytes, and not in their difference.
    saved, layer = (
        (count(model, inputs, compute) - count(model, inputs[:2], compute)) / 2
        for count in (saved_bytes, layer_bytes)
    )
    if isinstance(config, FineTuningConfig) and config.cache_features and isinstance(model, FineTunedNetwork):
        always += feature_bytes(config, model.feature_shape, dataset)
        batch, training = CACHING_BATCH, 2.2 * saved
    else:
        batch, training = EVALUATION_BATCH, max(2.2 * saved, 2 * layer)
    return always + config.batch_size * training, always + 2 * min(batch, len(dataset.test)) * layer


def peak(compute: Compute) -> int:
    """The most bytes that the process, or its part on the GPU, has needed so far; 0 where it is not known."""
    if compute.device.type == "cuda":
        return torch.cuda.max_memory_allocated(compute.device)
    # getrusage would give the parent's peak where that is larger.
    status = Path("/proc/self/status")  # only Linux has it
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii")) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def saved_bytes(model: nn.Module, inputs: torch.Tensor, compute: Compute) -> int:
    """The size of all tensors that autograd saves in the forward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), compute.autocast():
        model(inputs)
    return sum(found.values())


def layer_bytes(model: nn.Module, inputs: torch.Tensor, compute: Compute) -> int:
    """The most that the inputs and outputs of one layer, or of a block of layers, take in a forward pass."""
    sizes = []

    def note(module: nn.Module, given: Any, result: Any) -> None:
        tensors = [*given, *(result if isinstance(result, tuple) else (result,))]
        sizes.append(sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)))

    hook = nn.modules.module.register_module_forward_hook(note)
    with hook, torch.no_grad(), compute.autocast():
        model(inputs)
    return max(sizes)
