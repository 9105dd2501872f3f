"""Checksums of what a checkpoint holds: the storage itself has none of the content of arrays."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp

ENCODER, TRAINER, RECORD = "encoder", "trainer", "config"  # items of a checkpoint


def checksums(encoder: dict, trainer: dict) -> dict[str, int]:
    """Returns the checksums of both items of arrays, and of each network beside the encoder, because `read_parts` reads
    networks one at a time.
    """
    trees = {ENCODER: encoder, TRAINER: trainer}
    trees |= {name: network_of(trainer, name) for name in trainer["params"]}
    return {name: checksum(tree) for name, tree in trees.items()}


def network_of(trainer: dict, name: str) -> dict:
    """Returns {"params", "batch_stats"} of one of the trainer's networks, such as "head"."""
    return {kind: trainer[kind].get(name, {}) for kind in ("params", "batch_stats")}


def checksum(tree: Any) -> int:
    """Sums the bits of all arrays, as unsigned numbers modulo 2**32. A change of any single bit changes the
    sum; the division of the arrays over devices does not.
    """
    return int(_checksum(tree))


@jax.jit
def _checksum(tree: Any) -> jax.Array:
    total = jnp.uint32(0)
    for number, x in enumerate(jax.tree.leaves(tree)):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        # An odd factor of its own for each array, so that two that change places are seen.
        total += jnp.uint32(2 * number + 1) * jnp.sum(bits, dtype=jnp.uint32)
    return total


def verify(item: str, tree: Any, record: dict) -> None:
    """Raises a ValueError if an item of a checkpoint, or a network in it, is not what was saved, by its record. Call it on
    all processes together: the arrays may be divided over their devices.
    """
    expected = record.get("checksums", {}).get(item)  # None: an older version saved it
    if expected is not None and checksum(tree) != expected:
        raise ValueError(f"the arrays of {item} differ from those that were saved: damaged on disk")


def checksum_of_record(record: dict) -> int:
    """Returns the CRC-32 of a record as JSON, without its checksums."""
    content = {name: x for name, x in record.items() if name != "checksums"}
    content = json.loads(json.dumps(content))  # as it is read again: keys become texts
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def verify_record(record: dict) -> None:
    """Raises a ValueError if the record of a checkpoint is not what was saved."""
    expected = record.get("checksums", {}).get(RECORD)  # None: an older version saved it
    if expected is not None and checksum_of_record(record) != expected:
        raise ValueError("the record differs from the one that was saved: damaged on disk")
