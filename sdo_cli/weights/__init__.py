"""Which weights a recipe needs, whether they are here, and how to get them."""
