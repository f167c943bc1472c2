"""`sdo optimize` as its users meet it: folders, re-rendering, families, pictures, faults."""

import json
import signal
import time

import entry
import forked
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from small_models import FAMILY_OF, MAKERS

from rewards.clip_encoder import ClipEncoder
from sdo_cli.drawing.pictures import read_image, save_image
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.progress import Silent
from sdo_cli.recipe.steering import load_steering, shipped_steerings, steering_folder
from sdo_cli.seeding import keyed_generator
from sdo_cli.steering.job import begin, prepare
from sdo_cli.steering.objectives import OfReward, Seen, Style, Target, TextEdit, augmented, fitted, gram
from sdo_cli.steering.run import optimize, strip_steps
from sdo_cli.steering.variables_file import read_variables
from sdo_cli.weights.needs import needs_of

TIGER, ROCKET = "a tiger on a teal background", "a rocket on a red background"
QUICK = ["num_inference_steps=4", "batch_size=2"]
# where it does not matter what is drawn
ONCE = ["num_inference_steps=2", "batch_size=2", "steps=1", "strip=0"]


def sdo(*words, **more):
    return entry.run(["optimize", *map(str, words)], **more)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """A folder of three images in two groups, every variable but noise."""
    out = tmp_path_factory.mktemp("optimize") / "out"
    words = ["--prompt", TIGER, "--prompt", ROCKET, "--prompt", "a fish on a blue background", "-o", "clip"]
    words += ["-o", "0.1*aesthetic", "--variables", "latent,embedding-per-step,guidance", "--steps", 4, "--lr", 0.03]
    done = sdo(*words, "--seed", 5, "--out", out, *QUICK, "measures=[judge]", "strip=3")
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_folder_holds_what_came_of_it(steered):
    out, done = steered
    rows = json.loads((out / "results.json").read_text())["images"]
    assert [row["prompt"] for row in rows][:2] == [TIGER, ROCKET] and len(rows) == 3
    loss = {
        when: [r[when]["clip-embedded"] + 0.1 * r[when]["aesthetic-embedded"] for r in rows]
        for when in ("before", "after")
    }
    assert all(after > before for before, after in zip(loss["before"], loss["after"], strict=True))
    assert "judge" in rows[0]["after"] and "judge" in done.stdout
    for name in ("00002.png", "before/00002.png", "strips/00002.png", "grid.png", "curve.png", "report.html"):
        assert (out / name).stat().st_size > 200, name
    assert json.loads((out / "manifest.json").read_text())["status"] == "finished"
    lines = [json.loads(line) for line in (out / "objective.jsonl").read_text().splitlines()]
    assert [(line["images"], line["step"]) for line in lines] == [([0, 2], i) for i in range(5)] + [
        ([2, 3], i) for i in range(5)
    ]
    # a slider shows before on the left and after on the right
    assert '"columns": ["before", "after"]' in (out / "report.html").read_text()
    assert "Steered: clip-embedded, aesthetic-embedded" in (out / "report.html").read_text()


def test_before_is_what_sample_draws(steered, tmp_path):
    out, _ = steered
    words = [TIGER, ROCKET, "--seed", 5, "--steps", 4, "--guidance", 5, "--out", tmp_path / "s", "--batch-size", 2]
    assert entry.run(["sample", *map(str, words)]).returncode == 0
    for name in ("00000.png", "00001.png"):
        assert np.abs(pixels(out / "before" / name).astype(int) - pixels(tmp_path / "s" / name)).max() <= 1


@pytest.mark.parametrize("words", [["solver=lcm"], ["solver=tcd", "eta=0.3"], ["solver=euler-a"], ["solver=ipndm"]])
def test_samplers_with_noise_of_their_own_are_steered_as_they_draw(words, tmp_path):
    """The same noise as `sdo sample`'s before, and again from the saved variables."""
    given = ["num_inference_steps=2", "guidance_scale=2", "strip=0", *words]
    out = ["--out", tmp_path / "out", "-o", "clip", "--variables", "latent", "--seed", 3]
    done = sdo("--prompt", TIGER, *out, "--steps", 2, *given)
    assert done.returncode == 0, done.stderr
    options = [part for word in words for part in (f"--{word.split('=')[0]}", word.split("=")[1])]
    drawn = [TIGER, "--seed", 3, "--steps", 2, "--guidance", 2, "--out", tmp_path / "s", *options]
    assert entry.run(["sample", *map(str, drawn)]).returncode == 0
    before, after = (tmp_path / "out" / name for name in ("before/00000.png", "00000.png"))
    assert np.abs(pixels(before).astype(int) - pixels(tmp_path / "s" / "00000.png")).max() <= 1
    # LCM makes its picture anew at every step: the first latent hardly matters
    if "solver=lcm" not in words:
        assert np.abs(pixels(before).astype(int) - pixels(after)).max() > 3
    again = ["sample", "--variables", str(tmp_path / "out" / "variables.safetensors"), "--out", str(tmp_path / "again")]
    assert entry.run(again).returncode == 0
    assert np.array_equal(pixels(tmp_path / "again" / "00000.png"), pixels(after))


def test_sample_draws_the_saved_variables_again_to_the_bit(steered, tmp_path):
    out, _ = steered
    done = entry.run(["sample", "--variables", str(out / "variables.safetensors"), "--out", str(tmp_path / "again")])
    assert done.returncode == 0, done.stderr
    for number in range(3):
        name = f"{number:05d}.png"
        assert np.array_equal(pixels(out / name), pixels(tmp_path / "again" / name))
        assert not np.array_equal(pixels(out / name), pixels(out / "before" / name))


def test_the_file_holds_variables_and_says_what_they_are(steered):
    out, _ = steered
    with safe_open(out / "variables.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes["latent"] == (3, 4, 16, 16) and shapes["guidance"] == (1, 3)
    assert shapes["embedding.encoder_hidden_states"][:2] == (4, 3)
    saved = read_variables(out)
    assert saved.prompts[0] == TIGER and saved.spec.num_inference_steps == 4


def test_a_file_that_is_none_is_refused(steered, tmp_path):
    out, _ = steered
    whole = (out / "variables.safetensors").read_bytes()
    for name, content in {"cut": whole[:-10], "empty": b"", "text": b"hello world, this is text"}.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(EnvironmentFault, match="cannot read"):
            read_variables(path)
    words = ["sample", "--variables", str(tmp_path / "nowhere.safetensors"), "--out", str(tmp_path / "x")]
    done = entry.run(words)
    assert done.returncode == 2 and "cannot read" in done.stderr and not (tmp_path / "x").exists()
    done = entry.run(["sample", TIGER, "--variables", str(out), "--seed", "1"])
    assert done.returncode == 2 and "--seed: the file of --variables says it" in done.stderr


def test_everything_wrong_is_said_at_once(tmp_path):
    words = [
        "--prompt",
        TIGER,
        "-o",
        "clop",
        "-o",
        f"style:{tmp_path}/no.png",
        "-o",
        "judge",
        "--variables",
        "latnt,noise",
    ]
    done = sdo(*words, "--start", 99, "--rule", "draft-k:k=70", "--lr", -1)
    assert done.returncode == 2
    for text in (
        "did you mean clip?",
        "no picture",
        "only measures",
        "did you mean latent",
        "between 0 and 49",
    ):
        assert text in done.stderr, text
    assert "learning_rate" in done.stderr and "Traceback" not in done.stderr


def test_a_bare_command_says_what_to_write():
    done = sdo()
    assert done.returncode == 2 and "--prompt is missing" in done.stderr and "--recipe style" in done.stderr
    given = sdo("prompts.lines=[a cat]", "objectives=[clip]", "--dry-run")
    assert given.returncode == 0 and "a cat" in given.stdout


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["variables=[guidance]", "guidance_scale=1"], "start guidance at another value"),
        (["variables=[noise]"], "eta above 0"),
        (["variables=[embedding]", "rule=sdo-0"], "which an embedding needs"),
        (["variables=[embedding,embedding-per-step]"], "exclude each other"),
        (["start=3", "norm_prior=0.1"], "no Gaussian"),
        (["variables=[embedding]", "renormalise=true"], "about latents"),
        (["objectives=[{name: 'text:', options: {alpha: 2}}]"], "needs what it aims at"),
        (["objectives=[{name: 'text:x', options: {alpha: [0, 1, 2]}}]"], "between 0 and 1"),
        (["objectives=[{name: 'text:x', options: {model: 'embedded:judge'}}]"], "the judge only measures"),
        (["learning_rates={noise: 1}"], "not among the variables"),
        (["images=[gone.png]", "solver=dpm++2m"], "no single steps"),
        (["num_images=0"], "between 1"),
        (["images=[gone.png]", "num_images=2"], "inverted to one latent"),
        (["inversion_guidance=nan"], "inversion_guidance"),
        (["rule=refl"], "looks at predictions"),
        (["rule=drtune"], "early_stop: 0"),
        (["rule=sdo", "rule_options={steps_per_sample: 2}"], "only the first call counts"),
        (["measures=[clip]"], "stands there twice"),
        (["objectives=[clip, clip-score]"], "stands there twice"),
        (["objectives=[clip]", "measures=[clip-embedded]"], "stands there twice"),
    ],
)
def test_combinations_that_cannot_be(overrides, said):
    given = {"prompts": {"lines": [TIGER]}}
    if not any(word.startswith("objectives") for word in overrides):
        given["objectives"] = ["clip"]
    with pytest.raises(RecipeFault, match=said):
        load_steering(None, given, overrides)


def test_a_folder_in_use_is_left_alone(steered):
    out, _ = steered
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    done = sdo("--prompt", TIGER, "-o", "clip", "--out", out)
    assert done.returncode == 2 and "is not empty" in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_an_interrupted_job_keeps_what_it_reached(tmp_path):
    out = tmp_path / "out"
    words = ["--prompt", TIGER, "--prompt", ROCKET, "-o", "clip", "--steps", "5000", "--out", out]
    process = forked.Forked(["optimize", *map(str, words), "num_inference_steps=4", "batch_size=1"])
    log = out / "objective.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(120)
    assert process.returncode == 130 and "holds 1 of 2 images" in err
    assert json.loads((out / "manifest.json").read_text())["status"] == "interrupted"
    done = entry.run(["sample", "--variables", str(out), "--out", str(tmp_path / "again")])
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(out / "00000.png"), pixels(tmp_path / "again" / "00000.png"))


@pytest.mark.parametrize("name", shipped_steerings())
def test_shipped_recipes_run(name, tmp_path):
    quick = ["steps=1", "num_inference_steps=2", f"start={1 if name == 'style' else 0}", "measures=[]"]
    loaded = load_steering(name, {}, quick)
    assert loaded.spec.description
    assert len(optimize(loaded, tmp_path / "out", Silent())) == len(loaded.prompts)


def test_there_is_a_recipe_for_every_kind_of_objective():
    kinds = {item.kind for name in shipped_steerings() for item in load_steering(name, {}, []).spec.objectives}
    assert kinds == {"reward", "style", "text", "image", "classifier"}


def test_a_classifier_of_a_plug_in_is_raised_and_lowered(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from rewards import reward\n\n\n"
        "@reward('redness', summary='more red than blue')\n"
        "class Redness:\n"
        "    def score(self, images, prompts):\n"
        "        return (images[:, 0] - images[:, 2]).flatten(1).mean(1)\n"
    )
    found = {}
    for sign in (1, -1):
        words = ["--prompt", TIGER, "-o", f"{sign}*classifier:redness", "--steps", 4, "--lr", 0.1, "--plugin", plugin]
        done = sdo(*words, "--out", tmp_path / f"o{sign}", "--json", "-q", *ONCE[:2])
        assert done.returncode == 0, done.stderr
        row = json.loads(done.stdout.splitlines()[-1])["images"][0]
        found[sign] = row["after"]["classifier:redness"] - row["before"]["classifier:redness"]
    assert found[1] > 0.01 and found[-1] < -0.01


def test_missing_weights_are_said_with_the_line_that_gets_them(tmp_path):
    words = ["--prompt", TIGER, "-o", "hps", "-m", "nobody/nothing"]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(sdo(*words, "--dry-run").stdout)
    for more, named in ((words, "RECIPE.yaml"), (["--recipe", recipe], str(recipe))):
        done = sdo(*more, "--out", tmp_path / "out")
        assert done.returncode == 2 and f"sdo fetch {named}" in done.stderr
        assert "nobody/nothing" in done.stderr and "HPS_v2.1" in done.stderr
        assert not (tmp_path / "out").exists()
    done = entry.run(["fetch", str(recipe), "--list"])
    assert done.returncode == 0 and "nobody/nothing" in done.stdout and "HPS_v2.1" in done.stdout
    assert "nothing to fetch" in entry.run(["fetch", "style", "--list"]).stdout


def test_its_recipes_are_listed_shown_copied_and_checked(tmp_path):
    assert "colours and texture" in entry.run(["recipe", "list"]).stdout
    assert "style:waves.png" in entry.run(["recipe", "show", "style"]).stdout
    copy = tmp_path / "mine.yaml"
    assert "sdo optimize --recipe" in entry.run(["recipe", "copy", "style", str(copy)]).stdout
    # the picture is found though only the recipe was copied
    assert "3 prompts to steer" in entry.run(["recipe", "check", str(copy)]).stdout
    bad = entry.run(["recipe", "check", str(copy), "start=70"])
    assert bad.returncode == 2 and "between 0 and 49" in bad.stderr


def test_a_target_picture_needs_no_clip():
    picture = steering_folder() / "waves.png"
    given = {"prompts": {"lines": [TIGER]}, "objectives": [f"image:{picture}"], "model": "nobody/nothing"}
    needs = needs_of(load_steering(None, given, []).spec.as_recipe())
    assert [need.source for need in needs] == ["nobody/nothing"]


def test_what_was_finished_survives_a_fault_in_a_later_group(tmp_path, monkeypatch):
    import sdo_cli.steering.run as module

    whole = module.begin

    def failing(job, which):
        if which.start == 2:
            raise RuntimeError("out of luck")
        return whole(job, which)

    monkeypatch.setattr(module, "begin", failing)
    given = {"prompts": {"lines": [TIGER, ROCKET, "a fish"]}, "objectives": ["clip"], "measures": ["judge"]}
    loaded = load_steering(None, given, ONCE)
    with pytest.raises(RuntimeError, match="out of luck"):
        optimize(loaded, tmp_path / "out", Silent())
    assert read_variables(tmp_path / "out").prompts == [TIGER, ROCKET]
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["images"]) == 2
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["status"] == "failed"


def test_its_resolved_recipe_runs_from_anywhere(tmp_path, monkeypatch):
    save_image(torch.rand(3, 64, 64), tmp_path / "here" / "mine.png")
    monkeypatch.chdir(tmp_path / "here")
    given = {"prompts": {"lines": [TIGER]}, "objectives": ["image:mine.png"]}
    optimize(load_steering(None, given, ONCE), tmp_path / "out", Silent())
    monkeypatch.chdir(tmp_path)
    again = load_steering("out/resolved.yaml", {}, [])
    assert again.spec.objectives[0].value == str(tmp_path / "here" / "mine.png")


def test_a_prompt_that_is_cut_is_said(tmp_path):
    done = sdo("--prompt", "cat " * 40, "-o", "clip", "--out", tmp_path / "out", *ONCE)
    assert done.returncode == 0 and "CLIP reads" in done.stderr


def test_rows_without_a_prompt_and_words_a_reward_does_not_read_are_said(tmp_path):
    long = "a red bus " + "on a hill " * 30
    (tmp_path / "p.csv").write_text(f"prompt,kind\na cat,x\n,y\n{long},z\n")
    done = sdo(
        "--out", tmp_path / "run", f"prompts.file={tmp_path / 'p.csv'}", "objectives=[clip-score]", "measures=[judge]",
        "num_inference_steps=2", "steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 3 rows have no prompt" in done.stderr and "clip-embedded reads" in done.stderr, done.stderr


# --- families and pictures


@pytest.mark.parametrize(
    ("kind", "from_picture"),
    [("sd15", False), ("sd2", True), ("sd2-base", False), ("sdxl", True), ("sd3", False), ("sd35", True),
     ("sd3-no-t5", False)],
)  # fmt: skip
def test_every_family_is_steered_and_drawn_again(kind, from_picture, small, tmp_path):
    """Latent, embeddings (pooled ones too) and guidance, from noise or a picture; drawn again by `sdo sample`."""
    picture, out, again = tmp_path / "picture.png", tmp_path / "out", tmp_path / "again"
    save_image(torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(0)), picture)
    images = [str(picture)] if from_picture else []
    options = {"prompts": {"lines": ["a cat", "a dog"]}, "objectives": ["colorfulness"], "images": images}
    words = ["variables=[latent,embedding,guidance-per-step]", "steps=2", "num_inference_steps=3", "start=1"]
    loaded = load_steering(None, options, [f"model={small(kind)}", *words, "inversion_iterations=2", "strip=0"])
    rows = optimize(loaded, out, Silent())
    assert all(row["after"]["colorfulness"] >= row["before"]["colorfulness"] for row in rows)
    assert any(row["best_step"] > 0 for row in rows)
    assert all(np.isfinite(list(row["inversion"].values())).all() for row in rows)
    assert all(bool(row["inversion"]) == from_picture for row in rows)
    with safe_open(out / "variables.safetensors", "pt") as file:
        names = set(file.keys())
    conditions = {"sd": 1, "sdxl": 2, "sd3": 2}[FAMILY_OF[kind]]
    assert len([name for name in names if name.startswith("embedding.")]) == conditions
    assert entry.run(["sample", "--variables", str(out), "--out", str(again)]).returncode == 0
    for name in ("00000.png", "00001.png"):
        assert np.array_equal(pixels(out / name), pixels(again / name))


def test_every_family_has_its_turn():
    (marks,) = test_every_family_is_steered_and_drawn_again.pytestmark
    assert {kind for kind, _ in marks.args[1]} == set(MAKERS)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_latents_of_a_picture_are_those_of_diffusers(kind, small):
    """The scale and shift of each family's autoencoder: decoding what was encoded gives diffusers' round trip."""
    from sdo_cli.models.load import load_family

    family = load_family(str(small(kind)))
    family.to(torch.device("cpu"), torch.float32)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    latents = family.to_latents(image)
    with torch.no_grad():
        plain = family.vae.decode(family.vae.encode(2 * image - 1).latent_dist.mode()).sample / 2 + 0.5
        assert torch.allclose(family.decode(latents), plain.clamp(0, 1), atol=1e-5)


def test_a_drawn_picture_is_inverted_and_drawn_again(tmp_path):
    """On the embedded model without guidance: more iterations come nearer, and near the autoencoder's own error."""
    options = {"prompts": {"lines": [TIGER, ROCKET]}, "objectives": ["clip"], "guidance_scale": 1.0}
    drawn = tmp_path / "drawn"
    words = ["sample", TIGER, ROCKET, "--steps", "6", "--guidance", "1", "--out", str(drawn)]
    assert entry.run(words).returncode == 0
    names = [str(drawn / f"{j:05d}.png") for j in range(2)]
    errors = {}
    for iterations in (1, 6):
        loaded = load_steering(
            None, {**options, "images": names}, ["num_inference_steps=6", f"inversion_iterations={iterations}"]
        )
        begun = begin(prepare(loaded), range(2))
        errors[iterations] = begun.errors["inversion"]
        assert torch.equal(begun.sources[0], read_image(drawn / "00000.png"))
    assert bool((errors[6] < errors[1]).all())
    assert bool((errors[6] < begun.errors["autoencoder"] + 0.02).all())


def test_fp16_and_bf16_latents_still_move(small, tmp_path):
    options = {"prompts": {"lines": [TIGER]}, "objectives": ["colorfulness"], "mixed_precision": "bf16"}
    words = [f"model={small('sd15')}", "num_inference_steps=3", "steps=2", "strip=0", "learning_rate=0.03"]
    words.append("variables=[latent,embedding]")
    optimize(load_steering(None, options, words), tmp_path / "out", Silent())
    saved = read_variables(tmp_path / "out")
    assert all(value.dtype == torch.float32 for name, value in saved.tensors.items() if name != "guidance")


# --- objectives


def seen_of(images, **more):
    count = len(images)
    given = {"prompts": ["a"] * count, "sources": images.detach(), "numbers": list(range(count)), "step": 0}
    return Seen(images, **{**given, "progress": 0.0, **more})


@pytest.fixture(scope="module")
def encoder():
    return ClipEncoder("embedded")


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_patch_tokens_are_those_inside_the_whole_pass(encoder, images):
    kept = []
    block = encoder.net.visual.transformer.resblocks[1]
    handle = block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    encoder.images(images)
    handle.remove()
    tokens = encoder.patch_tokens(images, 2)
    assert tokens.shape == (3, 64, 128)
    assert torch.equal(tokens, kept[0][:, 1:])
    # nothing is left behind that would stop later passes
    assert encoder.images(images).shape == (3, 64)
    with pytest.raises(EnvironmentFault, match="has 4 blocks"):
        encoder.patch_tokens(images, 5)


def test_style_is_blind_to_places_and_zero_at_its_own_picture(encoder, images):
    tokens = torch.rand(2, 9, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shuffled = tokens[:, torch.randperm(9, generator=torch.Generator().manual_seed(3))]
    assert torch.allclose(gram(tokens), gram(shuffled))
    by_hand = torch.stack([sum(torch.outer(t, t) for t in picture) / 9 for picture in tokens])
    assert torch.allclose(gram(tokens), by_hand)
    style = Style(encoder, images[0], layer=2)
    values = style.values(seen_of(images.clone().requires_grad_()))
    assert values[0] < 1e-8 < values[1] and values.requires_grad


def test_text_edit_is_its_formula(encoder, images):
    moved = (images + 0.1).clamp(0, 1)
    for progress, alpha in ((0.0, 0.2), (0.5, 0.5), (1.0, 0.8)):
        edit = TextEdit(encoder, "a {prompt} on a red background", (0.2, 0.8), copies=0)
        seen = seen_of(moved, sources=images, progress=progress, prompts=["cat", "dog", "cat"])
        texts = encoder.prompts([f"a {word} on a red background" for word in seen.prompts])
        cosine = (encoder.images(moved) * texts).sum(-1)
        wanted = alpha * (1 - cosine) + (1 - alpha) * (moved - images).abs().flatten(1).mean(1)
        values = edit.values(seen)
        assert torch.allclose(values, wanted, atol=1e-6)
        # steps are compared by the end of the schedule
        end = 0.8 * (1 - cosine) + 0.2 * (moved - images).abs().flatten(1).mean(1)
        assert torch.allclose(edit.compared(seen, values), end, atol=1e-6)


def test_moved_copies_depend_on_image_and_step_alone(encoder, images):
    edit = TextEdit(encoder, "a cat", copies=3)
    together = edit.values(seen_of(images))
    alone = edit.values(seen_of(images[1:2], numbers=[1]))
    assert alone.item() == pytest.approx(together[1].item(), abs=1e-6)
    assert not torch.equal(edit.values(seen_of(images, step=1)), together)
    generators = [keyed_generator(0, "x", sample=i) for i in range(3)]
    leaf = images.clone().requires_grad_()
    copies = augmented(leaf, generators)
    copies.sum().backward()
    assert copies.shape == images.shape and copies.min() >= 0 and copies.max() <= 1 + 1e-6
    assert leaf.grad.abs().sum() > 0 and (copies - images).abs().mean() > 0.01


def test_target_and_frame(images):
    picture = torch.rand(3, 50, 120, generator=torch.Generator().manual_seed(4))
    framed = fitted(picture, 64, 64)
    assert framed.shape == (3, 64, 64)
    assert torch.equal(fitted(images[0], 64, 64), images[0])
    for loss, power in (("l1", 1), ("l2", 2)):
        wanted = (images - framed).abs().pow(power).flatten(1).mean(1)
        assert torch.allclose(Target(picture, loss).values(seen_of(images)), wanted)


def test_a_reward_counts_upwards(images):
    class Bright:
        def score(self, images, prompts):
            return images.flatten(1).mean(1)

    from sdo_cli.steering.objectives import Wish

    part = OfReward(Bright())
    values = part.values(seen_of(images))
    assert torch.equal(Wish("bright", part, 2.0).loss_of(values), -2 * values)
    assert torch.equal(Wish("dark", part, -2.0).loss_of(values), 2 * values)


def test_strips_are_dense_at_first():
    assert strip_steps(100, 5) == [0, 7, 25, 57, 100]
    assert strip_steps(2, 8) == [0, 1, 2] and strip_steps(10, 0) == [] and strip_steps(10, 1) == [10]
