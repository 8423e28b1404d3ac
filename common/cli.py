"""A program's command line: its keys and their values, and the one line and exit status with which it ends.

A configuration is a frozen pydantic model whose fields are the keys. argparse only splits the command line: so a
value may be written as a W&B agent writes it (`--amsgrad=False`, `512.0`, `None`).
"""

import argparse
import difflib
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from tqdm import tqdm

from common.files import public

LOG_EVERY = 60.0  # seconds between two lines of progress in a log file
BOOKKEEPING = {"data_root", "device", "output_dir", "wandb", "scratch"}  # no part of a run's identity


class UsageError(Exception):
    """The user asked for something impossible; the message names it and the remedy."""

    exit_status = 2


class Fault(Exception):
    """Something outside the command failed: a file, the disk, the internet connection."""

    exit_status = 1


class Untrainable(Fault):
    """Every run of this configuration on this machine fails, so a search does not try it again."""

    exit_status = 3


def first_line(error: Exception | str) -> str:
    """The first line of an error's message, without errno and path, or the name of its type where it is empty."""
    message = getattr(error, "strerror", None) or str(error)
    return (message.strip().splitlines() or [type(error).__name__])[0]


def one_line(message: str) -> str:
    """The message with a space for each character that a terminal cannot show, such as a line break."""
    return "".join(character if character.isprintable() else " " for character in message)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the system, a GPU or one of their libraries had too little memory left."""
    words = "out of memory|allocate memory|ALLOC.*FAILED|failed to map segment|could not create a primitive$"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def progress(iterable: Any = None, **options: Any) -> Any:
    """A tqdm bar on a terminal. Where stderr is a log file, a line a minute, and none for work of seconds."""
    if not sys.stderr.isatty():
        log = SimpleNamespace(write=lambda text: text.strip() and print(text.strip(), file=sys.stderr))
        options |= {"file": log, "mininterval": LOG_EVERY, "delay": LOG_EVERY}
    return tqdm(iterable, **options)


def closest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?` with the known name that is most similar to `name`; empty where none is similar."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {matches[0]}?" if matches else ""


def key(
    default: Any, description: str, *, choices: Sequence[Any] = (), positional: bool = False, **bounds: float
) -> Any:
    """A key: its default, its help, and its values, by `choices` or by pydantic's bounds ge, gt, le and lt.

    The default may be a function of the keys before it, and None where a validator fills it in. The value of a
    positional key is written without its name.
    """
    extra: Any = {"choices": list(choices), "positional": positional}
    options: Any = {"default_factory" if callable(default) else "default": default, **bounds}
    return Field(description=description, json_schema_extra=extra, **options)


class Keys(BaseModel):
    """The base of every configuration, without any key. A wrong value is a UsageError that names key and value."""

    unknown_key: ClassVar[str] = "--help lists the keys"  # the remedy

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**{**self.recipe(given), **given})
        except ValidationError as error:
            first = error.errors()[0]
            reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            named = "".join(f"--{name} {first['input']}: " for name in first["loc"][:1])
            raise UsageError(named + reason) from None

    @classmethod
    def recipe(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Values in the place of the keys' defaults; they may depend on the `given` keys, not yet checked."""
        return {}

    @field_validator("*", mode="wrap")
    @classmethod
    def _value(cls, value: Any, validate: Callable[[Any], Any], info: Any) -> Any:
        field: Any = cls.model_fields[info.field_name]
        if value in ("None", "none", "null") and type(None) in typing.get_args(field.annotation):
            return None  # `null` of a sweep file
        if value is None and field.default is None:
            return None
        value = validate(value)
        names = [str(choice) for choice in field.json_schema_extra["choices"]]
        if names and str(value) not in names:
            raise ValueError(f"choose from {', '.join(names)}{closest(str(value), names)}")
        try:
            return value.expanduser() if isinstance(value, Path) else value
        except RuntimeError as error:  # ~NAME of an unknown user
            raise ValueError(first_line(error)) from None

    def _set(self, name: str, value: Any) -> None:
        """For validators alone, which fill in a default that depends on other keys."""
        object.__setattr__(self, name, value)  # a frozen model refuses `self.name = value`

    def replaced(self, **changes: Any) -> Self:
        """The configuration with some other values, checked again."""
        return type(self)(**{**self.model_dump(), **changes})

    def as_dict(self) -> dict[str, Any]:
        """Every key and its value, ready for JSON, as records may show them (`public`)."""
        return dict(public(self.model_dump(mode="json")))

    def identity(self) -> dict[str, Any]:
        """The keys that decide what a run computes: all but BOOKKEEPING. Ready for JSON."""
        return {name: value for name, value in self.as_dict().items() if name not in BOOKKEEPING}


K = TypeVar("K", bound=Keys)


def program() -> list[str]:
    """How this program was started, without its keys: `["task1.py"]`, or `["-m", "study.report"]`."""
    module = sys.modules["__main__"].__spec__  # of `python -m MODULE`, where sys.argv has the whole path of a file
    return ["-m", module.name.removesuffix(".__main__")] if module else sys.argv[:1]


def parse(keys: type[K], arguments: Sequence[str], description: str = "") -> K:
    """Read `--key=value` or `--key value`; UsageError for unknown keys, wrong types and impossible values."""
    parser = argparse.ArgumentParser(
        prog=" ".join(["python", *program()]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    fields: Mapping[str, Any] = keys.model_fields
    for name, field in fields.items():
        kind = (typing.get_args(field.annotation) or (field.annotation,))[0]  # `int | None` is (int, NoneType)
        kind = (typing.get_args(kind) or (kind,))[0]  # of an annotated type
        default, extra, text = keys.recipe({}).get(name, field.default), field.json_schema_extra, field.description
        if extra["choices"]:
            text += f" [{' | '.join(map(str, extra['choices']))}]"
        if "(default: " not in text and default != ():
            text += f" (default: {default})"
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "metavar": kind.__name__.upper()}
        if extra["positional"]:
            options |= {"nargs": "*" if default == () else "?", "metavar": name.upper()}
        elif kind is bool:
            options |= {"nargs": "?", "const": True}
        parser.add_argument(name if extra["positional"] else f"--{name}", **options)
    try:
        given, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(str(error).removeprefix("argument ")) from None
    if unknown:
        name = unknown[0].partition("=")[0]
        hint = closest(name, [f"--{known}" for known in fields]) or f"; {keys.unknown_key}"
        hint = f"; write --{unknown[0]}" if name in fields else hint
        raise UsageError(f"unknown key {name}{hint}")
    return keys(**vars(given))


def run_script(main: Callable[[K], None], keys: type[K], arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and call `main`; an error becomes one line, an unexpected one after its traceback.

    SIGTERM raises KeyboardInterrupt, as Ctrl-C does. After both the exit status is 128 + the signal's number.
    """
    command, number = "", None

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)  # as Python does on Ctrl-C, but without the number

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        description = sys.modules[main.__module__].__doc__ or ""
        config = parse(keys, sys.argv[1:] if arguments is None else arguments, description)
        run_id = getattr(config, "run_id", None)
        command = f"the same command{f' with --run_id={run_id}' if run_id else ''}"
        return main(config)
    except (UsageError, Fault) as error:
        message, status = str(error), error.exit_status
    except Exception as error:
        if is_out_of_memory(error):
            sizes = [name for name in ("input_size", "batch_size", "checked_tiles") if name in keys.model_fields]
            remedy = " or ".join(f"lower --{name}" for name in sizes) or "close other programs"
            remedy += ", with another --run_id" if "batch_size" in sizes else ""
            message, status = f"out of memory ({first_line(error)}): {remedy}", Untrainable.exit_status
        elif isinstance(error, OSError):
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            message, status = f"{what}; fix this, then start {command} again", Fault.exit_status
        else:
            traceback.print_exc()
            what = f"{type(error).__name__}: {first_line(error)}"
            message, status = f"unexpected: {what}; please report it with the lines above", 70
    except KeyboardInterrupt as interrupted:
        number = signal.Signals(*interrupted.args or (signal.SIGINT,))  # Ctrl-C gives no number
        message = f"ended by {number.name}{f'; start {command} again' if command else ''}"
        status = 128 + number
    finally:
        signal.signal(signal.SIGTERM, before)
    with suppress(OSError):  # nobody may read stderr any more
        print(f"{Path(program()[-1]).name}: {one_line(message)}", file=sys.stderr)
    if number and "WANDB_SWEEP_ID" in os.environ:  # its agent takes an exit status for a failure, but not a signal
        with suppress(Exception):  # the signal skips what W&B does at a program's exit
            sys.modules["wandb"].finish(exit_code=status)
        sys.stdout.flush()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(status)
