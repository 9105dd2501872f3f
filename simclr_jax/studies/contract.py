"""The contract of a study: which runs it is made of, what is measured, what the paper found."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from simclr_jax import evals

# Evaluations with several numbers of their own, which a study names: "1 %", "10 %" of finetune, "rotation, h" of
# transformations.
BY_NAME = ("finetune", "transformations")
EVALUATIONS = (*evals.EVALUATIONS, "transfer_finetune", *BY_NAME)
# Evaluations with a validation accuracy, by which a study may choose among settings.
CHOOSING = ("probe",)

Overrides = Mapping[str, Any]  # {"group.option": value}
# One level of each factor, in their order, and the reading if there are several.
Key = tuple[str, ...]
Scores = Mapping[Key, Mapping[int, float]]  # accuracy in [0, 1] of each seed


class Level(NamedTuple):
    """One value of a factor.

    Attributes:
      overrides: the options that it sets.
      settings: alternatives to try, one run each. Each key takes the one with the best mean validation
        accuracy of the probe of all labels. The test split chooses nothing.
    """

    overrides: Overrides
    settings: tuple[Overrides, ...] = ({},)


class Factor(NamedTuple):
    """One thing that is varied, and its values.

    Attributes:
      name: for axes and headers, with its unit if it has one.
      levels: name -> Level, in order.
      numbers: the levels are numbers above 0; if it is the first factor, its axis is logarithmic.
    """

    name: str
    levels: Mapping[str, Level]
    numbers: bool = False


class Published(NamedTuple):
    """The paper's numbers for some keys.

    Attributes:
      source: table or figure, data and measure.
      values: key -> accuracy, %.
    """

    source: str
    values: Mapping[Key, float]


Levels = TypeVar("Levels")


def of_scale(argument: str, small: Levels, paper: Levels) -> Levels:
    """Returns a study's levels for the argument after its file: `small` for "", `paper` for "paper".

    Raises:
      ValueError: it is something else.
    """
    if argument not in ("", "paper"):
        raise ValueError(
            f"expected no argument, or 'paper' for the paper's levels, got {argument!r}"
        )
    return paper if argument else small


class Verdict(NamedTuple):
    """Whether a claim held.

    Attributes:
      claim: in words.
      held: whether it holds for the runs that are there; None: too few are there to say.
      because: the numbers.
    """

    claim: str
    held: bool | None
    because: str


class Study(NamedTuple):
    """A table or a figure of the paper, as runs.

    Attributes:
      title: names what is studied, above table and figure.
      factors: one or two.
      claims: each a function of the scores.
      published: the paper's numbers; None: there are none to set beside.
      evaluation: one of EVALUATIONS; "probe" alone allows levels of several settings.
      readings: {"name": overrides of the evaluation}, one number of each run for every name. With an evaluation
        BY_NAME, the names are its own and the overrides {}: shares of labels such as "1 %" from
        finetune.label_fractions, or "TASK, h" and "TASK, z" from `evals.transformations.TASKS`.
      labels_per_class: which row of the evaluation; None: all labels.
      seeds: runs of each key, with the seeds 0, 1, ...
      extremes: N: only the N best and the N worst keys of seed 0, and those of `always`, get the further seeds; None:
        every key.
      always: keys that get the further seeds whatever seed 0 says, such as those that claims name.
      metrics: names in metrics.jsonl, such as other_view_entropy, whose last values the table shows, as means over seeds.
      matrix: draw two factors as a matrix, the first one downwards, with the means of rows beside it.
    """

    title: str
    factors: tuple[Factor, ...]
    claims: tuple[Callable[[Scores], Verdict], ...] = ()
    published: Published | None = None
    evaluation: str = "probe"
    readings: Mapping[str, Overrides] = {"h": {}}
    labels_per_class: int | None = None
    seeds: int = 3
    extremes: int | None = None
    always: tuple[Key, ...] = ()
    metrics: tuple[str, ...] = ()
    matrix: bool = False

    @property
    def measure(self) -> str:
        """Names what the evaluation reports: for transfer the metric that the paper has for each data set (B.8.1)."""
        return "metric of B.8.1" if self.evaluation.startswith("transfer") else "accuracy"

    @property
    def has_readings(self) -> bool:
        """Returns whether there are several readings, so that the keys of scores end with one."""
        return len(self.readings) > 1

    def score_keys(self, levels: Key) -> list[Key]:
        """Returns the keys of the scores, one for each reading, of the runs that have these levels of the factors."""
        return [(*levels, reading) if self.has_readings else levels for reading in self.readings]

    def levels_of(self, key: Key) -> Key:
        """Returns the levels of the factors in the key of a score."""
        return key[: len(self.factors)]

    def of_first_reading(self, keys: Iterable[Key]) -> list[Key]:
        """Returns those of the keys of scores that are of the study's first reading."""
        return [key for key in keys if key == self.score_keys(self.levels_of(key))[0]]
