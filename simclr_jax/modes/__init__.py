"""What the program does besides training loops and evaluations: one file a mode."""
