"""The plug-ins of a run that is gone on with, or whose LoRA is scored: foreign code, never run in doubt."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import typer

import rewards
from sdo_cli.errors import PluginFault
from sdo_cli.gradients import rules
from sdo_cli.parallel.launch import launched
from sdo_cli.plugins import load_plugins
from sdo_cli.recipe.schema import Recipe
from sdo_cli.runs.again import plugins_of


def load_recorded_plugins(folder: Path, given: Sequence[Path] = ()) -> None:
    """Run the files the run was made with; on a terminal a changed one is asked for first.

    Args:
        given: of ``--plugin``, which take the place of recorded ones of their names.

    Raises:
        PluginFault: one is not there, or changed and nobody said that it may run.
    """
    for plugin in plugins_of(folder, given):
        if plugin.doubt and not _said_yes(f"the plug-in {plugin.path} {plugin.doubt}"):
            raise PluginFault(
                f"the plug-in {plugin.path} {plugin.doubt}", remedy=f"read it, then: --plugin {plugin.path}"
            )
        load_plugins([plugin.path])
        if plugin.doubt:
            # the processes that --gpus starts are not asked again
            sys.argv += ["--plugin", str(plugin.path)]


def load_plugins_for(names: Iterable[object], run: Path, recipe: Recipe, given: Sequence[Path] = ()) -> None:
    """The run's plug-ins, where ``names`` has a reward or the rule of its recipe and nobody else knows it."""
    own = [spec.name for spec in (*recipe.rewards, *recipe.validation.rewards)]
    only_there = {name for name in own if not rewards.resolve(rewards.full_name(name))}
    if not rules.resolve(recipe.gradient.rule):
        only_there.add(recipe.gradient.rule)
    if only_there.intersection(names):
        load_recorded_plugins(run, given)


def _said_yes(what: str) -> bool:
    if launched() or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    return typer.confirm(f"{what}; run it?", err=True)
