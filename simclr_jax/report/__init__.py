"""A run as one HTML page: what it was, whether it is healthy, what it learned. Reads workdirs only."""
