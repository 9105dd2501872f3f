"""Figure 5: compositions of two distortions, on one branch; the other branch is the crop that both share.

The paper publishes no parameters of cutout, noise, Sobel and rotation, and does not say whether the branches
share the first crop; only if they do is "crop" a distortion of its own. So only trends can be compared.
"""

from simclr_jax.studies import Factor, Level, Published, Study, above, among_best

_OFF = {
    "views.one_branch": True,
    "views.flip": False,
    "views.color_strength": 0.0,
    "views.grey_probability": 0.0,
    "views.blur_probability": 0.0,
}
_OPERATIONS = {
    "crop": ("recrop", {"views.recrop_probability": 1.0, "views.flip": True}),
    "cutout": ("cutout", {"views.cutout_probability": 1.0}),
    "colour": ("color_jitter", {"views.color_strength": 1.0, "views.grey_probability": 0.2}),
    "Sobel": ("sobel", {"views.sobel_probability": 1.0}),
    "noise": ("noise", {"views.noise_probability": 1.0}),
    "blur": ("blur", {"views.blur_probability": 0.5}),
    "rotate": ("rotation", {"views.rotation_probability": 1.0}),
}
_FIGURE_5 = (
    (33.1, 33.9, 56.3, 46.0, 39.9, 35.0, 30.2),
    (32.2, 25.6, 33.9, 40.0, 26.5, 25.2, 22.4),
    (55.8, 35.5, 18.8, 21.0, 11.4, 16.5, 20.8),
    (46.2, 40.6, 20.9, 4.0, 9.3, 6.2, 4.2),
    (38.8, 25.8, 7.5, 7.6, 9.8, 9.8, 9.6),
    (35.1, 25.2, 16.6, 5.8, 9.7, 2.6, 6.7),
    (30.0, 22.5, 20.7, 4.3, 9.7, 6.5, 2.6),
)


def get_study() -> Study:
    """49 runs, and 20 to 26 more for second and third seeds of the five best and worst and of those that the claims name;
    on the diagonal one distortion alone.
    """
    first = {
        name: Level(_OFF | options | {"views.first": kind})
        for name, (kind, options) in _OPERATIONS.items()
    }
    second = {name: Level(options) for name, (_, options) in _OPERATIONS.items()}
    published: dict[tuple[str, ...], float] = {
        (one, other): value
        for one, row in zip(_OPERATIONS, _FIGURE_5, strict=True)
        for other, value in zip(_OPERATIONS, row, strict=True)
    }
    return Study(
        title="Composition of distortions (figure 5)",
        factors=(Factor("first distortion", first), Factor("second distortion", second)),
        claims=(
            among_best("crop and colour are among the three best", ("crop", "colour"), 3),
            above("crop and colour are above crop alone", ("crop", "colour"), ("crop", "crop")),
            above(
                "crop and colour are above colour alone", ("crop", "colour"), ("colour", "colour")
            ),
        ),
        published=Published("paper, figure 5: ImageNet, linear, top-1", published),
        extremes=5,
        always=(("crop", "colour"), ("crop", "crop"), ("colour", "colour")),
        matrix=True,
    )
