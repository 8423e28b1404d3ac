"""The configuration of a run: frozen dataclasses whose fields are the keys of the command line.

The standard library's argparse reads them, not tyro: a W&B agent passes `--amsgrad=False`, which tyro refuses for
a flag, and tyro prints an error as a box of several lines instead of one.
"""

import argparse
import dataclasses
import io
import math
import operator
import os
import re
import secrets
import signal
import sys
import tempfile
import threading
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from common.data import pathmnist, phantom
from common.errors import (
    Fault,
    Stopped,
    Untrainable,
    UsageError,
    closest,
    first_line,
    is_out_of_memory,
    keep_traceback,
)
from common.files import public
from common.statistics import counted

C = TypeVar("C", bound="Keys")

MOST = 1_000_000  # of every key that counts something and has no lower limit
BOUNDS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


def key(
    default: Any,
    description: str,
    *,
    choices: Sequence[Any] = (),
    check: Callable[[Any], str | None] = lambda value: None,
    bookkeeping: bool = False,
    positional: bool = False,
    **bounds: float,
) -> Any:
    """A dataclass field with its help text and the values that it may take.

    A default that depends on the environment or on other keys is a function, which takes the configuration.
    `check` takes the value and returns what is wrong with it, or None. A bookkeeping key changes where and how a
    run is kept, not what it computes: a resumed run may have another value. The value of a positional key is
    written without the key's name. `bounds` have the names of BOUNDS.
    """
    metadata = {"description": description, "choices": choices, "check": check}
    metadata |= {"bookkeeping": bookkeeping, "bounds": bounds, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


def with_defaults(**defaults: Any) -> Callable[[type[C]], type[C]]:
    """Make a class a frozen dataclass that has the keys of its base, some of them with other defaults."""

    def decorate(config_class: type[C]) -> type[C]:
        inherited = {field.name: field for field in dataclasses.fields(config_class)}
        for name, default in defaults.items():
            field = dataclasses.field(default=default, metadata=inherited[name].metadata)
            setattr(config_class, name, field)
            config_class.__annotations__[name] = inherited[name].type
        return dataclass(frozen=True, kw_only=True)(config_class)

    return decorate


def check_run_id(run_id: str) -> str | None:
    """What is wrong with a run id, or None."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", run_id):
        return None
    return "a run id names files: use up to 64 letters, digits, '.', '_' and '-'"


def _check_model_name(name: str) -> str | None:
    from common.training.models import check_model_name  # imports torchvision, which --help does not need

    return check_model_name(name)


def _check_augmentation(names: str) -> str | None:
    from common.data.augment import build_augmentation  # imports torch, which --help does not need

    try:
        build_augmentation(names)
    except ValueError as error:
        return str(error)
    return None


def device_key() -> Any:
    """The key of the computing device, for every configuration that has one."""
    return key("auto", "computing device; auto is CUDA if there is one", choices=("auto", "cpu", "cuda"))


def _check_wandb(mode: str) -> str | None:
    given, modes = os.environ.get("WANDB_MODE"), ("online", "offline", "disabled")
    if mode != "auto" or not given or given in modes:
        return None
    return f"WANDB_MODE={given} is no mode; choose from {', '.join(modes)}{closest(given, modes)}"


def _data_root(config: "FolderConfig") -> Path:
    try:
        return Path(os.environ.get("PATHMNIST_ROOT") or "~/.medmnist").expanduser()
    except RuntimeError:
        raise UsageError(
            "--data_root: this user has no home folder; name a folder, or set PATHMNIST_ROOT"
        ) from None


def expanded(path: str) -> Path:
    """The path with the home folder in the place of `~`; UsageError where that is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: begins with an unknown home folder; write the whole path") from None


def _new_run_id(config: "Config") -> str:
    """A random id, or W&B's id under a W&B agent. Raises UsageError where only the user can name the run."""
    if config.resume:
        raise UsageError("--resume needs --run_id: which run shall be continued?")
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        return os.environ["WANDB_RUN_ID"]
    return secrets.token_hex(4)


@cache
def _print_once(line: str) -> None:
    print(line)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The base of every configuration, without any key."""

    OF_A_RUN = ""  # the hint if the user gives a key of the training loop that this configuration does not have

    def __post_init__(self) -> None:
        """Compute the defaults that are functions, and check every value; UsageError names a wrong one."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if callable(value):
                self._set(field.name, value(self))
            elif isinstance(value, str) and Path in (field.type, *typing.get_args(field.type)):
                self._set(field.name, Path(value).expanduser())
            _check_value(field, getattr(self, field.name))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # a frozen dataclass refuses `self.name = value`

    @classmethod
    def implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Other defaults for some keys, where the keys given on the command line change them."""
        return {}

    def as_dict(self) -> dict[str, Any]:
        """Every key and its value, ready for JSON, as records may show them (`public`)."""
        values = dataclasses.asdict(self)
        return {name: public(str(value) if isinstance(value, Path) else value) for name, value in values.items()}

    @classmethod
    def bookkeeping(cls) -> set[str]:
        """The names of the bookkeeping keys; see `key`."""
        return {field.name for field in dataclasses.fields(cls) if field.metadata["bookkeeping"]}

    def identity(self) -> dict[str, Any]:
        """The keys that decide what a run computes: all but the bookkeeping keys. Ready for JSON."""
        return {name: value for name, value in self.as_dict().items() if name not in self.bookkeeping()}


@dataclass(frozen=True, kw_only=True)
class FolderConfig(Keys):
    """Where a command reads and writes, and the seed of its random numbers."""

    data_root: Path = key(
        _data_root,
        "folder of the data files (default: $PATHMNIST_ROOT, else ~/.medmnist)",
        bookkeeping=True,
    )
    output_dir: Path = key(Path(), "folder that gets runs/, checkpoints/, fig/ and wandb/", bookkeeping=True)
    seed: int = key(0, "seed of weights, shuffling and augmentation", at_least=0, at_most=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class ScriptConfig(FolderConfig):
    """Also where a script computes, and whether it logs to W&B."""

    device: str = device_key()
    wandb: str = key(
        "auto",
        "W&B mode; auto is $WANDB_MODE, else online where a key is configured, else offline",
        choices=("auto", "online", "offline", "disabled"),
        check=_check_wandb,
        bookkeeping=True,
    )


@dataclass(frozen=True, kw_only=True)
class Config(ScriptConfig):
    """The keys of a script that trains: its data, and the run's name."""

    dataset: str = key(
        pathmnist.NAME, "data set; phantom is generated, without download", choices=(pathmnist.NAME, "phantom")
    )
    size: int = key(64, "tile side in pixels", choices=(28, 64, 128, 224))
    train_tiles: int | None = key(
        lambda config: phantom.TRAIN_TILES if config.dataset == "phantom" else None,
        f"number of training tiles; {pathmnist.NAME}: a part in which each class keeps its share (default: all); "
        f"phantom: so many are generated (default: {phantom.TRAIN_TILES})",
        at_least=1,
    )
    run_id: str = key(
        _new_run_id,
        "name of the run; an unfinished run is continued (default: a new id; under a W&B agent, the agent's id)",
        check=check_run_id,
    )
    precision: str = key("auto", "auto is bf16 on a GPU that has it, else fp32", choices=("auto", "fp32", "bf16"))
    wandb_model: bool = key(False, "upload the best weights to W&B, too", bookkeeping=True)
    resume: bool = key(False, "continue run_id; an error if it has no checkpoint", bookkeeping=True)

    def __post_init__(self) -> None:
        """Compute the defaults that are functions, and check every value."""
        super().__post_init__()
        if self.dataset == "phantom" and self.train_tiles is not None and self.train_tiles < 45:
            raise UsageError(f"--train_tiles {self.train_tiles}: must be at least 45 on the phantom")
        whole = pathmnist.COUNTS["train"]
        if self.dataset == pathmnist.NAME and self.train_tiles is not None and self.train_tiles > whole:
            raise UsageError(f"--train_tiles {self.train_tiles}: {pathmnist.TITLE} has {whole:,} training tiles")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """The keys of the training loop, which every script that trains shares."""

    input_size: int = key(
        lambda config: max(64, config.size),
        "side in pixels of the network's inputs; tiles are resized before they are augmented "
        "(default: 64, or size where that is larger)",
        at_least=8,
    )
    model_name: str = key(
        "resnet18",
        "torchvision classification model, or timm:NAME for one of the package timm",
        check=_check_model_name,
    )
    n_epochs: int = key(5, "largest number of epochs", at_least=1)
    batch_size: int = key(64, "tiles per step", at_least=2)

    optimizer: str = key("adam", "Adam, or AdamW with decoupled weight decay", choices=("adam", "adamw"))
    amsgrad: bool = key(False, "use the maximum of past second moments (Reddi et al. 2018)")
    lr: float = key(1e-3, "learning rate at its peak", above=0)
    lr_min: float = key(0.0, "the cosine ends at this factor of lr; 1: constant lr", at_least=0, at_most=1)
    lr_warmup_epochs: int = key(
        0, "epochs of linear warm-up; if the run has no more epochs than this, half of them", at_least=0
    )
    lr_warmup_decay: float = key(0.1, "the warm-up starts at this factor of lr", above=0, at_most=1)
    weight_decay: float = key(0.0, "weight decay", at_least=0)
    norm_weight_decay: float | None = key(None, "decay of norms and biases (default: weight_decay)", at_least=0)

    augmentation: str = key(
        "none",
        "augmentation of the training tiles, parts joined by commas: none, auto, ta_wide, ta_wide_scaled, "
        "dihedral, stain, randstain, randstain_quarter, flip, erase, channel, scale",
        check=_check_augmentation,
    )
    label_smoothing: float = key(
        0.0, "share of the target probability that is spread evenly over all classes", at_least=0, below=1
    )
    mixup_alpha: float = key(0.0, "mixup's Beta parameter; 0: off", at_least=0)
    cutmix_alpha: float = key(0.0, "cutmix's Beta parameter; 0: off", at_least=0)

    early_stopping_patience: int | None = key(
        None, "stop after this many epochs without improvement (default: never)", at_least=1
    )
    early_stopping_delta: float = key(
        0.0,
        "smallest rise of ACC or AUC, or fall of the loss, that is an improvement",
        at_least=0,
    )
    select_on: str = key(
        "validate/acc",
        "the metric that chooses the epoch with the best weights, or `last` for the last epoch",
        choices=("validate/acc", "validate/auc", "validate/loss", "last"),
    )
    ema_decay: float = key(
        0.0,
        "validate and test an exponential moving average (EMA) of the weights; its decay per step in a run of "
        "1,000 steps, scaled to the length of the run; 0: off",
        at_least=0,
        below=1,
    )
    reestimate_batchnorm: bool = key(
        False,
        "before scoring, measure BatchNorm statistics again, on training tiles without augmentation; always on "
        "with EMA",
    )
    test: bool = key(True, "score the test tiles at the end; False: a run that serves to choose a recipe")
    tta: bool = key(True, "also score the test tiles averaged over their 8 flips and quarter turns")

    def __post_init__(self) -> None:
        """Also shorten a warm-up that would fill the whole run, with one line."""
        super().__post_init__()
        if 0 < self.lr_warmup_epochs >= self.n_epochs:
            shorter = self.n_epochs // 2
            _print_once(
                f"lr_warmup_epochs {self.lr_warmup_epochs} → {shorter}: "
                f"the run has {counted(self.n_epochs, 'epoch')}"
            )
            self._set("lr_warmup_epochs", shorter)


def _check_value(field: "dataclasses.Field[Any]", value: Any) -> None:
    if value is None:  # an optional key without a value
        return
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if type(value) is int:
        bounds = {**bounds, "at_most": bounds.get("at_most", MOST)}
    if choices and value not in choices:
        names = [str(choice) for choice in choices]
        problem = f"choose from {', '.join(names)}{closest(str(value), names)}"
    elif isinstance(value, float) and not math.isfinite(value):
        problem = "must be a finite number"
    elif not all(BOUNDS[name](value, bound) for name, bound in bounds.items()):
        limits = (f"{name.replace('_', ' ')} {bound:,}" for name, bound in bounds.items())
        problem = f"must be {' and '.join(limits)}"
        value = f"{value:g}" if abs(value) > 1e15 else value
    else:
        problem = field.metadata["check"](value)
    if problem:
        raise UsageError(f"--{field.name} {value}: {problem}")


def program() -> list[str]:
    """How this program was started, without its keys: `["task1.py"]`, or `["-m", "study.report"]`."""
    module = sys.modules["__main__"].__spec__  # of `python -m MODULE`, where sys.argv has the whole path of a file
    return ["-m", module.name.removesuffix(".__main__")] if module else sys.argv[:1]


def parse(config_class: type[C], arguments: Sequence[str], description: str) -> C:
    """Read a command line: `--key=value` or `--key value`, with '_' or '-' in the key.

    Raises UsageError for unknown keys, wrong types and impossible values.
    """
    parser = argparse.ArgumentParser(
        prog=" ".join(["python", *program()]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    fields = dataclasses.fields(config_class)
    for field in fields:
        types = typing.get_args(field.type) or (field.type,)  # `int | None` is (int, NoneType)
        text = field.metadata["description"].replace("%", "%%")
        if field.metadata["choices"]:
            text += f" [{' | '.join(map(str, field.metadata['choices']))}]"
        if field.default not in (None, ()) and not callable(field.default):
            text = re.sub(r" \(default: [^)]*\)$", "", text)  # says what None would mean
            text += f" (default: {field.default})"
        options: dict[str, Any] = {"nargs": "?", "const": True} if bool in types else {}
        name, metavar = f"--{field.name}", types[0].__name__.upper()
        if field.metadata["positional"]:
            name, metavar, options = field.name, field.name.upper(), {"nargs": "*" if Ellipsis in types else "?"}
        parser.add_argument(
            name, type=_reader(types), default=argparse.SUPPRESS, metavar=metavar, help=text, **options
        )
    try:
        given, unknown = parser.parse_known_intermixed_args(
            [_with_underscores(argument) for argument in arguments]
        )
    except argparse.ArgumentError as error:
        raise UsageError(str(error).removeprefix("argument ")) from None
    if unknown:
        name = unknown[0].split("=")[0]
        positive = name.replace("--no_", "--", 1)
        if positive != name and positive in [f"--{field.name}" for field in fields]:
            hint = f"; write {positive}=False"
        elif name.removeprefix("--") in [field.name for field in dataclasses.fields(TrainingConfig)]:
            hint = config_class.OF_A_RUN  # no mistyped key
        else:
            hint = closest(name, [f"--{field.name}" for field in fields])
        raise UsageError(f"unknown key {name}{hint or '; --help lists the keys'}")
    return config_class(**{**config_class.implied(vars(given)), **vars(given)})


def _reader(types: Sequence[Any]) -> Callable[[str], Any]:
    """The function that reads a key's value, of the first of these types; NoneType may follow."""
    read, complaint = READERS[types[0]]

    def value_of(text: str) -> Any:
        if type(None) in types and text in ("None", "none", "null"):  # how W&B passes the `null` of a sweep file
            return None
        try:
            return read(text)
        except (KeyError, ValueError, RuntimeError):
            raise argparse.ArgumentTypeError(f"{text!r} {complaint}") from None

    return value_of


def _whole_number(text: str) -> int:
    number = float(text)  # W&B may pass 512.0 for a whole number that it drew from a range
    if not number.is_integer():
        raise ValueError
    return int(number)


BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: BOOLEANS[text.lower()], "is neither True nor False"),
    int: (_whole_number, "is not a whole number"),
    float: (float, "is not a number"),
    str: (str, ""),
    # The shell does not expand the ~ of --key=~/folder.
    Path: (lambda text: Path(text).expanduser(), "begins with an unknown home folder"),
}


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def end_by(number: signal.Signals) -> None:
    """End this process as `number` does by default."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def prepare_streams() -> None:
    """Make output possible: streams that the caller has closed lead nowhere, unknown characters are escaped.

    Without this, the first opened file would get the number of a closed stream, and output meant for the stream.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 (until the process ends)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_script(main: Callable[[C], None], config_class: type[C], arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and call `main`; an error becomes one line and an exit status.

    The traceback of an unexpected error goes into a file beside the run; the exit status is then 70.
    """
    prepare_streams()
    if callable(signal.getsignal(signal.SIGINT)) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    description = sys.modules[main.__module__].__doc__ or ""
    command, number, folders = "", None, [Path(tempfile.gettempdir())]
    try:
        config = parse(config_class, sys.argv[1:] if arguments is None else arguments, description)
        run_id, output_dir = getattr(config, "run_id", None), getattr(config, "output_dir", Path())
        folders = [*([output_dir / "runs" / run_id] if run_id else []), output_dir, *folders]
        command = f"the same command{f' with --run_id={run_id}' if run_id else ''}"
        return main(config)
    except Stopped as stopped:
        message, status, number = f"{stopped}; {command} continues", stopped.exit_status, stopped.number
    except (UsageError, Fault) as error:
        message, status = str(error), error.exit_status
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        message, status = f"{what}; fix this, then start {command} again", 1
    except Exception as error:
        if is_out_of_memory(error):
            # Tiles are scored in batches of a fixed number.
            names = {"input_size": "", "batch_size": "(in training) ", "checked_tiles": ""}
            keys = [f"{when}--{name}" for name, when in names.items() if hasattr(config_class, name)]
            remedy = f"lower {' or '.join(keys)}" if keys else "close other programs"
            message, status = f"out of memory ({first_line(error)}): {remedy}", Untrainable.exit_status
        else:
            path = keep_traceback(error, folders)
            what = f"{type(error).__name__}: {first_line(error)}"
            message, status = f"unexpected: {what}; please report it{f' with {path}' if path else ''}", 70
    except KeyboardInterrupt:
        message, status = f"interrupted; {command} continues" if command else "interrupted", 130
    with suppress(OSError):  # nobody may read stderr any more
        print(f"{Path(program()[-1]).name}: {' '.join(message.splitlines())}", file=sys.stderr)
    if number and "WANDB_SWEEP_ID" in os.environ:  # its agent takes an exit status for a failure, but not a signal
        end_by(number)
    sys.exit(status)
