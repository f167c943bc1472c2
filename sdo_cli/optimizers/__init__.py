"""From gradients to steps: AdamW whole, in 8 bits, or dealt out over processes."""
