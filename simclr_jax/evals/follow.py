"""--follow: evaluates the checkpoints of a run that another process trains, as they appear."""

import hashlib
import json
import time

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import config as config_lib
from simclr_jax import processes
from simclr_jax.console import say
from simclr_jax.data.split import DataSet
from simclr_jax.errors import UserError
from simclr_jax.evals import EVALUATIONS, results, subjects
from simclr_jax.evals.evaluate import (
    OF_ROWS,
    Subject,
    config_for,
    evaluate_features,
    evaluate_subject,
    file_of,
    settings_of,
)
from simclr_jax.evals.subjects import ENCODER, Trained
from simclr_jax.files import write_text
from simclr_jax.mesh import make_mesh
from simclr_jax.training.metrics import read_lines
from simclr_jax.training.record import is_of_run, run_record
from simclr_jax.training.saved import RECORD, saved_steps

_LOOK_EVERY_SECONDS = 10.0
_NONE_YET, _NO_MORE = -1, -2  # in place of the step of a checkpoint


def evaluate_or_follow(name: str, config: ConfigDict, workdir: str, follow: bool = False) -> dict:
    """Runs one of `EVALUATIONS` of the newest checkpoint, or with --follow of each new one; see `evaluate_features`."""
    return (follow_run if follow else evaluate_features)(name, config, workdir)


def follow_run(name: str, config: ConfigDict, workdir: str) -> dict:
    """Evaluates the checkpoints of a run as they appear, until that of its last step.

    Each adds a line to WORKDIR/NAME_followed.jsonl: {"step", metric, "settings": a digest of the evaluation's
    settings, "run": see `write_record`}. A restart goes on after the last line, if it is of that run and these settings;
    otherwise the file begins anew with the checkpoints that are there.

    Args:
      name: a row of `EVALUATIONS`.
      config: the evaluation's configuration.
      workdir: the run's folder, which need not be there yet.

    Returns:
      the result of the last step.

    Raises:
      UserError: the workdir is a folder of checkpoints, or what `evaluate_features` raises it for.
    """
    config = config_for(name, config)
    data, mesh = subjects.labelled(config, EVALUATIONS[name].sets), make_mesh()
    say(f"following {workdir}: Ctrl-C ends it")
    record = _wait_for_run(workdir)
    path = results.path_of(config, record, data, workdir, file_of(name, config))
    file = _file_of_lines(path)
    lines = _lines_before(name, config, data, path, record)
    settings = _digest_of_settings(name, config, data)
    done, result = lines[-1]["step"] if lines else -1, None
    while (step := processes.as_first_process_says(_next_step(workdir, done))) != _NO_MORE:
        if step == _NONE_YET:
            time.sleep(_LOOK_EVERY_SECONDS)
            continue
        done = step
        trained = _trained_at(step, config, workdir, mesh)
        if trained is None:
            continue
        result = evaluate_subject(name, Subject(config, data, trained, path, mesh))
        accuracy = results.accuracies(result["rows"])[ENCODER]
        run = trained.record.get("run", record.get("run"))
        # A new run may have begun meanwhile.
        lines = [line for line in lines if is_of_run(line, run)]
        metric = _name_of_metric(name, result)
        lines.append({"step": step, metric: accuracy, "settings": settings, "run": run})
        if jax.process_index() == 0:
            write_text(file, "".join(f"{json.dumps(line)}\n" for line in lines))
    say(f"followed to the last step, {done}: {file}")
    return json.loads(path.read_text()) if result is None else result


def _wait_for_run(workdir: str) -> dict:
    """Returns the record of the run, once it has begun."""
    if run_record(workdir) is None:
        say(f"waiting for a run to begin there: {workdir}/config.json")
    while (record := run_record(workdir)) is None:
        if saved_steps(workdir) or epath.Path(workdir, RECORD).is_dir():
            raise UserError(
                f"--follow with {workdir}: expected the workdir of a run, in which config.json says how long it is, "
                "not a folder of checkpoints"
            )
        time.sleep(_LOOK_EVERY_SECONDS)
    return record


def _name_of_metric(name: str, result: dict) -> str:
    """Returns the metric's name in a line, such as "transfer_accuracy" or "transfer_mean_per_class"."""
    metric = result["settings"].get("metric", "accuracy")
    return EVALUATIONS[name].metric if metric == "accuracy" else f"{name}_{metric}"


def _file_of_lines(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.stem}_followed.jsonl")


def _lines_before(
    name: str, config: ConfigDict, data: DataSet, path: epath.Path, record: dict
) -> list[dict]:
    """Returns the lines after which to go on.

    Args:
      name, config, data: the evaluation.
      path: the file of the evaluation's result.
      record: the run's.
    """
    lines = read_lines(_file_of_lines(path)) if path.exists() else []
    if not lines or not is_of_run(lines[-1], record.get("run")):
        return []
    settings = _digest_of_settings(name, config, data)
    if lines[-1].get("settings", settings) != settings:
        return []
    if lines[-1]["step"] == record["plan"]["steps"]:
        last = config_lib.from_dict(json.loads(path.read_text())["config"])
        if settings_of(name, last, data) != settings_of(name, config, data):
            lines.pop()  # another call has replaced the result of the last step, or other rows are asked for
    return lines


def _digest_of_settings(name: str, config: ConfigDict, data: DataSet) -> str:
    """Returns 8 letters that differ where `_settings` of the evaluation `name` do, as far as they decide the accuracy with
    all labels, which a line of --follow holds.
    """
    config = config.copy_and_resolve_references()
    for option in OF_ROWS:
        config.eval[option] = config_lib.default().eval[option]
    used = settings_of(name, config, data)
    labels, views = used.pop("labels"), used.pop("views")
    last = [views.pop("antialias")]
    # In the form of earlier versions, so that what they followed is gone on with.
    last += [bits] if (bits := views.pop("sample_bits")) else []
    text = json.dumps([used, labels, views, *last], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _next_step(workdir: str, done: int) -> int:
    """Returns the step of the first checkpoint after step `done`, _NONE_YET or _NO_MORE."""
    record = run_record(workdir)  # read anew: the run may be extended
    if record is not None and record["plan"]["steps"] == done:
        return _NO_MORE
    return next((step for step in saved_steps(workdir) if step > done), _NONE_YET)


def _trained_at(step: int, config: ConfigDict, workdir: str, mesh: Mesh) -> Trained | None:
    """Reads a checkpoint; returns None if training has deleted it for a newer one."""
    try:
        of_z = config.eval.features == "z"
        return subjects.trained(config, workdir, mesh, head=of_z, step=step)
    except UserError:
        # A checkpoint that is not the newest may be half deleted: its folder is left when its files are gone.
        steps = saved_steps(workdir)
        if not steps or steps[-1] == step or jax.process_count() > 1:
            raise
        return None
