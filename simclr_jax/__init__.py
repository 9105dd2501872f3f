"""SimCLR pretraining in JAX: from a laptop CPU to a TPU pod with one code path.

`simclr_jax.load_encoder(path)` gives the pretrained encoder to other people's code.
Importing this package does not import TensorFlow.
"""

from simclr_jax.encoder import Encoder, load_encoder

__all__ = ["Encoder", "load_encoder"]
