"""Section 3.2 and appendix A: without the flip, and without the blur."""

from simclr_jax.studies import Factor, Level, Published, Study, above


def get_study() -> Study:
    """3 runs per seed."""
    levels = {
        "all": Level({"views.flip": True, "views.blur_probability": 0.5}),
        "no flip": Level({"views.flip": False, "views.blur_probability": 0.5}),
        "no blur": Level({"views.flip": True, "views.blur_probability": 0.0}),
    }
    return Study(
        title="Flip and blur",
        factors=(Factor("views", levels),),
        claims=(
            above("the flip helps", ("all",), ("no flip",)),
            above("the blur helps", ("all",), ("no blur",)),
        ),
        published=Published(
            "paper, text: ImageNet, linear, top-1",
            {("all",): 64.5, ("no flip",): 63.4, ("no blur",): 63.2},
        ),
    )
