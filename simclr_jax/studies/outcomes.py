"""Outcomes of a study's runs: read from their workdirs, chosen by validation, as a table."""

import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from etils import epath

from simclr_jax.files import read_json
from simclr_jax.studies.claims import deviation, mean
from simclr_jax.studies.contract import Key, Scores, Study
from simclr_jax.studies.runs import StudyRun, runs_of
from simclr_jax.training.metrics import last_values, read_lines
from simclr_jax.training.verdict import HEALTH, Verdict

# In a run's workdir: {"about": see `record.about_run`, "readings": {reading: {"accuracy", "validation"}}}, or in place
# of the readings "failed": why the training could not go on. That of the study's first run also holds "baselines".
OUTCOME = "study_outcome.json"
AGAIN = "remove it, and the run is evaluated again"  # of an outcome that is damaged


class Outcomes(NamedTuple):
    """The outcomes that are there, and the runs that are missing.

    Attributes:
      scores: every key's accuracies; the key ends with the reading where there are several.
      settings: key -> the setting that was chosen, from 0, where there were several.
      missing: runs of `runs_wanted` that are not finished.
      failed: {run: why its training could not go on}. They have no score.
      baselines: {"raw pixels", "untrained encoder": accuracy} by the first reading's evaluation, with the encoder and
        data of the study's first run; {} where that evaluation has none.
      unhealthy: {run: the bad verdict that its training ended with}. They count all the same.
      metrics: (key without the reading, setting) -> the means of `Study.metrics` over the seeds.
    """

    scores: Scores
    settings: dict[Key, int]
    missing: list[StudyRun]
    failed: dict[str, str]
    baselines: dict[str, float]
    unhealthy: dict[str, str]
    metrics: dict[tuple[Key, int], dict[str, float]]


def runs_wanted(study: Study, folder: epath.Path) -> list[StudyRun]:
    """Lists the runs that a study wants, given those that are finished below `folder`.

    These are all runs, unless the study has `extremes`: then only the runs of seed 0 until all of them are finished,
    and after that also the further seeds of the best and worst keys, and of those in `always`.
    """
    runs = runs_of(study)
    if study.extremes is None:
        return runs
    first = [run for run in runs if run.seed == 0]
    if not all((folder / run.name / OUTCOME).exists() for run in first):
        return first
    scores = _outcomes_among(first, study, folder).scores
    means = {study.levels_of(key): mean(scores, key) for key in study.of_first_reading(scores)}
    order = sorted(means, key=means.__getitem__)
    chosen = {*order[: study.extremes], *order[-study.extremes :], *study.always}
    return [run for run in runs if run.seed == 0 or run.key in chosen]


def outcomes_of(study: Study, folder: epath.Path) -> Outcomes:
    """Reads the outcomes of the runs of `runs_wanted` that are finished below `folder`.

    Where a key has several settings, takes the one with the best mean validation accuracy over the seeds that
    all of them have, for each reading separately. A setting with a failed run is taken only if all settings have one.
    """
    return _outcomes_among(runs_wanted(study, folder), study, folder)


def _outcomes_among(runs: list[StudyRun], study: Study, folder: epath.Path) -> Outcomes:
    found: dict[tuple[Key, int], dict[int, dict]] = {}
    missing: list[StudyRun] = []
    failed: dict[str, str] = {}
    baselines: dict[str, float] = {}
    unhealthy: dict[str, str] = {}
    values: dict[tuple[Key, int], list[Mapping[str, float]]] = {}
    unstable = set()
    for run in runs:
        file = folder / run.name / OUTCOME
        outcome = read_json(file, AGAIN) if file.exists() else None
        if outcome is None:
            missing.append(run)
        elif "failed" in outcome:
            failed[run.name] = outcome["failed"]
            unstable.add((run.key, run.setting))
        else:
            found.setdefault((run.key, run.setting), {})[run.seed] = outcome["readings"]
            baselines |= outcome.get("baselines", {})
            if bad := _bad_verdict(folder / run.name):
                unhealthy[run.name] = bad
            if study.metrics:
                lines = read_lines(folder / run.name / "metrics.jsonl")
                values.setdefault((run.key, run.setting), []).append(last_values(lines))
    several = {run.key for run in runs if run.setting}
    scores: dict[Key, dict[int, float]] = {}
    settings = {}
    for key in {key: None for key, _ in found}:
        of_key = {s: x for (k, s), x in found.items() if k == key}
        of_key = {s: x for s, x in of_key.items() if (key, s) not in unstable} or of_key
        for reading, name in zip(study.readings, study.score_keys(key), strict=True):
            chosen = _best(of_key, reading)
            by_seed = of_key[chosen]
            scores[name] = {seed: x[reading]["accuracy"] for seed, x in by_seed.items()}
            if key in several:
                settings[name] = chosen
    metrics = {which: _means(study.metrics, of_runs) for which, of_runs in values.items()}
    return Outcomes(scores, settings, missing, failed, baselines, unhealthy, metrics)


def _bad_verdict(workdir: epath.Path) -> str:
    """Returns the bad verdict that a run ended with, and why; "": it is not bad, or none was passed."""
    file = workdir / HEALTH
    verdict = Verdict(**read_json(file)) if file.exists() else None
    return f"{verdict.name}: {verdict.because}" if verdict and verdict.is_bad else ""


def below(study: Study, outcomes: Outcomes, baseline: float) -> tuple[int, int]:
    """Counts the keys whose mean accuracy by the study's first reading is below `baseline`, and all that have one."""
    keys = study.of_first_reading(outcomes.scores)
    return sum(mean(outcomes.scores, key) < baseline for key in keys), len(keys)


def _means(names: Iterable[str], of_runs: list[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each name over the runs that have it; none has a name that is misspelt."""
    there = {name: [values[name] for values in of_runs if name in values] for name in names}
    return {name: statistics.mean(values) for name, values in there.items() if values}


def _best(of_key: dict[int, dict[int, dict]], reading: str) -> int:
    """Returns the setting with the best validation accuracy over the seeds that all settings have. If they have no
    seed in common, chooses among the settings with the most seeds.
    """
    common = set.intersection(*map(set, of_key.values()))
    most = max(map(len, of_key.values()))
    compared = {s: x for s, x in of_key.items() if common or len(x) == most}

    def on_validation(setting: int) -> float:
        seeds = common or set(compared[setting])
        return statistics.mean(compared[setting][seed][reading]["validation"] for seed in seeds)

    return max(compared, key=on_validation) if len(compared) > 1 else next(iter(compared))


def table_of(study: Study, outcomes: Outcomes) -> tuple[list[str], list[list[str]]]:
    """Makes a table: a line for each key, with mean and deviation over seeds, the setting that was chosen if any key has
    several, `Study.metrics` and the paper's number. A key without a score is "failed" if one of its trainings could not go on, else
    "missing".
    """
    header = [factor.name for factor in study.factors]
    header += ["of"] if study.has_readings else []
    header += [f"{study.measure}, %", "seeds"]
    runs = runs_of(study)
    tried = {(run.key, run.setting): run.tried for run in runs}
    has_settings = any(run.setting for run in runs)
    header += ["chosen"] if has_settings else []
    header += study.metrics
    header += ["paper, %"] if study.published else []
    lines = []
    failed = {run.key for run in runs if run.name in outcomes.failed}
    for key in keys_of(study):
        there = outcomes.scores.get(key, {})
        levels = study.levels_of(key)
        cell = "failed" if levels in failed else "missing"
        if there:
            cell = f"{100 * mean(outcomes.scores, key):.1f}"
            cell += f" ± {100 * deviation(outcomes.scores, key):.1f}" if len(there) > 1 else ""
        line = [*key, cell, str(len(there))]
        setting = outcomes.settings.get(key, 0)
        if has_settings:
            chosen = tried[levels, setting]
            line.append(", ".join(f"{k}={v}" for k, v in chosen.items()) if there else "")
        beside = outcomes.metrics.get((levels, setting), {})
        line += [f"{beside[name]:.3g}" if name in beside else "" for name in study.metrics]
        if study.published:
            value = study.published.values.get(key)
            line.append("" if value is None else f"{value:.1f}")
        lines.append(line)
    return header, lines


def claimed_of(study: Study, outcomes: Outcomes) -> Scores:
    """Returns the scores that claims are judged by: {} of a key of which a run of the first seed is missing. A key whose
    trainings could not go on is left out.
    """
    missing = {run.key for run in outcomes.missing if run.seed == 0}
    there = {
        key: {} if study.levels_of(key) in missing else outcomes.scores.get(key)
        for key in keys_of(study)
    }
    return {key: scores for key, scores in there.items() if scores is not None}


def keys_of(study: Study) -> Iterable[Key]:
    """Returns all keys of a study, in order, with the readings where there are several."""
    levels = dict.fromkeys(run.key for run in runs_of(study))
    return [key for one in levels for key in study.score_keys(one)]
