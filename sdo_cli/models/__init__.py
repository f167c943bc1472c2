"""Stable Diffusion families behind one interface."""
