"""A W&B sweep's YAML file, as far as this project uses it; a file that cannot be run is refused with one line."""

import math
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from common.cli import UsageError, closest, first_line, parse
from common.config import Config, RunId, TrainingConfig
from common.data.augment import build_augmentation
from common.files import read_text
from common.finetune.weights import library_name
from common.training.device import Compute
from common.training.models import check_model_name

# The forms of a parameter, each with the distributions that W&B allows for it; the first one is the default.
FORMS = {
    frozenset({"value"}): ("constant",),
    frozenset({"values"}): ("categorical",),
    frozenset({"min", "max"}): ("uniform", "int_uniform", "log_uniform_values"),
}
COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")


def _checked_command(command: list[str]) -> list[str]:
    for word in command:
        if "${" in word and word not in COMMAND:
            raise ValueError(f"unknown macro {word}: choose from {', '.join(COMMAND)}")
    if "${args}" not in command:
        raise ValueError("it has no ${args}: a run would not get its parameters")
    return command


def _checked_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 <= value <= 1e300:
        raise ValueError("must be a number; YAML reads 1e-4 as text and wants 0.0001 or 1.0e-4")
    return value


Number = Annotated[Any, BeforeValidator(_checked_number)]


class Parameter(BaseModel, extra="forbid"):
    """A key of the runs: one `value`, or `values` to choose from, or a range from `min` to `max`."""

    value: Any = None
    values: list[Any] = Field([], strict=True, min_length=1)
    min: Number = 0
    max: Number = 0
    distribution: str = ""

    @model_validator(mode="after")
    def _has_one_form(self) -> "Parameter":
        known = FORMS.get(frozenset(self.model_fields_set - {"distribution"}))
        if known is None:
            raise ValueError("needs either value, or values, or min and max")
        whole = isinstance(self.min, int) and isinstance(self.max, int)
        self.distribution = self.distribution or known[whole and len(known) > 1]
        if self.distribution not in known:
            hint = closest(self.distribution, known)
            raise ValueError(f"unknown distribution {self.distribution}: choose from {', '.join(known)}{hint}")
        integer, log = self.distribution == "int_uniform", self.distribution == "log_uniform_values"
        if self.is_range and (self.min >= self.max or (log and self.min <= 0) or (integer and not whole)):
            raise ValueError(f"no {self.distribution} between {self.min} and {self.max}")
        return self

    @property
    def is_range(self) -> bool:
        """Whether it has `min` and `max`."""
        return "min" in self.model_fields_set

    def suggest(self, trial: Any, name: str) -> Any:
        """A value for an Optuna trial."""
        if not self.is_range:
            return trial.suggest_categorical(name, self.values)
        if self.distribution == "int_uniform":
            return trial.suggest_int(name, self.min, self.max)
        return trial.suggest_float(name, self.min, self.max, log=self.distribution == "log_uniform_values")


class Metric(BaseModel, extra="forbid"):
    """What a search improves."""

    name: str
    goal: Literal["maximize", "minimize"] = "minimize"


class Hyperband(BaseModel, extra="forbid"):
    """Early termination: after min_iter, min_iter · eta, … epochs only the best 1/eta of the trials go on."""

    type: Literal["hyperband"]
    min_iter: int = Field(strict=True, ge=1)
    eta: int = Field(3, strict=True, ge=2)


class Sweep(BaseModel, extra="forbid"):
    """The content of a sweep file, and the configuration class of its program, which checks every value."""

    name: RunId  # the names of its runs begin with it
    program: str
    method: Literal["grid", "random", "bayes"]
    parameters: dict[str, Parameter]
    metric: Metric | None = None
    early_terminate: Hyperband | None = None
    command: Annotated[list[str], AfterValidator(_checked_command)] = list(COMMAND)
    project: str = ""
    entity: str = ""
    description: Any = None
    _overrides: dict[str, str] = PrivateAttr({})
    _config_class: type[Config] = PrivateAttr(Config)

    @model_validator(mode="after")
    def _has_metric(self) -> "Sweep":
        if self.metric is None and self.method != "grid":
            raise ValueError(f"metric is missing: method {self.method} needs one")
        return self

    @property
    def fixed(self) -> dict[str, Any]:
        """The keys that are the same in every run."""
        found = {name: one.value for name, one in self.parameters.items() if one.distribution == "constant"}
        return {**found, **self._overrides}

    @property
    def swept(self) -> dict[str, Parameter]:
        """The keys that vary."""
        return {name: one for name, one in self.parameters.items() if one.distribution != "constant"}

    @property
    def metric_name(self) -> str:
        """The metric that a search improves."""
        return self.metric.name if self.metric else ""

    @property
    def maximize(self) -> bool:
        """Whether a larger metric is better."""
        return self.metric is None or self.metric.goal == "maximize"

    @property
    def space(self) -> dict[str, Any]:
        """What all commands of a search must agree on, ready for JSON."""
        content = self.model_dump(mode="json", include={"metric": True, "parameters": set(self.swept)})
        apart = self.per_machine()
        return {**content, "fixed": {name: value for name, value in self.fixed.items() if name not in apart}}

    def config(self, values: Mapping[str, Any]) -> Config:
        """The program's configuration for the fixed keys and `values`; UsageError where it refuses them."""
        config = parse(self._config_class, _as_arguments({**self.fixed, **values}))
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
        return {*self._config_class.bookkeeping(), "device"}

    def on_cpu(self) -> bool:
        """Whether the program computes on a CPU."""
        return Compute.of(self.config({}).device, "fp32").device.type == "cpu"

    def recipe(self, values: Mapping[str, Any]) -> list[str]:
        """The arguments that train with `values` on all training tiles, wherever and however a run is kept."""
        apart = {*self.per_machine(), "train_tiles"}
        return _as_arguments({**{name: one for name, one in self.fixed.items() if name not in apart}, **values})

    def command_line(self, values: Mapping[str, Any]) -> list[str]:
        """The command that runs the program with the fixed keys and `values`."""
        macros = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": [sys.executable],
            "${program}": [self.program],
            "${args}": _as_arguments({**self.fixed, **values}),
        }
        return [word for item in self.command for word in macros.get(item, [item])]


def _as_arguments(values: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in the YAML file `path`; `overrides` are `--key=value` arguments for every run.

    Raises UsageError naming the file and what in it is missing, malformed or unknown.
    """
    try:
        content = _load(path)
        if not isinstance(content, dict):
            raise UsageError("the file must hold `key: value` entries")
        sweep = Sweep.model_validate({"name": path.stem, **content})
        sweep._config_class = _config_class(Path(sweep.program))
        sweep._overrides = _as_keys(overrides, sweep.swept)
        _check_values(sweep)
        return sweep
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        *where, last = map(str, first["loc"] or ("the file",))
        known = [name for model in (Sweep, Parameter, Metric, Hyperband) for name in model.model_fields]
        problem = f"{last}: {first['msg'].removeprefix('Value error, ')}"
        problem = f"{last} is missing" if first["type"] == "missing" else problem
        problem = f"unknown key {last}{closest(last, known)}" if first["type"] == "extra_forbidden" else problem
        raise UsageError(f"{path}: {': '.join([*where, problem])}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """A safe loader without aliases, nine levels of which unfold to a billion values, and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a sweep file has no aliases (*name)")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:  # YAML would drop the first value
            raise yaml.YAMLError(f"key {twice[0]} stands twice")
        return super().construct_mapping(node, deep)


def _load(path: Path) -> Any:
    try:
        return _Loader(read_text(path)).get_single_data()
    except OSError as error:
        raise UsageError(error.strerror or str(error)) from None
    except RecursionError:
        raise UsageError("not a sweep: its lists are nested too deep") from None
    except Exception as error:  # PyYAML has six types for scalars like !!int abc, !!float '' and 2001-13-45
        raise UsageError(f"not YAML: {' '.join(str(error).split())[:200]}") from None


def _as_keys(arguments: Sequence[str], swept: Mapping[str, Any]) -> dict[str, str]:
    keys = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or not equals:
            raise UsageError(f"{argument}: keys for every run are written --key=value")
        if name in swept:
            raise UsageError(f"{argument}: the sweep gives each run its own {name}")
        keys[name] = value
    return keys


def _check_values(sweep: Sweep) -> None:
    """Let the program's configuration check every value now: a wrong one should not end the twentieth run."""
    for name in ("run_id", "output_dir"):
        if name in sweep.fixed or name in sweep.swept:
            raise UsageError(f"{name}: the sweep gives each run its own {name}")
    sweep.config({})
    for name, parameter in sweep.swept.items():
        for value in parameter.values or (parameter.min, parameter.max):
            sweep.config({name: value})
        if parameter.is_range and parameter.distribution != "int_uniform":
            try:
                sweep.config({name: parameter.min + (parameter.max - parameter.min) / math.e})
            except UsageError as error:
                raise UsageError(f"{error}; a key of whole numbers needs int_uniform, or values") from None


def _config_class(program: Path) -> type[Config]:
    """The configuration class that the program defines."""
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
