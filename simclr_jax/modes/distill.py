"""--mode=distill: trains a student to give a teacher's distribution over the classes, on images without labels
(SimCLR v2, arXiv 2006.10029, section 2).

The student is the configuration's encoder with a linear classifier on h. It is trained like pretraining: by
the options "optimizer.*", "train.*" and "data.*", on random crops and flips.
"""

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax import config as config_lib
from simclr_jax.console import say
from simclr_jax.data.split import DataSet
from simclr_jax.encoders import init_encoder
from simclr_jax.encoders.classified import Classified
from simclr_jax.encoders.heads import LinearClassifier
from simclr_jax.errors import UserError
from simclr_jax.evals import results, subjects
from simclr_jax.files import absolute
from simclr_jax.mesh import check_divides, gathered, laid_out, make_mesh, replicated
from simclr_jax.modes.pretrain import run_of
from simclr_jax.modes.report import report_at_end
from simclr_jax.pretrained import Classifier, load_classifier
from simclr_jax.training.loop import Job, fit, job_of
from simclr_jax.training.objectives import distilled, no_loss
from simclr_jax.training.optimizer import of_parts
from simclr_jax.training.plan import Plan
from simclr_jax.training.record import about_classifier, about_training, write_record
from simclr_jax.training.state import TrainState, count_parameters, digest_of, start_of
from simclr_jax.training.step import UpdateRule, make_step
from simclr_jax.training.workdir import alone_in, check_workdir
from simclr_jax.views.placement import Views, stream

# Options that only pretraining uses.
_WITHOUT_EFFECT = (
    "model.init_from",
    "model.norm_group",
    "eval.every_steps",
    "eval.every_epochs",
    "health.every_steps",
)

_ADVICE = "in another --workdir, try a lower optimizer.learning_rate or a longer warm-up"


def distill(config: ConfigDict, workdir: str) -> None:
    """Trains a student to the end, from the workdir's newest checkpoint or from the start. Then writes
    WORKDIR/distill.json with the accuracies of teacher and student, if the data have a labelled test split, and the
    report, if train.report says so.

    On SIGTERM, SIGINT or SIGHUP it finishes the step and saves.

    Raises:
      Stopped: a signal has stopped it.
      UserError: there is no teacher, the workdir holds another run, or what `pretrain` raises it for.
    """
    with alone_in(workdir, config.data.path):
        _distill(config, workdir)
    if config.train.report:
        report_at_end(config, workdir)


def _distill(config: ConfigDict, workdir: str) -> None:
    if not config.distill.teacher:
        raise UserError(
            "distill.teacher is empty: expected the folder of a classifier, such as the one that "
            "--mode=finetune names at its end"
        )
    config = config.copy_and_resolve_references()
    # A student has no projection head, so its fine-tuning can only begin from h.
    config.model.head, config.finetune.from_layer = "none", 0
    data = assemble.data_set(config)
    train = data.train
    fingerprint = train.fingerprint()
    saved = check_workdir(config, workdir, train, fingerprint, mode="distill")
    teacher = load_classifier(config.distill.teacher)
    teacher.network.check_image_size(config.data.image_size)
    about = _about(config, teacher, data)
    _check_teacher(about["teacher"], saved, workdir)
    plan = assemble.plan_of(config, train.count)
    mesh = make_mesh(fsdp=config.mesh.fsdp)
    check_divides(config.data.batch_size, mesh, config.train.microbatches)
    views = assemble.classifier_views(config, mesh, config.data.batch_size)
    student = student_of(config, teacher.width)
    job = distillation_job(config, plan, student, teacher, views)
    about = about_training(plan, data, fingerprint) | about
    record = write_record(config, about, workdir, saved)
    _describe(config, plan, student, teacher.network, job, train.count)
    images = assemble.images_of(config, train, epath.Path(workdir) / "broken_images.jsonl")
    run = run_of(config, plan, workdir, record, _ADVICE)
    state = fit(job, stream(views, images), run)
    images.broken.say_how_many()
    if not subjects.without_labels(data):
        if other := _other_classes(data, teacher):
            say(f"compared    none: {other}, so its classes are not the labels of the test images")
        else:
            _compare(config, workdir, student, teacher, state, views, data)


def student_of(config: ConfigDict, outputs: int) -> Classified:
    """Makes the student: the encoder and a linear classifier on h, with `outputs` logits."""
    return Classified(
        assemble.encoder(config), assemble.head(config), 0, LinearClassifier(outputs), True
    )


def distillation_job(
    config: ConfigDict, plan: Plan, student: Classified, teacher: Classifier, views: Views
) -> Job:
    """Assembles the step of distillation.

    The teacher's arrays are a part of the state that no step changes: they are divided over the devices as all
    parameters are, and every checkpoint holds them.

    Args:
      config: the run's configuration, whose model is the student's.
      plan: length and learning rate.
      student: the network that is trained.
      teacher: the classifier that it learns from.
      views: crops of the training images.
    """
    mesh = views.settings.mesh
    optimizer, schedule = assemble.pretraining_optimizer(config, plan)
    optimizer = of_parts(optimizer, student.trained)
    step = make_step(
        distilled(
            student.logits,
            lambda variables, images: teacher.network.predict(variables, images)["logits"],
            views.views,
            config.distill.temperature,
            config.distill.alpha,
        ),
        no_loss,
        UpdateRule(optimizer, schedule, config.train.microbatches, config.train.skip_not_finite),
        fetch=views.fetch,
        gather=gathered(mesh),
    )

    def init(key: jax.Array, taught: dict) -> TrainState:
        encoder = init_encoder(student.encoder, config.data.image_size, key)
        empty: dict = {"params": {}, "batch_stats": {}}
        params, batch_stats = student.start(encoder, empty, jax.random.fold_in(key, 2))
        taught = jax.tree.map(jnp.copy, taught)  # copied, as the step takes over its state's memory
        return start_of(
            params | {"teacher": taught["params"]},
            batch_stats | {"teacher": taught["batch_stats"]},
            optimizer,
        )

    everywhere = replicated(mesh)
    taught = jax.tree.map(lambda x: laid_out(x, everywhere), jax.device_get(teacher.variables))
    start = (jax.random.key(config.seed), taught)
    return job_of(step, init, start, plan.steps, mesh)


def _about(config: ConfigDict, teacher: Classifier, data: DataSet) -> dict[str, Any]:
    """Returns what the record says of student and teacher.

    Raises:
      UserError: distill.alpha makes use of labels, and there are none, or the data have other classes than the teacher.
    """
    alpha, other = config.distill.alpha, _other_classes(data, teacher)
    if alpha < 1 and not data.train.has_labels():
        raise UserError(
            f"distill.alpha={alpha} uses the labels, and no training image has one: expected labelled images, or "
            "distill.alpha=1"
        )
    if alpha < 1 and other:
        raise UserError(
            f"distill.alpha={alpha} uses the labels, and {other}: expected the teacher's classes in its order, "
            "or distill.alpha=1"
        )
    return {
        "mode": "distill",
        "classifier": about_classifier(0, teacher.width, teacher.classes),
        "teacher": {
            "path": absolute(config.distill.teacher),
            "step": teacher.step,
            "digest": digest_of(teacher.variables),
        },
    }


def _other_classes(data: DataSet, teacher: Classifier) -> str:
    """Returns in words how the classes of the data differ from the teacher's; "" if they do not, or the data have
    none. Where the teacher's names are not known, their number counts.
    """
    own, taught = data.train.classes, teacher.classes
    if own and len(own) != teacher.width:
        return f"the data have {len(own)} classes, and the teacher has {teacher.width}"
    for i, (name, other) in enumerate(zip(own or (), taught or (), strict=False)):
        if name != other:
            return f"class {i} of the data is {name!r}, and the teacher's is {other!r}"
    return ""


def _check_teacher(teacher: dict, saved: dict | None, workdir: str) -> None:
    """Raises a UserError if the run to be resumed began with another teacher."""
    if saved is not None and saved["teacher"]["digest"] != teacher["digest"]:
        raise UserError(
            f"{workdir} holds a run with another teacher ({saved['teacher']['path']}) than {teacher['path']}: "
            "use another --workdir"
        )


def _describe(
    config: ConfigDict, plan: Plan, student: Classified, teacher: Classified, job: Job, images: int
) -> None:
    """Says what is trained, before anything is computed."""
    state = job.abstract_state
    on = f"layer {teacher.layer} of its head" if teacher.layer else "h"
    size = count_parameters(state.params["teacher"]["encoder"]) / 1e6
    own = count_parameters(state.params["encoder"]) / 1e6
    options = config.distill
    say(f"data        {images} images; views of {config.data.image_size} px")
    say(
        f"teacher     {teacher.encoder.describe()}, {size:.2f} M parameters, {teacher.width} classes on {on}"
    )
    say(f"student     {student.encoder.describe()}, {own:.2f} M parameters, classes on h")
    say(f"loss        distillation, temperature {options.temperature:g}, alpha {options.alpha:g}")
    say(f"steps       {plan.steps}, peak learning rate {plan.learning_rate:.4g}")
    values = config_lib.flatten(config)
    if unused := [f"{name}={values[name]}" for name in _WITHOUT_EFFECT if values[name]]:
        say(f"ignored     {', '.join(unused)}: --mode=distill does not use these options")


def _compare(
    config: ConfigDict,
    workdir: str,
    student: Classified,
    teacher: Classifier,
    state: TrainState,
    views: Views,
    data: DataSet,
) -> None:
    """Writes and shows the test accuracies of teacher and student."""
    assert data.test is not None
    images = assemble.images_of(config, data.test.labelled())
    taught = state.variables("teacher")
    own = {"params": state.params, "batch_stats": state.batch_stats}
    compared = (("teacher", teacher.network, taught), ("student", student, own))
    rows, count = [], 0
    for kind, network, variables in compared:
        extractor = subjects.extractor(config, views.settings.mesh, network.predict)
        score, count = subjects.score_of("accuracy", extractor, views, variables, images)
        rows.append(results.row(kind, None, [score]))
    path = epath.Path(workdir) / "distill.json"
    settings = config.distill.to_dict() | {"seed": config.seed}
    settings["views"] = views.settings.evaluation.by_option()
    result = {
        "step": int(state.step),
        "rows": rows,
        "train_images": data.train.count,
        "test_images": count,
        "settings": settings,
    }
    results.save(path, config, result)
    table = ["", "accuracy"], [[r["features"], results.cell(r)] for r in rows]
    results.show(path, result, "Distillation, test accuracy", table)
