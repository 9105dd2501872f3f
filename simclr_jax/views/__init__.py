"""Views of images: what they differ by. To add a distortion, write its file and a row in `OPERATIONS`.

A view is a crop, resized, and then the operations, in the order of the table (paper, appendix A).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from simclr_jax.options import Option, flag, one_of, options_of
from simclr_jax.views.blur import Blur
from simclr_jax.views.color import ColorJitter, Flip, Grey
from simclr_jax.views.crop import Crop
from simclr_jax.views.cutout import Cutout
from simclr_jax.views.distortion import Distortion, Operation
from simclr_jax.views.noise import Noise
from simclr_jax.views.recrop import Recrop
from simclr_jax.views.rotation import Rotation
from simclr_jax.views.sobel import Sobel
from simclr_jax.views.solarize import Solarize

OPERATIONS: tuple[type[Operation], ...] = (
    Flip,
    ColorJitter,
    Grey,
    Blur,
    Solarize,
    Sobel,
    Noise,
    Rotation,
    Cutout,
    Recrop,
)

OPTIONS = (
    *options_of(Crop, "views"),
    *(option for kind in OPERATIONS for option in options_of(kind, "views")),
    Option(
        "views.one_branch",
        False,
        flag(),
        "give both views one crop, and only the second the operations after it, as in figure 5",
    ),
    Option(
        "views.first",
        "none",
        one_of("none", *(kind.NAME for kind in OPERATIONS)),
        'operation that is applied first; "none": the usual order, which begins with the flip',
    ),
)

_DEFAULTS = {option.name.removeprefix("views."): option.default for option in OPTIONS}


def make_distortion(
    options: Mapping[str, Any],
    operations: Sequence[type[Operation]] = OPERATIONS,
    views: int = 2,
) -> Distortion:
    """Makes a distortion of options.

    Args:
      options: {option of the group "views", without the group: value}; missing ones get defaults.
      operations: the kinds of operations that a view may go through after its crop, in order.
      views: views of each image.
    """
    values = _DEFAULTS | dict(options)

    def made(kind: Any) -> Any:
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: _as_tuple(values[name]) for name in names})

    ordered = sorted(operations, key=lambda kind: values["first"] != kind.NAME)
    one_branch = values["one_branch"] and views == 2
    return Distortion(made(Crop), tuple(made(kind) for kind in ordered), views, one_branch)


def crops_for_classifiers(options: Mapping[str, Any]) -> Distortion:
    """Makes what classifiers are trained on (paper, appendix B.5): one view, cropped and flipped."""
    return make_distortion(options, operations=(Flip,), views=1)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
