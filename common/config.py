"""The configuration of a run: frozen dataclasses whose fields are the command line's keys.

The standard library's argparse reads them, not tyro: a W&B agent passes `--amsgrad=False`, which tyro refuses
for a flag, and tyro reports an error in a box of several lines where one clear line is wanted.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import secrets
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common.errors import Fault, Stopped, UsageError

C = TypeVar("C", bound="Keys")

# Keys that say where and how a run is kept, not what it computes: a resumed run may change them.
BOOKKEEPING_KEYS = ("data_root", "output_dir", "wandb", "wandb_model", "resume", "scratch", "n_seeds")
PHANTOM_TRAIN_TILES = 9000  # training tiles of the phantom, unless --train_tiles says another number


def key(
    default: Any,
    description: str,
    *,
    choices: Sequence[Any] | None = None,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    check: Callable[[Any], str | None] | None = None,
) -> Any:
    """A dataclass field with its help text and the values that it may take.

    `check` gets the value and returns what is wrong with it, or None.
    """
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {"description": description, "choices": choices, "bounds": bounds, "check": check}
    return dataclasses.field(default=default, metadata=metadata)


def with_defaults(**defaults: Any) -> Callable[[type[C]], type[C]]:
    """Make a class a frozen dataclass with its base's keys and, for some of them, other defaults."""

    def decorate(config_class: type[C]) -> type[C]:
        inherited = {field.name: field for field in dataclasses.fields(config_class)}
        hints = typing.get_type_hints(config_class)
        for name, default in defaults.items():
            field = dataclasses.field(default=default, metadata=inherited[name].metadata)
            setattr(config_class, name, field)
            config_class.__annotations__[name] = hints[name]
        return dataclass(frozen=True, kw_only=True)(config_class)

    return decorate


def closest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?` for the known name nearest to `name`, or nothing where none is near."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def check_run_id(run_id: str | None) -> str | None:
    """What is wrong with a run id, or None."""
    if run_id is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", run_id):
        return None
    return "a run id names files: use up to 64 letters, digits, '.', '_' and '-'"


def _check_model_name(name: str) -> str | None:
    from common.models import model_names  # torchvision takes a second to import: --help need not wait for it

    if name in model_names():
        return None
    return f"torchvision has no classification model of this name{closest(name, model_names())}"


def _check_augmentation(names: str) -> str | None:
    from common.augment import build_augmentation  # imports torch: --help need not wait for it

    try:
        build_augmentation(names)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What every command's configuration can do, whatever its keys are."""

    def __post_init__(self) -> None:
        """Check every value. Raises UsageError naming the key, the value and what it may be."""
        for field in dataclasses.fields(self):
            _check_value(field, getattr(self, field.name))

    @classmethod
    def implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The defaults that the keys given on a command line bring with them; a script may have some."""
        return {}

    def as_dict(self) -> dict[str, Any]:
        """Every key and its value, ready for JSON."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Workspace(Keys):
    """The keys that every script shares: where it reads, writes and computes."""

    data_root: Path = key(None, "folder of the data files (default: $PATHMNIST_ROOT, else ~/.medmnist)")
    output_dir: Path = key(Path(), "folder that gets runs/, checkpoints/, fig/ and wandb/")
    device: str = key(
        "auto", "where the network computes; auto takes CUDA if there is one", choices=("auto", "cpu", "cuda")
    )
    seed: int = key(0, "seed of weights, shuffling and augmentation", at_least=0, at_most=2**32 - 1)
    wandb: str = key(
        "auto",
        "W&B mode; auto is $WANDB_MODE, else online where a key is configured, else offline",
        choices=("auto", "online", "offline", "disabled"),
    )

    def __post_init__(self) -> None:
        """Fill in the default folder of the data files, then check every value."""
        if self.data_root is None:
            self._set("data_root", Path(os.environ.get("PATHMNIST_ROOT") or Path.home() / ".medmnist"))
        super().__post_init__()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the one way to derive a default in a frozen dataclass


@dataclass(frozen=True, kw_only=True)
class Config(Workspace):
    """The keys of a script that trains: its data, and the run's name."""

    dataset: str = key(
        "pathmnist",
        "data set; phantom is generated and needs no download",
        choices=("pathmnist", "phantom"),
    )
    size: int = key(64, "tile side in pixels", choices=(28, 64, 128, 224))
    train_tiles: int | None = key(
        None,
        "number of training tiles; pathmnist: a part with the same shares of classes (default: all); phantom: so "
        f"many are generated (default: {PHANTOM_TRAIN_TILES}; 89996 gives PathMNIST's counts)",
        at_least=1,
    )
    run_id: str = key(
        None,
        "name of the run; an unfinished run of this name is continued (default: a fresh 8-character id, "
        "under a W&B agent W&B's own)",
        check=check_run_id,
    )
    precision: str = key(
        "auto", "auto is bf16 autocast on a GPU that has it, else fp32", choices=("auto", "fp32", "bf16")
    )
    wandb_model: bool = key(False, "upload the best weights to W&B, too")
    resume: bool = key(False, "insist that run_id is continued: an error if it has no checkpoint")

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other keys, then check every value."""
        if self.dataset == "phantom":
            if self.train_tiles is None:
                self._set("train_tiles", PHANTOM_TRAIN_TILES)
            elif self.train_tiles < 45:
                raise UsageError(f"--train_tiles {self.train_tiles}: must be at least 45 on the phantom")
        if self.resume and self.run_id is None:
            raise UsageError("--resume needs --run_id: which run shall be continued?")
        if self.run_id is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("torchrun: give --run_id, so that all its processes agree on it")
        if self.run_id is None:
            under_agent = "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ
            self._set("run_id", os.environ["WANDB_RUN_ID"] if under_agent else secrets.token_hex(4))
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """The keys of the training loop, which every script that trains shares."""

    model_name: str = key("resnet18", "torchvision classification model", check=_check_model_name)
    n_epochs: int = key(5, "epochs to train, at most", at_least=1)
    batch_size: int = key(64, "tiles a step", at_least=2)

    optimizer: str = key("adam", "Adam, or AdamW with decoupled weight decay", choices=("adam", "adamw"))
    amsgrad: bool = key(False, "use the maximum of past second moments (Reddi et al. 2018)")
    lr: float = key(1e-3, "learning rate at its peak", above=0)
    lr_min: float = key(0.0, "the cosine ends at this factor of lr; 1: constant lr", at_least=0, at_most=1)
    lr_warmup_epochs: int = key(0, "epochs of linear warm-up", at_least=0)
    lr_warmup_decay: float = key(0.1, "the warm-up starts at this factor of lr", above=0, at_most=1)
    weight_decay: float = key(0.0, "weight decay", at_least=0)
    norm_weight_decay: float | None = key(
        None, "weight decay of norm and bias parameters (default: weight_decay)", at_least=0
    )

    augmentation: str = key(
        "none",
        "augmentation of the training tiles, parts joined by commas: none, auto, ta_wide, ta_wide_scaled, "
        "dihedral, stain, flip, erase, channel, scale",
        check=_check_augmentation,
    )
    label_smoothing: float = key(0.0, "share of the target spread over all classes", at_least=0, below=1)
    mixup_alpha: float = key(0.0, "mixup's Beta parameter; 0: off", at_least=0)
    cutmix_alpha: float = key(0.0, "cutmix's Beta parameter; 0: off", at_least=0)

    early_stopping_patience: int | None = key(
        None, "stop after so many epochs without improvement (default: never)", at_least=1
    )
    early_stopping_delta: float = key(
        0.0,
        "an improvement cuts the error (1 - ACC, 1 - AUC or the loss) by this fraction, at least",
        at_least=0,
        below=1,
    )
    select_on: str = key(
        "validate/acc",
        "which epoch's weights are the best ones: by this metric, or simply the last",
        choices=("validate/acc", "validate/auc", "validate/loss", "last"),
    )
    ema_decay: float = key(
        0.0,
        "judge an exponential moving average of the weights; decay a step in a run of 1,000 steps, scaled to "
        "the run's length; 0: off",
        at_least=0,
        below=1,
    )
    reestimate_batchnorm: bool = key(
        False,
        "measure BatchNorm statistics on clean training tiles before weights are judged; EMA always does",
    )
    resize_to: int | None = key(
        None, "side in pixels that tiles are resized to, after augmentation (default: as they are)", at_least=8
    )
    tta: bool = key(True, "also score the test tiles averaged over their 8 flips and quarter turns")

    @property
    def input_size(self) -> int:
        """The side in pixels of what the network takes."""
        return self.resize_to or self.size


def _check_value(field: "dataclasses.Field[Any]", value: Any) -> None:
    metadata = field.metadata
    allowed = metadata["choices"]
    problem = None
    if value is None:  # an optional key, switched off
        return
    if allowed is not None and value not in allowed:
        names = [str(choice) for choice in allowed]
        problem = f"choose from {', '.join(names)}{closest(str(value), names)}"
    elif isinstance(value, float) and not math.isfinite(value):
        problem = "must be a finite number"
    else:
        violated = {
            "above": lambda bound: value <= bound,
            "at_least": lambda bound: value < bound,
            "below": lambda bound: value >= bound,
            "at_most": lambda bound: value > bound,
        }
        bounds = {name: bound for name, bound in metadata["bounds"].items() if bound is not None}
        if any(violated[name](bound) for name, bound in bounds.items()):
            limits = " and ".join(f"{name.replace('_', ' ')} {bound:g}" for name, bound in bounds.items())
            problem = f"must be {limits}"
        elif metadata["check"] is not None:
            problem = metadata["check"](value)
    if problem:
        raise UsageError(f"--{field.name} {value}: {problem}")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _whole_number(text: str) -> int:
    try:
        number = float(text)  # a W&B sweep may pass 512.0 for a whole number that it drew from a range
        if number.is_integer():
            return int(number)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")


def parse(config_class: type[C], arguments: Sequence[str], description: str) -> C:
    """The configuration that a command line asks for; `--key=value` and `--key value`, '_' or '-' in the key.

    Raises UsageError for unknown keys, wrong types and impossible values.
    """
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    readers: dict[type, Callable[[str], Any]]
    readers = {bool: _boolean, int: _whole_number, float: _number, str: str, Path: Path}
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    for field in fields:
        value_type, optional = _plain_type(hints[field.name])
        read = readers[value_type]
        text = field.metadata["description"].replace("%", "%%")
        if field.metadata["choices"]:
            text += f" [{' | '.join(map(str, field.metadata['choices']))}]"
        if field.default is not None:
            text += f" (default: {field.default})"
        options: dict[str, Any] = {"nargs": "?", "const": True} if value_type is bool else {}
        parser.add_argument(
            f"--{field.name}",
            type=_or_none(read) if optional else read,
            default=argparse.SUPPRESS,
            metavar=value_type.__name__.upper(),
            help=text,
            **options,
        )
    given, unknown = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    if unknown:
        names = [f"--{field.name}" for field in fields]
        name = unknown[0].split("=")[0]
        hint = closest(name, names) or "; --help lists the keys"
        raise UsageError(f"unknown key {name}{hint}")
    return config_class(**{**config_class.implied(vars(given)), **vars(given)})


def _plain_type(hint: Any) -> tuple[type, bool]:
    """`int | None` is (int, True), `int` is (int, False)."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return (members[0], True) if members else (hint, False)


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A W&B sweep writes `null` for a key that is switched off, and its agent passes `None`."""
    return lambda text: None if text in ("None", "none", "null") else read(text)


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def end_by(number: signal.Signals) -> None:
    """End this process as `number` does by default."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def run_script(main: Callable[[C], None], config_class: type[C], arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, call `main`, and turn an expected error into one line and an exit status."""
    description = sys.modules[main.__module__].__doc__ or ""
    name = Path(sys.argv[0]).name
    again = ""
    try:
        config = parse(config_class, sys.argv[1:] if arguments is None else arguments, description)
        run_id = getattr(config, "run_id", None)
        again = f"; the same command{f' with --run_id={run_id}' if run_id else ''} goes on"
        main(config)
    except Stopped as stopped:
        print(f"{name}: {stopped}{again}", file=sys.stderr)
        if "WANDB_SWEEP_ID" in os.environ:  # its agent takes an exit status for a failure, but not a signal
            end_by(stopped.number)
        sys.exit(stopped.exit_status)
    except (UsageError, Fault) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"{name}: {what}{again}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted{again}", file=sys.stderr)
        sys.exit(130)
