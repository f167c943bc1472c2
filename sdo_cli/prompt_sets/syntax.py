"""Words in prompts that other programs take for commands; here they are text, for model and rewards alike."""

import re
from collections.abc import Iterable

# what it is called, and how it looks
COMMANDS = {
    "weights like (red:1.2)": re.compile(r"\([^()]*:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)"),
    "emphasis like ((red))": re.compile(r"\(\([^()]+\)\)|\[\[[^\[\]]+\]\]"),
    "emphasis like {red}": re.compile(r"\{[^{}|]+\}"),
    # C++ and a dash between words are no commands
    "emphasis like red++": re.compile(r"\w{2,}\+{2,}(?!\w)|\)(?:\++|-+|\d+\.\d+)(?!\w)"),
    "BREAK": re.compile(r"\bBREAK\b"),
    # where not every word is in capitals
    "AND": re.compile(r"(?=.*[a-z]).*\bAND\b", re.DOTALL),
    "changes like [red:blue:0.5]": re.compile(r"\[[^\[\]]*:[^\[\]]*:?\s*(?:\d+\.?\d*|\.\d+)\s*\]"),
    "networks like <lora:name:1>": re.compile(r"<(?:lora|lyco|hypernet|locon|loha):[^<>]*>", re.IGNORECASE),
    "commands like <segment:face>": re.compile(
        r"<(?!(?:lora|lyco|hypernet|locon|loha):)[a-z]\w*(?:\[[^\[\]<>]*\])?:[^<>]+>", re.IGNORECASE
    ),
    "wildcards like __animal__": re.compile(r"(?<!\w)__[\w*./-]+?__(?!\w)"),
    "escaped brackets like \\(red\\)": re.compile(r"\\[()\[\]{}]"),
    "mixtures like .blend(1, 1)": re.compile(r"\.(?:blend|and|swap)\("),
    "choices like {red|blue}": re.compile(r"\{[^{}]*\|[^{}]*\}"),
}


def syntax_notes(prompts: Iterable[str]) -> list[str]:
    """One sentence on prompts with such words, with how many there are and the first; none without."""
    every = list(dict.fromkeys(prompts))
    held = {text: [name for name, look in COMMANDS.items() if look.search(text)] for text in every}
    odd = [text for text in every if held[text]]
    if not odd:
        return []
    kinds = [name for name in COMMANDS if any(name in held[text] for text in odd)]
    line = " ".join(odd[0].split())
    shown = line if len(line) <= 60 else f"{line[:60]}…"
    return [
        f"{len(odd)} of {len(every)} prompts hold {', '.join(kinds)}: commands of other programs, which "
        f"model and rewards read here as plain words; the first: {shown}"
    ]
