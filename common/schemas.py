"""What the records of a run must contain: names, types and ranges, as pydantic checks them.

A record may have more than its type names, so that later versions of the project can add to it. `common.records`
imports this module when it reads the first record: a new run needs none, and pydantic takes 0.1 seconds.
"""

from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Field, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter
from typing_extensions import TypedDict  # Python 3.11 has none that pydantic can use

from common.config import check_run_id

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ShareOrNan = Annotated[float, AfterValidator(lambda value: _require(not value < 0 and not value > 1, value))]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _require(holds: bool, value: Any, message: str = "must be a share from 0 to 1") -> Any:
    """`value`; ValueError, which pydantic reports with the key, where it does not hold."""
    if not holds:
        raise ValueError(message)
    return value


def _check_name(name: str) -> str:
    problem = check_run_id(name)
    return _require(problem is None, name, str(problem))


def _check_epochs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    counted = [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    return _require(counted, rows, "the epochs do not count from 1")


def _check_scores(scores: dict[str, Any]) -> dict[str, Any]:
    matrix, n_classes = scores["confusion_matrix"], len(scores["auc_per_class"])
    square = len(matrix) == n_classes and all(len(row) == n_classes for row in matrix)
    _require(square, scores, f"the confusion matrix has not {n_classes} rows and columns")
    return _require(sum(map(sum, matrix)) == scores["n"], scores, "the confusion matrix does not sum up to n")


RunId = Annotated[str, AfterValidator(_check_name)]


class Estimate(TypedDict):
    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class ShareEstimate(TypedDict):
    value: Share
    low: Share
    high: Share


class Tiles(TypedDict):
    train: PositiveInt
    val: PositiveInt
    test: PositiveInt


class Config(TypedDict):
    seed: Seed
    dataset: str
    size: PositiveInt
    train_tiles: PositiveInt | None
    model_name: NotRequired[str]
    select_on: NotRequired[str]
    resize_to: NotRequired[PositiveInt | None]
    cache_features: NotRequired[bool | None]


class Facts(TypedDict):
    config: Config
    task: str
    run_id: RunId
    dataset: str
    synthetic: bool
    data_fingerprint: str
    started: str


Row = TypedDict(
    "Row",
    {
        "epoch": PositiveInt,
        "train/loss": FiniteFloat,
        "validate/loss": FiniteFloat,
        "validate/auc": ShareOrNan,  # NaN where the validation tiles are of one class
        "validate/acc": Share,
        "validate/balanced_acc": NotRequired[Share],  # older records lack it
        "lr": Seconds,
        "tiles_per_second": Seconds,
        "seconds": Seconds,
    },
)


Validated = TypedDict(
    "Validated", {"validate/loss": FiniteFloat, "validate/auc": ShareOrNan, "validate/acc": Share}
)


class Scores(TypedDict):
    epoch: NotRequired[PositiveInt]  # a baseline, which is no network, has no epochs
    n: PositiveInt
    auc: ShareEstimate
    acc: ShareEstimate
    balanced_acc: NotRequired[ShareEstimate]  # older records lack it
    expected_calibration_error: Share
    auc_per_class: dict[str, Share | None]
    confusion_matrix: list[list[NonNegativeInt]]


CheckedScores = Annotated[Scores, AfterValidator(_check_scores)]
Summary = TypedDict(
    "Summary",
    {
        "task": str,
        "run_id": RunId,
        "dataset": str,
        "synthetic": bool,
        "data_fingerprint": str,
        "tiles": Tiles,
        "test/auc": Share,
        "test/acc": Share,
        "best": CheckedScores,
        "last": NotRequired[CheckedScores],
        "tta": NotRequired[CheckedScores],
        "validate": Validated,
        "stopped": NotRequired[str],
        "wall_seconds": Seconds,
    },
)


class Spread(TypedDict):
    n: NonNegativeInt
    mean: FiniteFloat | None
    sd: FiniteFloat | None
    low: FiniteFloat | None
    high: FiniteFloat | None


class Difference(Spread):
    p: Share | None


class ComparedRun(TypedDict):
    run_id: RunId
    seed: Seed
    convergence_epoch: PositiveInt
    censored: bool


class Weights(TypedDict):
    name: str
    source: str


class Comparison(TypedDict):
    dataset: str
    convergence_rule: str
    weights: Weights
    runs: Annotated[dict[str, list[ComparedRun]], Field(min_length=2, max_length=2)]
    over_seeds: dict[str, dict[str, Spread]]
    differences: dict[str, Difference]


class ExplainedTile(TypedDict):
    index: NonNegativeInt
    label: str
    predicted: str
    probability: Share
    input: str
    saliency: str


class Faithful(TypedDict):
    title: str
    infidelity: Estimate
    deletion: Estimate
    insertion: Estimate


class Method(Faithful):
    description: str
    passes: bool
    verdict: str
    randomisation: dict[str, Estimate]
    edge_correlation: Estimate
    max_sensitivity: Estimate


class Attribution(TypedDict):
    run_id: RunId
    dataset: str
    synthetic: bool
    network: str
    target: str
    tiles: list[ExplainedTile]
    n: dict[str, PositiveInt]
    randomisation_limit: FiniteFloat
    methods: dict[str, Method]
    controls: dict[str, Faithful]
    figures: dict[str, str]


HISTORY: TypeAdapter[Any] = TypeAdapter(Annotated[list[Row], AfterValidator(_check_epochs)])
BY_FILE: dict[str, TypeAdapter[Any]] = {
    "config.json": TypeAdapter(Facts),
    "summary.json": TypeAdapter(Summary),
    "comparison.json": TypeAdapter(Comparison),
    "attribution.json": TypeAdapter(Attribution),
}
