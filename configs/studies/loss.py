"""Table 4: NT-Xent beside the logistic and the triplet loss, with and without semi-hard negatives.

Negatives are those of the other view only, as in appendix B.10. For each loss the validation part
chooses between two temperatures, or two margins, of the grid of B.10, which goes on to tau 1.0 and margin 1.6. The learning rate is the configuration's.
"""

from simclr_jax.studies import Factor, Level, Published, Study, above, best

TEMPERATURES = tuple({"loss.temperature": t} for t in (0.2, 0.5))
MARGINS = tuple({"loss.margin": m} for m in (0.4, 0.8))


def level(name: str, settings) -> Level:
    """A loss with negatives of one view, and the settings that are tried."""
    return Level({"loss.name": name, "loss.negatives": "other_view"}, settings)


def get_study() -> Study:
    """10 runs per seed."""
    losses = {
        "margin": level("margin", MARGINS),
        "NT-Logistic": level("nt_logistic", TEMPERATURES),
        "margin, semi-hard": level("margin_semihard", MARGINS),
        "NT-Logistic, semi-hard": level("nt_logistic_semihard", TEMPERATURES),
        "NT-Xent": level("nt_xent", TEMPERATURES),
    }
    return Study(
        title="Losses (Table 4)",
        factors=(Factor("loss", losses),),
        claims=(
            best("NT-Xent is first, or within the spread of the first", ("NT-Xent",)),
            above("semi-hard mining helps the triplet loss", ("margin, semi-hard",), ("margin",)),
            above(
                "semi-hard mining helps the logistic loss",
                ("NT-Logistic, semi-hard",),
                ("NT-Logistic",),
            ),
        ),
        published=Published(
            "paper, Table 4: ImageNet, linear, top-1",
            {
                ("margin",): 50.9,
                ("NT-Logistic",): 51.6,
                ("margin, semi-hard",): 57.5,
                ("NT-Logistic, semi-hard",): 57.9,
                ("NT-Xent",): 63.9,
            },
        ),
    )
