"""A finished adapter for other programs: kohya names, peft folders, merged weights."""
