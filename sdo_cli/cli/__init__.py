"""Typer only: parse, call a library function, show the result. Imports no torch."""
