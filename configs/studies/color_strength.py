"""Table 1: strength of the colour distortion, for SimCLR and for training with labels on the same views.

Without the AutoAugment column. Both are judged by the probe of h; the paper's supervised numbers are those of the
classifier itself, after 90 epochs.
"""

from simclr_jax.studies import Factor, Level, Published, Study, above, rises

_PUBLISHED = {
    "SimCLR": (59.6, 61.0, 62.6, 63.2, 64.5),
    "supervised": (77.0, 76.7, 76.5, 75.7, 75.4),
}


def get_study() -> Study:
    """10 runs per seed."""
    names = ("0.125", "0.25", "0.5", "1")
    strengths = {
        name: Level({"views.color_strength": float(name), "views.blur_probability": 0.0})
        for name in names
    }
    strengths["1, blur"] = Level({"views.color_strength": 1.0, "views.blur_probability": 0.5})
    training = {
        "SimCLR": Level({}),
        "supervised": Level({"train.objective": "supervised"}),
    }
    return Study(
        title="Strength of colour distortion (Table 1)",
        factors=(Factor("colour strength", strengths), Factor("training", training)),
        claims=(
            rises("stronger colour distortion helps SimCLR", [(n, "SimCLR") for n in names]),
            above(
                "stronger colour distortion hurts supervised training",
                (names[0], "supervised"),
                (names[-1], "supervised"),
            ),
        ),
        published=Published(
            "paper, Table 1: ImageNet, top-1",
            {
                (strength, kind): value
                for kind, values in _PUBLISHED.items()
                for strength, value in zip(strengths, values, strict=True)
            },
        ),
    )
