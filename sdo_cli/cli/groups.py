"""Groups of options: a frozen dataclass whose fields are options, handed to a command as one object.

    @dataclass(frozen=True)
    class NoiseOptions:
        seeds: Annotated[int, typer.Option(help="Images per prompt.")] = 1
        seed: Annotated[int, typer.Option(help="Another number, other noise.")] = 0

    @grouped
    def draw(*, noise: NoiseOptions, quiet: bool = False) -> None: ...

Typer sees ``--seeds --seed --quiet``, in this order. A subclass may repeat a field to give it another default; it keeps
its place.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a flat signature, as Typer reads it.

    Raises:
        TypeError: two options of one name.
    """
    flat, groups = [], {}
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in signature(command).parameters.items():
        if isinstance(group := hints[name], type) and is_dataclass(group):
            groups[name] = group
            flat += options_of(group)
        else:
            flat.append(parameter.replace(annotation=group, kind=Parameter.KEYWORD_ONLY))
    if twice := [name for name, times in Counter(option.name for option in flat).items() if times > 1]:
        raise TypeError(f"{command.__name__}: {', '.join(twice)} stands in more than one group")

    @wraps(command)
    def called(**given: Any) -> None:
        objects = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**given, **objects)

    annotations = {option.name: option.annotation for option in flat}
    vars(called).update(__signature__=Signature(flat))
    called.__annotations__ = annotations
    return called


def options_of(group: type) -> list[Parameter]:
    """A parameter for every field of a dataclass."""
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
