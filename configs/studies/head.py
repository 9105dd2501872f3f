"""Figure 8: no head, a linear one and a nonlinear one; and how much h and z hold.

--study=head          z of 32, 128 and 512 numbers
--study=head:paper    all seven widths of the paper, 32 to 2,048: 21 runs
"""

from simclr_jax.studies import Factor, Level, Published, Study, above, of_scale

_SMALL = ("32", "128", "512")
_PAPER = ("32", "64", "128", "256", "512", "1024", "2048")
_FIGURE_8 = {
    "linear": (60.0, 61.3, 61.1, 60.6, 60.6, 60.5, 60.6),
    "nonlinear": (63.6, 64.2, 64.3, 64.9, 64.8, 64.6, 64.8),
    "none": (50.2,) * 7,  # one network: z is h, whatever the width
}


def get_study(argument: str = "") -> Study:
    """`argument`: "" or "paper". 9 runs per seed, or 21 and one seed; without a head z is h, whatever the width."""
    names = of_scale(argument, small=_SMALL, paper=_PAPER)
    kinds = {
        "none": Level({"model.head": "none"}),
        "linear": Level({"model.head": "linear"}),
        "nonlinear": Level({"model.head": "nonlinear"}),
    }
    widths = {width: Level({"model.head_width": int(width)}) for width in names}
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
                for kind, values in _FIGURE_8.items()
                for width, value in zip(_PAPER, values, strict=True)
                if width in names
            },
        ),
        seeds=1 if argument else 3,
    )
