"""Finds what to skip: DiP-GO's search, its baselines, step schedules; measures what they cost."""
