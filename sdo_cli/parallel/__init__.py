"""Several processes for one job: starting them, what they tell each other, stopping together."""
