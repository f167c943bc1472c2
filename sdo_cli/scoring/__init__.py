"""Images to scores, and what a difference of scores is worth."""
