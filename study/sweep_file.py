"""Read a W&B sweep's YAML file; a file that cannot be run is refused with one line that names the reason."""

import math
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.cli import UsageError, closest, first_line, parse
from common.config import Config, TrainingConfig, check_run_id
from common.data.augment import build_augmentation
from common.files import read_text
from common.finetune.weights import library_name
from common.records.read import METRICS
from common.training.device import Compute
from common.training.models import check_model_name

METHODS = ("grid", "random", "bayes")
# The forms of a parameter, each with the distributions that W&B allows for it; the first one is the default.
DISTRIBUTIONS = {
    "value": ("constant",),
    "values": ("categorical",),
    "min": ("uniform", "int_uniform", "log_uniform_values"),
}
KEYS = ("program", "method", "metric", "parameters", "command", "early_terminate", "name")
WANDB_KEYS = {"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY"}  # with the variables that W&B reads in a run
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
LARGEST = 1e300  # of a range's bounds
SET_PER_RUN = ("run_id", "output_dir")  # the sweep sets them for each run


@dataclass(frozen=True)
class Range:
    """An interval from which a search samples a parameter."""

    distribution: str
    low: float
    high: float


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep file.

    `environment` has W&B's variables for the runs. `fixed` are the keys that are the same in every run; `swept`
    are those that vary, each with its values or its range. Without early termination `min_iter` is None.
    """

    name: str
    method: str
    program: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    fixed: Mapping[str, Any]
    swept: Mapping[str, tuple[Any, ...] | Range]
    metric: str | None
    maximize: bool
    min_iter: int | None
    eta: int
    config_class: type[Config]

    def config(self, values: Mapping[str, Any]) -> Config:
        """The program's configuration for the fixed keys and `values`."""
        config = parse(self.config_class, _as_arguments({**self.fixed, **values}))
        if isinstance(config, TrainingConfig):  # names that a run itself would refuse only after its start
            build_augmentation(config.augmentation)
            if problem := check_model_name(library_name(config.model_name)):
                raise UsageError(f"--model_name {config.model_name}: {problem}")
        return config

    def best(self, values: Iterable[float]) -> float | None:
        """The best finite value of the metric; None where there is none."""
        finite = [value for value in values if math.isfinite(value)]
        return max(finite, default=None) if self.maximize else min(finite, default=None)

    def per_machine(self) -> set[str]:
        """The keys in which the machines that share a search may differ."""
        return {*self.config_class.bookkeeping(), "device"}

    def on_cpu(self, values: Mapping[str, Any]) -> bool:
        """Whether the program computes on a CPU, with the fixed keys and `values`."""
        return Compute.of(self.config(values).device, "fp32").device.type == "cpu"

    def recipe(self, values: Mapping[str, Any]) -> list[str]:
        """The arguments that train with `values` on all training tiles, wherever and however a run is kept."""
        apart = {*self.per_machine(), "train_tiles"}
        fixed = {name: value for name, value in self.fixed.items() if name not in apart}
        return _as_arguments({**fixed, **values})

    def command_line(self, values: Mapping[str, Any]) -> list[str]:
        """The command that runs the program with the fixed keys and `values`."""
        macros = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": [sys.executable],
            "${program}": [self.program],
            "${args}": _as_arguments({**self.fixed, **values}),
        }
        return [word for item in self.command for word in macros.get(item, [item])]


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in the YAML file `path`; `overrides` are `--key=value` arguments for every run.

    Raises UsageError naming the file and what in it is missing, malformed or unknown.
    """
    try:
        return _sweep(_mapping(_load(path), "the file", (*KEYS, *WANDB_KEYS, "description")), path.stem, overrides)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key that stands twice: YAML would drop the first value without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {name} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _load(path: Path) -> Any:
    try:
        return _Loader(read_text(path)).get_single_data()
    except OSError as error:
        raise UsageError(error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise UsageError("not a text file") from None
    except yaml.YAMLError as error:
        raise UsageError(f"not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UsageError("not a sweep: its lists are nested too deep") from None


def _sweep(content: Mapping[str, Any], default_name: str, overrides: Sequence[str]) -> Sweep:
    for required in ("program", "method", "parameters"):
        if required not in content:
            raise UsageError(f"{required} is missing")
    method = _one_of(content["method"], METHODS, "method")
    fixed, swept = {}, {}
    for name, parameter in _mapping(content["parameters"], "parameters").items():
        values = _parameter(name, parameter)
        if "value" in parameter:
            fixed[name] = values
        else:
            swept[name] = values
    fixed.update(_overrides(overrides, swept))
    metric, maximize = _metric(content, method)
    min_iter, eta = _early_terminate(content.get("early_terminate"))
    name = str(content.get("name", default_name))
    if problem := check_run_id(name):  # the names of its runs begin with it
        raise UsageError(f"name {name!r}: {problem}")
    sweep = Sweep(
        name=name,
        method=method,
        program=str(content["program"]),
        command=_command(content.get("command", DEFAULT_COMMAND)),
        environment={variable: str(content[key]) for key, variable in WANDB_KEYS.items() if key in content},
        fixed=fixed,
        swept=swept,
        metric=metric,
        maximize=maximize,
        min_iter=min_iter,
        eta=eta,
        config_class=_config_class(Path(str(content["program"]))),
    )
    # The program's configuration checks every value now, so that a wrong one does not end the twentieth run.
    sweep.config({})
    for name, values in swept.items():
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            sweep.config({name: value})
    if metric is not None and issubclass(sweep.config_class, TrainingConfig):
        _one_of(metric, METRICS, "metric")
    return sweep


def _mapping(content: Any, what: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """`content`, which must be a mapping with text keys, and with these keys alone where `known` lists them."""
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise UsageError(f"{what} must hold `key: value` entries")
    for name in content:
        if known and name not in known:
            raise UsageError(f"{what} has an unknown key {name}{closest(name, known)}")
    return content


def _one_of(value: Any, known: Sequence[str], what: str) -> str:
    if value in known:
        return str(value)
    raise UsageError(f"unknown {what} {value}: choose from {', '.join(known)}{closest(str(value), known)}")


def _parameter(name: str, content: Any) -> Any:
    """The value of a fixed parameter, the values of a categorical one as a tuple, or a Range."""
    _mapping(content, f"parameter {name}", ("value", "values", "min", "max", "distribution"))
    _check_settable(name, f"parameter {name}")
    found = [form for form in DISTRIBUTIONS if form in content]
    if len(found) != 1 or ("min" in content) != ("max" in content):
        raise UsageError(f"parameter {name} needs either value, or values, or min and max")
    known = DISTRIBUTIONS[found[0]]
    distribution = _one_of(content.get("distribution", known[0]), known, f"distribution of parameter {name}:")
    if found == ["value"]:
        return content["value"]
    if found == ["values"]:
        if not isinstance(content["values"], list) or not content["values"]:
            raise UsageError(f"parameter {name}: values must be a list")
        return tuple(content["values"])
    low, high = content["min"], content["max"]
    for bound in (low, high):
        if isinstance(bound, bool) or not isinstance(bound, int | float):  # YAML reads 1e-4 as text
            raise UsageError(f"parameter {name}: {bound!r} is not a number; YAML wants 0.0001 or 1.0e-4")
        if not -LARGEST <= bound <= LARGEST:
            raise UsageError(f"parameter {name}: min and max must be numbers up to {LARGEST:g}")
    whole = isinstance(low, int) and isinstance(high, int)
    if whole and "distribution" not in content:
        distribution = "int_uniform"
    if low >= high or (distribution == "log_uniform_values" and low <= 0):
        raise UsageError(f"parameter {name}: no {distribution} between {low} and {high}")
    if distribution == "int_uniform" and not whole:
        raise UsageError(f"parameter {name}: int_uniform needs whole numbers, not {low} and {high}")
    return Range(distribution, low, high)


def _check_settable(name: str, where: str, swept: Iterable[str] = ()) -> None:
    """Raise UsageError for a key that is not the user's to set for all runs; `where` names its place."""
    if name in swept or name in SET_PER_RUN:
        raise UsageError(f"{where}: the sweep gives each run its own {name}")


def _overrides(arguments: Sequence[str], swept: Mapping[str, Any]) -> dict[str, str]:
    fixed = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or not equals:
            raise UsageError(f"{argument}: keys for every run are written --key=value")
        _check_settable(name, argument, swept)
        fixed[name] = value
    return fixed


def _metric(content: Mapping[str, Any], method: str) -> tuple[str | None, bool]:
    """The metric's name, and whether it is maximised."""
    if "metric" not in content:
        if method != "grid":
            raise UsageError(f"metric is missing: method {method} needs one")
        return None, True
    metric = _mapping(content["metric"], "metric", ("name", "goal"))
    if "name" not in metric:
        raise UsageError("metric needs a name")
    goal = _one_of(metric.get("goal", "minimize"), ("maximize", "minimize"), "goal of metric:")
    return str(metric["name"]), goal == "maximize"


def _early_terminate(content: Any) -> tuple[int | None, int]:
    """`min_iter` and `eta`; W&B's other form, `max_iter` and `s`, is not supported."""
    if content is None:
        return None, 3
    _mapping(content, "early_terminate", ("type", "min_iter", "eta"))
    _one_of(content.get("type"), ("hyperband",), "type of early_terminate:")
    min_iter, eta = content.get("min_iter"), content.get("eta", 3)
    if type(min_iter) is not int or min_iter < 1:  # true is an int, too
        raise UsageError(f"early_terminate: min_iter {min_iter} must be a whole number of epochs")
    if type(eta) is not int or eta < 2:
        raise UsageError(f"early_terminate: eta {eta} must be a whole number, at least 2")
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
    """The configuration class that the program defines; a sweep may vary its keys."""
    if not program.is_file():
        raise UsageError(f"program {program}: no such file; start the sweep in the folder of the program")
    try:
        defined = runpy.run_path(str(program), run_name="swept_program")
    except Exception as error:  # of the program
        raise UsageError(f"program {program}: Python cannot load it: {first_line(error)}") from None
    for item in defined.values():
        if isinstance(item, type) and issubclass(item, Config) and item.__module__ == "swept_program":
            return item
    raise UsageError(f"program {program} defines no configuration class")


def _as_arguments(values: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]
