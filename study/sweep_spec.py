"""A W&B sweep's YAML file, as far as this project uses it; a file that cannot be run is refused with one line."""

import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from optuna import distributions
from pydantic import BaseModel, Field, ValidationError, model_validator

from common.cli import UsageError, parse
from common.config import RunId, TrainingConfig
from common.training.models import check_model_name

Scalar = bool | int | float | str | None


class Parameter(BaseModel, extra="forbid"):
    """A key of the runs: one `value`, or `values` to choose from, or a range from `min` to `max`."""

    value: Scalar = None
    values: list[Scalar] = Field(default_factory=list, min_length=1)
    min: int | float = 0
    max: int | float = 0
    distribution: Literal["constant", "categorical", "uniform", "int_uniform", "log_uniform_values"] | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> "Parameter":
        form = self.model_fields_set - {"distribution"}
        forms = [{"value"}, {"values"}, {"min", "max"}]
        fitting = {None: forms, "constant": forms[:1], "categorical": forms[1:2]}
        if form not in fitting.get(self.distribution, forms[2:]):
            raise ValueError("needs either value (constant), or values (categorical), or min and max")
        if self.distribution == "int_uniform" and not (isinstance(self.min, int) and isinstance(self.max, int)):
            raise ValueError("int_uniform needs whole numbers as min and max")
        if form != {"value"}:
            self.for_optuna()  # ValueError for an impossible range
        return self

    def for_optuna(self) -> distributions.BaseDistribution:
        """The values or the range. Without `distribution`, a range is whole where its ends are, as with W&B.

        Raises ValueError where `min` is above `max`, or is not above 0 on a logarithmic scale.
        """
        if self.values:
            return distributions.CategoricalDistribution(self.values)
        if self.distribution in (None, "int_uniform") and isinstance(self.min, int) and isinstance(self.max, int):
            return distributions.IntDistribution(self.min, self.max)
        return distributions.FloatDistribution(self.min, self.max, log=self.distribution == "log_uniform_values")


class Metric(BaseModel, extra="forbid"):
    """What a search improves: a column of history.csv."""

    name: Literal["train/loss", "validate/loss", "validate/auc", "validate/acc", "validate/balanced_acc"]
    goal: Literal["maximize", "minimize"] = "minimize"  # W&B's default


class Hyperband(BaseModel, extra="forbid"):
    """Early termination: after min_iter, min_iter · eta, … epochs only the best 1/eta of the trials go on."""

    type: Literal["hyperband"]
    min_iter: int = Field(ge=1)
    eta: int = Field(3, ge=2)


class Sweep(BaseModel, extra="forbid"):
    """The content of a sweep file. The configuration class of its program checks every value."""

    name: RunId  # the names of its runs begin with it
    program: str
    method: Literal["grid", "random", "bayes"]
    parameters: dict[str, Parameter]
    metric: Metric = Metric(name="validate/acc", goal="maximize")
    early_terminate: Hyperband | None = None
    command: list[Literal["${env}", "${interpreter}", "${program}", "${args}"]] = []  # no other words run here
    project: str = ""

    @property
    def swept(self) -> dict[str, Parameter]:
        """The keys that vary."""
        return {name: one for name, one in self.parameters.items() if "value" not in one.model_fields_set}

    def config(self, values: Mapping[str, Any]) -> TrainingConfig:
        """The program's configuration for the fixed keys and `values`; UsageError where it refuses them."""
        config = parse(config_class(self.program), self.command_line(values)[2:])
        check_model_name(config.model_name)
        if getattr(config, "scratch", False):
            raise UsageError("scratch: a run trains one network; add scratch: {value: false}")
        if config.test and self.method != "grid":
            raise UsageError("test: a search must not score the test tiles; add test: {value: false}")
        return config

    def command_line(self, values: Mapping[str, Any]) -> list[str]:
        """The command that runs the program with the fixed keys and `values`."""
        fixed = {name: one.value for name, one in self.parameters.items() if name not in self.swept}
        keys = {**fixed, **values}
        return [sys.executable, self.program, *(f"--{name}={value}" for name, value in keys.items())]


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in the YAML file `path`; `overrides` are `--key=value` arguments for every run.

    Raises UsageError naming the file and what in it is missing, malformed or unknown, or which value the program
    refuses, before any run starts. OSError.
    """
    text = path.read_bytes()
    try:
        content = yaml.safe_load(text)
    except Exception as error:  # PyYAML has six types for scalars like !!int abc, !!float '' and 2001-13-45
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}") from None
    try:
        sweep = Sweep.model_validate({"name": path.stem, **content} if isinstance(content, dict) else content)
        for argument in overrides:
            name, equals, value = argument.removeprefix("--").partition("=")
            if not argument.startswith("--") or not equals or name in sweep.swept:
                raise UsageError(f"{argument}: write --key=value, for a key that the sweep does not vary")
            sweep.parameters[name] = Parameter(value=value)
        if own := {"run_id", "output_dir"} & sweep.parameters.keys():
            raise UsageError(f"{min(own)}: the sweep gives each run its own")
        sweep.config({})
        for name, one in sweep.swept.items():
            for tried in one.values or (one.min, one.max):
                sweep.config({name: tried})
            kind = config_class(sweep.program).model_fields[name].annotation
            whole = int in (kind, *get_args(kind))
            if whole and isinstance(one.for_optuna(), distributions.FloatDistribution):
                raise UsageError(f"parameter {name}: a whole number; use values, or distribution: int_uniform")
        return sweep
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        words = [*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")]
        raise UsageError(f"{path}: {': '.join(words)}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


@cache
def config_class(program: str) -> type[TrainingConfig]:
    """The configuration class that the program defines."""
    if not Path(program).is_file() or Path(program).suffix != ".py":
        raise UsageError(f"program {program}: no such Python file; start the sweep in the folder of the program")
    for item in runpy.run_path(program, run_name="swept_program").values():
        if isinstance(item, type) and issubclass(item, TrainingConfig) and item.__module__ == "swept_program":
            return item
    raise UsageError(f"program {program}: no training script; use train.py, task1.py or task5.py")
