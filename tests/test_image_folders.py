"""Folders of pictures as programs write them: the prompt each picture is scored under, or one sentence of refusal.

The table in docs/evaluation.md and LAYOUTS are held to the same rows.
"""

import json
import re
import urllib.parse
from pathlib import Path

import entry
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.evaluation.comfyui import prompt_of_graph
from sdo_cli.evaluation.evaluation import Evaluation, folder_variants, job_from, job_tree
from sdo_cli.evaluation.folders import read_folder
from sdo_cli.evaluation.job import EvalPrompt, Job, Prompts
from sdo_cli.evaluation.picture_text import decoded, prompt_inside, prompt_of_parameters
from sdo_cli.evaluation.reference import reference_files
from sdo_cli.prompt_sets.read import read_prompt_set
from sdo_cli.recipe.schema import RewardSpec

WORDS = ["a red bus", 'a sign that says "OPEN", at night', "a teapot &amp; a cup: blue", "ein Bär, 熊"]
NEGATIVE = "blurry, lowres"
SETTINGS = "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 1234, Size: 512x512, Model: v1-5, Version: v1.10.1"


def png(path, chunks=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for key, text in (chunks or {}).items():
        info.add_itxt(key, text) if not text.isascii() else info.add_text(key, text)
    Image.new("RGB", (8, 8), "red").save(path, pnginfo=info)


def a1111(prompt, after=""):
    return f"{prompt} <lora:detail:0.8>\nNegative prompt: {NEGATIVE}\n{SETTINGS}{after}"


def given(*texts, name="set"):
    return Prompts(name, name, [EvalPrompt(text) for text in texts])


def of_path(path):
    found = read_prompt_set(str(path))
    return Prompts(
        found.name, found.source, [EvalPrompt(p.text, p.category, p.names, p.picture) for p in found.prompts]
    )


def said(folder):
    """Sentences beside the first, without the folder's path."""
    return [sentence.removeprefix(f"{folder}: ") for sentence in read_folder(folder, None).notes[1:]]


def texts(folder, prompts=None, **options):
    return {item.file: item.text for item in read_folder(folder, prompts, **options).items}


# who wrote the folder


def a1111_png(folder):
    for i, words in enumerate(WORDS):
        png(folder / f"{i:05d}-{1234 + i}.png", {"parameters": a1111(words)})


def a1111_png_and_text(folder):
    for i, words in enumerate(WORDS):
        png(folder / f"{i:05d}-{1234 + i}.png", {"parameters": a1111(words)})
        (folder / f"{i:05d}-{1234 + i}.txt").write_text(a1111(words) + "\n", encoding="utf-8")


def a1111_templates(folder):
    for i, words in enumerate(WORDS):
        after = "\nTemplate: a {red|blue} bus\nNegative Template: blurry"
        png(folder / f"{i:05d}.png", {"parameters": a1111(words, after)})


def with_comment(path, raw, root=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if root:
        exif[0x9286] = raw
    else:
        exif.get_ifd(0x8769)[0x9286] = raw
    Image.new("RGB", (8, 8), "red").save(path, exif=exif)


def a1111_jpeg(folder):
    for i, words in enumerate(WORDS):
        with_comment(folder / f"{i:05d}.jpg", b"UNICODE\0" + a1111(words).encode("utf-16-be"))


def a1111_webp(folder):
    for i, words in enumerate(WORDS):
        with_comment(folder / f"{i:05d}.webp", b"UNICODE\0" + a1111(words).encode("utf-16-le"))


def swarmui(folder):
    for i, words in enumerate(WORDS):
        tree = {"sui_image_params": {"prompt": words, "negativeprompt": NEGATIVE, "seed": i, "steps": 20}}
        png(folder / f"{1700 + i}-{words[:5]}-sd_xl-{i}.png", {"parameters": json.dumps(tree, indent=2)})


def fooocus_tree(words, i):
    return {"full_prompt": [words, f"cinematic still {words}"], "negative_prompt": NEGATIVE, "prompt": words, "seed": i}


def fooocus_png(folder):
    for i, words in enumerate(WORDS):
        chunks = {"parameters": json.dumps(fooocus_tree(words, i)), "fooocus_scheme": "fooocus"}
        png(folder / f"2024-08-01_12-00-0{i}_12{i}4.png", chunks)


def fooocus_jpeg(folder):
    for i, words in enumerate(WORDS):
        with_comment(folder / f"2024_{i}.jpg", json.dumps(fooocus_tree(words, i)), root=True)


def fooocus_a1111(folder):
    for i, words in enumerate(WORDS):
        raw = json.dumps(words) if any(c in words for c in ",:\n") else words
        settings = f"Steps: 30, Sampler: DPM++ 2M, Raw prompt: {raw}, Seed: 1"
        text = f"{words}, cinematic still\nNegative prompt: {NEGATIVE}\n{settings}"
        png(folder / f"2024-08-01_12-00-0{i}_12{i}4.png", {"parameters": text, "fooocus_scheme": "a1111"})


def fooocus_log(folder):
    entries = []
    for i, words in enumerate(WORDS):
        name = f"2024-08-01_12-00-0{i}_12{i}4.png"
        png(folder / name)
        copied = urllib.parse.quote(json.dumps({"prompt": words, "seed": i}, indent=0), safe="")
        entries.append(
            f'<div id="{name.replace(".", "_")}" class="image-container"><hr><table class="image"><tr>\n'
            f'<td><a href="{name}" '
            f"target=\"_blank\"><img src='{name}'/></a><div>{name}</div></td><td><table class='metadata'>"
            f"<tr><td class='label'>Prompt</td><td class='value'>{words}</td></tr>\n"
            f"<tr><td class='label'>Negative Prompt</td><td class='value'>{NEGATIVE}</td></tr>\n</table>"
            f"</br><button onclick=\"to_clipboard('{copied}')\">Copy to Clipboard</button></td></tr></table></div>\n\n"
        )
    page = "<!DOCTYPE html><html><body><!--fooocus-log-split-->\n\n" + "".join(reversed(entries))
    (folder / "log.html").write_text(page + "<!--fooocus-log-split--></body></html>", encoding="utf-8")


def invokeai(folder):
    for i, words in enumerate(WORDS):
        tree = {"generation_mode": "txt2img", "positive_prompt": words, "negative_prompt": NEGATIVE, "seed": i}
        png(folder / f"3f0b7c1e-{i}.png", {"invokeai_metadata": json.dumps(tree), "invokeai_graph": "{}"})


def invokeai_2(folder):
    for i, words in enumerate(WORDS):
        tree = {"app_version": "2.3", "image": {"prompt": [{"prompt": f"{words} [{NEGATIVE}]", "weight": 1.0}]}}
        chunks = {"Dream": f'"{words} [{NEGATIVE}]" -s 50 -S {i}', "sd-metadata": json.dumps(tree)}
        png(folder / f"00000{i}.{i}.png", chunks)


def novelai(folder):
    for i, words in enumerate(WORDS):
        comment = json.dumps({"prompt": words, "steps": 28, "uc": NEGATIVE})
        chunks = {"Title": "NovelAI generated image", "Description": words, "Software": "NovelAI", "Comment": comment}
        png(folder / f"{words[:4]} s-{i}.png", chunks)


def graph(words, **nodes):
    """ComfyUI's default workflow, in the form its API takes."""
    sampler = {"seed": 1, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": {"class_type": "KSampler", "inputs": {**sampler, **links}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": words, "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": NEGATIVE, "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
        **nodes,
    }


def comfyui_png(folder):
    for i, words in enumerate(WORDS):
        chunks = {"prompt": json.dumps(graph(words)), "workflow": json.dumps({"nodes": []})}
        png(folder / f"ComfyUI_{i + 1:05d}_.png", chunks)


def comfyui_webp(folder):
    folder.mkdir()
    for i, words in enumerate(WORDS):
        exif = Image.Exif()
        exif[0x0110], exif[0x010F] = f"prompt:{json.dumps(graph(words))}", f"workflow:{json.dumps({'nodes': []})}"
        Image.new("RGB", (8, 8), "red").save(folder / f"ComfyUI_{i + 1:05d}_.webp", exif=exif)


def image_folder(folder):
    rows = [{"file_name": f"train/{i}.png", "text": words} for i, words in enumerate(WORDS)]
    for row in rows:
        png(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def image_folder_csv(folder):
    for i in range(len(WORDS)):
        png(folder / f"{i}.png")
    cells = ['"' + words.replace('"', '""') + '"' for words in WORDS]
    rows = [f"{i}.png,{cell}\n" for i, cell in enumerate(cells)]
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(rows), encoding="utf-8")


def side_files(folder):
    for i, words in enumerate(WORDS):
        png(folder / f"{i}.png")
        (folder / f"{i}{'.caption' if i % 2 else '.txt'}").write_text(words + "\n", encoding="utf-8")


def geneval(folder):
    for i, words in enumerate(WORDS):
        for k in range(2):
            png(folder / f"{i:05d}" / "samples" / f"{k:05d}.png")
        (folder / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps({"tag": "single_object", "prompt": words}))
        png(folder / f"{i:05d}" / "grid.png")


def t2i_compbench(folder):
    for i, words in enumerate(["a green bench and a blue bowl", "a blue bench and a green bowl"]):
        png(folder / f"{words}_{i:06d}.png")


# rows of docs/evaluation.md that need no --prompts
LAYOUTS = {
    "A1111, Forge, SD.Next: PNG": a1111_png,
    "the same with text files": a1111_png_and_text,
    "the same with dynamic prompts": a1111_templates,
    "the same: JPEG": a1111_jpeg,
    "the same: WebP": a1111_webp,
    "SwarmUI": swarmui,
    "Fooocus: PNG": fooocus_png,
    "Fooocus: JPEG, WebP": fooocus_jpeg,
    "Fooocus: A1111's scheme": fooocus_a1111,
    "Fooocus without metadata": fooocus_log,
    "InvokeAI 3 and later": invokeai,
    "InvokeAI 2": invokeai_2,
    "NovelAI": novelai,
    "ComfyUI: PNG": comfyui_png,
    "ComfyUI: WebP": comfyui_webp,
    "Hugging Face image folder": image_folder,
    "the same with metadata.csv": image_folder_csv,
    "captions beside pictures": side_files,
    "GenEval": geneval,
    "T2I-CompBench": t2i_compbench,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompts_as_programs_keep_them(tmp_path, name):
    LAYOUTS[name](tmp_path / "x")
    found = read_folder(tmp_path / "x", None)
    if name == "T2I-CompBench":
        assert all(item.file.startswith(f"{item.text}_") for item in found.items) and len(found.items) == 2
        return
    order = {words: [item.file for item in found.items if item.text == words] for words in WORDS}
    assert all(order.values()) and {item.text for item in found.items} == set(WORDS)
    numbers = [int(re.findall(r"\d", files[0].replace("samples", ""))[-1]) for files in order.values()]
    assert name == "GenEval" or numbers == sorted(numbers), "each file its own prompt"
    assert f"{len(found.items)} pictures of {len(WORDS)} prompts, by " in found.notes[0]


# by names, with --prompts

MANY = [f"prompt number {i}" for i in range(12)]
NAMES = {
    "img_{n}.png": 1,
    "{i}.png": 0,
    "{n}.png": 1,
    "ComfyUI_{n:05d}_.png": 1,
    "{i:05d}-{seed}.png": 0,
    "sd15_{i}.png": 0,
    "{seed}-{i:05d}.png": 0,
}


@pytest.mark.parametrize("pattern", NAMES)
def test_numbers_that_count_the_set(tmp_path, pattern):
    for i in range(12):
        png(tmp_path / "x" / pattern.format(i=i, n=i + 1, seed=987654 - i))
    found = read_folder(tmp_path / "x", given(*MANY))
    wanted = {pattern.format(i=i, n=i + 1, seed=987654 - i): words for i, words in enumerate(MANY)}
    assert {item.file: item.text for item in found.items} == wanted
    assert [item.prompt for item in found.items] == list(range(12))
    first, last = (pattern.format(i=i, n=i + 1, seed=987654 - i) for i in (0, 11))
    assert f"12 pictures of 12 prompts, by the number in their names, from {NAMES[pattern]}" in found.notes[0]
    assert f"first and last {first}: prompt number 0; {last}: prompt number 11" in found.notes[0]


@pytest.mark.parametrize("pattern", ["{i:05d}-{k}", "{i}_{k}", "p{i}_s{k}", "{i:05d}_seed{k}", "seed{k}_prompt{i}"])
def test_several_images_a_prompt(tmp_path, pattern):
    for i in range(4):
        for k in range(3):
            png(tmp_path / "x" / f"{pattern.format(i=i, k=k)}.png")
    items = read_folder(tmp_path / "x", given(*MANY[:4])).items
    assert [(i.file, i.prompt, i.seed_index) for i in items] == [
        (f"{pattern.format(i=i, k=k)}.png", i, k) for i in range(4) for k in range(3)
    ]


REFUSED = {
    "one fewer": ([f"{n}.png" for n in range(1, 12)], "hold numbers 1 to 11, 11 of them, and there are 12 prompts"),
    "one more": ([f"{n}.png" for n in range(13)], "numbers 0 to 12, 13 of them"),
    "a gap": ([f"{n}.png" for n in (*range(11), 12)], "numbers 0 to 12, 12 of them"),
    "seeds only": ([f"x_seed{k}.png" for k in range(12)], "and there are 12 prompts"),
    "no numbers": ([f"{'abcdefghijkl'[k]}.png" for k in range(12)], "names of several patterns"),
    "two patterns": ([f"{'ab'[k % 2]}_{k}.png" for k in range(12)], r"several patterns \(a_0, b_1\)"),
    "groups of prompts": ([f"{i}-{k}.png" for i in range(4) for k in range(3)], "numbers 0 to 3, 4 of them"),
    "a later number": (
        [f"{j}-{i}.png" for j in range(2) for i in range(12)],
        "the first number in names like 0-0 does not count",
    ),
    "two that count": ([f"{i}-{k}.png" for i in range(12) for k in range(12)], "two numbers in names like 0-0 count"),
    "sdo's names from 1": ([f"{n:05d}_01.png" for n in range(1, 12)], "numbers 1 to 11, 11 of them"),
    "another number as digits": ([f"{n}{'²'}.png" for n in range(1, 12)], "numbers 1 to 11, 11 of them"),
    "batches": ([f"b{c // 4}_{c % 4}.png" for c in range(46)], "names like b0_0 has 2 to 4 pictures each"),
    "a square": ([f"{c // 12}_{c}.png" for c in range(144)], "12 pictures for each of 12, so either number may count"),
    "equal numbers": ([f"{n:0{w}d}.png" for n in range(1, 13) for w in (2, 3)], "two names hold the same number"),
    "called alike": ([f"{i}-{k}.{e}" for i in range(12) for k in (5, 6) for e in ("bmp", "jpg")], "are called 0-5"),
    "epochs": ([f"epoch{n}_sample{k}.png" for n in range(1, 13) for k in range(8)], "numbers 0 to 7, 8 of them"),
    "steps alone": ([f"step_{n}.png" for n in range(1, 13)], "no number that counts"),
    "p may be a picture": ([f"{i}_p{k}.png" for i in range(12) for k in range(12)], "two numbers in names like 0_p0"),
    "twice": ([f"x{k}.{e}" for k in range(12) for e in ("bmp", "jpg")], "two pictures are called x0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_guess_is_refused(tmp_path, name):
    files, said = REFUSED[name]
    for file in files:
        png(tmp_path / "x" / file)
    with pytest.raises(RecipeFault, match=f"would be a guess: .*{said}.*; write metadata.jsonl"):
        read_folder(tmp_path / "x", given(*MANY))


def test_all_pictures_of_a_sets_only_prompt(tmp_path):
    for name in ("b.png", "a.png"):
        png(tmp_path / "x" / name)
    assert texts(tmp_path / "x", given("a red bus")) == {"a.png": "a red bus", "b.png": "a red bus"}


def test_the_first_prompts_of_a_set(tmp_path):
    for i in range(3):
        png(tmp_path / "x" / f"{i}.png")
        png(tmp_path / "all" / f"{i}.png")
    for i in range(3, 12):
        png(tmp_path / "all" / f"{i}.png")
    for folder in ("x", "all"):
        found = read_folder(tmp_path / folder, given(*MANY), limit=3)
        assert [(item.file, item.text) for item in found.items] == [(f"{i}.png", MANY[i]) for i in range(3)]
    variants, prompts, _notes = folder_variants([tmp_path / "x", tmp_path / "all"], given(*MANY), 3)
    assert [len(v.items or ()) for v in variants] == [3, 3] and len(prompts.prompts) == 3


def test_dpg_bench_names_pictures_as_prompt_files(tmp_path):
    names = ["0", "1", "2", "5", "10", "COCOval2014000000000042", "drawtext0", "whoops1"]
    (tmp_path / "prompts").mkdir()
    for name in names:
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"the prompt of {name}")
        png(tmp_path / "x" / f"{name}.png")
        for k in range(2):
            png(tmp_path / "several" / f"{name}_{k}.png")
    prompts = of_path(tmp_path / "prompts")
    assert prompts.categories == [], "a prompt's own file is no category"
    assert texts(tmp_path / "x", prompts) == {f"{name}.png": f"the prompt of {name}" for name in names}
    several = texts(tmp_path / "several", prompts)
    assert several == {f"{name}_{k}.png": f"the prompt of {name}" for name in names for k in range(2)}
    assert [p.text for p in prompts.prompts][3:5] == ["the prompt of 5", "the prompt of 10"], "natural order"


def test_pictures_named_by_the_ids_of_a_table(tmp_path):
    (tmp_path / "t.csv").write_text("id,prompt\n42,a red bus\n7,a cat\n")
    for name in ("000042", "000007"):
        png(tmp_path / "x" / f"{name}.png")
    assert texts(tmp_path / "x", of_path(tmp_path / "t.csv")) == {"000042.png": "a red bus", "000007.png": "a cat"}
    # ids that count rows otherwise than the rows do
    (tmp_path / "t.csv").write_text("id,prompt\n2,a red bus\n1,a cat\n")
    for name in ("1", "2"):
        png(tmp_path / "y" / f"{name}.png")
    with pytest.raises(RecipeFault, match=r"1.png is prompt 2 by the names of the prompts, and prompt 1 by the number"):
        read_folder(tmp_path / "y", of_path(tmp_path / "t.csv"))


def test_the_prompt_in_the_name_beats_the_order(tmp_path):
    words = ["a green bench and a blue bowl", "a sign that says: 'no/way'?", "route 66", "a cat"]
    for i, text in enumerate(words):
        name = re.sub(r"[:/?']", "_", text)
        png(tmp_path / "x" / f"{name}_{i * 10:06d}.png")
    assert sorted(texts(tmp_path / "x", given(*words)).values()) == sorted(words)
    # cut by the program, but still the beginning of one prompt only
    png(tmp_path / "cut" / "a green bench and a blue_000.png")
    png(tmp_path / "cut" / "a green bench and a red_001.png")
    cut = texts(tmp_path / "cut", given("a green bench and a red bowl", "a green bench and a blue bowl"))
    assert list(cut.values()) == ["a green bench and a red bowl", "a green bench and a blue bowl"]
    png(tmp_path / "both" / "route_66.png")
    png(tmp_path / "both" / "a cat_1.png")
    with pytest.raises(RecipeFault, match="would be a guess"):
        read_folder(tmp_path / "both", given("route", "route 66", "a cat"))


def test_hpsv2s_four_styles(tmp_path):
    styles = ("anime", "concept-art", "paintings", "photo")
    (tmp_path / "prompts").mkdir()
    for style in styles:
        (tmp_path / "prompts" / f"{style}.json").write_text(json.dumps([f"{style} prompt {i}" for i in range(3)]))
        for i in range(3):
            png(tmp_path / "x" / style / f"{i:05d}.jpg")
    found = read_folder(tmp_path / "x", of_path(tmp_path / "prompts"))
    assert [(i.file, i.text, i.category) for i in found.items][3:5] == [
        ("concept-art/00000.jpg", "concept-art prompt 0", "concept-art"),
        ("concept-art/00001.jpg", "concept-art prompt 1", "concept-art"),
    ]
    with pytest.raises(RecipeFault, match="folders are HPSv2's styles; give its prompts: --prompts hpsv2"):
        read_folder(tmp_path / "x", None)
    (tmp_path / "x" / "photo" / "00002.jpg").unlink()
    with pytest.raises(RecipeFault, match="in photo/, the names hold numbers 0 to 1, 2 of them, and there are 3"):
        read_folder(tmp_path / "x", of_path(tmp_path / "prompts"))


def test_folders_inside_are_named_not_scored(tmp_path):
    png(tmp_path / "x" / "samples" / "0.png")
    with pytest.raises(
        RecipeFault, match=r"in folders inside it \(samples\); give one of them, as in --images .*samples"
    ):
        read_folder(tmp_path / "x", given("a", "b"))
    png(tmp_path / "x" / "0.png", {"parameters": a1111("a red bus")})
    png(tmp_path / "x" / "xyz_grid-0001-7.png", {"parameters": a1111("a red bus")})
    (tmp_path / "x" / "a.avif").write_bytes(b"")
    said = "\n".join(read_folder(tmp_path / "x", None).notes)
    assert "1 picture in folders inside it (samples) not scored" in said
    assert "1 sheet of several pictures not scored, xyz_grid-0001-7.png first" in said
    assert "1 file of kinds that sdo does not read not scored, a.avif first" in said


def test_pictures_that_a_metadata_file_does_not_list_are_counted(tmp_path):
    image_folder(tmp_path / "x")
    png(tmp_path / "x" / "train" / "9999.png")
    assert (
        "1 picture not in metadata.jsonl and not scored, train/9999.png first"
        in read_folder(tmp_path / "x", None).notes[1]
    )
    with (tmp_path / "x" / "metadata.jsonl").open("a") as stream:
        stream.write(json.dumps({"file_name": "train/0.png", "text": "another"}) + "\n")
    with pytest.raises(RecipeFault, match=r"metadata.jsonl:5: names train/0.png a second time"):
        read_folder(tmp_path / "x", None)
    (tmp_path / "x" / "metadata.jsonl").write_text("")
    with pytest.raises(RecipeFault, match=r"metadata.jsonl lists no picture"):
        read_folder(tmp_path / "x", None)
    (tmp_path / "x" / "metadata.jsonl").write_bytes('{"file_name": "Bär.png"}'.encode("latin-1"))
    with pytest.raises(RecipeFault, match=r"metadata.jsonl is not UTF-8 text"):
        read_folder(tmp_path / "x", None)


# prompts given beside prompts stated


def test_what_a_folder_states_has_to_be_in_the_set_given(tmp_path):
    image_folder(tmp_path / "x")
    turned = list(reversed(WORDS))
    found = read_folder(tmp_path / "x", given(*turned))
    assert [(i.text, i.prompt) for i in found.items] == list(zip(turned, range(4), strict=True)), "the set's order"
    with pytest.raises(
        RecipeFault, match=r"metadata.jsonl says of train/0.png: a red bus, which --prompts does not hold"
    ):
        read_folder(tmp_path / "x", given("a", "b", "c", "d"))


def test_words_inside_agree_with_the_set_given_or_are_said(tmp_path):
    for i, words in enumerate(["a red bus, masterpiece", "a cat, masterpiece"]):
        png(tmp_path / "x" / f"{i}.png", {"parameters": a1111(words)})
    found = read_folder(tmp_path / "x", given("a red bus", "a cat"))
    assert [i.text for i in found.items] == ["a red bus", "a cat"]
    assert "(inside 2 of them are other words, a red bus, masterpiece first)" in found.notes[0]
    with pytest.raises(
        RecipeFault, match=r"0.png is a cat by the number in their names, from 0, but the text inside them"
    ):
        read_folder(tmp_path / "x", given("a cat", "a red bus"))
    # the words themselves, in another order than the names count
    for i, words in enumerate(["a cat", "a red bus"]):
        png(tmp_path / "y" / f"{i}.png", {"parameters": a1111(words)})
    assert texts(tmp_path / "y", given("a red bus", "a cat")) == {"1.png": "a red bus", "0.png": "a cat"}


def test_the_longest_prompt_inside_is_the_one_meant(tmp_path):
    for i, words in enumerate(["a cat on a mat, masterpiece", "a cat, masterpiece"]):
        png(tmp_path / "x" / f"{i}.png", {"parameters": a1111(words)})
    with pytest.raises(
        RecipeFault, match=r"0.png is a cat by the number .*, but the text inside them says a cat on a mat"
    ):
        read_folder(tmp_path / "x", given("a cat", "a cat on a mat"))
    assert len(read_folder(tmp_path / "x", given("a cat on a mat", "a cat")).items) == 2
    # a text beside one picture alone
    png(tmp_path / "y" / "0.png")
    png(tmp_path / "y" / "1.png")
    (tmp_path / "y" / "0.txt").write_text("a cat on a mat")
    with pytest.raises(
        RecipeFault, match=r"0.png is a cat by the number .*, but the .txt beside each says a cat on a mat"
    ):
        read_folder(tmp_path / "y", given("a cat", "a cat on a mat"))


def test_prompts_that_a_name_cannot_tell_apart(tmp_path):
    for name in ("a cat_0.png", "a bus_1.png"):
        png(tmp_path / "x" / name)
    with pytest.raises(RecipeFault, match="would be a guess"):
        read_folder(tmp_path / "x", given("a cat!", "a cat?", "a bus"))
    assert len(read_folder(tmp_path / "x", given("a cat!", "a bus")).items) == 2


def test_text_of_no_one_prompt_is_said_where_names_decide(tmp_path):
    for i in range(2):
        png(tmp_path / "x" / f"{i}.png", {"parameters": "two\nlines"})
    said = read_folder(tmp_path / "x", given("a", "b")).notes[0]
    assert "(2 of them hold text of no one prompt, 0.png: its text has no line of settings" in said


def test_what_was_settled_is_what_is_opened_again(tmp_path):
    """Two pictures of one prompt: read again by the folder's own prompts, the second would get the next prompt."""
    for i, words in enumerate(["a cat", "a cat", "a dog"]):
        png(tmp_path / "x" / f"{i}.png", {"parameters": a1111(words)})
    variants, prompts, _notes = folder_variants([tmp_path / "x"], None)
    job = Job(prompts, None, variants, {"colorfulness": RewardSpec("colorfulness")}, embedding=False)
    again = job_from(json.loads(json.dumps(job_tree(job))))
    assert again == job
    items = Evaluation(again, tmp_path / "e").items["x"]
    assert [(i.file, i.text) for i in items] == [("0.png", "a cat"), ("1.png", "a cat"), ("2.png", "a dog")]


def test_folders_of_equal_prompts_in_another_order_are_compared(tmp_path):
    for folder, order in (("a", ["a cat", "a dog", "a dog"]), ("b", ["a dog", "a cat"]), ("c", ["a dog", "a fox"])):
        for i, words in enumerate(order):
            png(tmp_path / folder / f"{i}.png", {"parameters": a1111(words)})
    variants, prompts, _notes = folder_variants([tmp_path / "a", tmp_path / "b"], None)
    assert [prompt.text for prompt in prompts.prompts] == ["a cat", "a dog"]
    assert [(i.file, i.prompt, i.text) for i in variants[1].items or ()] == [
        ("1.png", 0, "a cat"),
        ("0.png", 1, "a dog"),
    ]
    with pytest.raises(RecipeFault, match="has other prompts"):
        folder_variants([tmp_path / "a", tmp_path / "c"], None)


def table(path, head, *rows):
    path.write_text("\n".join([head, *rows]))
    return of_path(path)


@pytest.mark.parametrize("column", ["file_name", "image", "image_path", "filepath", "url", "Output"])
@pytest.mark.parametrize("value", ["img_{n}.png", "renders\\\\img_{n}.tiff", "old/renders/IMG_{n}.PNG"])
def test_a_table_that_names_the_picture_of_each_prompt_is_believed(tmp_path, column, value):
    """Rows sorted as text, as `sorted(os.listdir())` gives them; an id that counts rows says nothing then."""
    order = sorted(range(12), key=lambda n: f"img_{n}")
    for n in order:
        png(tmp_path / "x" / f"img_{n}.png")
    rows = [f"{k},{value.format(n=n)},prompt of {n}" for k, n in enumerate(order)]
    found = read_folder(tmp_path / "x", table(tmp_path / "p.csv", f"id,{column},prompt", *rows))
    assert {item.file: item.text for item in found.items} == {f"img_{n}.png": f"prompt of {n}" for n in range(12)}
    assert "by the picture that each prompt's row names" in found.notes[0]


def test_a_table_that_names_some_of_the_pictures_is_refused(tmp_path):
    for n in range(3):
        png(tmp_path / "x" / f"{n}.png")
    with pytest.raises(RecipeFault, match=r"name the picture of each, and 2.png is in none"):
        read_folder(tmp_path / "x", table(tmp_path / "p.csv", "image,prompt", "1.png,a", "0.png,b", "9.png,c"))
    with pytest.raises(RecipeFault, match=r"two prompts name 0.png"):
        read_folder(
            tmp_path / "x", table(tmp_path / "p.csv", "image,prompt", "1.png,a", "0.png,b", "0.jpg,c", "2.png,d")
        )
    # the photographs that captions were written of
    found = read_folder(
        tmp_path / "x", table(tmp_path / "p.csv", "image,prompt", "COCO_7.jpg,a", "COCO_3.jpg,b", "COCO_9.jpg,c")
    )
    assert [item.text for item in found.items] == ["a", "b", "c"]


def test_pictures_of_one_name_in_several_folders_are_told_apart_by_their_path(tmp_path):
    for kind in ("anime", "photo"):
        for n in range(2):
            png(tmp_path / "x" / kind / f"{n}.png")
    rows = [f"{kind}/{n}.png,{kind},{kind} {n}" for n in (1, 0) for kind in ("photo", "anime")]
    found = read_folder(tmp_path / "x", table(tmp_path / "p.csv", "image,category,prompt", *rows))
    assert all(item.text == item.file.replace("/", " ")[:-4] for item in found.items) and len(found.items) == 4


def test_numbers_that_are_ids_of_other_prompts_are_a_guess(tmp_path):
    for n in (1, 2, 3):
        png(tmp_path / "x" / f"img_{n}.png")
    for ids in ((3, 1, 2), (0, 1, 2)):
        with pytest.raises(RecipeFault, match=r"img_\d.png is prompt \d by the number .* by the ids of the prompts"):
            read_folder(tmp_path / "x", table(tmp_path / "p.csv", "id,prompt", *(f"{n},prompt {n}" for n in ids)))
    found = read_folder(tmp_path / "x", table(tmp_path / "p.csv", "id,prompt", "1,a", "2,b", "3,c"))
    assert [item.text for item in found.items] == ["a", "b", "c"]


def test_names_of_several_lengths_were_not_cut(tmp_path):
    words = ["a photograph of a cat", "a photograph of a red dog"]
    longer = given(*(f"{text}, cinematic lighting" for text in words))
    for text in words:
        png(tmp_path / "x" / f"{text}_7.png")
    with pytest.raises(RecipeFault, match="would be a guess"):
        read_folder(tmp_path / "x", longer)
    for text in longer.prompts:
        png(tmp_path / "z" / f"{text.text[:30]}_7.png")
    assert "by the prompt in their names" in read_folder(tmp_path / "z", longer).notes[0]


@pytest.mark.parametrize("inside", [False, True])
def test_words_that_come_twice_keep_their_category(tmp_path, inside):
    """What the pictures say of their prompt is true of both categories: the folders tell them apart."""
    rows = [f"{text},{kind}" for kind in ("anime", "photo") for text in ("a cat", "a dog")]
    prompts = table(tmp_path / "p.csv", "prompt,category", *rows)
    for kind in ("anime", "photo"):
        for n, text in enumerate(("a cat", "a dog")):
            png(tmp_path / "x" / kind / f"{n:05d}.png", {"parameters": a1111(text)} if inside else None)
    found = read_folder(tmp_path / "x", prompts)
    assert [(item.file[:5], item.category, item.text, item.prompt, item.seed_index) for item in found.items] == [
        (kind, kind, text, k, 0)
        for k, (kind, text) in enumerate((kind, text) for kind in ("anime", "photo") for text in ("a cat", "a dog"))
    ]
    for n, text in enumerate(("a cat", "a dog", "a dog", "a cat")):
        png(tmp_path / "y" / f"{'abcd'[n]}.png", {"parameters": a1111(text)})
    with pytest.raises(RecipeFault, match="a cat is in several categories, and which picture is of which"):
        read_folder(tmp_path / "y", prompts)


def test_a_prompt_that_comes_twice_stays_two_prompts(tmp_path):
    for n, text in enumerate(("a cat", "a dog", "a cat")):
        png(tmp_path / "x" / f"{n}.png", {"parameters": a1111(text)})
    assert [item.prompt for item in read_folder(tmp_path / "x", given("a cat", "a dog", "a cat")).items] == [0, 1, 2]


def test_a_prompt_folder_of_geneval_without_its_prompt_is_refused(tmp_path):
    geneval(tmp_path / "x")
    png(tmp_path / "x" / "stray.png")
    assert any("1 picture outside samples/ not scored, stray.png first" in note for note in said(tmp_path / "x"))
    last = sorted((tmp_path / "x").glob("*/metadata.jsonl"))[-1]
    last.write_text(last.read_text()[:9])
    with pytest.raises(RecipeFault, match=rf"{last.parent.name}/ has samples/ and no metadata.jsonl that can be read"):
        read_folder(tmp_path / "x", None)


def test_what_is_beside_the_pictures_is_counted(tmp_path):
    folder = tmp_path / "x"
    for name in (
        "0.png",
        "1.jfif",
        "2.jpe",
        "3.png",
        "3-before-highres-fix.png",
        "prompt_matrix-0000-1.png",
        "a/b/c.png",
    ):
        png(folder / name, {"parameters": a1111("a cat")})
    Image.new("RGB", (8, 8)).save(folder / "3.jpg")
    Image.new("RGB", (8, 8)).save(folder / "4.ppm")
    (folder / "5.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("1.txt", "2.txt"):
        (folder / name).write_text("a dog")
    found = read_folder(folder, None)
    assert [item.file for item in found.items] == ["0.png", "3.png", "1.jfif", "2.jpe"]
    notes = "\n".join(found.notes)
    for line in (
        "1 sheet of several pictures not scored, prompt_matrix", "1 copy of PNG files not scored, 3.jpg",
        "1 unfinished stage of pictures not scored, 3-before", "1 link to no file not scored, 5.png",
        "1 file of kinds that sdo does not read not scored, 4.ppm",
    ):  # fmt: skip
        assert line in notes, notes


def test_pictures_without_a_suffix_are_known_by_how_they_begin(tmp_path):
    """As hubs and browsers' caches name them; they were passed over without a word."""
    folder = tmp_path / "x"
    png(folder / "a.png", {"parameters": a1111("a cat")})
    (folder / "b").write_bytes((folder / "a.png").read_bytes())
    Image.new("RGB", (8, 8)).save(folder / "c", format="WEBP")
    (folder / "c.txt").write_text("a dog")
    (folder / "LICENSE").write_text("of the pictures")
    (folder / "odd 1.5").write_bytes((folder / "a.png").read_bytes())
    assert texts(folder) == {"a.png": "a cat", "b": "a cat", "c": "a dog"}
    assert said(folder) == ["1 file of kinds that sdo does not read not scored, odd 1.5 first"]
    (folder / "inner").mkdir()
    (folder / "b").rename(folder / "inner" / "b")
    assert "1 picture in folders inside it (inner) not scored" in said(folder)
    assert [path.name for path in reference_files(folder)[0]] == ["a.png", "c", "b"]


def test_black_from_a_block_on_is_said(tmp_path):
    (tmp_path / "x").mkdir()
    noise = Image.effect_noise((64, 64), 90).convert("RGB").point(lambda value: max(value, 1))
    for name in ("a.bmp", "b.bmp"):
        noise.save(tmp_path / "x" / name)
    (tmp_path / "x" / "prompts.txt").write_text("a\n")
    whole = (tmp_path / "x" / "b.bmp").read_bytes()
    (tmp_path / "x" / "b.bmp").write_bytes(whole[:8192] + bytes(len(whole) - 8192))
    notes = read_folder(tmp_path / "x", given("a")).notes
    assert "x: 1 picture black from a disk's block on, as a copy that was interrupted is; look at b.bmp" in notes


def test_rows_that_contradict_each_other_are_refused(tmp_path):
    for n in range(2):
        png(tmp_path / "x" / f"{n}.png")
    listing = tmp_path / "x" / "metadata.jsonl"
    listing.write_text('{"file_name": "0.png", "prompt": "a"}\n{"file_name": "./0.png", "prompt": "b"}\n')
    with pytest.raises(RecipeFault, match=r"names 0.png a second time"):
        read_folder(tmp_path / "x", None)
    rows = [{"file_name": f"{n}.png", "prompt": f"prompt {n}", "prompt_index": 0} for n in range(2)]
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecipeFault, match=r"prompt_index 0 stands for prompt 0 and for prompt 1"):
        read_folder(tmp_path / "x", None)


# A1111's text


@pytest.mark.parametrize("words", ["two lines\nof prompt", "a cat, on a mat", "a cat"])
@pytest.mark.parametrize("after", [", Version: Fooocus v2.5.5", "", "\nTemplate: x"])
def test_raw_prompts_without_marks_go_on_to_the_next_key(words, after):
    """Fooocus writes marks; without them the words up to a comma or a line's end were taken for all."""
    settings = f"Steps: 30, Sampler: DPM++ 2M, Raw prompt: {words}{after}"
    text = f"{words}, cinematic still\nNegative prompt: {NEGATIVE}\n{settings}"
    assert prompt_of_parameters(text) == " ".join(words.split())


def test_texts_of_a1111_and_its_relatives():
    assert prompt_of_parameters(f"Steps: up the hill\n{SETTINGS}") == "Steps: up the hill"
    assert prompt_of_parameters("two\nlines\nSteps: 20| Sampler: Euler a") == "two lines"
    assert prompt_of_parameters("one line alone") == "one line alone"
    assert prompt_of_parameters(f"a bus <lora:x:1> <hypernet:y:0.5> <lyco:z:1>\n{SETTINGS}") == "a bus"
    with pytest.raises(ValueError, match="no line of settings"):
        prompt_of_parameters("two\nlines")
    with pytest.raises(ValueError, match="names no prompt that is a text"):
        prompt_of_parameters('{"steps": 3}')
    with pytest.raises(ValueError, match="JSON inside it cannot be read"):
        prompt_of_parameters('{"steps": ')


def test_a_text_beside_a_picture_may_be_a_caption_or_a_program_s(tmp_path):
    png(tmp_path / "x" / "0.png", {"parameters": a1111("drawn from this")})
    (tmp_path / "x" / "0.txt").write_text("a caption: by hand\nin two lines\n")
    assert texts(tmp_path / "x") == {"0.png": "a caption: by hand\nin two lines"}
    assert said(tmp_path / "x") == [
        "1 picture with other words beside than inside, the ones beside taken; 0.png first: "
        "a caption: by hand in two lines / drawn from this"
    ]
    (tmp_path / "x" / "0.txt").write_text("masterpiece, drawn from this")
    assert said(tmp_path / "x") == []
    (tmp_path / "x" / "0.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(RecipeFault, match=r"0.txt is not UTF-8 text; write its prompt into a .txt beside it"):
        read_folder(tmp_path / "x", None)


def test_bytes_of_an_exif_comment():
    for encoded in (b"UNICODE\0" + "\ufeffé".encode("utf-16-le"), b"ASCII\0\0\0\xc3\xa9", b"\0" * 8 + b"\xc3\xa9"):
        assert decoded(encoded) == "é"
    assert decoded("Ã©") == "é" and decoded("é") == "é"


def test_old_and_new_pages_of_fooocus(tmp_path):
    png(tmp_path / "x" / "a.png")
    (tmp_path / "x" / "log.html").write_text(
        '<div id="a_png" class="image-container">\n<hr><table><tr>'
        "<td><a href='a.png'><img src='a.png'></img></a></td>"
        "<td><table class='metadata'><tr><td class='key'>Prompt</td><td class='value'>a <b> bus</td></tr>\n"
        "<tr><td class='key'>Negative Prompt</td><td class='value'>no</td></tr>\n</table></td></tr></table></div>"
    )
    assert texts(tmp_path / "x") == {"a.png": "a <b> bus"}


def test_several_prompts_inside_are_refused(tmp_path):
    people = {"prompt": "two girls", "v4_prompt": {"caption": {"char_captions": [{"char_caption": "one"}]}}}
    png(tmp_path / "n.png", {"Software": "NovelAI", "Description": "two girls", "Comment": json.dumps(people)})
    with pytest.raises(ValueError, match="a prompt and 1 of its characters"):
        prompt_inside(tmp_path / "n.png")
    tree = {"image": {"prompt": [{"prompt": "a", "weight": 0.5}, {"prompt": "b", "weight": 0.5}]}}
    png(tmp_path / "i.png", {"sd-metadata": json.dumps(tree)})
    with pytest.raises(ValueError, match="drawn from 2 prompts"):
        prompt_inside(tmp_path / "i.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    with pytest.raises(EnvironmentFault, match=r"broken.png is no readable image"):
        prompt_inside(tmp_path / "broken.png")


BROKEN = [
    {"invokeai_metadata": '{"positive_prompt": 3}'},
    {"invokeai_metadata": "[]"},
    {"sd-metadata": '{"image": "x"}'},
    {"sd-metadata": '{"image": {"prompt": [3]}}'},
    {"Comment": '{"v4_prompt": 3, "prompt": []}', "Software": "NovelAI"},
    {"parameters": '{"sui_image_params": 3}'},
    {"parameters": '{"prompt": {"a": 1}}'},
    {"parameters": 'Steps: 3, Raw prompt: "a \\"b'},
    {"parameters": "{" + '"a": {' * 3},
    {"prompt": json.dumps({"1": {"class_type": None, "inputs": None}})},
    {"prompt": json.dumps({"1": {"class_type": "KSampler", "inputs": [1]}})},
    {"prompt": json.dumps({"1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0], "cfg": 1}}})},
    {"prompt": json.dumps(graph("x", **{"6": {"class_type": "CLIPTextEncode", "inputs": {"text": 5}}}))},
    {"prompt": json.dumps(graph("x", **{"6": {"class_type": "CLIPTextEncode"}}))},
]


@pytest.mark.parametrize("chunks", BROKEN)
def test_broken_text_inside_is_a_sentence(tmp_path, chunks):
    png(tmp_path / "x" / "0.png", chunks)
    with pytest.raises(RecipeFault, match=r"0.png: .*; write its prompt into a .txt beside it"):
        read_folder(tmp_path / "x", None)


# ComfyUI's graphs


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def conditioned(**nodes):
    """The default workflow with the sampler on node c."""
    found = graph("a red bus", **nodes)
    found["3"]["inputs"]["positive"] = ["c", 0]
    return found


TWO = {"t": node("CLIPTextEncode", text="at night", clip=["4", 1])}
GRAPHS = {
    "primitive": (
        graph("x", **{"6": node("CLIPTextEncode", text=["p", 0]), "p": node("PrimitiveNode", value="a red bus")}),
        "a red bus",
    ),
    "text nodes joined": (
        graph(
            "x",
            **{
                "6": node("CLIPTextEncode", text=["j", 0]),
                "j": node("StringConcatenate", string_a="a red bus", string_b=["p", 0], delimiter=", "),
                "p": node("PrimitiveStringMultiline", value="at night"),
            },
        ),
        "a red bus, at night",
    ),
    "conditions joined": (
        conditioned(c=node("ConditioningConcat", conditioning_to=["6", 0], conditioning_from=["t", 0]), **TWO),
        "a red bus at night",
    ),
    "controlnet": (
        conditioned(c=node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], strength=1.0)),
        "a red bus",
    ),
    "guidance of flux": (conditioned(c=node("FluxGuidance", conditioning=["6", 0], guidance=3.5)), "a red bus"),
    "sdxl": (
        conditioned(c=node("CLIPTextEncodeSDXL", text_g="a red bus", text_l="a red bus", width=8, clip=["4", 1])),
        "a red bus",
    ),
    "guider": (
        graph(
            "a red bus",
            **{
                "3": node("SamplerCustomAdvanced", noise=["n", 0], guider=["g", 0], latent_image=["5", 0]),
                "g": node("BasicGuider", model=["4", 0], conditioning=["6", 0]),
            },
        ),
        "a red bus",
    ),
    "two passes": (
        graph(
            "a red bus",
            **{
                "h": node("KSampler", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["3", 0]),
                "8": node("VAEDecode", samples=["h", 0], vae=["4", 2]),
            },
        ),
        "a red bus",
    ),
    "nodes beside": (graph("a red bus", x=node("CLIPTextEncode", text="unused", clip=["4", 1])), "a red bus"),
    "loader": (
        graph("x", **{"6": node("Efficient Loader", ckpt_name="x", positive="a red bus", negative="blurry")}),
        "a red bus",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_comfyuis_graphs(name):
    tree, wanted = GRAPHS[name]
    assert prompt_of_graph(json.loads(json.dumps(tree))) == wanted


UNCLEAR = {
    "regions": (
        conditioned(c=node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["t", 0]), **TWO),
        "several prompts: 'a red bus' and 'at night'",
    ),
    "average": (
        conditioned(c=node("ConditioningAverage", conditioning_to=["6", 0], conditioning_from=["t", 0]), **TWO),
        "several prompts",
    ),
    "encoders": (conditioned(c=node("CLIPTextEncodeFlux", clip_l="a bus", t5xxl="a red bus")), "several prompts"),
    "two pictures": (
        graph(
            "a red bus",
            s=node("KSampler", model=["4", 0], positive=["t", 0], negative=["7", 0], latent_image=["5", 0]),
            v=node("VAEDecode", samples=["s", 0], vae=["4", 2]),
            i=node("SaveImage", images=["v", 0]),
            **TWO,
        ),
        "several prompts",
    ),
    "made up": (
        graph(
            "x", **{"6": node("CLIPTextEncode", text=["d", 0]), "d": node("DPRandomGenerator", text="a {red|blue} bus")}
        ),
        "takes the prompt from DPRandomGenerator",
    ),
    "boxes": (
        conditioned(c=node("GLIGENTextBoxApply", conditioning_to=["6", 0], text="a dog", x=0)),
        "goes through GLIGENTextBoxApply",
    ),
    "styled": (
        graph("x", **{"6": node("PromptStylerConditioning", text="a bus", style="photo")}),
        "goes through PromptStylerConditioning",
    ),
    "no sampler": ({"9": node("SaveImage", images=["1", 0]), "1": node("LoadImage", image="x")}, "leads to no prompt"),
    "a circle": (conditioned(c=node("FluxGuidance", conditioning=["c", 0])), "or a circle"),
    "no graph": ({"a": 3}, "not in the form that ComfyUI writes"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_graphs_that_may_mean_several_prompts_are_refused(tmp_path, name):
    tree, said = UNCLEAR[name]
    png(tmp_path / "x" / "ComfyUI_00001_.png", {"prompt": json.dumps(tree)})
    with pytest.raises(RecipeFault, match=f"ComfyUI_00001_.png: its ComfyUI graph .*{said}"):
        read_folder(tmp_path / "x", None)
    # by a name at its word it may still be scored
    assert len(read_folder(tmp_path / "x", given("a red bus")).items) == 1


# the command


def test_the_pairing_is_shown_and_a_guess_ends_with_2(tmp_path):
    for n in range(1, 13):
        png(tmp_path / "x" / f"img_{n}.png")
    (tmp_path / "p.txt").write_text("".join(f"{words}\n" for words in MANY))
    words = [
        "eval",
        "--images",
        "x",
        "--prompts",
        "p.txt",
        "--rewards",
        "colorfulness",
        "--no-embedding",
        "--no-report",
    ]
    done = entry.run([*words, "--out", "e"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "x: 12 pictures of 12 prompts, by the number in their names, from 1; first and last img_1.png" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "e" / "scores.jsonl").read_text().splitlines()]
    assert {row["image"]: row["prompt"] for row in rows} == {f"img_{n}.png": n - 1 for n in range(1, 13)}
    (tmp_path / "x" / "img_12.png").unlink()
    done = entry.run([*words, "--out", "f"], cwd=tmp_path)
    assert done.returncode == 2 and "would be a guess" in done.stderr and "metadata.jsonl" in done.stderr
    assert not (tmp_path / "f").exists()


def test_the_table_in_the_docs_is_this_file():
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    rows = [
        line.split("|")[1].strip()
        for line in page.split("## Folders made elsewhere")[1].split("\n## ")[0].splitlines()
        if line.startswith("| ") and "---" not in line
    ][1:]
    assert set(LAYOUTS) <= set(rows)
