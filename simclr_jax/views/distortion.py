"""A distortion: a crop and a chain of operations, and the random numbers that decide them.

Formulas take the module that computes, `xp`, and use only names that `tf` and `jax.numpy` share. So the
host and the device cannot disagree on what a view is; they differ in how they batch and branch. All
chance is drawn beforehand, as numbers in [0, 1); what follows is a pure function of them. An
operation's numbers are keyed by its name: adding or removing another operation does not change them.
"""

import abc
import dataclasses
import zlib
from typing import Any, ClassVar

import numpy as np

from simclr_jax.views.crop import Crop

Channels = tuple[Any, ...]


class Operation(abc.ABC):
    """One step of a distortion after the crop: a frozen dataclass whose fields are its options, "views.FIELD".

    Attributes:
      NAME: the key of its random numbers. Another name would mean other numbers, so it never changes.
      DRAWS: name -> how many random numbers in [0, 1) decide one view. The first number of the first name says whether
        anything happens. Draws are below 1: with 1 in its place, which `one_branch` puts there, nothing happens.
      FUSED: whether the host, for large images, compiles it together with its neighbours; False where the compiled
        code would depend on the random numbers.
    """

    NAME: ClassVar[str]
    DRAWS: ClassVar[dict[str, int]]
    FUSED: ClassVar[bool] = True

    @property
    def probability(self) -> float:
        """How often it happens to a view: the option X_probability, where X is the first name of DRAWS."""
        return getattr(self, f"{next(iter(self.DRAWS))}_probability")

    @property
    def is_on(self) -> bool:
        """Returns whether its options let it change any view."""
        return self.probability > 0

    def happens(self, u: dict[str, Any]) -> Any:
        """Returns whether it happens, for the numbers drawn, by the names of DRAWS, each [..., n]: bool [...]."""
        return u[next(iter(self.DRAWS))][..., 0] < self.probability

    @abc.abstractmethod
    def host(self, x: Any, u: dict[str, Any]) -> Any:
        """Applies it to one view by TensorFlow.

        Args:
          x: float32 [C, S, S] in [0, 1], C 1 or 3.
          u: the numbers drawn, by the names of DRAWS, each [n].

        Returns:
          float32 [C, S, S] in [0, 1].
        """

    def host_small(self, x: Any, u: dict[str, Any]) -> Any:
        """Applies it like `host`, within a compiled program for a small view."""
        return self.host(x, u)

    @abc.abstractmethod
    def device(self, channels: Channels, u: dict[str, Any]) -> Channels:
        """Applies it to a batch of views by JAX. Devices do not branch by image.

        Args:
          channels: 1 or 3 arrays float32 [..., S, S] in [0, 1].
          u: the numbers drawn, by the names of DRAWS, each [..., 1, 1, n].

        Returns:
          1 or 3 arrays float32 [..., S, S], as many as were given.
        """

    def describe(self, u: dict[str, np.ndarray], channels: int) -> str:
        """Says in a few words what was drawn for one view; "" where nothing happens to it.

        Args:
          u: the numbers drawn, by the names of DRAWS, each [n].
          channels: 1 or 3, of the image.
        """
        return self.drawn(u, channels) if self.happens(u) else ""

    def drawn(self, u: dict[str, np.ndarray], channels: int) -> str:
        """Says in a few words what was drawn for one view to which it happens; see `describe`."""
        del u, channels
        return self.NAME


class PixelOperation(Operation):
    """An operation that changes all channels by one formula, for which nothing else is drawn."""

    @abc.abstractmethod
    def formula(self, xp: Any, channels: Channels) -> Channels:
        """Applies it to channels [..., S, S], computed by the module `xp`."""

    def host(self, x: Any, u: dict[str, Any]) -> Any:
        import tensorflow as tf

        return happening(self.happens(u), lambda x: tf.stack(self.formula(tf, tf.unstack(x))), x)

    def device(self, channels: Channels, u: dict[str, Any]) -> Channels:
        import jax.numpy as jnp

        happens = self.happens(u)
        changed = self.formula(jnp, channels)
        return tuple(
            jnp.where(happens, new, old) for new, old in zip(changed, channels, strict=True)
        )


def happening(condition: Any, function: Any, x: Any) -> Any:
    """Returns function(x) where the TensorFlow condition holds, else x; computes only what is taken."""
    import tensorflow as tf

    return tf.cond(condition, lambda: function(x), lambda: x)


@dataclasses.dataclass(frozen=True)
class Distortion:
    """How strongly the views of an image differ. Hashable.

    Attributes:
      crop: the part of the image.
      operations: the steps that a view goes through after its crop, in order.
      views: how many views an image gets: two to learn from, one to train a classifier on.
      one_branch: both views are one crop, and only the second gets the operations (paper, section 3.1).
    """

    crop: Crop
    operations: tuple[Operation, ...]
    views: int = 2
    one_branch: bool = False

    @property
    def changes_nothing(self) -> bool:
        """Returns whether all views of an image are one picture: no operation, and one crop or none."""
        return not self.chain and (self.one_branch or self.crop.crop_area[0] >= 1)

    @property
    def chain(self) -> tuple[Operation, ...]:
        """The operations that are on."""
        return tuple(operation for operation in self.operations if operation.is_on)

    @property
    def sizes(self) -> dict[str, int]:
        """{step's name: how many random numbers of the step decide a view}, in the order of the steps."""
        steps: tuple[Operation | Crop, ...] = (self.crop, *self.chain)
        return {step.NAME: sum(step.DRAWS.values()) for step in steps}

    @property
    def draws(self) -> int:
        """How many numbers in [0, 1) decide a view."""
        return sum(self.sizes.values())

    def draws_of_views(self, xp: Any, draws: Any) -> Any:
        """Returns the draws [views, `draws`] of the views that are made, of those of two, [2, `draws`]. With
        `one_branch` the second view gets the crop of the first, and the first gets numbers for which no operation
        happens.
        """
        if not self.one_branch:
            return draws[: self.views]
        crop = draws[:1, : self.sizes[self.crop.NAME]]
        rest = draws[1:, self.sizes[self.crop.NAME] :]
        first = xp.concat([crop, xp.ones_like(rest)], axis=1)
        return xp.concat([first, xp.concat([crop, rest], axis=1)], axis=0)

    def describe(self, shape: tuple[int, int, int], draws: np.ndarray) -> list[str]:
        """Says what was drawn for one view: a line for its crop and for each operation that happens to it.

        Args:
          shape: (height, width, channels) of the image.
          draws: the numbers [`draws`] of the view.
        """
        height, width, channels = shape
        lines = [self.crop.describe(height, width, self.numbers_of(self.crop, draws))]
        lines += [step.describe(self.numbers_of(step, draws), channels) for step in self.chain]
        return [line for line in lines if line]

    def numbers_of(self, step: Operation | Crop, draws: Any) -> dict[str, Any]:
        """Picks the numbers of one step out of the draws [..., `draws`] of a view, by name, [..., n]."""
        start = 0
        for name, size in self.sizes.items():
            if name == step.NAME:
                break
            start += size
        ends = start + np.cumsum(list(step.DRAWS.values()))
        return {
            name: draws[..., end - n : end]
            for (name, n), end in zip(step.DRAWS.items(), ends.tolist(), strict=True)
        }


def key_of(name: str) -> int:
    """Returns the 32-bit number that keys the chance of an operation."""
    return zlib.crc32(name.encode())
