"""What the records of a run must contain: names, types and ranges, as pydantic checks them.

A record may have more than its type names, so that later versions of the project can add to it.
`common.records.read` imports this module when it reads the first record: a new run needs none, and pydantic takes
0.1 seconds.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter
from typing_extensions import TypedDict  # Python 3.11 has none that pydantic can use

from common.config import check_run_id

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _checked(problem_of: Callable[[Any], str | None]) -> AfterValidator:
    """A check by a function that returns the problem with a value, or None; pydantic adds the key."""

    def check(value: Any) -> Any:
        if problem := problem_of(value):
            raise ValueError(problem)
        return value

    return AfterValidator(check)


def _problem_with_epochs(rows: list[Any]) -> str | None:
    counted = [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    return None if counted else "the epochs do not count from 1"


def _problem_with_scores(scores: Any) -> str | None:
    matrix, n_classes = scores["confusion_matrix"], len(scores["auc_per_class"])
    if len(matrix) != n_classes or any(len(row) != n_classes for row in matrix):
        return f"confusion_matrix has not {n_classes} rows and columns"
    return None if sum(map(sum, matrix)) == scores["n"] else "confusion_matrix does not sum up to n"


RunId = Annotated[str, _checked(check_run_id)]


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
    input_size: NotRequired[PositiveInt]
    resize_to: NotRequired[PositiveInt | None]  # of older records
    cache_features: NotRequired[bool | None]


class Weights(TypedDict):
    name: str
    source: str
    sha256: NotRequired[str | None]


class Facts(TypedDict):
    config: Config
    task: str
    run_id: RunId
    dataset: str
    synthetic: bool
    data_fingerprint: str
    weights: NotRequired[Weights]  # of a run of Task 5
    started: str


Row = TypedDict(
    "Row",
    {
        "epoch": PositiveInt,
        "train/loss": FiniteFloat,
        "validate/loss": FiniteFloat,
        "validate/auc": Share,
        "validate/acc": Share,
        "validate/balanced_acc": NotRequired[Share],  # older records lack it
        "lr": NotNegative,
        "tiles_per_second": NotNegative,
        "seconds": NotNegative,
    },
)


Validated = TypedDict("Validated", {"validate/loss": FiniteFloat, "validate/auc": Share, "validate/acc": Share})


class Scores(TypedDict):
    epoch: NotRequired[PositiveInt]  # a baseline, which is no network, has no epochs
    n: PositiveInt
    auc: ShareEstimate
    acc: ShareEstimate
    balanced_acc: NotRequired[ShareEstimate]  # older records lack it
    expected_calibration_error: Share
    auc_per_class: dict[str, Share | None]
    confusion_matrix: list[list[NonNegativeInt]]


CheckedScores = Annotated[Scores, _checked(_problem_with_scores)]
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
        "wall_seconds": NotNegative,
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


class Comparison(TypedDict):
    dataset: str
    convergence_rule: str
    weights: Weights
    runs: Annotated[dict[Literal["from scratch", "fine-tuned"], list[ComparedRun]], Field(min_length=2)]
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
    tile_correlation: NotRequired[Estimate]
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


class OnlyRight(TypedDict):
    ours: NonNegativeInt
    theirs: NonNegativeInt


class Published(TypedDict):
    file: str
    sha256: str
    scores: CheckedScores
    only_right: dict[RunId, OnlyRight]


class Accuracies(TypedDict):
    acc: Share
    balanced_acc: Share


class Analysis(TypedDict):
    dataset: str
    synthetic: bool
    runs: dict[RunId, str]  # with the SHA-256 of the outputs
    published: Published | None
    matched: dict[str, dict[RunId, Accuracies]]
    kept: dict[RunId, dict[str, Any]]  # of which earlier analysis a run's scores on matched colours are


HISTORY: TypeAdapter[Any] = TypeAdapter(Annotated[list[Row], _checked(_problem_with_epochs)])
BY_FILE: dict[str, TypeAdapter[Any]] = {
    "config.json": TypeAdapter(Facts),
    "summary.json": TypeAdapter(Summary),
    "comparison.json": TypeAdapter(Comparison),
    "attribution.json": TypeAdapter(Attribution),
    "analysis.json": TypeAdapter(Analysis),
}
