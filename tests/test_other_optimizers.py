"""Optimizers of other packages, skipped without them: they learn, go on bit for bit, are switched where needed."""

import importlib.util
import json

import entry
import pytest
import torch
from test_checkpoints import TINY, UNMEASURED, run, stepper, walk

from sdo_cli.errors import EnvironmentFault
from sdo_cli.optimizers import adamw
from sdo_cli.optimizers.adamw import PACKAGES, make_adamw
from sdo_cli.optimizers.stepper import Stepper
from sdo_cli.recipe.load import load_recipe
from sdo_cli.runs.checkpoint import newest, restore, save


def needed(name):
    package = PACKAGES[name][0]
    there = importlib.util.find_spec(package) is not None
    return pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"{package} is not installed"))


EVERY = [needed(name) for name in PACKAGES]


def words_of(name):
    return [f"optimizer={name}", "learning_rate=1.0" if name == "prodigy" else "learning_rate=2e-3"]


@pytest.mark.parametrize("name", PACKAGES)
def test_without_the_package_one_sentence_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr(adamw, "import_module", lambda module: (_ for _ in ()).throw(ImportError(module)))
    with pytest.raises(EnvironmentFault, match=f"optimizer {name} needs the package {PACKAGES[name][0]}") as fault:
        make_adamw(load_recipe("quickstart", [f"optimizer={name}", "lr_scheduler=constant"]).recipe, [])
    assert f"[{PACKAGES[name][3]}]" in fault.value.remedy and "optimizer=adamw" in fault.value.remedy


@pytest.mark.parametrize("name", EVERY)
def test_it_learns(name):
    """A parabola, on the CPU; bitsandbytes quantises there too."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(96, 96))
    recipe = load_recipe("quickstart", [*words_of(name), "lr_scheduler=constant", "lr_warmup_steps=0"]).recipe
    optimizer, start = make_adamw(recipe, [weight]), weight.detach().square().mean().item()
    if name == "schedulefree":
        optimizer.train()
    for _ in range(400):
        weight.grad = 2 * weight.detach()
        optimizer.step()
    assert weight.detach().square().mean().item() < 0.8 * start


@pytest.mark.parametrize("name", EVERY)
def test_what_goes_on_from_a_checkpoint_goes_the_same_way(tmp_path, name):
    words = [*words_of(name), "lr_scheduler=constant"]
    straight = stepper(tmp_path, *words)
    expected = walk(straight, range(8))
    first = stepper(tmp_path, *words)
    walk(first, range(5))
    with first.kept_weights():
        pass
    save(tmp_path, 5, first, {}, keep=2)
    second = stepper(tmp_path, *words, seed=9)
    restore(newest(tmp_path)[0], second)
    assert all(torch.equal(a, b) for a, b in zip(walk(second, range(5, 8)), expected, strict=True))
    for one in (straight, second):
        one.finish()
    assert all(torch.equal(a, b) for a, b in zip(second.parameters, straight.parameters, strict=True))


@pytest.mark.parametrize("name", [needed("schedulefree")])
def test_schedulefree_is_drawn_with_at_its_mean_and_trained_beside_it(name):
    # many numbers: of a few all may come back as they were by themselves
    parameters = [torch.nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))]
    one = Stepper(load_recipe("quickstart", [f"optimizer={name}", "lr_scheduler=constant"]).recipe, parameters)
    walk(one, range(6))
    there = [parameter.detach().clone() for parameter in one.parameters]
    with one.kept_weights():
        kept = [parameter.detach().clone() for parameter in one.parameters]
        assert not any(group["train_mode"] for group in one.optimizer.param_groups)
    assert all(group["train_mode"] for group in one.optimizer.param_groups)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, there, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(kept, there, strict=True))
    one.finish()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, kept, strict=True))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_command(tmp_path, name, train):
    words = [*UNMEASURED, *words_of(name), "lr_scheduler=constant", f"train={train}", "max_train_steps=2", "-q"]
    done = run(tmp_path / "run", *words, *([] if name == "prodigy" else ["learning_rate=1e-5"]))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and not any(row["skipped"] for row in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["lr_scheduler=cosine"], "schedulefree does without; write constant"), (["ema_decay=0.9"], "mean of its own")],
)
def test_what_schedulefree_does_itself_is_refused(tmp_path, words, said):
    given = ["lr_scheduler=constant", *words]
    done = entry.run(
        ["finetune", "--recipe", "quickstart", "--out", str(tmp_path / "run"), *TINY, "optimizer=schedulefree", *given]
    )
    assert done.returncode == 2 and said in done.stderr, done.stderr
