"""--mode=study: runs a study of the paper, and makes its table, its figure and its verdict."""

import json
import time

import jax
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import assemble, processes
from simclr_jax import config as config_lib
from simclr_jax.bench.e2e import measure_e2e
from simclr_jax.console import duration, say, show_table
from simclr_jax.data import name_of
from simclr_jax.errors import NotFinite, Stopped, UserError
from simclr_jax.evals import EVALUATIONS
from simclr_jax.evals.classifiers import finetune
from simclr_jax.evals.evaluate import evaluate
from simclr_jax.evals.results import accuracies
from simclr_jax.evals.subjects import ENCODER
from simclr_jax.evals.transformations import TASKS, what_is_known
from simclr_jax.files import read_json, write_json, write_text
from simclr_jax.modes.pretrain import pretrain
from simclr_jax.studies.contract import BY_NAME, Study, Verdict
from simclr_jax.studies.figure import draw, need_matplotlib
from simclr_jax.studies.outcomes import (
    OUTCOME,
    Outcomes,
    below,
    claimed_of,
    outcomes_of,
    runs_wanted,
    table_of,
)
from simclr_jax.studies.record import about_run, check_finished, fingerprints
from simclr_jax.studies.runs import StudyRun, config_of, part_of, read_study, reading_of, runs_of

_MEASURED_SECONDS = 5.0  # for each kind of step in a dry run
# Options that do not change how long a step takes.
_NOT_OF_THE_STEP = (
    "seed",
    "train.epochs",
    "train.steps",
    "optimizer.learning_rate",
    "optimizer.momentum",
    "optimizer.scaling",
    "optimizer.warmup_epochs",
    "optimizer.weight_decay",
    "eval.",
    "loss.temperature",
)


def run_study(
    config: ConfigDict, workdir: str, study: str, part: str = "1/1", dry_run: bool = False
) -> dict:
    """Makes the unfinished runs of a study, each in a workdir of its own below `workdir`; then writes
    WORKDIR/study.json, table.md, figure.png and figure.svg from all finished runs.

    Args:
      config: the configuration that all runs share, before their own options.
      workdir: the study's folder.
      study: "FILE.py[:ARGUMENT]" or "NAME[:ARGUMENT]", see `read_study`.
      part: "I/N": only every N-th run, from the I-th on.
      dry_run: list the runs that are not finished and estimate their training time; train nothing.

    Returns:
      what study.json holds; {} for a dry run.

    Raises:
      Stopped: a signal has stopped it.
      UserError: the study is not sound, the data have no labels, matplotlib is not installed, or a run was
        finished with other options or data.
    """
    found = read_study(study)
    need_matplotlib()
    _check_readings(config, found)
    every = runs_of(found)
    configs = {run.name: config_of(config, found, run) for run in every}
    mine = {run.name for run in part_of(every, part)}
    folder = epath.Path(workdir)
    check_study(folder, found)
    images = fingerprints(config, configs)
    about = {name: about_run(own, found, images[name]) for name, own in configs.items()}
    check_finished(folder, about)
    while True:
        runs, waiting = _of_first_process(found, folder, mine)
        say(f"study       {found.title}: {len(runs)} runs, {len(runs) - len(waiting)} finished")
        if dry_run:
            _estimate(
                {run.name: configs[run.name] for run in waiting}, _further_seeds(found, waiting)
            )
            return {}
        if not waiting:  # and the outcomes ask for no further run
            return _show(config, found, folder)
        try:
            _finish_all({run.name: configs[run.name] for run in waiting}, found, folder, about)
        except Stopped:
            _show(config, found, folder)
            raise


def _of_first_process(
    study: Study, folder: epath.Path, mine: set[str]
) -> tuple[list[StudyRun], list[StudyRun]]:
    """Returns the runs of this part that the study wants, and those of them that are not finished, as process 0 sees the
    outcomes: other programs write them meanwhile, and all processes must go on with one run.

    Args:
      study: the study.
      folder: where its runs lie.
      mine: names of the runs of this part.
    """
    seen = None
    if jax.process_index() == 0:
        wanted = [run.name for run in runs_wanted(study, folder) if run.name in mine]
        waiting = [name for name in wanted if not (folder / name / OUTCOME).exists()]
        seen = json.dumps([wanted, waiting])
    names = json.loads(processes.text_of_first(seen) or "")
    by_name = {run.name: run for run in runs_of(study)}
    return [by_name[name] for name in names[0]], [by_name[name] for name in names[1]]


def check_study(folder: epath.Path, study: Study) -> None:
    """Raises a UserError if a folder holds the table of another study, or of other levels, which would be overwritten."""
    file = folder / "study.json"
    if not file.exists():
        return
    there = read_json(file, "remove it, and it is made again")
    levels = there.get("levels", _levels(study))  # of an earlier version there are none
    if (there["title"], levels) != (study.title, _levels(study)):
        raise UserError(
            f"{file} is of another study, {there['title']!r} with the levels {levels}: use another --workdir"
        )


def _levels(study: Study) -> dict[str, list[str]]:
    return {factor.name: list(factor.levels) for factor in study.factors}


def _finish_all(
    configs: dict[str, ConfigDict], study: Study, folder: epath.Path, about: dict[str, dict]
) -> None:
    """Trains and evaluates runs, {name: configuration}."""
    began = time.monotonic()
    for number, (name, config) in enumerate(configs.items()):
        left = ""
        if number:
            seconds = (time.monotonic() - began) / number * (len(configs) - number)
            left = f", left {duration(seconds)}"
        say(f"run         {number + 1} of {len(configs)}{left}: {name}")
        outcome = _outcome(config, study, str(folder / name), name == runs_of(study)[0].name)
        if jax.process_index() == 0:
            write_json(folder / name / OUTCOME, {"about": about[name]} | outcome)
        processes.wait_until_all_see(name, (folder / name / OUTCOME).exists)  # all read it


def _outcome(config: ConfigDict, study: Study, workdir: str, is_first: bool) -> dict:
    """Trains and evaluates one run. Returns what `_read` does, or {"failed": why} if its loss did not stay finite, as it
    would not the next time either.
    """
    try:
        pretrain(config, workdir)
        return _read(config, study, workdir, is_first)
    except NotFinite as error:
        say(f"failed      {error}")
        return {"failed": str(error)}


def _read(config: ConfigDict, study: Study, workdir: str, is_first: bool) -> dict:
    """Evaluates a run: {"readings": {reading: {"accuracy", "validation"}}} and, of the study's first run, "baselines":
    {kind: accuracy} by the first reading, where the evaluation is one of features.
    """
    if study.evaluation in BY_NAME:
        known = _known(config, study, workdir)
        by_name = {n: {"accuracy": known[n], "validation": None} for n in study.readings}
        return {"readings": by_name}
    readings: dict[str, dict] = {}
    baselines: dict[str, float] = {}
    for reading, overrides in study.readings.items():
        own = reading_of(config, overrides)
        own.eval.baselines = is_first and not readings and study.evaluation in EVALUATIONS
        found = evaluate(study.evaluation, own, workdir)["rows"]
        reached = accuracies(found, study.labels_per_class)
        (validation,) = (
            row.get("validation_accuracy")
            for row in found
            if row["features"] == ENCODER and row["labels_per_class"] is None
        )
        readings[reading] = {"accuracy": reached.pop(ENCODER), "validation": validation}
        baselines |= reached
    return {"readings": readings} | ({"baselines": baselines} if baselines else {})


def _known(config: ConfigDict, study: Study, workdir: str) -> dict[str, float]:
    """Returns {name: accuracy} of an evaluation that has several of its own."""
    if study.evaluation == "transformations":
        rows = what_is_known(config, workdir)
        return {f"{row['task']}, {row['features']}": row["accuracy"] for row in rows}
    result = finetune(config, workdir)
    rows = [row for row in result["rows"] if row["features"] == ENCODER]
    return {_share(row["label_fraction"]): row["accuracy"] for row in rows}


def _share(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def _check_readings(config: ConfigDict, study: Study) -> None:
    """Raises a UserError if a reading is not one that the evaluation has."""
    if study.evaluation not in BY_NAME:
        return
    there = [_share(fraction) for fraction in config.finetune.label_fractions]
    if study.evaluation == "transformations":
        there = [f"{task}, {kind}" for task in TASKS for kind in ("h", "z")]
    if unknown := [name for name in study.readings if name not in there]:
        raise UserError(
            f"the study reads {', '.join(unknown)}, and {study.evaluation} has {', '.join(there)} here"
        )


def _estimate(configs: dict[str, ConfigDict], further: str) -> None:
    """Says how long each run will take, by a short measurement of each kind of step; `further`: what else comes."""
    # Each process would measure for its own seconds, and wait for steps of the other processes.
    if jax.process_count() > 1:
        names = "".join(f"{name}\n" for name in configs)
        say(f"{names}times are not measured with several processes")
        return
    measured: dict[str, tuple[float, float]] = {}
    total = 0.0
    for name, own in configs.items():
        flat = config_lib.flatten(own)
        kind = repr(sorted((k, v) for k, v in flat.items() if not k.startswith(_NOT_OF_THE_STEP)))
        if kind not in measured:
            (row,) = measure_e2e(own, _MEASURED_SECONDS)
            measured[kind] = row["images_per_second"], row["seconds_to_first_step"]
        rate, first = measured[kind]
        train = assemble.data_set(own).train
        steps = assemble.plan_of(own, train.count).steps
        seconds = first + steps * own.data.batch_size / rate
        total += seconds
        say(
            f"{duration(seconds)}  {name}  {duration(first)} to the first step, then {steps} steps of "
            f"{own.data.batch_size} images, {rate:.0f} images/s"
        )
    say(f"{duration(total)}  in all, training alone; evaluations come on top{further}")


def _further_seeds(study: Study, waiting: list[StudyRun]) -> str:
    """Returns a remark that further runs will follow those `waiting`; "" if none will."""
    if study.extremes and any(run.seed == 0 for run in waiting):
        return f", and further seeds of the best and worst {study.extremes}"
    return ""


def _show(config: ConfigDict, study: Study, folder: epath.Path) -> dict:
    """Makes the table, the figure and the verdicts from all finished runs."""
    outcomes = outcomes_of(study, folder)
    scores = claimed_of(study, outcomes)
    verdicts = [claim(scores) for claim in study.claims]
    header, lines = table_of(study, outcomes)
    data = name_of(config.data.to_dict())
    title = f"{study.title}; {data}; {study.evaluation}, test {study.measure}"
    result = _record(study, outcomes, verdicts)
    if jax.process_index() == 0:
        write_json(folder / "study.json", result)
        write_text(folder / "table.md", _markdown(title, header, lines, verdicts, study, outcomes))
        files = draw(study, outcomes, data, folder)
        show_table(title, header, lines)
        if outcomes.baselines:
            words = _baselines_in_words(study, outcomes)
            say(f"beside      {words}, for the data and encoder of the first run")
        for verdict in verdicts:
            held = {True: "holds", False: "does not hold", None: "open"}[verdict.held]
            say(f"{held + ':':<15}{verdict.claim} ({verdict.because})")
        for name, why in outcomes.failed.items():
            say(f"failed      {name}: {why}")
        for name, why in outcomes.unhealthy.items():
            say(f"unhealthy   {name}: {why}")
        for name in study.metrics:
            if outcomes.metrics and not any(name in found for found in outcomes.metrics.values()):
                say(f"no metric   {name} in any metrics.jsonl")
        if outcomes.missing:
            say(
                f"missing     {len(outcomes.missing)} runs{_further_seeds(study, outcomes.missing)}: the same "
                "command, or other parts, make them"
            )
        say(f"written     {', '.join(str(f) for f in [folder / 'table.md', *files])}")
    return result


def _record(study: Study, outcomes: Outcomes, verdicts: list[Verdict]) -> dict:
    return {
        "title": study.title,
        "levels": _levels(study),
        "rows": [
            {
                "key": list(key),
                "accuracies": scores,
                "setting": (setting := outcomes.settings.get(key, 0)),
                "metrics": outcomes.metrics.get((study.levels_of(key), setting), {}),
            }
            for key, scores in outcomes.scores.items()
        ],
        "verdicts": [verdict._asdict() for verdict in verdicts],
        "missing": [run.name for run in outcomes.missing],
        "failed": outcomes.failed,
        "unhealthy": outcomes.unhealthy,
        "baselines": outcomes.baselines,
    }


def _baselines_in_words(study: Study, outcomes: Outcomes) -> str:
    words = []
    for kind, value in outcomes.baselines.items():
        lower, settings = below(study, outcomes, value)
        are = "is" if lower == 1 else "are"
        words.append(f"{kind} {100 * value:.1f} % ({lower} of {settings} settings {are} below)")
    return ", ".join(words)


def _markdown(
    title: str,
    header: list[str],
    lines: list[list[str]],
    verdicts: list[Verdict],
    study: Study,
    outcomes: Outcomes,
) -> str:
    rows = [header, ["---"] * len(header), *lines]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    claims = "\n".join(
        f"- **{ {True: 'Holds', False: 'Does not hold', None: 'Open'}[v.held] }**: {v.claim} ({v.because})"
        for v in verdicts
    )
    for what, runs in (("Failed", outcomes.failed), ("Unhealthy", outcomes.unhealthy)):
        claims += "".join(f"\n- **{what}**: {name}: {why}" for name, why in runs.items())
    beside = (
        f"Without training, for the data and encoder of the first run: {_baselines_in_words(study, outcomes)}.\n\n"
        if outcomes.baselines
        else ""
    )
    return f"{title}\n\n{text}\n\n{beside}{claims}\n"
