"""Predicts FLOPs and memory of a recipe from configs alone: every part is run on meta tensors and counted."""
