"""Figure 7: deeper and wider encoders."""

from simclr_jax.studies import Factor, Level, Study, above, rises

WIDTHS, DEPTHS = ("0.125", "0.25", "0.5"), ("10", "18")


def get_study() -> Study:
    """6 runs a seed. Figure 7 has depths 18 to 152 and widths 1 to 4, no common point with these."""
    widths = {w: Level({"model.width": float(w)}) for w in WIDTHS}
    depths = {f"ResNet-{d}": Level({"model.depth": int(d)}) for d in DEPTHS}
    return Study(
        title="Depth and width of the encoder (figure 7)",
        factors=(Factor("width", widths, numbers=True), Factor("encoder", depths)),
        claims=(
            *(rises(f"a wider {d} learns more", [(w, d) for w in WIDTHS]) for d in depths),
            above("a deeper encoder learns more", ("0.5", "ResNet-18"), ("0.5", "ResNet-10")),
        ),
    )
