"""The modes of the program that are neither a training loop nor an evaluation: one file a mode."""
