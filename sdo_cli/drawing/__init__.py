"""Prompts and seeds to images, through a model family."""
