"""The folder of a run: what is written into it, going on from it, reading it; card, report, trackers."""
