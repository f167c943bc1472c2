"""Images of a prompt set drawn, scored, compared and shown."""
