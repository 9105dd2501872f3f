"""One training step, and the loop that repeats it: states, gradients, optimizers, checkpoints, workdirs."""
