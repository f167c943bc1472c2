"""The prompt of a picture by ComfyUI, from the graph it keeps inside: which text reached the sampler."""

import re
from collections.abc import Iterator
from typing import Any

Node = dict[str, Any]
Graph = dict[str, Node]

# inputs of nodes that encode text; several hold the words for several encoders
TEXTS = ("text", "text_g", "text_l", "clip_g", "clip_l", "t5xxl", "bert", "mt5xl", "llama", "prompt", "user_prompt")
# conditions that go through a node, both sides or one
SIDES = ("positive", "negative")
# nodes whose output is the text in them; others may choose, replace or make words up
LITERAL = (
    "primitivenode",
    "primitivestring",
    "primitivestringmultiline",
    "string",
    "string literal",
    "stringconstant",
    "stringconstantmultiline",
    "text",
    "text box",
    "text multiline",
    "cr text",
    "cr prompt text",
    "jwstring",
    "jwstringmultiline",
    "ttn text",
    "showtext|pysssss",
    "previewany",
)
VALUES = ("value", "text", "string", "prompt", "source")
DELIMITERS = ("delimiter", "separator")
# concatenations whose delimiter is the text itself; others name it (none, comma, "Comma + Space")
JOINS = ("stringconcatenate", "joinstrings", "text concatenate", "cr text concatenate")
# what they join, in order of letter or number
PARTS = re.compile(r"(?:text|string|prompt)_?([a-z]|\d+)")


def prompt_of_graph(graph: Any) -> str:
    """The one text behind every sampler's positive condition.

    Args:
        graph: as in the chunk ``prompt``: nodes by id, each with ``class_type`` and ``inputs``.

    Raises:
        ValueError: one sentence: no sampler, several prompts, or a node whose text is not known.
    """
    if not isinstance(graph, dict) or not all(map(_is_node, graph.values())):
        raise ValueError("its ComfyUI graph is not in the form that ComfyUI writes")
    walk = _Walk({str(key): {**node, "inputs": node.get("inputs") or {}} for key, node in graph.items()})
    found = list(dict.fromkeys(text for text in walk.sampled() if text))
    if not found:
        raise ValueError("its ComfyUI graph leads to no prompt")
    if len(found) > 1:
        raise ValueError(f"its ComfyUI graph holds several prompts: {found[0]!r} and {found[1]!r}")
    return found[0]


def _is_node(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("inputs") or {}, dict):
        return False
    return isinstance(value.get("class_type"), str)


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)


class _Walk:
    """Against the links, from what was saved to what was written."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.way = graph, []  # type: tuple[Graph, list[str]]

    def sampled(self) -> Iterator[str]:
        """Texts of every sampler that a saved picture comes from."""
        nodes = self._saved()
        for key in nodes:
            inputs = self.graph[key]["inputs"]
            if _is_link(inputs.get("positive")) and (_is_link(inputs.get("model")) or "cfg" in inputs):
                yield self.condition(inputs["positive"], "positive")
            # SamplerCustomAdvanced asks a guider
            elif _is_link(inputs.get("conditioning")) and "Guider" in self.graph[key]["class_type"]:
                yield self.condition(inputs["conditioning"], "positive")

    def _saved(self) -> list[str]:
        read = {str(value[0]) for node in self.graph.values() for value in node["inputs"].values() if _is_link(value)}
        ends = [key for key in self.graph if key not in read]
        saving = [key for key in ends if "save" in self.graph[key]["class_type"].lower()] or ends
        found: dict[str, None] = {}
        while saving:
            key = saving.pop()
            if key in self.graph and key not in found:
                found[key] = None
                saving += [str(value[0]) for value in self.graph[key]["inputs"].values() if _is_link(value)]
        return list(found)

    def _node(self, link: list[Any]) -> tuple[str, Node]:
        key = str(link[0])
        if key not in self.graph or key in self.way:
            raise ValueError(f"its ComfyUI graph leads from a sampler to node {key}, which is not in it or a circle")
        return key, self.graph[key]

    def condition(self, link: list[Any], side: str) -> str:
        """The text of a condition; empty where it was zeroed out.

        Args:
            side: of the sampler, for nodes that hand on both.
        """
        key, node = self._node(link)
        kind, inputs = node["class_type"], node["inputs"]
        self.way.append(key)
        try:
            if kind == "ConditioningZeroOut":
                return ""
            texts = [name for name in TEXTS if name in inputs]
            conditions = [name for name, value in inputs.items() if "conditioning" in name.lower() and _is_link(value)]
            # other nodes with a text may put a style around it
            encodes = "textencode" in kind.lower().replace(" ", "")
            if encodes and texts and not conditions and not any(_is_link(inputs.get(name)) for name in SIDES):
                return self._one([self.text(inputs[name]) for name in texts])
            if kind == "ConditioningConcat" and len(conditions) == 2:
                ordered = [inputs["conditioning_to"], inputs["conditioning_from"]]
                return " ".join(text for text in (self.condition(at, side) for at in ordered) if text)
            if kind.startswith("Conditioning") and len(conditions) > 1:
                return self._one([self.condition(inputs[name], side) for name in conditions])
            if len(conditions) == 1 and not texts:
                return self.condition(inputs[conditions[0]], side)
            if all(_is_link(inputs.get(name)) for name in SIDES) and not texts and link[1] in (0, 1):
                other = SIDES[link[1]]
                return self.condition(inputs[other], other)
            # loaders that encode both sides themselves
            if all(isinstance(inputs.get(name), str) for name in SIDES):
                return str(inputs[side]).strip()
        finally:
            self.way.pop()
        raise ValueError(f"its ComfyUI graph goes through {kind}, whose prompt sdo does not know")

    def _one(self, texts: list[str]) -> str:
        different = list(dict.fromkeys(text for text in texts if text))
        if len(different) > 1:
            raise ValueError(f"its ComfyUI graph holds several prompts: {different[0]!r} and {different[1]!r}")
        return different[0] if different else ""

    def text(self, value: Any) -> str:
        """Words written into a node, or linked to it through primitives and concatenations."""
        if not _is_link(value):
            if isinstance(value, str):
                return value.strip()
            raise ValueError(f"its ComfyUI graph has {value!r} where a prompt belongs")
        key, node = self._node(value)
        kind, inputs = node["class_type"], node["inputs"]
        self.way.append(key)
        try:
            if "concat" in kind.lower() or kind == "JoinStrings":
                return self._joined(kind, inputs)
            held = [name for name in inputs if name.lower() in VALUES]
            if kind.lower() in LITERAL and len(held) == 1:
                return self.text(inputs[held[0]])
        finally:
            self.way.pop()
        raise ValueError(f"its ComfyUI graph takes the prompt from {kind}, whose text sdo does not know")

    def _joined(self, kind: str, inputs: dict[str, Any]) -> str:
        parts = [name for name in inputs if PARTS.fullmatch(name)]
        between = [inputs[name] for name in DELIMITERS if name in inputs]
        # a prefix, a switch, words for no delimiter: what comes out is up to the node
        others = [name for name in inputs if name not in (*parts, *DELIMITERS, "clean_whitespace")]
        if not parts or others or len(between) > 1 or any(not isinstance(mark, str) for mark in between):
            raise self._unclear(kind)
        mark = between[0].replace("\\n", "\n") if between else ""
        if kind.lower() not in JOINS and (not between or re.search(r"[^\W_]", mark)):
            raise self._unclear(kind)
        parts.sort(key=lambda name: (len(PARTS.sub(r"\1", name)), name))
        return mark.join(text for text in (self.text(inputs[name]) for name in parts) if text).strip()

    @staticmethod
    def _unclear(kind: str) -> ValueError:
        return ValueError(f"its ComfyUI graph joins the prompt in {kind}, and which prompt is meant is not clear")
