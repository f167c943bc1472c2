"""What the user writes: typed schema, loading with every mistake at once, prompt lists. Imports no torch."""
