"""What the pages tell a reader to type exists: verbs, options, keys, recipes, links, scripts. Imports no torch."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from sdo_cli.cli.app import app
from sdo_cli.cli.options import RecipeOptions
from sdo_cli.recipe.explain import entries, path_of
from sdo_cli.recipe.load import load_recipe, shipped_recipes
from sdo_cli.recipe.steering import shipped_steerings

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("sdo_cli/*/*.md")])
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
# of the past
HISTORY = {"CHANGELOG.md", "log.md"}
VARIABLES = r"(?:[A-Z_]+=\S+ )*"
TYPED = re.compile(rf"^(?:#? +)?{VARIABLES}(?:sdo|\S.* -m sdo_cli) (\S.*?)(?: {{2,}}.*)?$")
MENTIONED = re.compile(rf"`{VARIABLES}sdo\s([^`]+)`")


def typed_in(text):
    """Command lines of code blocks, and of the comments above a recipe."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif (fenced or line.startswith(("    ", "#"))) and (found := TYPED.match(line)):
            yield found[1]


def words_of(line):
    words = shlex.split(line, comments=True)
    end = next((i for i, word in enumerate(words) if word in (">", "|", "&&", "…")), len(words))
    return words[:end]


@cache
def root():
    return get_command(app)


def command_of(words):
    """The command that the first words name, and the other words."""
    command, words = root(), list(words)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command = command.commands[words.pop(0)]
    return command, words


def check_options(command, words):
    known = {"--help", "--debug"} | {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert given <= known, f"no option {', '.join(sorted(given - known))}"


@cache
def keys(verb):
    return {entry.path: entry for entry in entries(verb)}


def check_keys(verb, overrides):
    for word in overrides:
        path = path_of(word.partition("=")[0])
        above = [keys(verb).get(path[:n]) for n in range(1, len(path))]
        assert path in keys(verb) or any(entry and entry.takes_names for entry in above), f"no key {word}"


def check_recipe(verb, name):
    if re.fullmatch(r"[a-z0-9-]+", name or ""):
        assert name in (shipped_steerings() if verb == "optimize" else shipped_recipes()), f"no recipe {name}"


def check_typed(line):
    command, words = command_of(words_of(line))
    check_options(command, words)
    # types, required arguments, values out of range
    params = command.make_context(command.name, words).params
    if "words" in params:
        # a recipe may be the first of the words
        given = RecipeOptions(params["words"], params["recipe_option"])
        params |= {"recipe": given.recipe, "overrides": given.overrides}
        if params.get("resume") and Path(given.recipe).suffix == "" and "/" in given.recipe:
            # a run's folder
            params["recipe"] = ""
    verb = "optimize" if command.name == "optimize" else "finetune"
    check_keys(verb, params.get("overrides") or [])
    if command.name in ("finetune", "optimize", "bench", "doctor", "fetch"):
        check_recipe(verb, params.get("recipe"))
        if params.get("recipe") in shipped_recipes() and not params.get("plugin"):
            load_recipe(params["recipe"], params["overrides"])


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_can_be_typed(page):
    text = page.read_text()
    for line in typed_in(text):
        try:
            check_typed(line)
        except Exception as fault:
            raise AssertionError(f"sdo {line}: {fault!r}") from fault
    for mention in MENTIONED.findall(text):
        command, words = command_of(mention.split())
        check_options(command, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in path or (path and not (page.parent / path).is_relative_to(page.parent.parent)):
            continue
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def anchors(page):
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"`", "", head).lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in HISTORY], ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_that_are_named_are_there(page):
    for name in re.findall(r"\bscripts/[\w/]+\.\w+", page.read_text()):
        assert (ROOT / name).is_file(), name


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name}" not in index] == ["README.md"]


@pytest.mark.parametrize(
    ("line", "fault"),
    {
        "finetun --recipe hps": "no command finetun",
        "sample x --colour red": "no option --colour",
        "sample x --seed soon": "valid integer",
        "finetune --recipe hpz": "no recipe hpz",
        "finetune --recipe hps lora.rnak=3": "no key lora.rnak",
        "finetune --recipe hps solver=hps": "unknown solver",
        "compare": "Missing",
    }.items(),
)
def test_a_line_that_cannot_be_typed_is_noticed(line, fault):
    with pytest.raises(Exception) as found:
        check_typed(line)
    assert fault in str(found.value) or fault in getattr(found.value, "message", "")


def test_lines_are_found():
    text = (
        "text\n\n    HF_HOME=/x sdo fetch hps            # --list: what\n    torchrun -m sdo_cli finetune --recipe a\n"
    )
    assert list(typed_in(text)) == ["fetch hps", "finetune --recipe a"]
    assert list(typed_in("#   sdo fetch low-memory       downloads the weights\n")) == ["fetch low-memory"]
