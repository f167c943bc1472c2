"""The mathematics of a step and the run that takes them: adapter, draws, objective, loop, guard, validation."""
