"""Figure 7: deeper and wider encoders, pretrained without labels and trained with them."""

from simclr_jax.studies import Factor, Level, Study, rises
from simclr_jax.studies.claims import Claim, compared, paired
from simclr_jax.studies.contract import Scores, Verdict

WIDTHS, DEPTHS = ("0.125", "0.25", "0.5"), ("10", "18")


def get_study() -> Study:
    """12 runs a seed. Figure 7 has depths 18 to 152 and widths 1 to 4, no common point with these."""
    widths = {w: Level({"model.width": float(w)}) for w in WIDTHS}
    encoders = {
        f"ResNet-{d}{suffix}": Level({"model.depth": int(d)} | options)
        for suffix, options in (("", {}), (", supervised", {"train.objective": "supervised"}))
        for d in DEPTHS
    }
    return Study(
        title="Depth and width of the encoder (figure 7)",
        factors=(Factor("width", widths, numbers=True), Factor("encoder", encoders)),
        claims=(
            *(
                rises(f"a wider {name} learns more", [(w, name) for w in WIDTHS])
                for name in encoders
            ),
            *(gains_more(f"ResNet-{d}") for d in DEPTHS),
        ),
    )


def gains_more(encoder: str) -> Claim:
    """Claims that SimCLR gains more from width than supervised training does."""
    text = f"{encoder} gains more from width without labels than with them"

    def verdict(scores: Scores) -> Verdict:
        gains = [
            paired(scores, (WIDTHS[-1], name), (WIDTHS[0], name))
            for name in (encoder, f"{encoder}, supervised")
        ]
        differences = [a - b for a, b in zip(*gains, strict=False)]
        if not differences:
            return Verdict(text, None, "the ends of both are needed")
        return Verdict(text, sum(differences) > 0, compared(differences))

    return verdict
