"""The labelled images of a protocol: those trained on, those that choose, and those that test."""

from typing import NamedTuple

from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.data.broken import Images
from simclr_jax.data.split import DataSet, Split
from simclr_jax.data.subsets import share_of_labels
from simclr_jax.errors import UserError
from simclr_jax.evals import subjects
from simclr_jax.evals.classifiers.protocol import Protocol
from simclr_jax.evals.subjects import ENCODER


class Parts(NamedTuple):
    """The images of a protocol.

    Attributes:
      config: the evaluation's configuration.
      data: the data set that the images are of.
      whole: the training split's labelled images.
      part: the images of `whole` that are trained on.
      validation: the images of `whole` that settings are chosen on, or None.
      test: the test split's labelled images.
      metric: name of the metric, a row of `METRICS`, by which candidates are chosen and reported.
    """

    config: ConfigDict
    data: DataSet
    whole: Split
    part: Images
    validation: Images | None
    test: Images
    metric: str

    @property
    def classes(self) -> tuple[str, ...]:
        """Returns the names of the classes."""
        assert self.whole.classes
        return self.whole.classes

    @property
    def outputs(self) -> int:
        """Returns how many outputs a classifier has: one for each class or, of sets of labels, for each label."""
        return len(self.classes) if self.data.members is None else self.data.members.shape[1]

    @property
    def everything(self) -> Images:
        """Returns all labelled training images, those of the validation part among them."""
        return assemble.images_of(self.config, self.whole)

    def per_class(self, fraction: float) -> int:
        """Returns the mean number of labels of a class if this fraction of all labels is used, at least one."""
        return max(1, round(fraction * self.whole.count / len(self.classes)))

    def labels(self, fraction: float, draw: int) -> Images:
        """Returns the images of `part` whose labels are used.

        Args:
          fraction: share of all labels of `whole`; 1: all of `part`.
          draw: number of the random draw, from 0.
        """
        if fraction == 1:
            return self.part
        part = self.part.split
        share = fraction * self.whole.count / part.count
        picked = share_of_labels(part.all_labels(), share, draw)
        return assemble.images_of(self.config, part.subset(picked), whole=self.whole)

    def judged_on(self) -> list[str]:
        """Returns the fingerprints of the images that choose, where there are any, and of the test images."""
        return [i.split.fingerprint() for i in (self.validation, self.test) if i is not None]

    def check_fraction(self, mode: str, fraction: float) -> None:
        """Raises a UserError, before hours of training, if a fraction of the labels, of --mode `mode`, is more than the
        validation part leaves, or will not fit into memory.
        """
        if fraction == 1:
            return
        if fraction * self.whole.count > self.part.split.count + 0.5:
            raise UserError(
                f"{mode}.label_fractions names {fraction:g}, and the validation part leaves "
                f"{self.part.split.count / self.whole.count:.3g} of the images: expected no more, or 1 for all of these"
            )
        self.part.split.check_subset(self.per_class(fraction) * len(self.classes))


def parts_of(config: ConfigDict, protocol: Protocol) -> Parts:
    """Opens the data of the configuration and holds a validation part out of the training split.

    Raises:
      UserError: labels or the test split are missing, or there is nothing to choose several candidates on.
    """
    data = subjects.labelled(config, sets=protocol.sets)
    assert data.test is not None
    whole = part = data.train.labelled()
    validation, fraction = None, config.eval.validation_fraction
    if fraction > 0:
        part, held_out = whole.divided(fraction, config.seed)
        validation = assemble.images_of(config, held_out, whole=whole)
    elif any(len(search.candidates) > 1 for search in protocol.searches(ENCODER)):
        raise UserError(
            f"{protocol.mode}.learning_rate and weight_decay name several values, and "
            "eval.validation_fraction=0 leaves nothing to choose them on"
        )
    return Parts(
        config,
        data,
        whole,
        part=assemble.images_of(config, part, whole=whole),
        validation=validation,
        test=assemble.images_of(config, data.test.labelled()),
        metric=subjects.metric_of(config, data) if protocol.sets else "accuracy",
    )
