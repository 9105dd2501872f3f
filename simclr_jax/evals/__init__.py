"""Evaluations of representations. To add an evaluation of features, write its file and a row in
`EVALUATIONS`.
"""

from simclr_jax.evals import knn, probe, transfer
from simclr_jax.evals.contract import Evaluation

# --mode: the evaluation of features it runs.
EVALUATIONS: dict[str, Evaluation] = {
    "probe": probe.EVALUATION,
    "knn": knn.EVALUATION,
    "transfer": transfer.EVALUATION,
}
