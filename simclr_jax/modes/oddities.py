"""Finds what is unusual about a configuration, before an hour is spent on it."""

import jax
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.console import say
from simclr_jax.losses import count_negatives
from simclr_jax.losses.checks import has_gradient
from simclr_jax.mesh import make_mesh
from simclr_jax.training.plan import Plan
from simclr_jax.views import make_distortion

_WITH_STEM = ("resnet", "sk_resnet")
_OFF_THE_RULE = 3.0  # factor between a learning rate and the paper's rules; our choice


def oddities(config: ConfigDict, plan: Plan, images: int) -> list[str]:
    """Lists what is unusual about a configuration, with the reason, a line each.

    Args:
      config: the run's configuration.
      plan: its length and learning rate.
      images: number of training images.
    """
    batch, size, options = config.data.batch_size, config.data.image_size, config.optimizer
    learns_by_loss = config.train.objective == "contrastive"  # which is otherwise only watched
    found = []
    if learns_by_loss and batch < 64 and config.loss.name == "nt_xent":
        found.append(
            f"data.batch_size={batch}: {count_negatives(batch, config.loss.negatives)} negatives an anchor; below 64 images NT-Xent learns "
            "slowly (Yeh et al. 2022)"
        )
    rules = (0.3 * batch / 256, 0.075 * batch**0.5)  # appendix B.1
    times = [max(plan.learning_rate / rule, rule / max(plan.learning_rate, 1e-9)) for rule in rules]
    if options.name == "lars" and min(times) > _OFF_THE_RULE:
        found.append(
            f"learning rate {plan.learning_rate:.3g}: the paper's rules are 0.3 x B / 256 = {rules[0]:.3g} and "
            f"0.075 x sqrt(B) = {rules[1]:.3g} for {batch}"
        )
    if options.name == "lars" and batch < 256:
        found.append(
            f"optimizer.name=lars at batch {batch}: the paper's smallest is 256; see sgd, or muon with "
            "learning_rate 0.008 and scaling none"
        )
    if options.name == "adamw" and plan.learning_rate > 5e-3:
        found.append(
            f"learning rate {plan.learning_rate:.2g} with adamw: above 0.005 (ours) it often diverges"
        )
    if size < 20 and config.views.blur_probability > 0:
        found.append(
            f"views.blur_probability above 0 at {size} px does nothing: a kernel a tenth of the view wide is one pixel"
        )
    elif size <= 32 and config.views.blur_probability > 0:
        found.append(
            f"views.blur_probability above 0 at {size} px: the paper leaves it out (appendix B.9)"
        )
    warmup = round(options.warmup_epochs * images / batch)
    if warmup > plan.warmup_steps:
        found.append(
            f"optimizer.warmup_epochs={options.warmup_epochs:g} is {warmup} steps of {plan.steps}: it is cut "
            f"to {plan.warmup_steps}"
        )
    if make_distortion(config.views.to_dict()).changes_nothing:
        found.append(
            "views: whole images and no distortion, so both views of an image are one picture: nothing can be learned from "
            "them; see views.crop_area"
        )
    elif config.views.color_strength == 0 and config.views.grey_probability == 0:
        found.append(
            "no colour distortion: crops alone let colours give an image away (section 3.1)"
        )
    least, most = (0.05, 1) if config.loss.normalize else (10, 100)
    has_temperature = learns_by_loss and not config.loss.name.startswith("margin")
    if has_temperature and not least <= config.loss.temperature <= most:
        found.append(
            f"loss.temperature={config.loss.temperature:g}: with loss.normalize={config.loss.normalize} the paper tries "
            f"{least:g} to {most:g} (Table 5)"
        )
    if learns_by_loss and not _reaches_z(config, plan):
        found.append(
            f"loss.name={config.loss.name} has no gradient at random z: it may learn nothing"
        )
    if config.loss.memory > images - batch:
        found.append(
            f"loss.memory={config.loss.memory} and a batch of {batch} are more than {images} images: earlier views of an "
            "image are negatives of its own views"
        )
    if plan.steps < 100:
        found.append(f"{plan.steps} steps: enough to see that it runs, not to learn")
    if config.model.stem == "imagenet" and size <= 64 and config.model.name in _WITH_STEM:
        found.append(
            f"model.stem=imagenet at {size} px leaves {-(-size // 32)} px: see cifar or strided"
        )
    return found


def _reaches_z(config: ConfigDict, plan: Plan) -> bool:
    # On one device of this machine: --mode=explain may be about devices that are not there.
    mesh = make_mesh(jax.local_devices()[:1])
    images, width, *_ = assemble.references(config, plan)
    return has_gradient(assemble.contrastive_loss(config, mesh), images, width, mesh)


def say_unusual(found: list[str]) -> None:
    """Says what `oddities` found."""
    for i, line in enumerate(found):
        say(f"{'' if i else 'unusual':<12}{line}")
