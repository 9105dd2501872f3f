"""From a data set to batches of views. Only host_augment and pipeline need TensorFlow at import."""
