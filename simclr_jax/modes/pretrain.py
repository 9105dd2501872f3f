"""--mode=pretrain: trains the encoder, with its summary before and its evaluations on the way."""

import collections
import functools
import json
import shlex
from collections.abc import Callable

import jax
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax import config as config_lib
from simclr_jax.assemble import Pretraining
from simclr_jax.config import suggest
from simclr_jax.console import say
from simclr_jax.data import FILES, measure, measured, say_not_read, summary
from simclr_jax.evals.evaluate import evaluate_features, why_not
from simclr_jax.evals.on_the_way import evaluations_on_the_way
from simclr_jax.evals.spread import Spread
from simclr_jax.evals.verdict import BAD_OF_EVALUATIONS, judge_accuracy
from simclr_jax.files import expanded, write_json
from simclr_jax.losses import count_negatives
from simclr_jax.mesh import FSDP
from simclr_jax.modes.oddities import oddities, say_unusual
from simclr_jax.modes.report import report_at_end
from simclr_jax.modes.warm_start import begun_with, describe_start, find_start
from simclr_jax.training.checkpoint import Saving
from simclr_jax.training.log import Reporting, steps_between_reports
from simclr_jax.training.loop import Run, check_length, fit
from simclr_jax.training.metrics import read_lines
from simclr_jax.training.optimizer import scaling_in_words
from simclr_jax.training.plan import Plan
from simclr_jax.training.program import what_changed
from simclr_jax.training.record import about_classifier, about_training, write_record
from simclr_jax.training.sinks import Sinks
from simclr_jax.training.state import count_parameters
from simclr_jax.training.verdict import HEALTH, NOT_JUDGED, Verdict, judge
from simclr_jax.training.workdir import alone_in, check_workdir
from simclr_jax.views.placement import stream

_ADVICE = "in another --workdir, try a lower optimizer.learning_rate, a longer warm-up or model.dtype=float32"
_OR_SKIP = "; train.skip_not_finite=True goes on past single steps"


def pretrain(config: ConfigDict, workdir: str, extend: bool = False) -> None:
    """Trains the encoder from the workdir's newest checkpoint, or from the start, to the end.

    On SIGTERM, SIGINT or SIGHUP it finishes the step and saves; all processes stop at the same step.

    Args:
      config: the run's configuration.
      workdir: its folder.
      extend: the run may have another length than it was begun with.

    Raises:
      Stopped: a signal has stopped it.
      UserError: the batch does not divide, the data are not there, the workdir holds a run of
        another configuration, another program trains in it, too many images cannot be read, the loss or the gradient is not
        finite, or a checkpoint cannot be read or written.
    """
    with alone_in(workdir, config.data.path):
        _pretrain(config, workdir, extend)


def pretrain_and_evaluate(config: ConfigDict, workdir: str, extend: bool = False) -> None:
    """Pretrains, then evaluates as eval.after_training says, where the data have labels, and then writes the
    report if train.report says so.

    The arguments and the errors are those of `pretrain`.
    """
    pretrain(config, workdir, extend)
    if config.eval.after_training != "none":
        _evaluate(config, workdir)
    if config.train.report:
        report_at_end(config, workdir)


def _evaluate(config: ConfigDict, workdir: str) -> None:
    """Evaluates as eval.after_training says, or says what can be done with images without labels."""
    evaluation = config.eval.after_training
    if why := why_not(config, evaluation):
        say(f"no {evaluation:<9}{why}")
        say(
            f"next        python -m simclr_jax.main --mode=embed --workdir={shlex.quote(workdir)} \\"
        )
        say("                --input=FOLDER --output=features.parquet")
        say("            writes the features of images; then --mode=neighbours shows what is near")
        say("            what; --mode=export hands the encoder on")
        return
    result = evaluate_features(evaluation, config, workdir)
    if config.eval.features != "h":  # a verdict is on the encoder
        return
    last = _last_metrics(workdir)
    verdict = judge_accuracy(result["rows"], last, result.get("test_images"))
    if verdict is not None:
        _judge_at_end(config, workdir, verdict, last)


def _judge_at_end(
    config: ConfigDict, workdir: str, evaluated: Verdict, last: dict[str, float]
) -> None:
    """Says the verdict of the final evaluation in two cases: it is bad and that of the training is not (a bad one of the
    training says more), or the training's loss could not be judged. If the evaluation is sound, restores the verdict of
    the training where WORKDIR/health.json still holds the bad one of an earlier evaluation.

    Args:
      config: the run's configuration.
      workdir: its folder.
      evaluated: the verdict of the evaluation.
      last: the last metrics of the training; {}: there are none.
    """
    trained = None
    if "z_std" in last:  # not in metrics of older versions
        plan = assemble.plan_of(config, assemble.data_set(config).train.count)
        trained = judge(int(last["step"]), last, assemble.references(config, plan))
    unjudged = trained is not None and trained.name == NOT_JUDGED
    if (evaluated.is_bad or unjudged) and (trained is None or not trained.is_bad):
        _say_verdict(workdir, evaluated)
        return
    file = epath.Path(workdir) / HEALTH
    if evaluated.is_bad or trained is None or not file.exists():
        return
    if json.loads(file.read_text())["name"] in BAD_OF_EVALUATIONS:
        _say_verdict(workdir, trained)


def _pretrain(config: ConfigDict, workdir: str, extend: bool) -> None:
    data = assemble.data_set(config)
    say_not_read(config.data)
    train = data.train
    fingerprint = train.fingerprint()
    saved = check_workdir(config, workdir, train, fingerprint, extend)
    made = assemble.pretraining(config)
    plan = made.plan
    if saved is not None:  # before config.json is replaced
        check_length(workdir, saved["step"], plan.steps)
    start, began_with = find_start(config, saved, workdir)
    job = begun_with(start, made.job) if start else made.job
    about = about_training(plan, data, fingerprint)
    references = assemble.references(config, plan)
    about |= {"init_from": began_with, "references": references._asdict()}
    if made.job.abstract_state.params.get("classifier"):
        assert train.classes
        about["classifier"] = about_classifier(0, len(train.classes), train.classes, online=True)
    images = assemble.images_of(config, train, epath.Path(workdir) / "broken_images.jsonl")
    hooks = [
        *evaluations_on_the_way(config, made),
        *([Spread(config, made)] if config.health.every_steps else []),
    ]
    record = write_record(config, about, workdir, saved)
    describe_run(config, made)
    say_unusual(oddities(config, plan, train.count))
    if saved is not None and (changed := what_changed(saved)):
        say(f"program     other than when the checkpoint was saved: {'; '.join(changed)}")
    if start:
        say(describe_start(start))
    verdicts: list[Verdict] = []

    def judged(step: int, means: dict[str, float]) -> Verdict:
        verdicts[:] = [judge(step, means, references)]
        return verdicts[0]

    advice = _ADVICE + ("" if config.train.skip_not_finite else _OR_SKIP)
    run = run_of(config, plan, workdir, record, advice, judged)
    if saved is not None and saved["step"] == plan.steps:
        say(f"finished    before, at step {plan.steps}: nothing is trained")
    fit(job, stream(made.views, images), run, hooks)
    images.broken.say_how_many()
    say(f"trained to step {plan.steps}: {workdir}/checkpoints, {workdir}/metrics.jsonl")
    if verdicts:  # empty if the training was finished before
        _say_verdict(workdir, verdicts[0])


def run_of(
    config: ConfigDict,
    plan: Plan,
    workdir: str,
    record: dict,
    advice: str,
    judge: Callable[[int, dict[str, float]], Verdict] | None = None,
) -> Run:
    """Says where and how often a training writes, for `fit`.

    Args:
      config: the run's configuration.
      plan: its length.
      workdir: its folder.
      record: what `write_record` returned.
      advice, judge: see `Reporting`.
    """
    every = steps_between_reports(config.train.log_every_steps, plan.steps)
    return Run(
        workdir,
        record,
        Saving(**config.checkpoint.to_dict()),
        Reporting(every, config.data.batch_size, advice, judge),
        functools.partial(Sinks, config.train.sinks, workdir, config_lib.flatten(config)),
        config.train.hang_seconds,
    )


def _say_verdict(workdir: str, verdict: Verdict) -> None:
    """Says a verdict, and writes it to WORKDIR/health.json."""
    say(f"health      {verdict.name}: {verdict.because}")
    if jax.process_index() == 0:
        write_json(epath.Path(workdir) / HEALTH, verdict._asdict())


def _last_metrics(workdir: str) -> dict[str, float]:
    lines = read_lines(epath.Path(workdir) / "metrics.jsonl")
    return next((line for line in reversed(lines) if "loss" in line), {})


def describe_run(config: ConfigDict, made: Pretraining) -> None:
    """Says what the configuration comes to, before anything is computed."""
    plan, train, state, mesh = made.plan, made.train, made.job.abstract_state, made.job.mesh
    batch, options = config.data.batch_size, config.optimizer
    how = scaling_in_words(options.learning_rate, options.scaling, batch)
    f, g = (count_parameters(state.params[name]) / 1e6 for name in ("encoder", "head"))
    kinds = collections.Counter(device.device_kind for device in mesh.devices.flat)
    devices = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
    labels = f"{made.classes} classes" if made.classes else "no labels"
    norm = "the batch" if made.norm_images == batch else f"groups of {made.norm_images} images"
    if config.data.source in FILES:
        describe_choices(config, labelled=bool(made.classes))
    say(f"data        {train.count} images, {labels}; views of {config.data.image_size} px")
    say(f"model       {made.encoder.describe()}, {f:.2f} M parameters; head {g:.2f} M")
    negatives = count_negatives(batch, config.loss.negatives)
    stored = f" and up to {config.loss.memory} of earlier batches" if config.loss.memory else ""
    say(f"batch       {batch} images, {2 * batch} views, {negatives} negatives an anchor{stored}")
    has_norm = bool(jax.tree.leaves(state.batch_stats))
    say(f"loss        {made.loss.text}" + (f"; BatchNorm over {norm}" if has_norm else ""))
    say(
        f"steps       {plan.steps} ({plan.steps * batch / train.count:.1f} epochs), of which {plan.warmup_steps} warm-up"
    )
    say(
        f"optimizer   {options.name}, peak learning rate {plan.learning_rate:.4g} ({how}), weight decay {options.weight_decay:g}"
    )
    microbatches, shards = config.train.microbatches, mesh.shape[FSDP]
    say(
        f"devices     {devices}; {jax.process_count()} process{'es' if jax.process_count() > 1 else ''}, {batch // mesh.size} images a device"
        + (f" in {microbatches} microbatches" if microbatches > 1 else "")
        + (f"; parameters divided over {shards}" if shards > 1 else "")
    )


def describe_choices(config: ConfigDict, labelled: bool) -> None:
    """Says what a folder holds, and which options follow from the images."""
    if config.data.source == "folder":
        found = summary.summarize(expanded(config.data.path))
        count, short_side, bits = measured(found)
        for i, line in enumerate(summary.summary_lines(found)):
            say(f"{'' if i else 'folder':<12}{line}")
    else:
        count, short_side, bits = measure(config.data.to_dict() | {"seed": config.seed})
    values = config_lib.flatten(config)
    accelerator = jax.default_backend() != "cpu"
    about, size = (count, short_side, accelerator, bits), config.data.image_size
    choices = suggest.suggest_settings(*about)
    # For a size that was given, other values of the remaining options would be chosen, or the defaults.
    fit = config_lib.flatten(config_lib.default())
    fit |= {c.option: c.value for c in suggest.suggest_settings(*about, given_size=size)}
    if labelled:
        of_evaluation = suggest.suggest_evaluation(count, accelerator)
        choices += of_evaluation
        fit |= {c.option: c.value for c in of_evaluation}
    for i, choice in enumerate(choices):
        option, suggested, reason = choice
        given = values[option]
        if given == suggested:
            other = f"chosen for {choices[0].value} px; for {size} px it would be {fit[option]}"
            why = reason if suggested == fit[option] else other
        elif given == fit[option]:
            why = f"fits {size} px"
        else:
            why = f"as configured; the images suggest {fit[option]}"
        say(f"{'' if i else 'settings':<12}{option}={given}  ({why})")
