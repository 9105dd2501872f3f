"""Whether training was worth it, by its final evaluation."""

from collections.abc import Mapping

from simclr_jax.evals.results import accuracies
from simclr_jax.evals.subjects import ENCODER, RAW_PIXELS, UNTRAINED
from simclr_jax.training.verdict import NOT_JUDGED, SOUND, Verdict

_SHORTCUT, _NO_BETTER = "a shortcut", "no better than untrained"
_BELOW_PIXELS = "below raw pixels"
_TOLD = 0.99  # share of pairs that are told apart: ours
_MANY = 100  # test images, of which a standard error is 5 points or less: ours
BAD_OF_EVALUATIONS = (_SHORTCUT, _NO_BETTER, _BELOW_PIXELS)


def judge_accuracy(
    rows: list[dict], metrics: Mapping[str, float], test_images: int | None = None
) -> Verdict | None:
    """Judges a run by the accuracy of the trained and of the untrained encoder, and of raw pixels if it is known.

    Args:
      rows: the evaluation's, see `evals.results.row`.
      metrics: the last of the run.
      test_images: how many images the accuracies are of; None: many. Of few, no run is called bad by a
        difference within a standard error.

    Returns:
      None where the evaluation has no untrained encoder.
    """
    found = accuracies(rows)
    if ENCODER not in found or UNTRAINED not in found:
        return None
    trained, of_pixels = found[ENCODER], found.get(RAW_PIXELS, 0.0)
    said = f"accuracy {trained:.1%}, untrained {found[UNTRAINED]:.1%}"
    if trained == found[UNTRAINED] == 1.0:
        return Verdict(
            NOT_JUDGED,
            f"{said}: both get every test image right, so the test cannot tell them apart",
        )
    if trained > found[UNTRAINED]:
        if trained >= of_pixels:
            return Verdict(SOUND, said)
        said += f", raw pixels {of_pixels:.1%}"
        bad = Verdict(
            _BELOW_PIXELS, f"{said}: the pixels alone tell more: train longer, or on more images"
        )
    else:
        bad = Verdict(_NO_BETTER, said)
    better, images = max(found[UNTRAINED], of_pixels), test_images or _MANY
    share = (better * images + 1) / (
        images + 2
    )  # Laplace's: of 20 images that all are right no error would be left
    error = (2 * share * (1 - share) / images) ** 0.5  # of the difference
    if images < _MANY and better - trained <= error:
        why = f"{test_images} test images are too few to tell (standard error {error:.1%})"
        return Verdict(NOT_JUDGED, f"{said}: {why}")
    told = metrics.get("other_view_top1", 0.0)
    if told > _TOLD:
        why = (
            "it tells views apart and images not: the two views of an image are too alike, or there is a shortcut, such as "
            "BatchNorm of few images a device (simclr#114)"
        )
        return Verdict(_SHORTCUT, f"{said}, other_view_top1 {told:.1%}: {why}")
    return bad
