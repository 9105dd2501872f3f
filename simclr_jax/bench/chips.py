"""Peak rates of devices, by kind."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peak rates of one device of a kind; half a chip where JAX sees two cores of it.

    Attributes:
      flops: peak bfloat16 operations a second.
      bandwidth: bytes a second to and from its memory.
      interconnect: bytes a second that it can send to other chips, over all its links together.
      memory: bytes that a program can use.
      options: for the compiler's topology; "megacore" makes the two cores of a chip one device.
    """

    flops: float
    bandwidth: float
    interconnect: float
    memory: float
    options: dict = dataclasses.field(default_factory=dict)


# Rates: docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}, read 2026-11-24; interconnect is the
# pages' all-reduce bandwidth of a pod over its chips, for v5p half of the bidirectional figure.
# Memory: what the compiler names as available when a program does not fit (libtpu 0.0.42.1).
_MEGACORE = {"chip_config_name": "megacore"}
CHIPS = {
    "v3": Chip(123e12 / 2, 900e9 / 2, 340e12 / 1024 / 2, 15.48 * 2**30),
    "v4": Chip(275e12, 1200e9, 1.1e15 / 4096, 30.75 * 2**30, _MEGACORE),
    "v5e": Chip(197e12, 819e9, 51.2e12 / 256, 15.75 * 2**30),
    "v5p": Chip(459e12, 2765e9, 600e9, 95.74 * 2**30, _MEGACORE),
    "v6e": Chip(918e12, 1640e9, 102.4e12 / 256, 31.25 * 2**30),
}

# Peak bfloat16 operations a second by what a device calls itself. GPUs: NVIDIA's data sheets of the
# SXM cards, dense, without sparsity.
PEAKS = {
    "TPU v3": CHIPS["v3"].flops,
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,  # after v5 lite, as the first that fits counts
    "TPU v6 lite": CHIPS["v6e"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
