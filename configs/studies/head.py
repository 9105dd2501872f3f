"""Figure 8: no head, a linear one and a nonlinear one; and how much h and z hold."""

from simclr_jax.studies import Factor, Level, Published, Study, above

WIDTHS = ("32", "128", "512")


def get_study() -> Study:
    """9 runs a seed; without a head z is h, whatever the width, so that one row would do."""
    kinds = {
        "none": Level({"model.head": "none"}),
        "linear": Level({"model.head": "linear"}),
        "nonlinear": Level({"model.head": "nonlinear"}),
    }
    widths = {width: Level({"model.head_width": int(width)}) for width in WIDTHS}
    figure_8 = {
        "linear": (60.0, 61.1, 60.6),
        "nonlinear": (63.6, 64.3, 64.8),
    }
    return Study(
        title="Projection head (figure 8)",
        factors=(Factor("width of z", widths, numbers=True), Factor("head", kinds)),
        readings={"h": {"eval.features": "h"}, "z": {"eval.features": "z"}},
        claims=(
            above(
                "a nonlinear head is better than none",
                ("128", "nonlinear", "h"),
                ("128", "none", "h"),
            ),
            above(
                "a nonlinear head is better than a linear one",
                ("128", "nonlinear", "h"),
                ("128", "linear", "h"),
            ),
            above("h holds more than z", ("128", "nonlinear", "h"), ("128", "nonlinear", "z")),
        ),
        published=Published(
            "paper, figure 8: ImageNet, linear, top-1",
            {
                (width, kind, "h"): value
                for kind, values in figure_8.items()
                for width, value in zip(WIDTHS, values, strict=True)
            },
        ),
    )
