"""`sdo sample --grid`: what varies side by side, each picture as it is drawn alone."""

import json
import shutil

import entry
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from test_parallel import finish, start

from sdo_cli.drawing import grid as drawing_grid
from sdo_cli.drawing import sheet as drawing_sheet
from sdo_cli.drawing.axes import MOST_SHEETS, Values, laid_out
from sdo_cli.drawing.grid import lora_labels
from sdo_cli.drawing.sheet import MOST_AREA, MOST_SIDE, Words, font_of, wrapped, write_sheet
from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.load import load_family
from sdo_cli.models.lora_variants import LoraVariants

TIGER = "a tiger on a teal background"


def sdo(*arguments, cwd):
    return entry.run(arguments, cwd=cwd)


def text_of(path):
    return Image.open(path).text["parameters"]


def made(folder, seed, *, text=False, **config):
    """A LoRA of the embedded model that does something visible; with ``text`` to its text encoder too."""
    family = load_family("embedded")
    generator = torch.Generator().manual_seed(seed)
    for part in (family.denoiser, *(family.text_encoders.values() if text else ())):
        names = ["to_q", "to_v"] if part is family.denoiser else ["q_proj", "v_proj"]
        part.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names, **config), adapter_name="default")
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    family.save_lora(folder)
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """A folder with the LoRAs a, and b whose prompts are read otherwise too."""
    root = tmp_path_factory.mktemp("loras")
    made(root / "a", 1)
    made(root / "b", 2, text=True)
    return root


@pytest.fixture(scope="module")
def drawn(loras):
    """The command of a LoRA maker, small: two LoRAs, three scales, two seeds."""
    words = ["--lora", "a", "--lora", "b", "--lora-scale", "0,0.5,1", "--seeds", "2", "--seed", "3", "--steps", "2"]
    done = sdo("sample", TIGER, *words, "--grid", "--out", "drawn", cwd=loras)
    assert done.returncode == 0, done.stderr
    return done


ORDER = [(None, 0), ("a", 0.5), ("a", 1), ("b", 0.5), ("b", 1)]


def test_one_sheet_with_the_plain_model_once(drawn, loras):
    assert "2 --lora, side by side; one word A+B draws both at once" in drawn.stderr
    said = "10 images of 2 steps\ngrid: rows seeds (2), columns variants (5), the same seeds 3 to 4 throughout\n"
    assert said in drawn.stderr
    files = sorted(path.name for path in (loras / "drawn").iterdir())
    assert files == [*(f"{number:05d}.png" for number in range(10)), "grid.png"]
    for number, ((lora, scale), seed) in enumerate((variant, seed) for variant in ORDER for seed in (3, 4)):
        first, settings = text_of(loras / "drawn" / f"{number:05d}.png").splitlines()
        assert first == (TIGER if lora is None else f"{TIGER} <lora:{lora}:{scale:g}>")
        assert f"Steps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: {seed}," in settings
    pictures = {(loras / "drawn" / f"{number:05d}.png").read_bytes() for number in range(10)}
    assert len(pictures) == 10


def test_every_picture_is_the_one_that_is_drawn_alone(drawn, loras, tmp_path):
    for number, (lora, scale) in enumerate(ORDER):
        words = [] if lora is None else ["--lora", str(loras / lora), "--lora-scale", str(scale)]
        done = sdo("sample", TIGER, *words, "--seed", "4", "--steps", "2", "--out", str(number), "-q", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        alone = (tmp_path / str(number) / "00000.png").read_bytes()
        assert (loras / "drawn" / f"{2 * number + 1:05d}.png").read_bytes() == alone, (lora, scale)


def test_the_sheet_shows_the_files_under_their_columns(drawn, loras):
    sheet = Image.open(loras / "drawn" / "grid.png").convert("RGB")
    side = drawing_sheet.LEAST_CELL
    for row in range(2):
        for column in range(5):
            tile = Image.open(loras / "drawn" / f"{2 * column + row:05d}.png").convert("RGB")
            tile = tile.resize((side, side), Image.Resampling.LANCZOS)
            # counted from the last corner: heads stand left and above
            right, bottom = sheet.width - (4 - column) * (side + 4) - 4, sheet.height - (1 - row) * (side + 4) - 4
            assert np.array_equal(
                np.asarray(sheet.crop((right - side, bottom - side, right, bottom))), np.asarray(tile)
            )


def test_the_words_of_the_sheet(monkeypatch, loras, tmp_path):
    seen = []
    monkeypatch.setattr(drawing_grid, "write_sheet", lambda words, files, path: seen.append((words, path.name)))
    common = [TIGER, "a rose", "--lora", "a", "--steps", "1,2", "--guidance", "1", "--grid", "-q"]
    done = sdo("sample", *common, "--lora-scale", "0,0.5", "--out", str(tmp_path / "o"), cwd=loras)
    assert done.returncode == 0, done.stderr
    assert [name for _, name in seen] == ["grid-01.png", "grid-02.png"]
    assert seen[1][0] == Words(
        "a · seed 0 · 2 steps · guidance 1", [TIGER, "a rose"], ["scale 0 (no LoRA)", "scale 0.5"]
    )
    assert "2 sheets, grid-01.png to grid-02.png" in done.stdout


def test_the_model_is_loaded_once(monkeypatch, loras, tmp_path):
    loaded = []
    real = drawing_grid.load_family
    monkeypatch.setattr(drawing_grid, "load_family", lambda *a, **k: loaded.append(1) or real(*a, **k))
    words = ["--lora", "a", "--lora", "b", "--lora-scale", "0,1", "--steps", "1", "--guidance", "1", "-q", "--grid"]
    assert sdo("sample", "x", *words, "--out", str(tmp_path / "o"), cwd=loras).returncode == 0
    assert loaded == [1] and len(list((tmp_path / "o").glob("0*.png"))) == 3


def test_several_processes_share_it(loras, tmp_path):
    words = ["sample", TIGER, "--lora", str(loras / "a"), "--lora", str(loras / "b"), "--lora-scale", "0,1"]
    words += ["--steps", "1,2", "--seeds", "2", "--guidance", "2", "--grid"]
    for size in (1, 2):
        codes, _, errs = finish(start(size, [*words, "--out", str(tmp_path / str(size))]))
        assert not any(codes), errs
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("1", "2"))
    assert [p.name for p in one] == [p.name for p in two] and len(one) == 12 + 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


def test_a_stack_is_one_word_in_a_grid_and_several_options_without(loras, tmp_path):
    common = ["sample", TIGER, "--steps", "2", "--seed", "1"]
    beside = sdo(
        *common, "--lora", "a+b:0.5", "--lora", "b", "--grid", "--json", "--out", str(tmp_path / "g"), cwd=loras
    )
    at_once = sdo(*common, "--lora", "a", "--lora", "b:0.5", "--out", str(tmp_path / "s"), cwd=loras)
    assert beside.returncode == at_once.returncode == 0, beside.stderr + at_once.stderr
    assert text_of(tmp_path / "g" / "00000.png").splitlines()[0] == f"{TIGER} <lora:a:1> <lora:b:0.5>"
    assert (tmp_path / "g" / "00000.png").read_bytes() == (tmp_path / "s" / "00000.png").read_bytes()
    assert len(list((tmp_path / "g").glob("0*.png"))) == 2 and len(list((tmp_path / "s").glob("0*.png"))) == 1
    assert "2 --lora, all at once in every picture; --grid lays them side by side" in at_once.stderr
    record = json.loads(beside.stdout)
    assert record["grid"] == str(tmp_path / "g" / "grid.png") and record["grids"] == [record["grid"]]


def test_seeds_are_every_prompts_and_without_them_follow_each_other(tmp_path):
    common = ["sample", TIGER, "a rose", "--steps", "1", "--guidance", "1", "--seed", "5", "-q"]
    for name, words in {"own": ["-n", "2"], "same": ["--seeds", "2"], "grid": ["-n", "2", "--grid"]}.items():
        assert sdo(*common, *words, "--out", name, cwd=tmp_path).returncode == 0
    found = {
        name: [int(text_of(path).partition("Seed: ")[2].partition(",")[0]) for path in sorted(folder.glob("0*.png"))]
        for name in ("own", "same", "grid")
        if (folder := tmp_path / name)
    }
    assert found == {"own": [5, 6, 7, 8], "same": [5, 6, 5, 6], "grid": [5, 6, 5, 6]}
    assert not (tmp_path / "same" / "grid.png").exists()
    # beside another prompt as alone
    alone = ["sample", "a rose", "--steps", "1", "--guidance", "1", "--seed", "6", "-q", "--out", "alone"]
    assert sdo(*alone, cwd=tmp_path).returncode == 0
    assert (tmp_path / "grid" / "00003.png").read_bytes() == (tmp_path / "alone" / "00000.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lora-scale", "0,1", "--lora", "a"], "--lora-scale: a list is for --grid; add --grid, or give one number"),
        (["--steps", "2,4"], "--steps: a list is for --grid"),
        (["--guidance", "1,4"], "--guidance: a list is for --grid"),
        (["--lora-scale", "1_0", "--lora", "a"], "--lora-scale: '1_0' is no plain number; write digits, as 0.8"),
        (["--guidance", "1,4_0", "--grid"], "--guidance: '4_0' is no plain number; write digits, as 7.5"),
        (["--steps", "2.5"], "--steps: '2.5' is no plain whole number; write digits, as 20"),
        (["--steps", "5,0", "--grid"], "--steps: must be between 1 and"),
        (["--lora-scale", "0,2000", "--lora", "a", "--grid"], "--lora-scale: must be between -1000 and 1000, not 2000"),
        (["--lora-scale", "0,1", "--grid"], "--lora-scale: a list is of the weights of a LoRA; add --lora"),
        (["--seeds", "1_0"], "--seeds: must be a whole number between 1 and 1000000, not 1_0"),
        (["--seeds", "2", "-n", "2"], "--num-images: --seeds says how many images a prompt has"),
        (["--rows", "seeds"], "--rows: is of the grid; add --grid"),
        (["--rows", "colour", "--grid"], "--rows: 'colour' is none of prompts, loras, scales, seeds, steps, guidance"),
        (["--rows", "seed", "--columns", "seeds", "--grid"], "--columns: seeds are the rows already"),
        (["--columns", "lora", "--grid"], "--columns: no loras here, there is no --lora"),
        (["--timesteps", "800,100", "--steps", "2,4", "--grid"], "--steps: a list, but --timesteps says the steps"),
        (["--seeds", "101", "--grid"], "--grid: 101 seeds are more than the 100 columns of a sheet"),
        (["--lora", "gone", "--lora", "a", "--grid"], "no LoRA at gone"),
    ],
)
def test_bad_input_is_one_sentence(words, expected, loras, tmp_path):
    done = sdo("sample", "x", *words, "--out", str(tmp_path / "o"), cwd=loras)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.png"))


def values(**given):
    counts = dict.fromkeys(("prompts", "loras", "scales", "seeds", "steps", "guidance"), 1) | given
    return Values(
        tuple(f"p{i}" for i in range(counts["prompts"])),
        tuple(f"l{i}" for i in range(counts["loras"])),
        tuple(i / 2 for i in range(3 - counts["scales"], 3)),
        tuple(range(counts["seeds"])),
        tuple(range(1, 1 + counts["steps"])),
        tuple(float(i) for i in range(counts["guidance"])),
    )


@pytest.mark.parametrize(
    ("given", "rows", "columns", "others"),
    [
        ({}, None, None, []),
        ({"prompts": 3}, "prompts", None, []),
        ({"seeds": 3}, None, "seeds", []),
        ({"prompts": 2, "seeds": 3}, "prompts", "seeds", []),
        ({"loras": 2, "scales": 3}, "loras", "scales", []),
        ({"loras": 2, "seeds": 3}, "seeds", "loras", []),
        ({"steps": 2, "guidance": 3}, "steps", "guidance", []),
        ({"loras": 2, "scales": 3, "seeds": 4}, "seeds", "variants", []),
        ({"loras": 2, "scales": 3, "seeds": 4, "prompts": 2}, "prompts", "variants", ["seeds"]),
        ({"scales": 3, "seeds": 4, "steps": 2}, "seeds", "scales", ["steps"]),
    ],
)
def test_what_is_rows_and_columns(given, rows, columns, others):
    wrong = []
    found = laid_out(values(**given), None, None, wrong)
    assert wrong == [] and (found.rows, found.columns, found.others) == (rows, columns, others)
    counts = [(len(sheet.cells), len(sheet.cells[0])) for sheet in found.sheets()]
    assert counts == [(len(found.line(rows)), len(found.line(columns)))] * found.sheet_count
    # every picture is on a sheet, and nothing else is
    every = values(**given)
    assert {cell for sheet in found.sheets() for row in sheet.cells for cell in row} == set(every.cells())


def test_rows_and_columns_that_were_chosen():
    every = values(loras=2, scales=3, seeds=4)
    for asked, expected in {
        ("loras", "scales"): ("loras", "scales", ["seeds"]),
        ("scale", None): ("scales", "loras", ["seeds"]),
        (None, "seed"): ("variants", "seeds", []),
        ("variants", None): ("variants", "seeds", []),
    }.items():
        wrong = []
        found = laid_out(every, *asked, wrong)
        assert wrong == [] and (found.rows, found.columns, found.others) == expected


def test_too_many_sheets_are_refused_with_the_choice_that_makes_fewest():
    wrong = []
    laid_out(values(prompts=3, seeds=MOST_SHEETS + 1, steps=2), None, None, wrong)
    (said,) = wrong
    assert said == (
        "--grid: prompts (3), seeds (13) and steps (2) vary, which makes 13 sheets of prompts by steps, more than 12; "
        "choose with --rows prompts --columns seeds (2 sheets), or give fewer values"
    )
    wrong = []
    laid_out(values(prompts=5, seeds=5, steps=5, guidance=5), None, None, wrong)
    assert wrong[0].endswith("more than 12; give fewer values")


def measure(text):
    return font_of(20).getlength(text)


def test_words_are_wrapped_and_shortened_in_their_middle():
    prompt = "a wide photograph of a lighthouse keeper who reads a letter by the window while a storm rages, film grain"
    lines = wrapped(prompt, 300, 3, measure)
    assert len(lines) == 3 and all(measure(line) <= 300 for line in lines)
    assert lines[0].startswith("a wide") and lines[-1].endswith("film grain") and "…" in "".join(lines)
    name = "pixel-art_v3-sdxl-step-00000300 at 0.5"
    assert wrapped(name, 300, 4, measure) == ["pixel-art_v3-sdxl-step-", "00000300 at 0.5"]
    unbroken = wrapped("x" * 200 + " at 1", 200, 2, measure)
    assert all(measure(line) <= 200 for line in unbroken) and unbroken[-1].endswith("at 1")
    assert wrapped("a cat", 300, 4, measure) == ["a cat"] and wrapped("", 300, 4, measure) == []


def test_letters_grow_with_the_pictures_and_big_sheets_shrink(tmp_path):
    for side in (64, 512, 1024):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    words = Words("title", ["seed 1"], ["scale 0.5"])
    plans = {side: drawing_sheet._fitting(words, (side, side)) for side in (64, 512, 1024)}
    assert [plans[side].cell[0] for side in plans] == [192, 512, 1024]
    assert [plans[side].letters for side in plans] == [13, 32, 63]
    many = Words("title", ["row"] * 20, ["column"] * 30)
    write_sheet(many, [[tmp_path / "1024.png"] * 30] * 20, tmp_path / "sheet.png")
    width, height = Image.open(tmp_path / "sheet.png").size
    assert max(width, height) <= MOST_SIDE and 0.8 * MOST_AREA < width * height <= MOST_AREA


def test_two_loras_of_one_name_are_told_apart(tmp_path):
    assert lora_labels(["runs/a", "x/b.safetensors:0.5+runs/a"]) == {
        "runs/a": "a", "x/b.safetensors:0.5+runs/a": "b:0.5 + a",
    }  # fmt: skip
    assert lora_labels(["one/best", "two/best"]) == {"one/best": "one/best", "two/best": "two/best"}


def test_a_dora_has_no_other_weight_in_a_grid_either(loras, tmp_path):
    dora = str(made(tmp_path / "dora", 3, use_dora=True))
    family = load_family("embedded")
    LoraVariants(family, [(dora, 1.0)])
    with pytest.raises(EnvironmentFault, match=r"is DoRA, which has no weight but 1: it was asked for 0\.5"):
        LoraVariants(load_family("embedded"), [(dora, 1.0), (dora, 0.5)])


def test_switching_leaves_nothing_behind(loras):
    """Back to the plain model, and to another LoRA, whichever was on before."""
    family, plain = load_family("embedded"), load_family("embedded")
    one = load_family("embedded")
    one.load_lora(str(loras / "b"), scale=0.5)
    a, b = str(loras / "a"), str(loras / "b")
    variants = LoraVariants(family, [(a, 1.0), (b, 0.5), (b, 2.0)])
    assert variants.reads_text(b) and not variants.reads_text(a) and not variants.reads_text(None)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, *family.latent_shape(), generator=generator), torch.tensor([500])
    for lora, scale, expected in ((a, 1.0, None), (b, 2.0, None), (b, 0.5, one), (None, 0.0, plain), (b, 0.5, one)):
        variants.switch(lora, scale)
        if expected is not None:
            ours, theirs = family.encode([TIGER]), expected.encode([TIGER])
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
            with torch.no_grad():
                assert torch.equal(family.network(x, t, ours), expected.network(x, t, theirs))
    assert not any(p.requires_grad for p in family.denoiser.parameters())


def test_a_file_that_is_gone_is_said_before_anything_is_drawn(loras, tmp_path):
    shutil.copytree(loras / "a", tmp_path / "a")
    done = sdo("sample", "x", "--lora", "a", "--lora", ".", "--grid", "--out", "o", cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "o").exists()
