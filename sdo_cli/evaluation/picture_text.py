"""The prompt that a program keeps inside a picture, in a file beside it, or in the log of its folder."""

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image

from sdo_cli.errors import EnvironmentFault
from sdo_cli.evaluation.comfyui import prompt_of_graph
from sdo_cli.pixels import UNREADABLE

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
# the line of A1111 and its relatives after the prompts; what follows it is of extensions
SETTINGS = re.compile(r"^Steps: \d+\s*([,|]|$)")
NEGATIVE = "Negative prompt:"
# the same where the line ends were lost
ONE_LINE = re.compile(
    r"(?<=[ \t,.])(?:Negative prompt:|Steps: \d+, (?:Sampler|Schedule type|CFG scale|Seed|Size|Model|Model hash): )"
)
# JSON, not the emphasis of {{words}}
JSON_LIKE = re.compile(r"\s*\{\s*(?:\"|\}\s*$)")
# Easy Diffusion's text beside a picture: a line for each
EASY = re.compile(
    r"^(Prompt|Negative Prompt|Seed|Stable Diffusion model|Clip Skip|ControlNet model|VAE model|Sampler|Width|Height"
    r"|Steps|Guidance Scale|Prompt Strength|LoRA model|Hypernetwork model|Embedding models|Seamless Tiling"
    r"|Use Face Correction|Use Upscaling): ?",
    re.MULTILINE,
)
# LoRAs and hypernetworks are none of a picture's words
EXTRA_NETWORK = re.compile(r"<(?:lora|lyco|hypernet|locon|loha):[^<>]*>", re.IGNORECASE)
# quoted, or up to the next key, over lines too
RAW_PROMPT = re.compile(r'(?:^|, )Raw prompt: ("(?:\\.|[^"\\])*"|.*?(?=(?:, |\n)[A-Z][\w .-]*: |\Z))', re.DOTALL)
# InvokeAI before 3 wrote what it steered away from into the prompt
BRACKETED = re.compile(r"\[[^\]]*\]")


def prompt_inside(path: Path) -> str:
    """The prompt a picture was drawn from, as the program that drew it says; empty without one.

    A1111, Forge, SD.Next, Fooocus, SwarmUI, ComfyUI, InvokeAI, NovelAI and sdo; PNG text, EXIF of JPEG and WebP.

    Raises:
        ValueError: one sentence: there is text, but not which prompt it means.
        EnvironmentFault: no readable image.
    """
    try:
        with Image.open(path) as image:
            notes = _notes(image)
    except UNREADABLE as fault:
        raise EnvironmentFault(f"{path} is no readable image: {fault}", remedy="remove it, or save it again") from fault
    return prompt_of(notes)


def _notes(image: Image.Image) -> dict[str, str]:
    """Texts by the key they are kept under; EXIF's under A1111's and ComfyUI's keys."""
    found = {key: str(value) for key, value in getattr(image, "text", {}).items()}
    exif = image.getexif()
    for raw in (exif.get(USER_COMMENT), exif.get_ifd(EXIF_IFD).get(USER_COMMENT)):
        if raw and "parameters" not in found and (text := decoded(raw)):
            found["parameters"] = text
    for raw in exif.values():
        # ComfyUI takes tags of the camera, each with its key before a colon
        key, colon, text = decoded(raw).partition(":") if isinstance(raw, str | bytes) else ("", "", "")
        if colon and key.lower() == "prompt":
            found.setdefault("prompt", text)
    return found


def decoded(raw: str | bytes) -> str:
    """EXIF's text: eight bytes name the encoding of a comment; UTF-16 comes in both orders of bytes."""
    if isinstance(raw, str):
        # Pillow reads every tag as Latin-1
        try:
            return raw.encode("latin-1").decode("utf-8").strip("\0 ")
        except UnicodeError:
            return raw.strip("\0 ")
    if raw.startswith(b"UNICODE\0"):
        body = raw[8:]
        if body.startswith((b"\xfe\xff", b"\xff\xfe")):
            return body.decode("utf-16", "replace").strip("\0 ")
        return _most_plausible(body).strip("\0 ")
    named = raw.startswith((b"ASCII\0\0\0", b"\0" * 8))
    return (raw[8:] if named else raw).decode("utf-8", "replace").strip("\0 ")


def _most_plausible(body: bytes) -> str:
    """UTF-16 in either order, as every program has its own, or the UTF-8 that some write in its place."""
    zeros = body[0::2].count(0) >= body[1::2].count(0)
    orders = ("utf-16-be", "utf-16-le") if zeros else ("utf-16-le", "utf-16-be")
    found = []
    for encoding in (*orders, "utf-8"):
        whole = body[:-1] if encoding != "utf-8" and len(body) % 2 and body.endswith(b"\0") else body
        try:
            text = whole.decode(encoding).strip("\0")
        except UnicodeDecodeError:
            continue
        # two letters of ASCII are one sign of Chinese, rarely the other way round
        found.append((_odd(text) + 4 * (encoding == "utf-8"), text))
    return min(found, key=lambda pair: pair[0])[1] if found else body.decode(orders[0], "replace")


# written together in one language
EAST = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH", "HANGUL", "LEFT", "RIGHT")


def _odd(text: str) -> int:
    """How little a text looks like writing: characters that are none, many scripts, signs from all over the table."""
    cost, scripts, rows = 0, set(), set()
    for sign in text:
        kind = unicodedata.category(sign)
        if kind in ("Cn", "Co", "Cs") or (kind == "Cc" and sign not in "\n\r\t"):
            cost += 10
        elif not sign.isascii():
            cost += 1 if kind[0] in "LMNP" else 2
            script = unicodedata.name(sign, "").partition(" ")[0]
            scripts.add("CJK" if script in EAST else script)
            rows.add(ord(sign) >> 8)
    return cost + 3 * len(scripts) + len(rows)


def prompt_of(notes: Mapping[str, str]) -> str:
    """The prompt among the texts of a picture; raises ValueError where they do not say which."""
    if "invokeai_metadata" in notes:
        return _words(_object(notes["invokeai_metadata"]).get("positive_prompt"))
    if "sd-metadata" in notes:
        return _old_invoke(_at(_object(notes["sd-metadata"]), "image", "prompt"))
    if "Dream" in notes and (quoted := re.match(r'\s*"(.*?)"(?= -|\s*$)', notes["Dream"], re.DOTALL)):
        return BRACKETED.sub("", quoted[1]).strip()
    if "parameters" in notes:
        return prompt_of_parameters(notes["parameters"])
    if "Comment" in notes and (notes.get("Software") == "NovelAI" or "AI generated" in notes.get("Title", "")):
        return _novelai(_object(notes["Comment"]), notes.get("Description", ""))
    text = notes.get("prompt", "").strip()
    return prompt_of_graph(_object(text)) if JSON_LIKE.match(text) else text


def prompt_of_parameters(text: str) -> str:
    """Of A1111's text, the JSON that SwarmUI and Fooocus keep in its place, or Easy Diffusion's lines.

    Raises:
        ValueError: neither.
    """
    text = text.strip()
    if JSON_LIKE.match(text):
        tree = _object(text)
        if "sui_image_params" in tree:
            return _plain(_words(_at(tree, "sui_image_params", "prompt")))
        return _plain(_words(tree.get("prompt", tree.get("Prompt"))))
    if (easy := _easy(text)) is not None:
        return _plain(easy)
    lines = text.split("\n")
    at = max((number for number, line in enumerate(lines) if SETTINGS.match(line)), default=None)
    if at is None and (lost := ONE_LINE.search(text)):
        return _plain(text[: lost.start()]).rstrip(" ,")
    if at is None and len(lines) > 1:
        raise ValueError("its text has no line of settings, so where the prompt ends is not known")
    if at is not None and (raw := RAW_PROMPT.search("\n".join(lines[at:]))):
        # Fooocus puts the words of its styles before
        return _plain(_words(_json(raw[1])) if raw[1].startswith('"') else raw[1])
    before = lines if at is None else lines[:at]
    negative = next((number for number, line in enumerate(before) if line.startswith(NEGATIVE)), len(before))
    return _plain(" ".join(before[:negative]))


def _plain(text: str) -> str:
    return " ".join(EXTRA_NETWORK.sub("", text).split())


def _easy(text: str) -> str | None:
    """The prompt of Easy Diffusion's lines; None where they are not its."""
    marks = list(EASY.finditer(text))
    at = next((k for k, mark in enumerate(marks) if mark[1] == "Prompt"), None)
    if at is None or marks[0].start() != 0 or len(marks) < 3:
        return None
    return text[marks[at].end() : marks[at + 1].start() if at + 1 < len(marks) else len(text)]


def is_parameters(text: str) -> bool:
    """Whether a text beside a picture is A1111's, with negative prompt and settings, or another program's."""
    if JSON_LIKE.match(text):
        try:
            return isinstance(json.loads(text), dict)
        except json.JSONDecodeError:
            return False
    if _easy(text.strip()) is not None or ONE_LINE.search(text):
        return True
    return any(SETTINGS.match(line) or line.startswith(NEGATIVE) for line in text.split("\n"))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("the JSON inside it cannot be read") from None


def _object(text: str) -> dict[str, Any]:
    tree = _json(text)
    if not isinstance(tree, dict):
        raise ValueError("the JSON inside it cannot be read")
    return tree


def _at(tree: Any, *keys: str) -> Any:
    """What lies at the end of ``keys``; None where they lead nowhere."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _words(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("the JSON inside it names no prompt that is a text")
    return value.strip()


def _old_invoke(value: Any) -> str:
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict):
            raise ValueError(f"it was drawn from {len(value)} prompts")
        value = value[0].get("prompt")
    return BRACKETED.sub("", _words(value)).strip()


def _novelai(comment: dict[str, Any], description: str) -> str:
    people = _at(comment, "v4_prompt", "caption", "char_captions")
    if isinstance(people, list) and people:
        raise ValueError(f"NovelAI drew it from a prompt and {len(people)} of its characters")
    return _words(comment.get("prompt", description))


def fooocus_log(path: Path) -> dict[str, str]:
    """Prompts of Fooocus's ``log.html`` by name of the picture."""
    found = {}
    for entry in path.read_text(encoding="utf-8", errors="replace").split('class="image-container"')[1:]:
        name = re.search(r"<a href=[\"']([^\"']+)[\"']", entry)
        copied = re.search(r"to_clipboard\('([^']*)'\)", entry)
        cell = re.search(r"<td class='(?:key|label)'>Prompt</td><td class='value'>(.*?)</td></tr>", entry, re.DOTALL)
        if name is None:
            continue
        try:
            # the button's copy is quoted, the page itself is not
            words = _words(_object(unquote(copied[1])).get("prompt")) if copied else None
        except ValueError:
            words = None
        if words is None and cell is not None:
            words = re.sub(r" ?</br> ?", "\n", cell[1]).strip()
        if words is not None:
            found[unquote(name[1])] = words
    return found
