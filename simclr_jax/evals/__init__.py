"""What the representations are worth: features once, then probes on them."""
