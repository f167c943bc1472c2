"""What is said of one key of a recipe."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """Attributes:
    line: one short sentence, for the table.
    more: units, what 0 and each word mean, what goes with what.
    example: lines of a recipe.
    """

    line: str
    example: str
    more: str = ""
