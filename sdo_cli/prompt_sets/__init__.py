"""Prompt sets: shipped ones, and readers of the files the field uses."""
