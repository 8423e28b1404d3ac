"""A W&B sweep's YAML file, as far as this project uses it; a file that cannot be run is refused with one line."""

import math
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, FiniteFloat, PrivateAttr, ValidationError, model_validator

from common.cli import UsageError, parse
from common.config import Config, RunId, TrainingConfig
from common.data.augment import build_augmentation
from common.files import read_text
from common.finetune.weights import library_name
from common.training.models import check_model_name


class Parameter(BaseModel, extra="forbid"):
    """A key of the runs: one `value`, or `values` to choose from, or a range from `min` to `max`."""

    value: Any = None
    values: list[Any] = Field(default_factory=list, strict=True, min_length=1)
    min: int | FiniteFloat = 0
    max: int | FiniteFloat = 0
    distribution: Literal["constant", "categorical", "uniform", "int_uniform", "log_uniform_values"] | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> "Parameter":
        form = self.model_fields_set - {"distribution"}
        if form not in ({"value"}, {"values"}, {"min", "max"}):
            raise ValueError("needs either value, or values, or min and max")
        least = 0 if self.distribution == "log_uniform_values" else -math.inf
        if "min" in form and not least < self.min < self.max:
            raise ValueError(f"no range from {self.min} to {self.max}")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether a range has whole numbers only; by default, as with W&B, where both ends are whole."""
        ends = (self.min, self.max)
        return self.distribution in (None, "int_uniform") and all(isinstance(end, int) for end in ends)


class Metric(BaseModel, extra="forbid"):
    """What a search improves: a column of history.csv."""

    name: Literal["train/loss", "validate/loss", "validate/auc", "validate/acc", "validate/balanced_acc"]
    goal: Literal["maximize", "minimize"] = "minimize"  # W&B's default


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
    metric: Metric = Metric(name="validate/acc", goal="maximize")
    early_terminate: Hyperband | None = None
    command: list[Literal["${env}", "${interpreter}", "${program}", "${args}"]] = []  # no other words run here
    project: str = ""
    _config_class: type[Config] = PrivateAttr(Config)

    @property
    def fixed(self) -> dict[str, Any]:
        """The keys that are the same in every run."""
        return {name: one.value for name, one in self.parameters.items() if "value" in one.model_fields_set}

    @property
    def swept(self) -> dict[str, Parameter]:
        """The keys that vary."""
        return {name: one for name, one in self.parameters.items() if "value" not in one.model_fields_set}

    def config(self, values: Mapping[str, Any]) -> Config:
        """The program's configuration for the fixed keys and `values`; UsageError where it refuses them."""
        config = parse(self._config_class, self.command_line(values)[2:])
        if isinstance(config, TrainingConfig):  # names that a run itself would refuse only after its start
            build_augmentation(config.augmentation)
            if problem := check_model_name(library_name(config.model_name)):
                raise UsageError(f"--model_name {config.model_name}: {problem}")
        return config

    def best(self, values: Iterable[float]) -> float:
        """The best finite value of the metric; the worst number of all where there is none."""
        finite = filter(math.isfinite, values)
        maximize = self.metric.goal == "maximize"
        return max(finite, default=-math.inf) if maximize else min(finite, default=math.inf)

    def command_line(self, values: Mapping[str, Any]) -> list[str]:
        """The command that runs the program with the fixed keys and `values`."""
        keys = {**self.fixed, **values}
        return [sys.executable, self.program, *(f"--{name}={value}" for name, value in keys.items())]


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


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in the YAML file `path`; `overrides` are `--key=value` arguments for every run.

    Raises UsageError naming the file and what in it is missing, malformed or unknown. OSError.
    """
    try:
        content = {"name": path.stem, **_Loader(read_text(path)).get_single_data()}
    except OSError:
        raise
    except Exception as error:  # PyYAML has six types for scalars like !!int abc, !!float '' and 2001-13-45
        raise UsageError(f"{path}: not YAML of a sweep: {' '.join(str(error).split())[:200]}") from None
    try:
        sweep = Sweep.model_validate(content)
        sweep._config_class = _config_class(Path(sweep.program))
        for argument in overrides:
            name, equals, value = argument.removeprefix("--").partition("=")
            if not argument.startswith("--") or not equals or name in sweep.swept:
                raise UsageError(f"{argument}: write --key=value, for a key that the sweep does not vary")
            sweep.parameters[name] = Parameter(value=value)
        _check_values(sweep)
        return sweep
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        words = [*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")]
        raise UsageError(f"{path}: {': '.join(words)}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _check_values(sweep: Sweep) -> None:
    """Let the program's configuration check every value now: a wrong one should not end the twentieth run."""
    if own := {"run_id", "output_dir"} & sweep.parameters.keys():
        raise UsageError(f"{min(own)}: the sweep gives each run its own")
    sweep.config({})
    for name, one in sweep.swept.items():
        # A key of whole numbers must have a range of whole numbers.
        between = [] if one.is_whole else [one.min + (one.max - one.min) / math.e]
        for value in one.values or [one.min, one.max, *between]:
            sweep.config({name: value})


def _config_class(program: Path) -> type[Config]:
    """The configuration class that the program defines."""
    if not program.is_file():
        raise UsageError(f"program {program}: no such file; start the sweep in the folder of the program")
    for item in runpy.run_path(str(program), run_name="swept_program").values():
        if isinstance(item, type) and issubclass(item, Config) and item.__module__ == "swept_program":
            return item
    raise UsageError(f"program {program} defines no configuration class")
