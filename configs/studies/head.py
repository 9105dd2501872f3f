"""Figure 8: no head, a linear one and a nonlinear one; and how much h and z hold.

--study=head          z of 32, 128 and 512 numbers
--study=head:128      z of 128 numbers alone, or of another of the paper's widths
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
    """`argument`: "", a width or "paper". 9 runs per seed, 3, or 21 and one seed; without a head z is h, whatever the
    width.
    """
    one = argument in _PAPER
    names = (argument,) if one else of_scale(argument, small=_SMALL, paper=_PAPER)
    at = argument if one else "128"
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
                (at, "nonlinear", "h"),
                (at, "none", "h"),
            ),
            above(
                "a nonlinear head is better than a linear one",
                (at, "nonlinear", "h"),
                (at, "linear", "h"),
            ),
            above("h holds more than z", (at, "nonlinear", "h"), (at, "nonlinear", "z")),
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
        seeds=1 if argument == "paper" else 3,
    )
