"""Optimizers in a short training, which the paper does not compare: SGD, LARS, AdamW and Muon.

The validation part chooses among two learning rates of each. SGD: half and twice the 0.06 that lightly's
documentation has for small batches. LARS: the paper's two rules for the batch (appendix B.1). AdamW and Muon: two
rates a factor of 4 apart.
"""

from simclr_jax.studies import Factor, Level, Study, above, best

_DECAY = {"optimizer.weight_decay": 1e-4}


def level(name: str, rates: tuple[float, float], momentum: float) -> Level:
    """An optimizer and the learning rates that are tried, the same at every batch size."""
    fixed = {"optimizer.name": name, "optimizer.momentum": momentum, "optimizer.scaling": "none"}
    return Level(fixed | _DECAY, tuple({"optimizer.learning_rate": rate} for rate in rates))


def get_study() -> Study:
    """8 runs per seed."""
    rules = (("linear", 0.3), ("sqrt", 0.075))
    optimizers = {
        "SGD": level("sgd", (0.03, 0.12), 0.9),
        "LARS": Level(
            {"optimizer.name": "lars", "optimizer.momentum": 0.9} | _DECAY,
            tuple({"optimizer.scaling": s, "optimizer.learning_rate": r} for s, r in rules),
        ),
        "AdamW": level("adamw", (1e-3, 4e-3), 0.9),
        "Muon": level("muon", (4e-3, 16e-3), 0.95),
    }
    return Study(
        title="Optimizers (not in the paper)",
        factors=(Factor("optimizer", optimizers),),
        claims=(
            best("Muon is first, or within the spread of the first", ("Muon",)),
            above("Muon is better than AdamW", ("Muon",), ("AdamW",)),
            above("AdamW is better than LARS", ("AdamW",), ("LARS",)),
        ),
    )
