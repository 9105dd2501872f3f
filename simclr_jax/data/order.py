"""Which image comes when: a function of (seed, epoch, position) and nothing else."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Set

import numpy as np

# A stream of shards is shuffled window by window. The current windows of all lanes together hold this many raw
# examples, or as many as take so many bytes: whole shards in the epoch's order, their examples in any order. A window
# has at least one shard, and memory holds two windows of each lane: for ImageNet, whose shards are 1,251 JPEGs of
# 0.11 MB, 1.8 GB with the 4 lanes of a batch of 256, and 18 GB with the 64 lanes of a batch of 4096 if one process has
# all lanes. A run that starts anywhere reads at most one window of each lane in vain.
WINDOW, WINDOW_BYTES = 8 * 1024, 2**30

# Examples that each lane gives to a batch, at least.
LEAST_OF_A_LANE = 64

# Least number of shards for each lane. Lanes with unequal numbers of examples come to the end of an epoch at
# different steps. A batch there, where it has images of two epochs, may hold an image twice.
SHARDS_OF_A_LANE = 16


# A prime near 2**32 / golden ratio (Knuth's multiplicative hash): multiples of it modulo N are spread evenly.
_FAR_APART = 2654435761


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of every global batch that this process loads: the `index`-th of `count`."""

    index: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> slice:
        """Returns the rows of this process in a global batch of `batch_size` images."""
        part = batch_size // self.count
        return slice(self.index * part, (self.index + 1) * part)


@dataclasses.dataclass(frozen=True)
class Order:
    """The settings that decide which image comes when.

    Attributes:
      seed: the run's.
      batch_size: B, images of the global batch.
      share: this process's part.
    """

    seed: int
    batch_size: int
    share: Share = Share()


# Kept: an order of 14 M images takes 1.4 s and 0.1 GB, and each unreadable image asks for two of them again.
@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns the order of one epoch: a permutation [count] of image indices, new for each epoch. Read-only."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False
    return order


def next_whole(broken: np.ndarray) -> np.ndarray:
    """Returns int64 [n]: place i where broken[i] is False, else the next place, cyclically, that is not broken.
    If all are broken, returns each place itself.
    """
    places = np.arange(len(broken))
    if broken.any() and not broken.all():
        whole, bad = np.flatnonzero(~broken), np.flatnonzero(broken)
        places[bad] = whole[np.searchsorted(whole, bad) % len(whole)]
    return places


def standing_in(broken: Set[int], batch: np.ndarray, rows: slice, count: int) -> np.ndarray:
    """Returns some rows of a batch, with other places where an image is broken: places that are neither broken nor in the
    batch, as a copy of an image would be its own negative; if there is none, the next whole one. A row depends on no other
    broken image, as each process knows its own; so two may get the same, which is rare: broken images are often
    neighbours, and the search for each begins far from those of its neighbours.

    Args:
      broken: places that cannot be read.
      batch: places [B] of the global batch.
      rows: which of them are returned.
      count: images of the data set.
    """
    present, found = frozenset(batch.tolist()), batch[rows].copy()
    for row, place in enumerate(found.tolist()):
        if place in broken:
            free = _next(place * _FAR_APART % count, count, broken, present)
            free = _next(place, count, broken, frozenset()) if free is None else free
            found[row] = place if free is None else free
    return found


def _next(place: int, count: int, broken: Set[int], present: Set[int]) -> int | None:
    """Returns a place, or the next one, cyclically, that is in neither of two sets; None if there is none."""
    following = ((place + step) % count for step in range(count))
    return next((i for i in following if i not in broken and i not in present), None)


def batch_positions(
    order: Order, count: int, start_step: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (epochs, indices), int64 [B / P] each, of every batch from `start_step` on, without end.

    The epochs follow each other without a gap: step s holds the positions s * B to (s + 1) * B of
    the concatenated epochs, so that no image is left out.

    Args:
      order: seed, batch size and this process's part.
      count: images of the data set.
      start_step: the first step to yield; nothing before it is computed.
    """
    size = order.batch_size
    first = start_step * size // count
    following = enumerate(_changed_orders(order, count, first), first)
    orders: dict[int, np.ndarray] = {}
    for step in itertools.count(start_step):
        positions = np.arange(step * size, (step + 1) * size)[order.share.rows(size)]
        epochs = positions // count
        while epochs[-1] not in orders:
            orders |= [next(following)]
        orders = {e: shuffled for e, shuffled in orders.items() if e >= epochs[0]}
        indices = np.empty_like(positions)
        for epoch, shuffled in orders.items():
            here = epochs == epoch
            indices[here] = shuffled[positions[here] % count]
        yield epochs, indices


def _changed_orders(order: Order, count: int, first: int) -> Iterator[np.ndarray]:
    """Yields the order of each epoch from `first` on, changed so that a batch that two epochs share holds no image
    twice: a copy of an image would be its own negative. Of fewer images than a batch, copies cannot be avoided, and
    the orders stay as they are.

    Images that the shared batch already has from the epoch before change places with later ones. With two batches of
    images or more none of these is in the epoch's own last batch, so that an epoch depends on its number alone. With
    fewer, each epoch depends on those before it, and all are worked out from the first on; the images are few.
    """
    size = order.batch_size
    in_turn = size <= count < 2 * size
    previous = None
    for epoch in itertools.count(0 if in_turn else first):
        own = epoch_order(order.seed, epoch, count)
        before, after = epoch * count % size, (epoch + 1) * count % size
        if before and count >= size:
            if previous is None:  # its last batch is as drawn
                previous = epoch_order(order.seed, epoch - 1, count)
            taken = np.isin(own, previous[count - before :])
            head = size - before
            clash = np.flatnonzero(taken[:head])
            free = head + np.flatnonzero(~taken[head : count if in_turn else count - after])
            free = free[: len(clash)]
            own = own.copy()
            own[clash], own[free] = own[free], own[clash]
        previous = own
        if epoch >= first:
            yield own


@dataclasses.dataclass(frozen=True)
class Lane:
    """One of n endless sequences that the examples of a stream are dealt into. Every batch takes its next B / n
    examples from each lane: those of lane i are the rows from i * B / n on.

    Which example is in which lane depends on the batch size and the data alone, so the content of a batch does not
    depend on the number of processes. A process reads only the lanes that fill its own rows.

    Attributes:
      index: which lane.
      count: how many lanes there are, a divisor of B.
      start, stop: which of the B / count examples of each batch are this process's.
    """

    index: int
    count: int
    start: int
    stop: int


def lanes(order: Order, shards: int) -> list[Lane]:
    """Returns the lanes of this process's rows, in the order of the rows, for a stream of `shards` shards."""
    most = max(1, min(order.batch_size // LEAST_OF_A_LANE, shards // SHARDS_OF_A_LANE))
    count = max(n for n in range(1, most + 1) if order.batch_size % n == 0)
    size, rows = order.batch_size // count, order.share.rows(order.batch_size)
    found = []
    for index in range(rows.start // size, -(-rows.stop // size)):
        start, stop = rows.start - index * size, rows.stop - index * size
        found.append(Lane(index, count, max(0, start), min(size, stop)))
    return found


def windows(
    order: Order, lengths: np.ndarray, lane: Lane, start_step: int, example_bytes: float = 0.0
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (epoch, shards int [k], positions int [n]) of a lane's windows, without end.

    A window is the list of all examples of its k shards, which are read in turns. `positions` are places in that
    list: the examples that this process needs, in the order of its rows. Windows before the first step are left out.

    Args:
      order: seed and batch size.
      lengths: examples of each shard.
      lane: one of `lanes`.
      start_step: the first batch.
      example_bytes: mean size of an example.
    """
    most = min(WINDOW, WINDOW_BYTES / max(example_bytes, 1.0))
    lane_batch, total = order.batch_size // lane.count, int(lengths.sum())
    windows_a_lane = max(1, min(round(total / most), len(lengths) // lane.count))
    windows_an_epoch = windows_a_lane * lane.count
    # Counted in examples of the lane since step 0.
    skipped, read = start_step * lane_batch, 0
    epoch = 0
    while True:
        shards = epoch_order(order.seed, epoch, len(lengths))
        # Windows of equal length, to within a shard's: lanes come to the ends of epochs together.
        middles = np.cumsum(lengths[shards]) - lengths[shards] / 2
        window_of = (middles * windows_an_epoch / total).astype(int)
        # The lanes trade windows in each epoch: where windows differ, no lane falls behind for ever.
        for window in range((lane.index - epoch) % lane.count, windows_an_epoch, lane.count):
            members = shards[window_of == window]
            n = int(lengths[members].sum())
            if read + n > skipped:
                rng = np.random.default_rng([order.seed, epoch, window])
                places = np.arange(read, read + n)
                row = places % lane_batch
                own = (places >= skipped) & (lane.start <= row) & (row < lane.stop)
                yield epoch, members, rng.permutation(n)[own]
            read += n
        epoch += 1
