"""Whether a run is healthy, by its metrics. Each verdict says the number, the reference and its source."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from simclr_jax.losses.health import chance, lower_bound

_BELOW, _NEAR_CHANCE, _COLLAPSED = 1e-3, 0.01, 0.1  # nats; nats; share of 1 / sqrt(d): ours

_SOUND, _TOO_EARLY = "sound", "too early to say"
# The verdicts of `judge_accuracy`, but for "sound".
OF_EVALUATIONS = _SHORTCUT, _NO_BETTER, _BELOW_PIXELS = (
    "a shortcut",
    "no better than untrained",
    "below raw pixels",
)


class References(NamedTuple):
    """Numbers that a run's metrics are held against.

    Attributes:
      images: B, of the global batch.
      width: d, the width of z.
      settled_after: means reported after this step have no step of the warm-up in them.
      temperature: tau; None: the loss has no known bounds (it is not NT-Xent over cosines and both views).
    """

    images: int
    width: int
    settled_after: int
    temperature: float | None


class Verdict(NamedTuple):
    """A judgement of a run at one moment.

    Attributes:
      name: "sound", "too early to say", "below the lower bound", "collapsed", "not learning" or one of OF_EVALUATIONS.
      because: the numbers, the reference and where it comes from.
    """

    name: str
    because: str

    @property
    def is_bad(self) -> bool:
        return self.name not in (_SOUND, _TOO_EARLY)


def judge(step: int, metrics: Mapping[str, float], references: References) -> Verdict:
    """Judges a run by the means of the steps up to `step`.

    Args:
      step: the last of them.
      metrics: "z_std", and "loss" where `references.temperature` is given.
      references: the run's.
    """
    images, width, settled_after, temperature = references
    spread, even = metrics["z_std"], 1 / math.sqrt(width)
    seen = f"z_std {spread:.2g}, evenly spread {even:.2g}"
    if spread < _COLLAPSED * even:
        why = "under a tenth (ours) of 1 / sqrt(d) (SimSiam, section 4.1)"
        return Verdict("collapsed", f"all images have nearly one projection: {seen}: {why}")
    if temperature is None:
        return Verdict(_SOUND, seen)
    loss, least, no_better = metrics["loss"], lower_bound(images, temperature), chance(images)
    way = (no_better - loss) / (no_better - least)
    far = f"{way:.0%} of the way" if way > -0.005 else "worse than chance"
    where = f"loss {loss:.3f}, by chance {no_better:.3f}, at best {least:.3f}: {far}"
    if loss < least - _BELOW:
        why = "under the exact bound: the mask, the normalisation or the gather is wrong"
        return Verdict("below the lower bound", f"{where}: {why}")
    # At a high temperature every loss is near chance: ask for a tenth of the way to the lower bound instead.
    near = min(_NEAR_CHANCE, 0.1 * (no_better - least))
    if loss > no_better - near:
        if step <= settled_after:
            early = f"before step {settled_after + 1} it may be near chance"
            return Verdict(_TOO_EARLY, f"{where}; {seen}; {early}")
        why = f"after the warm-up within {near:.2g} (ours) of ln(2B - 1), and z is spread"
        if loss > no_better + near:
            why = "after the warm-up above ln(2B - 1): worse than telling nothing apart"
        return Verdict("not learning", f"{where}: {why}: {seen}")
    return Verdict(_SOUND, f"{where}; {seen}")


def judge_accuracy(
    rows: list[dict], metrics: Mapping[str, float], trained: str, untrained: str, pixels: str
) -> Verdict | None:
    """Judges a run by its final evaluation: by the accuracy of the trained and of the untrained encoder, and of pixels.

    Args:
      rows: the evaluation's, see `evals.results.row`.
      metrics: the last of the run.
      trained, untrained, pixels: names in the rows of the two encoders and of raw pixels, which may be missing.

    Returns:
      None where the evaluation has no untrained encoder.
    """
    found = {r["features"]: r["accuracy"] for r in rows if r["labels_per_class"] is None}
    if trained not in found or untrained not in found:
        return None
    said = f"accuracy {found[trained]:.1%}, untrained {found[untrained]:.1%}"
    if found[trained] > found[untrained]:
        of_pixels = found.get(pixels, 0.0)
        if found[trained] >= of_pixels:
            return Verdict(_SOUND, said)
        why = "the pixels alone tell more: train longer, or on more images"
        return Verdict(_BELOW_PIXELS, f"{said}, raw pixels {of_pixels:.1%}: {why}")
    told = metrics.get("other_view_top1", 0.0)
    if told > 0.99:  # ours
        why = "it tells views apart and images not: a shortcut, such as BatchNorm of few images a device"
        return Verdict(_SHORTCUT, f"{said}, other_view_top1 {told:.1%}: {why} (simclr#114)")
    return Verdict(_NO_BETTER, said)
