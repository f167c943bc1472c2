"""Searches for cheaper ways through sampling: which steps to take."""
