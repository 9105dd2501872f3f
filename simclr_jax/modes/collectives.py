"""The collectives of a compiled program, read from the text of its optimised HLO."""

import collections
import math
import re

_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}

# The least that each of n devices sends, as a multiple of the bytes of the result.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


# The same as a multiple of the bytes of the operand.
_SENT_OF_OPERAND = {
    "all-reduce": _SENT["all-reduce"],
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
}


def collectives(program: str, devices: int) -> dict[str, dict]:
    """Counts the collectives of a compiled program. A loop's body counts once.

    Args:
      program: text of the optimised HLO. One collective may stand in it several times, where the
        compiler has written out its overlap with other work: those share a channel.
      devices: how many the program runs on.

    Returns:
      kind -> {"count", "bytes" of its results on a device, "sent": bytes a device sends at least}.
    """
    pattern = re.compile(
        rf"= (.*?) ({'|'.join(_SENT)})(-start)?\(.*?channel_id=(\d+)(?:.*?replica_groups=(\S+))?"
    )
    found: dict[str, dict[str, tuple[int, float]]] = collections.defaultdict(dict)
    for line in program.splitlines():
        match = pattern.search(line)
        if match is None:
            continue
        shapes, kind, start, channel, groups = match.groups()
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        if start and kind != "all-reduce":
            # An asynchronous start lists operands, results, and scalars that the runtime keeps: take the results.
            arrays = [(dtype, dims) for dtype, dims in arrays if (dtype, dims) != ("u32", "")]
            arrays = arrays[len(arrays) // 2 :]
        size = _bytes_of(arrays)
        found[kind][channel] = size, size * _SENT[kind](_group_size(groups, devices))
    return _summed(found)


def between_slices(program: str, slices: int) -> dict[str, dict]:
    """Counts what a compiled program sends from slice to slice, over the data-centre network.

    The compiler reduces within each slice first, so that a device holds a part of the result, and exchanges that
    part with its peers in the other slices by a send and a receive.

    Args:
      program: text of the optimised HLO.
      slices: how many the program runs on.

    Returns:
      kind -> {"count", "bytes" that a device hands over, "sent": bytes a device sends at least}.
    """
    pattern = re.compile(
        r"= \((.*?), u32\[\].*? send\(.*?channel_id=(\d+).*?_xla_host_transfer_rendezvous=\"(.*?)\""
        r".*?_xla_megascale_transfer_type=\"(\w+)\""
    )
    found: dict[str, dict[str, tuple[int, float]]] = collections.defaultdict(dict)
    for match in pattern.finditer(program):
        shapes, channel, rendezvous, kind = match.groups()
        kind = kind.lower().replace("_", "-")
        size = _bytes_of(re.findall(r"(\w+)\[([\d,]*)\]", shapes))
        sent = size * _SENT_OF_OPERAND.get(kind, lambda _: 1.0)(slices)
        found[kind][f"{channel} {rendezvous}"] = size, sent
    return _summed(found)


def _bytes_of(arrays: list[tuple[str, str]]) -> int:
    """Adds up the bytes of arrays given as (dtype, "2,3")."""
    return sum(
        _ITEM_BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in arrays
    )


def _summed(found: dict[str, dict[str, tuple[int, float]]]) -> dict[str, dict]:
    return {
        kind: {
            "count": len(by_channel),
            "bytes": sum(size for size, _ in by_channel.values()),
            "sent": sum(sent for _, sent in by_channel.values()),
        }
        for kind, by_channel in sorted(found.items())
    }


def _group_size(groups: str | None, devices: int) -> int:
    """Reads how many devices take part from {{0,1},{2,3}} or [2,2]<=[4]; returns `devices` for any other notation."""
    if groups and (listed := re.match(r"\{\{([\d,]+)\}", groups)):
        return len(listed[1].split(","))
    if groups and (shape := re.match(r"\[(\d+),(\d+)\]<=", groups)):
        return int(shape[2])
    return devices
