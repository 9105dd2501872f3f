"""Table 3: what h and z know of a transformation, where pretraining also applied it, now and then, to each view.

In the paper h and z have 2,048 numbers each. Here z has as many as model.head_width says, 128 by default, so a part of
what z knows less may be its width: give `--config.model.head_width=` the width of h to leave that out.
"""

from collections.abc import Mapping

from simclr_jax.studies import Factor, Level, Published, Study, above

LEVEL = "in pretraining too"
_PUBLISHED = {
    "colour or grey": (99.3, 97.4),
    "rotation": (67.6, 25.6),
    "original or noisy": (99.5, 59.6),
    "original or Sobel": (96.6, 56.3),
}


def get_study() -> Study:
    """1 run per seed."""
    transformations = {
        "views.rotation_probability": 0.75,  # so that each of the four angles is equally frequent
        "views.noise_probability": 0.5,
        "views.sobel_probability": 0.5,
    }
    readings: dict[str, Mapping] = {
        f"{task}, {kind}": {} for task in _PUBLISHED for kind in ("h", "z")
    }
    published: dict[tuple[str, ...], float] = {
        (LEVEL, f"{task}, {kind}"): value
        for task, values in _PUBLISHED.items()
        for kind, value in zip(("h", "z"), values, strict=True)
    }
    return Study(
        title="What h and z know (Table 3; chance 80, 25, 50, 50 %)",
        factors=(Factor("transformations", {LEVEL: Level(transformations)}),),
        evaluation="transformations",
        readings=readings,
        claims=tuple(
            above(f"h knows more than z of {task}", (LEVEL, f"{task}, h"), (LEVEL, f"{task}, z"))
            for task in _PUBLISHED
        ),
        published=Published("paper, Table 3: ImageNet, a network on h and on z", published),
    )
