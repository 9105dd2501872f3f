"""Flip, colour jitter and grey (paper, appendix A), on the host and on the device."""

import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np

from simclr_jax.options import flag, number, one_of, option_field
from simclr_jax.views.distortion import Channels, Operation, PixelOperation, happening

GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)  # ITU-R BT.601 luma, as tf.image.rgb_to_grayscale


@dataclasses.dataclass(frozen=True)
class Flip(PixelOperation):
    """Mirrors left-right with probability 0.5."""

    flip: bool = option_field(True, flag(), "mirror a view left-right with probability 0.5")

    NAME: ClassVar = "flip"
    DRAWS: ClassVar = {"flip": 1}

    @property
    def probability(self) -> float:
        return 0.5 if self.flip else 0.0

    def formula(self, xp: Any, channels: Channels) -> Channels:
        return tuple(c[..., ::-1] for c in channels)


@dataclasses.dataclass(frozen=True)
class Grey(PixelOperation):
    """Replaces three channels by their luma."""

    grey_probability: float = option_field(
        0.2, number(0, 1), "probability that a view loses all colour"
    )

    NAME: ClassVar = "grey"
    DRAWS: ClassVar = {"grey": 1}

    def formula(self, xp: Any, channels: Channels) -> Channels:
        return (luma(channels),) * 3 if len(channels) == 3 else channels

    def drawn(self, u: dict[str, Any], channels: int) -> str:
        return self.NAME if channels == 3 else ""


@dataclasses.dataclass(frozen=True)
class ColorJitter(Operation):
    """Changes brightness, contrast, saturation and hue, in a random order, clipped after each.

    On one channel, saturation and hue are the identity, and are left out.
    """

    color_strength: float = option_field(
        1.0,
        number(0, 2),
        "s, the strength of the colour jitter: brightness, contrast and saturation vary by 0.8 s, hue "
        "by 0.2 s of a turn; 0.5 for CIFAR",
    )
    jitter_probability: float = option_field(
        0.8,
        number(0, 1),
        "probability that a view's brightness, contrast, saturation and hue change at all",
    )
    brightness: str = option_field(
        "additive",
        one_of("additive", "multiplicative"),
        'how brightness changes; "additive": the paper\'s code; "multiplicative": the later published '
        "code",
    )

    NAME: ClassVar = "color_jitter"
    DRAWS: ClassVar = {"jitter": 1, "factors": 4, "order": 4}

    @property
    def is_on(self) -> bool:
        return self.color_strength > 0 and super().is_on

    @property
    def _spread(self) -> float:
        return 0.8 * self.color_strength

    def host(self, x: Any, u: dict[str, Any]) -> Any:
        return happening(
            self.happens(u),
            lambda x: self.jittered(x, u["factors"], u["order"]),
            x,
        )

    def jittered(self, x: Any, factors: Any, order: Any) -> Any:
        """Applies the operations to x [C, H, W] by TensorFlow, in the order that `order` [4] sorts.

        `factors` [4] in [0, 1) says how much of brightness, contrast, saturation and hue.
        """
        import tensorflow as tf

        spread = self._spread

        def change_brightness(x):
            if self.brightness == "additive":
                return x + turn(factors[0], spread)
            return x * factor(factors[0], spread)

        def change_contrast(x):
            mean = tf.reduce_mean(x, axis=(1, 2), keepdims=True)
            return (x - mean) * factor(factors[1], spread) + mean

        def change_saturation(x):
            return tf.stack(saturate(tf, tf.unstack(x), factor(factors[2], spread)))

        def change_hue(x):
            by = turn(factors[3], 0.2 * self.color_strength)
            return tf.stack(turn_hue(tf, tf.unstack(x), by))

        operations = [change_brightness, change_contrast]
        if x.shape[0] == 3:
            operations += [change_saturation, change_hue]
        turns = tf.argsort(order[: len(operations)])

        def take_turn(place, x):
            branches = [functools.partial(operation, x) for operation in operations]
            return place + 1, tf.clip_by_value(tf.switch_case(turns[place], branches), 0.0, 1.0)

        # A loop, so that each operation is compiled once and not once for each place in the order.
        return tf.while_loop(lambda place, x: place < len(operations), take_turn, (0, x))[1]

    def device(self, channels: Channels, u: dict[str, Any]) -> Channels:
        """Applies the jitter where it was drawn.

        A device does not branch by image, so each place in the order computes one formula that contains all
        operations. Numbers that do nothing (no turn of the hue, a factor of one, nothing added) switch off those
        that were not drawn for this place. That takes one pass a place; computing all four operations and
        choosing one would take four.
        """
        import jax.numpy as jnp

        happens = self.happens(u)
        brightness, contrast, saturation, hue = range(4)
        operations = 4 if len(channels) == 3 else 2
        factors = u["factors"]
        turns = jnp.argsort(u["order"][..., :operations], axis=-1)
        for place in range(operations):
            now = turns[..., place]

            def when(operation, value, otherwise, now=now):
                return jnp.where(happens & (now == operation), value, otherwise)

            if operations == 4:
                by = when(hue, turn(factors[..., hue], 0.2 * self.color_strength), 0.0)
                channels = turn_hue(jnp, channels, by)
                by = when(saturation, factor(factors[..., saturation], self._spread), 1.0)
                channels = saturate(jnp, channels, by)
            times = when(contrast, factor(factors[..., contrast], self._spread), 1.0)
            plus = jnp.zeros_like(times)
            if self.brightness == "additive":
                plus = when(brightness, turn(factors[..., brightness], self._spread), 0.0)
            else:
                times = when(brightness, factor(factors[..., brightness], self._spread), times)
            about_mean = now == contrast  # contrast scales about the mean, brightness about zero
            changed = []
            for c in channels:
                mean = jnp.mean(c, axis=(-2, -1), keepdims=True)
                pivot = jnp.where(about_mean, mean, 0.0)
                changed.append(jnp.clip((c - pivot) * times + pivot + plus, 0.0, 1.0))
            channels = tuple(changed)
        return channels

    def drawn(self, u: dict[str, Any], channels: int) -> str:
        by = [float(x) for x in u["factors"]]
        brightness = f"brightness {turn(by[0], self._spread):+.2f}"
        if self.brightness == "multiplicative":
            brightness = f"brightness x {factor(by[0], self._spread):.2f}"
        said = [
            brightness,
            f"contrast x {factor(by[1], self._spread):.2f}",
            f"saturation x {factor(by[2], self._spread):.2f}",
            f"hue {360 * turn(by[3], 0.2 * self.color_strength):+.0f}°",
        ]
        order = u["order"][: 4 if channels == 3 else 2]
        return ", ".join(said[int(i)] for i in np.argsort(order))


def factor(drawn: Any, spread: float) -> Any:
    """Turns a number in [0, 1) into a factor uniform in [max(0, 1 - spread), 1 + spread)."""
    low = max(0.0, 1.0 - spread)
    return low + (1.0 + spread - low) * drawn


def turn(drawn: Any, spread: float) -> Any:
    """Turns a number in [0, 1) into one uniform in [-spread, spread)."""
    return spread * (2.0 * drawn - 1.0)


def saturate(xp: Any, rgb: Channels, factor: Any) -> Channels:
    """Multiplies the HSV saturation of three channels by `factor`; it stays at most 1.

    With hue and value v kept, each channel c is v - (v - c) s' / s, so no hue is needed:
    s' / s = min(factor, 1 / s), and s = (v - darkest) / v.
    """
    value, darkest = _value_and_darkest(xp, rgb)
    share = xp.minimum(factor, value / xp.maximum(value - darkest, 1e-9))
    return tuple(value - (value - c) * share for c in rgb)


def turn_hue(xp: Any, rgb: Channels, turn: Any) -> Channels:
    """Turns the HSV hue of three channels by `turn`, in whole turns."""
    r, g, b = rgb
    value, darkest = _value_and_darkest(xp, rgb)
    chroma = value - darkest
    per = 1.0 / xp.maximum(chroma, 1e-9)
    # Channels are compared with each other, not with their maximum: a compiler may compute a channel
    # twice and round it in two ways, and then no channel would equal the maximum.
    hue = xp.where(
        (r >= g) & (r >= b),
        (g - b) * per,
        xp.where(g >= b, 2.0 + (b - r) * per, 4.0 + (r - g) * per),
    )
    hue = hue + 6.0 * turn + 6.0  # sixths of a turn, above 0
    # Each channel is the value, less the chroma where the hue is far: a trapezium.
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = hue + offset
        k = k - 6.0 * xp.floor(k / 6.0)
        channels.append(value - chroma * xp.maximum(0.0, xp.minimum(1.0, xp.minimum(k, 4.0 - k))))
    return tuple(channels)


def _value_and_darkest(xp: Any, rgb: Channels) -> tuple:
    r, g, b = rgb
    return xp.maximum(xp.maximum(r, g), b), xp.minimum(xp.minimum(r, g), b)


def luma(rgb: Channels) -> Any:
    """Computes the grey value of three channels."""
    return sum(w * c for w, c in zip(GREY_WEIGHTS, rgb, strict=True))
