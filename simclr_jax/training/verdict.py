"""Whether a run is healthy, by its metrics. Each verdict says the number, the reference and its source."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from simclr_jax.losses.health import chance, lower_bound

HEALTH = "health.json"  # in a workdir: the verdict that the run ended with

_BELOW, _NEAR_CHANCE, _COLLAPSED = 1e-3, 0.01, 0.1  # nats; nats; share of 1 / sqrt(d): ours
_FEW_STEPS, _LITTLE = 100, 0.25  # of which share of the way is too little to call a run sound: ours
_TOLD = 10.0  # times chance, by which pairs are told apart: ours

SOUND, NOT_JUDGED, _TOO_EARLY = "sound", "not judged", "too early to say"


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
      name: "sound", "too early to say", "not judged", "below the lower bound", "collapsed", "not learning", or
        one of an evaluation's (`evals.verdict`).
      because: the numbers, the reference and where it comes from.
    """

    name: str
    because: str

    @property
    def is_bad(self) -> bool:
        return self.name not in (SOUND, NOT_JUDGED, _TOO_EARLY)


def judge(step: int, metrics: Mapping[str, float], references: References) -> Verdict:
    """Judges a run by the means of the steps up to `step`.

    Args:
      step: the last of them.
      metrics: "z_std", and "loss" where `references.temperature` is given; "other_view_top1", if it is known.
      references: the run's.
    """
    images, width, settled_after, temperature = references
    spread, even = metrics["z_std"], 1 / math.sqrt(width)
    seen = f"z_std {spread:.2g} ({even:.2g} where z is spread evenly)"
    if spread < _COLLAPSED * even:
        why = "under a tenth (ours) of 1 / sqrt(d) (SimSiam, section 4.1)"
        return Verdict("collapsed", f"all images have nearly one projection: {seen}: {why}")
    if temperature is None:
        return Verdict(
            NOT_JUDGED, f"{seen}; no bounds of this loss are known: judge by an evaluation"
        )
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
        told = metrics.get("other_view_top1", 0.0)
        if loss > no_better + near and told > _TOLD / images:
            why = f"yet {told:.1%} of the pairs are told apart (by chance {100 / images:.2g}%)"
            return Verdict(
                NOT_JUDGED, f"{where}: {why}: this bound says nothing, as at a very low temperature"
            )
        if step < _FEW_STEPS:
            return Verdict(_TOO_EARLY, f"{where}; {seen}; {step} steps are few")
        why = "" if loss > no_better + near else f", within {near:.2g} (ours) of chance"
        return Verdict("not learning", f"{where} after the warm-up{why}; {seen}")
    if step < _FEW_STEPS and way < _LITTLE:
        return Verdict(_TOO_EARLY, f"{where}; {seen}; {step} steps are few")
    return Verdict(SOUND, f"{where}; {seen}")
