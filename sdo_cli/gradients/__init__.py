"""Gradient rules (functions that make a plan), plans, and the engines that carry them out."""
