"""What a step and a check are: those who make them and those who read a run folder know the same record."""
