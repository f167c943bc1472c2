"""`sdo doctor`: what a recipe needs and whether this machine has it, before anything heavy starts."""
