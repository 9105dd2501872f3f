"""The runs of a study: read from its file, listed, and shared among several programs."""

import itertools
import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from simclr_jax import config as config_lib
from simclr_jax.config.python_files import made_by
from simclr_jax.errors import UserError
from simclr_jax.studies.contract import BY_NAME, CHOOSING, EVALUATIONS, Key, Overrides, Study


class StudyRun(NamedTuple):
    """One run of a study.

    Attributes:
      key: a level of each factor.
      setting: which combination of its levels' settings, from 0.
      seed: the run's seed.
      overrides: the options that it sets.
      tried: those of them that are its setting.
    """

    key: Key
    setting: int
    seed: int
    overrides: dict[str, Any]
    tried: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of its workdir below the study's."""
        words = [re.sub(r"[^A-Za-z0-9.]+", "-", level).strip("-") for level in self.key]
        setting = f"_setting-{self.setting}" if self.setting else ""
        return f"{'_'.join(words)}{setting}_seed-{self.seed}"


def read_study(spec: str) -> Study:
    """Runs `get_study(ARGUMENT)` of a study "FILE.py[:ARGUMENT]", or "NAME[:ARGUMENT]" of one in the package.

    Raises:
      UserError: there is no such file, it fails, or it returns something else than a sound `Study`.
    """
    path, study = made_by(spec, "get_study", Study, "study", folder="studies")
    _check(path, study)
    return study


def _check(path: str, study: Study) -> None:
    known = config_lib.flatten(config_lib.default())
    if not 1 <= len(study.factors) <= 2:
        raise UserError(f"{path} has {len(study.factors)} factors: expected one or two")
    if study.evaluation not in EVALUATIONS:
        expected = ", ".join(EVALUATIONS)
        raise UserError(f"{path}: evaluation={study.evaluation!r}: expected one of {expected}")
    levels = [level for factor in study.factors for level in factor.levels.values()]
    given = [*study.readings.values(), *(level.overrides for level in levels)]
    given += [setting for level in levels for setting in level.settings]
    unknown = sorted({name for overrides in given for name in overrides if name not in known})
    if unknown:
        raise UserError(f"{path} sets options that do not exist: {', '.join(unknown)}")
    if study.evaluation in BY_NAME and any(study.readings.values()):
        raise UserError(
            f"{path}: readings of {study.evaluation} are its own: expected no overrides"
        )
    if not study.readings or study.seeds < 1:
        raise UserError(
            f"{path}: {len(study.readings)} readings, {study.seeds} seeds: expected one or more of both"
        )
    if study.matrix and (len(study.factors) != 2 or len(study.readings) != 1):
        raise UserError(
            f"{path}: a matrix of {len(study.factors)} factors and {len(study.readings)} readings: expected "
            "two factors and one reading, or matrix=False"
        )
    if study.extremes is not None and study.extremes < 1:
        raise UserError(f"{path}: extremes={study.extremes}: expected None, or 1 and more")
    names = [run.name for run in runs_of(study)]
    if len(set(names)) < len(names) or any(name.startswith("_") for name in names):
        raise UserError(f"{path}: levels need names that differ in their letters and digits")
    if study.evaluation != "probe" and study.labels_per_class is not None:
        raise UserError(
            f"{path}: {study.evaluation} has no such row: expected labels_per_class=None"
        )
    for factor in study.factors:
        if factor.numbers and not all(_is_above_0(name) for name in factor.levels):
            raise UserError(f"{path}: {factor.name} has levels that are not numbers above 0")
    if study.evaluation not in CHOOSING and any(len(level.settings) > 1 for level in levels):
        raise UserError(
            f"{path}: levels have several settings, and {study.evaluation} has no validation accuracy to "
            "choose by: expected evaluation='probe'"
        )


def _is_above_0(name: str) -> bool:
    try:
        return float(name) > 0
    except ValueError:
        return False


def runs_of(study: Study) -> list[StudyRun]:
    """Lists all runs: every key, with every setting of its levels, with every seed; the first seed of
    all before the second of any, so that a study cut short has the most points.
    """
    found = []
    for seed in range(study.seeds):
        for levels in itertools.product(*(factor.levels.items() for factor in study.factors)):
            key = tuple(name for name, _ in levels)
            settings = itertools.product(*(level.settings for _, level in levels))
            for number, chosen in enumerate(settings):
                overrides: dict[str, Any] = {}
                tried: dict[str, Any] = {}
                for (_, level), setting in zip(levels, chosen, strict=True):
                    overrides |= dict(level.overrides) | dict(setting)
                    tried |= setting
                found.append(StudyRun(key, number, seed, overrides | {"seed": seed}, tried))
    return found


def part_of(runs: list[StudyRun], part: str) -> list[StudyRun]:
    """Returns every N-th run from the I-th on, of part "I/N", I from 1 to N.

    Raises:
      UserError: `part` is something else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part={part}: expected I/N, I from 1 to N, such as 2/8")
    return runs[int(match[1]) - 1 :: int(match[2])]


def config_of(base: ConfigDict, study: Study, run: StudyRun) -> ConfigDict:
    """Returns the configuration of a run, without the evaluation that would end it: `study` does that.

    Raises:
      UserError: a value is not allowed.
    """
    config = base.copy_and_resolve_references()
    fixed: dict[str, Any] = {"eval.after_training": "none", "eval.baselines": False}
    if "train.epochs" in run.overrides:
        fixed["train.steps"] = 0  # which would count in place of the epochs
    # No other row of the probe is read.
    few = () if study.labels_per_class is None else (study.labels_per_class,)
    fixed |= {"eval.labels_per_class": few, "eval.label_fraction": 0.0}
    config_lib.set_options(config, fixed | run.overrides)
    config_lib.validate(config)
    if study.evaluation == "probe" and config.eval.validation_fraction == 0:
        raise UserError(
            "eval.validation_fraction=0: the probe chooses its regularisation on a validation part: expected "
            "a number above 0, such as 0.1"
        )
    for overrides in study.readings.values():
        reading_of(config, overrides)  # refused here, and not after the training
    return config


def reading_of(config: ConfigDict, overrides: Overrides) -> ConfigDict:
    """Returns the configuration of one reading of a run. Raises a UserError for a value not allowed."""
    own = config.copy_and_resolve_references()
    config_lib.set_options(own, dict(overrides))
    config_lib.validate(own)
    return own
