"""Whether training was worth it, by its final evaluation."""

from collections.abc import Mapping

from simclr_jax.evals.results import accuracies
from simclr_jax.evals.subjects import ENCODER, RAW_PIXELS, UNTRAINED
from simclr_jax.training.verdict import SOUND, Verdict

_SHORTCUT, _NO_BETTER = "a shortcut", "no better than untrained"
_BELOW_PIXELS = "below raw pixels"
BAD_OF_EVALUATIONS = (_SHORTCUT, _NO_BETTER, _BELOW_PIXELS)


def judge_accuracy(rows: list[dict], metrics: Mapping[str, float]) -> Verdict | None:
    """Judges a run by the accuracy of the trained and of the untrained encoder, and of raw pixels if it is known.

    Args:
      rows: the evaluation's, see `evals.results.row`.
      metrics: the last of the run.

    Returns:
      None where the evaluation has no untrained encoder.
    """
    found = accuracies(rows)
    if ENCODER not in found or UNTRAINED not in found:
        return None
    trained, of_pixels = found[ENCODER], found.get(RAW_PIXELS, 0.0)
    said = f"accuracy {trained:.1%}, untrained {found[UNTRAINED]:.1%}"
    if trained > found[UNTRAINED]:
        if trained >= of_pixels:
            return Verdict(SOUND, said)
        said += f", raw pixels {of_pixels:.1%}"
        bad = Verdict(
            _BELOW_PIXELS, f"{said}: the pixels alone tell more: train longer, or on more images"
        )
    else:
        bad = Verdict(_NO_BETTER, said)
    told = metrics.get("other_view_top1", 0.0)
    if told > 0.99:  # ours
        why = (
            "it tells views apart and images not: the two views of an image are too alike, or there is a shortcut, such as "
            "BatchNorm of few images a device (simclr#114)"
        )
        return Verdict(_SHORTCUT, f"{said}, other_view_top1 {told:.1%}: {why}")
    return bad
