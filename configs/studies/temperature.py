"""Table 5: the temperature, with z normalised and not.

The paper's entropy, in nats, and contrastive accuracy are other_view_entropy and other_view_top1.
"""

from simclr_jax.studies import Factor, Level, Published, Study, above, best

NORMALISED = {"0.05": 59.7, "0.1": 64.4, "0.5": 60.7, "1": 58.0}
NOT = {"10": 57.2, "100": 57.0}


def get_study() -> Study:
    """6 runs per seed."""
    levels = {
        f"tau {tau}": Level({"loss.temperature": float(tau), "loss.normalize": True})
        for tau in NORMALISED
    } | {
        f"tau {tau}, not normalised": Level(
            {"loss.temperature": float(tau), "loss.normalize": False}
        )
        for tau in NOT
    }
    published: dict[tuple[str, ...], float] = {}
    published |= {(f"tau {tau}",): value for tau, value in NORMALISED.items()}
    published |= {(f"tau {tau}, not normalised",): value for tau, value in NOT.items()}
    return Study(
        title="Temperature (Table 5)",
        factors=(Factor("temperature", levels),),
        claims=(
            best("tau 0.1 is first, or within the spread of the first", ("tau 0.1",)),
            above("normalising helps", ("tau 0.1",), ("tau 10, not normalised",)),
        ),
        metrics=("other_view_entropy", "other_view_top1"),
        published=Published("paper, Table 5: ImageNet, linear, top-1", published),
    )
