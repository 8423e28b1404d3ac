"""Read a W&B sweep's YAML file, and refuse in one line what cannot be run."""

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.config import Config, closest, parse
from common.errors import UsageError

METHODS = ("grid", "random", "bayes")
# How a parameter may be written, and the distributions that W&B lets it name; the first is the default.
DISTRIBUTIONS = {
    "value": ("constant",),
    "values": ("categorical",),
    "min": ("uniform", "int_uniform", "log_uniform_values"),
}
# The last three mean something to W&B's server only.
TOP_KEYS = (
    *("program", "method", "metric", "parameters", "command", "early_terminate", "name"),
    *("description", "project", "entity"),
)
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
SET_PER_RUN = ("run_id", "output_dir")  # the sweep gives these to each run itself


@dataclass(frozen=True)
class Range:
    """A parameter that a search draws from an interval."""

    distribution: str
    low: float
    high: float


@dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for.

    `fixed` are the keys that every run gets; `swept` are those that vary, each with its values or its range.
    Early termination is off where `min_iter` is None.
    """

    name: str
    method: str
    program: str
    command: tuple[str, ...]
    fixed: Mapping[str, Any]
    swept: Mapping[str, tuple[Any, ...] | Range]
    metric: str | None
    maximize: bool
    min_iter: int | None
    eta: int
    config_class: type[Config]

    def config(self, values: Mapping[str, Any]) -> Config:
        """The configuration that the program will make of `values` beside the fixed keys."""
        return parse(self.config_class, _as_arguments({**self.fixed, **values}), "")

    def command_line(self, values: Mapping[str, Any]) -> list[str]:
        """The command that runs the program with `values` beside the fixed keys."""
        macros = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": [sys.executable],
            "${program}": [self.program],
            "${args}": _as_arguments({**self.fixed, **values}),
        }
        return [word for item in self.command for word in macros.get(item, [item])]


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in the YAML file `path`; `overrides` are `--key=value` arguments that every run gets.

    Raises UsageError naming the file and whatever in it is missing, malformed or unknown.
    """
    with _naming(path):
        content = _mapping(_load(path), "the file")
        _known(content, TOP_KEYS, "key")
        for required in ("program", "method", "parameters"):
            if required not in content:
                raise UsageError(f"{required} is missing")
        method = _one_of(content["method"], METHODS, "method")
        parameters = {
            name: _parameter(name, _mapping(text, name))
            for name, text in _mapping(content["parameters"], "parameters").items()
        }
        fixed = {name: values[0] for name, (values, sweeps) in parameters.items() if not sweeps}
        swept = {name: values for name, (values, sweeps) in parameters.items() if sweeps}
        fixed.update(_overrides(overrides, swept))
        metric, maximize = _metric(content, method)
        min_iter, eta = _early_terminate(content.get("early_terminate"))
        sweep = Sweep(
            name=str(content.get("name", path.stem)),
            method=method,
            program=str(content["program"]),
            command=_command(content.get("command", DEFAULT_COMMAND)),
            fixed=fixed,
            swept=swept,
            metric=metric,
            maximize=maximize,
            min_iter=min_iter,
            eta=eta,
            config_class=_config_class(Path(str(content["program"]))),
        )
        _check_values(sweep)
    return sweep


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise UsageError("not a text file") from None
    except yaml.YAMLError as error:
        raise UsageError(f"not YAML: {' '.join(str(error).split())}") from None


def _mapping(content: Any, what: str) -> dict[str, Any]:
    if isinstance(content, dict) and content and all(isinstance(name, str) for name in content):
        return content
    raise UsageError(f"{what} must hold `key: value` entries")


def _known(content: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for name in content:
        if name not in known:
            raise UsageError(f"unknown {what} {name}{closest(name, known)}")


def _one_of(value: Any, known: Sequence[str], what: str) -> str:
    if value in known:
        return str(value)
    raise UsageError(f"unknown {what} {value}: choose from {', '.join(known)}{closest(str(value), known)}")


def _parameter(name: str, content: Mapping[str, Any]) -> tuple[Any, bool]:
    """A parameter's values or range, and whether it is swept."""
    if name in SET_PER_RUN:
        raise UsageError(f"parameter {name}: the sweep gives each run its own")
    _known(content, ("value", "values", "min", "max", "distribution"), f"entry of parameter {name}:")
    found = [kind for kind in DISTRIBUTIONS if kind in content]
    if len(found) != 1 or ("min" in content) != ("max" in content):
        raise UsageError(f"parameter {name} needs either value, or values, or min and max")
    known = DISTRIBUTIONS[found[0]]
    distribution = _one_of(content.get("distribution", known[0]), known, f"distribution of parameter {name}:")
    if found == ["value"]:
        return (content["value"],), False
    if found == ["values"]:
        if not isinstance(content["values"], list) or not content["values"]:
            raise UsageError(f"parameter {name}: values must be a list")
        return tuple(content["values"]), True
    low, high = content["min"], content["max"]
    for bound in (low, high):
        if not isinstance(bound, int | float):  # YAML reads 1e-4 as text
            raise UsageError(f"parameter {name}: {bound!r} is not a number; YAML wants 0.0001 or 1.0e-4")
    whole = isinstance(low, int) and isinstance(high, int)
    if whole and "distribution" not in content:
        distribution = "int_uniform"
    if low >= high or (distribution == "log_uniform_values" and low <= 0):
        raise UsageError(f"parameter {name}: no {distribution} between {low} and {high}")
    if distribution == "int_uniform" and not whole:
        raise UsageError(f"parameter {name}: int_uniform needs whole numbers, not {low} and {high}")
    return Range(distribution, low, high), True


def _overrides(arguments: Sequence[str], swept: Mapping[str, Any]) -> dict[str, str]:
    fixed = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or not equals:
            raise UsageError(f"{argument}: keys for every run are written --key=value")
        if name in swept or name in SET_PER_RUN:
            raise UsageError(f"{argument}: the sweep gives each run its own {name}")
        fixed[name] = value
    return fixed


def _metric(content: Mapping[str, Any], method: str) -> tuple[str | None, bool]:
    if "metric" not in content:
        if method != "grid":
            raise UsageError(f"metric is missing: method {method} needs one")
        return None, True
    metric = _mapping(content["metric"], "metric")
    _known(metric, ("name", "goal"), "entry of metric:")
    if "name" not in metric:
        raise UsageError("metric needs a name")
    goal = _one_of(metric.get("goal", "minimize"), ("maximize", "minimize"), "goal of metric:")
    return str(metric["name"]), goal == "maximize"


def _early_terminate(content: Any) -> tuple[int | None, int]:
    """`min_iter` and `eta`; W&B's other form, `max_iter` and `s`, is not supported."""
    if content is None:
        return None, 3
    content = _mapping(content, "early_terminate")
    _one_of(content.get("type"), ("hyperband",), "type of early_terminate:")
    _known(content, ("type", "min_iter", "eta"), "entry of early_terminate:")
    min_iter, eta = content.get("min_iter"), content.get("eta", 3)
    if not isinstance(min_iter, int) or min_iter < 1:
        raise UsageError(f"early_terminate: min_iter {min_iter} must be a whole number of epochs")
    if not isinstance(eta, int) or eta < 2:
        raise UsageError(f"early_terminate: eta {eta} must be a whole number from 2 on")
    return min_iter, eta


def _command(content: Any) -> tuple[str, ...]:
    if not isinstance(content, list | tuple) or not all(isinstance(item, str) for item in content):
        raise UsageError("command must be a list of words")
    for item in content:
        if "${" in item and item not in DEFAULT_COMMAND:
            raise UsageError(f"unknown macro {item} in command: choose from {', '.join(DEFAULT_COMMAND)}")
    if "${args}" not in content:
        raise UsageError("command has no ${args}: a run would not get its parameters")
    return tuple(content)


def _config_class(program: Path) -> type[Config]:
    """The configuration class that the program defines; its keys are what a sweep may vary."""
    if not program.is_file():
        raise UsageError(f"program {program}: no such file; start the sweep where the program is")
    name = f"swept_{program.stem}"
    spec = importlib.util.spec_from_file_location(name, program)
    if spec is None or spec.loader is None:
        raise UsageError(f"program {program} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    for item in vars(module).values():
        if isinstance(item, type) and issubclass(item, Config) and item.__module__ == name:
            return item
    raise UsageError(f"program {program} defines no configuration class")


def _check_values(sweep: Sweep) -> None:
    """Let the program's configuration judge every value; a typo ends the sweep now, not its twentieth run."""
    sweep.config({})
    for name, values in sweep.swept.items():
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            sweep.config({name: value})


def _as_arguments(values: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]
