"""The collectives of a compiled program, read from the text of its optimised HLO."""

import collections
import math
import re

_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}

# Bytes a device sends at least, of the bytes of the result, among n devices.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
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
            # Operands, results, and scalars that the runtime keeps.
            arrays = [(dtype, dims) for dtype, dims in arrays if (dtype, dims) != ("u32", "")]
            arrays = arrays[len(arrays) // 2 :]
        size = sum(
            _ITEM_BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in arrays
        )
        found[kind][channel] = size, size * _SENT[kind](_group_size(groups, devices))
    return {
        kind: {
            "count": len(by_channel),
            "bytes": sum(size for size, _ in by_channel.values()),
            "sent": sum(sent for _, sent in by_channel.values()),
        }
        for kind, by_channel in sorted(found.items())
    }


def _group_size(groups: str | None, devices: int) -> int:
    """How many devices take part, from {{0,1},{2,3}} or [2,2]<=[4]; all in any other notation."""
    if groups and (listed := re.match(r"\{\{([\d,]+)\}", groups)):
        return len(listed[1].split(","))
    if groups and (shape := re.match(r"\[(\d+),(\d+)\]<=", groups)):
        return int(shape[2])
    return devices
