"""Measures gradient rules side by side: cost, nearness to the full gradient, gain for equal computation."""
