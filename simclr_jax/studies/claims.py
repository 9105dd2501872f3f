"""Claims of the paper as functions of scores, with a paired sign test and the size of the effect.

With three seeds the two-sided sign test cannot go below p = 0.25. So the mean decides whether a claim holds,
and p tells how easily chance alone would give such a result.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

from simclr_jax.studies.contract import Key, Scores, Verdict

# Equal numbers of right answers make means that differ by their rounding, some 1e-17.
_ROUNDING = 1e-9

Claim = Callable[[Scores], Verdict]


def above(text: str, one: Key, other: Key) -> Claim:
    """Claims that one key is above another: the mean difference over common seeds is positive."""

    def verdict(scores: Scores) -> Verdict:
        differences = paired(scores, one, other)
        if not differences:
            return Verdict(text, None, f"no seed has both {said(one)} and {said(other)}")
        return Verdict(text, statistics.mean(differences) > _ROUNDING, compared(differences))

    return verdict


def best(text: str, one: Key, among: Sequence[Key] | None = None) -> Claim:
    """Claims that one key has the best mean, or trails the best by no more than the larger of the two
    standard deviations over seeds.

    `among`: the keys that it is compared with; None: all.
    """

    def verdict(scores: Scores) -> Verdict:
        compared_with = [key for key in (among or scores) if key in scores]
        keys = [key for key in compared_with if scores[key]]
        if one not in keys or len(keys) < 2:
            return Verdict(text, None, f"{said(one)} and one more are needed")
        if lacking := len(compared_with) - len(keys):
            return Verdict(text, None, f"{lacking} of {len(compared_with)} are missing")
        first = max(keys, key=lambda key: mean(scores, key))
        behind = mean(scores, first) - mean(scores, one)
        spread = max(deviation(scores, first), deviation(scores, one))
        if first == one:
            second = max((k for k in keys if k != one), key=lambda key: mean(scores, key))
            because = f"first; {said(second)} follows: {compared(paired(scores, one, second))}"
        else:
            because = f"{said(first)} is {100 * behind:.1f} points above, spread {100 * spread:.1f}"
        return Verdict(text, behind <= spread + _ROUNDING, because)

    return verdict


def among_best(text: str, one: Key, count: int) -> Claim:
    """Claims that one key is among the `count` best."""

    def verdict(scores: Scores) -> Verdict:
        keys = [key for key in scores if scores[key]]
        if one not in keys or len(keys) <= count:
            return Verdict(text, None, f"{said(one)} and {count} more are needed")
        if lacking := len(scores) - len(keys):
            return Verdict(text, None, f"{lacking} of {len(scores)} are missing")
        own = mean(scores, one)
        place = 1 + sum(mean(scores, key) > own + _ROUNDING for key in keys)
        return Verdict(text, place <= count, f"place {place} of {len(keys)}")

    return verdict


def rises(text: str, keys: Sequence[Key]) -> Claim:
    """Claims that the last of some keys is above the first; tells how many steps between go up."""

    def verdict(scores: Scores) -> Verdict:
        there = [key for key in keys if scores.get(key)]
        if len(there) < len(keys):
            return Verdict(
                text, None, f"{len(keys) - len(there)} of {len(keys)} points are missing"
            )
        means = [mean(scores, key) for key in there]
        up = sum(b > a + _ROUNDING for a, b in itertools.pairwise(means))
        differences = paired(scores, there[-1], there[0])
        if not differences:
            return Verdict(text, None, "the ends have no seed in common")
        because = f"{up} of {len(means) - 1} steps go up; ends: {compared(differences)}"
        return Verdict(text, statistics.mean(differences) > _ROUNDING, because)

    return verdict


def mean(scores: Scores, key: Key) -> float:
    """Returns the mean over seeds."""
    return statistics.mean(scores[key].values())


def deviation(scores: Scores, key: Key) -> float:
    """Returns the sample standard deviation over seeds; 0 for one seed."""
    values = list(scores[key].values())
    return statistics.stdev(values) if len(values) > 1 else 0.0


def paired(scores: Scores, one: Key, other: Key) -> list[float]:
    """Returns the differences of the seeds that both keys have."""
    a, b = scores.get(one, {}), scores.get(other, {})
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def compared(differences: Sequence[float]) -> str:
    """Says the mean difference in points, its size in standard deviations of the differences, and the sign test."""
    if not differences:
        return "no seed in common"
    middle = statistics.mean(differences)
    text = f"{100 * middle:+.1f} points"
    if len(differences) > 1 and (spread := statistics.stdev(differences)) > 0:
        text += f" ({middle / spread:+.1f} standard deviations of the difference over seeds)"
    up = sum(d > 0 for d in differences)
    return (
        f"{text}, {up} of {len(differences)} seeds up, sign test p = {sign_test(differences):.2g}"
    )


def sign_test(differences: Sequence[float]) -> float:
    """Returns the two-sided p: how likely as many differences, or more, share a sign if both signs are as likely.

    Differences of zero do not count.
    """
    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    n, most = up + down, max(up, down)
    tail = sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n
    return min(1.0, 2 * tail)


def said(key: Key) -> str:
    """Names a key."""
    return ", ".join(key)
