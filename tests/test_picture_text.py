"""Which prompt a picture's text means: joined nodes of ComfyUI, other programs' lines, bytes in either order."""

import pytest

from sdo_cli.evaluation.comfyui import prompt_of_graph
from sdo_cli.evaluation.picture_text import decoded, is_parameters, prompt_of, prompt_of_parameters
from sdo_cli.prompt_sets.syntax import syntax_notes


def joined(kind, **inputs):
    """A graph whose one prompt comes out of a node."""
    return {
        "1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0], "model": ["9", 0], "cfg": 7}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": ["3", 0]}},
        "3": {"class_type": kind, "inputs": inputs},
        "4": {"class_type": "PrimitiveString", "inputs": {"value": ", "}},
    }


WORDS = {f"text{k}": f"w{k}" for k in (10, 1, 11, 2)}


@pytest.mark.parametrize(
    "kind, inputs, text",
    [
        ("JoinStrings", {**WORDS, "delimiter": " "}, "w1 w2 w10 w11"),
        (
            "Text Concatenate",
            {"text_b": "b", "text_a": "a", "delimiter": " and ", "clean_whitespace": "true"},
            "a and b",
        ),
        ("CR Text Concatenate", {"text1": "a", "text2": "b", "separator": "\\n"}, "a\nb"),
        ("StringConcatenate", {"string_a": "a ", "string_b": "b", "delimiter": ""}, "ab"),
        ("easy promptConcat", {"prompt1": "a", "prompt2": "b", "separator": ", "}, "a, b"),
    ],
)
def test_joined_texts(kind, inputs, text):
    assert prompt_of_graph(joined(kind, **inputs)) == text


@pytest.mark.parametrize(
    "kind, inputs",
    [
        ("Text Concatenate (JPS)", {"text1": "a cat", "text2": "on a mat", "delimiter": "comma"}),
        ("Text Concatenate (JPS)", {"text1": "a cat", "text2": "on a mat", "delimiter": "none"}),
        ("PiePieConcat", {"text_1": "a", "text_2": "b", "delimiter": "Comma + Space"}),
        ("StringConcatenate", {"string_a": "a", "string_b": "b", "delimiter": ["4", 0]}),
        ("TextConcatAffixes", {"text": "a cat", "prefix": "photo of", "suffix": "at night", "delimiter": " "}),
        ("SomeConcat", {"a": "x", "b": "y", "delimiter": " "}),
        ("SomeTextConcat", {"text1": "x", "text2": "y"}),
    ],
)
def test_texts_joined_in_a_way_that_is_not_known(kind, inputs):
    with pytest.raises(ValueError, match=r"joins the prompt in .*, and which prompt is meant is not clear"):
        prompt_of_graph(joined(kind, **inputs))


EASY = "Prompt: a cat: sitting\non a mat\nNegative Prompt: ugly\nSeed: 1\nStable Diffusion model: sd-v1-5\nSteps: 25\n"


def test_easy_diffusions_lines():
    assert is_parameters(EASY) and prompt_of_parameters(EASY) == "a cat: sitting on a mat"
    turned = "Seed: 1\nWidth: 512\nPrompt: a cat\nSampler: euler_a"
    assert is_parameters(turned) and prompt_of_parameters(turned) == "a cat"
    for plain in ("Prompt: a cat", "a cat\nPrompt: x\nSeed: 1\nSteps: x"):
        assert not is_parameters(plain)


def test_settings_on_the_line_of_the_prompt():
    for text in (
        "a cat, red, Steps: 20, Sampler: Euler, CFG scale: 7",
        "a cat, red Negative prompt: ugly Steps: 20, Sampler: Euler",
        "a cat,\nred. Negative prompt: ugly, Steps: 20, CFG scale: 7",
    ):
        assert is_parameters(text) and prompt_of_parameters(text).rstrip(".") == "a cat, red"
    assert prompt_of_parameters("Steps: 3 of them, a stair") == "Steps: 3 of them, a stair"


def test_braces_are_json_only_where_they_hold_a_name():
    text = "{{masterpiece}}, a cat"
    assert not is_parameters(text) and prompt_of_parameters(text) == text and prompt_of({"prompt": text}) == text
    assert prompt_of_parameters(f"{text}\nSteps: 20, Sampler: Euler") == text
    with pytest.raises(ValueError, match="JSON inside it cannot be read"):
        prompt_of_parameters('{ "prompt": ')


TEXTS = {
    "chinese": "一只猫坐在垫子上",
    "short": "小猫",
    "japanese": "ねこがねている",
    "mixed": "夜のネオン街を歩く猫、高画質",
    "korean": "매트 위의 고양이",
    "russian": "кот на коврике",
    "thai": "แมวบนเสื่อ",
    "arabic": "قطة على سجادة",
    "english": "a cat on a mat",
    "one word": "cat",
    "accents": "un café très élégant",
    "emoji": "a 🐯 on a mat",
    "both": "masterpiece, 一只猫, best quality\nNegative prompt: 丑",
}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-8"])
@pytest.mark.parametrize("name", TEXTS)
def test_unicode_comments_in_any_order_of_bytes(name, encoding):
    for end in ("", "\0"):
        assert decoded(b"UNICODE\0" + (TEXTS[name] + end).encode(encoding)) == TEXTS[name]


def test_more_commands_of_other_programs_are_said():
    for text, kind in {
        r"saber \(fate\), 1girl": r"escaped brackets like \(red\)",
        "a man <segment:face> smiling": "commands like <segment:face>",
        "a <wildcard:animals> on a mat": "commands like <segment:face>",
        "<random[1-3]:red, blue> bus, <object:0.1,0.1,0.5,0.5> cat": "commands like <segment:face>",
        "a __colors/warm__ bus": "wildcards like __animal__",
        '("a cat", "a dog").blend(1, 1)': "mixtures like .blend(1, 1)",
    }.items():
        assert syntax_notes([text])[0].startswith(f"1 of 1 prompts hold {kind}: commands"), text
    assert syntax_notes(["a <b> c", "snake_case__name", "a <3 b: c>", "a bus.", "blend (red)", "1 < 2: 3 > 2"]) == []
