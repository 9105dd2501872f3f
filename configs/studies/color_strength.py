"""Table 1: strength of the colour distortion, without the AutoAugment column and the supervised row."""

from simclr_jax.studies import Factor, Level, Published, Study, rises


def get_study() -> Study:
    """5 runs a seed."""
    names = ("0.125", "0.25", "0.5", "1")
    strengths = {
        name: Level({"views.color_strength": float(name), "views.blur_probability": 0.0})
        for name in names
    }
    strengths["1, blur"] = Level({"views.color_strength": 1.0, "views.blur_probability": 0.5})
    return Study(
        title="Strength of colour distortion (Table 1)",
        factors=(Factor("colour strength", strengths),),
        claims=(rises("stronger colour distortion helps", [(name,) for name in names]),),
        published=Published(
            "paper, Table 1: ImageNet, linear, top-1",
            {
                ("0.125",): 59.6,
                ("0.25",): 61.0,
                ("0.5",): 62.6,
                ("1",): 63.2,
                ("1, blur",): 64.5,
            },
        ),
    )
