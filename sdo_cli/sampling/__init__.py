"""Solver coefficients, guidance, and the one denoising loop."""
