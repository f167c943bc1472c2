"""A model in shards (FSDP 2): gloo processes do what they do with a whole model each; what cannot be is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from forked import Forked
from safetensors.torch import load_file
from small_models import plain
from test_checkpoints import lines_until
from test_family_finetune import recipe_file
from test_guard import OWN
from test_parallel import environment, finish, fragile, free_port, metrics, saved_at_its_last_step, words_of

from sdo_cli.errors import EnvironmentFault
from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.models.load import load_family
from sdo_cli.parallel.shards import asked_for
from sdo_cli.parallel.world import joined
from sdo_cli.recipe.load import load_recipe
from sdo_cli.training.sharding import check_shardable

# what `accelerate launch` sets for CONFIG
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
CONFIG = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "main_process_port": 0,
    "mixed_precision": "no",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
    },
}
# four samples a step, one at a time; three held-out batches, so that one process has none in the last round
FULL = ["train=full", "rollout={}", "gradient.options={}", "learning_rate=1e-4", "lr_scheduler=constant"]
FULL += ["train_batch_size=1", "gradient_accumulation_steps=2", "num_inference_steps=3", "max_train_steps=4"]
HELD_OUT = ["validation.num_prompts=3", "validation.grid_prompts=1", "validation.grid_steps=0"]
HELD_OUT += ["validation.batch_size=1", "validation.rewards=[]"]
KEPT = ["checkpointing_steps=2", "checkpoints_total_limit=0"]
SDO = [*FULL, *HELD_OUT, *KEPT, "ema_decay=0.5"]
UNMEASURED = ["validation.prompts={}", "validation.rewards=[]"]
# of the small UNet of SD 1.5
UNITS, PARAMETERS = 14, 208
RAGGED = """
import torch
from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.gradients.rules import gradient_rule

def drawn(calls, batch, generator, mode):
    ends = torch.randint(0, calls + 1, (batch,), generator=generator)
    live = (torch.rand(calls, batch, generator=generator) < 0.6) & (torch.arange(calls)[:, None] <= ends)
    # one sample has nothing to do
    live[:, int(torch.randint(batch, (1,), generator=generator))] = False
    return Plan(live * mode, live * 1.5, endpoint=ends)

@gradient_rule("ragged", summary="every sample has its own end and calls")
def ragged(calls, batch, coefficients, generator):
    return drawn(calls, batch, generator, Mode.WEIGHTS)

@gradient_rule("ragged-chain", summary="the same, chained", chained=True)
def ragged_chain(calls, batch, coefficients, generator):
    return drawn(calls, batch, generator, Mode.THROUGH)
"""


def start(argv, *, sharded=True, **more):
    """Two processes as a launcher starts them, by rank."""
    port, call = free_port(), more.pop("call", None)
    how = {} if call is None else {"call": call}
    extra = {**(FSDP if sharded else {}), **more}
    return [Forked(argv, env=environment(rank, 2, port) | extra, **how) for rank in range(2)]


def run(out, *words, sharded=True, **more):
    codes, outs, errs = finish(start(words_of(out, *words), sharded=sharded, **more))
    assert codes == [0, 0], errs
    assert not outs[1] and not errs[1] and ("FSDP: " in errs[0]) == sharded
    return errs[0]


def same(one, other, tolerance=1e-5):
    """Losses, norms and rewards of all steps."""
    mine, theirs = metrics(one), metrics(other)
    assert len(mine) == len(theirs) > 1
    for a, b in zip(mine, theirs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=tolerance)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=10 * tolerance)
    assert mine[0]["grad_norm"] > 0
    assert theirs[0]["grad_norm"] == pytest.approx(mine[0]["grad_norm"], rel=tolerance)


def unet(folder):
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def near(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one) <= tolerance


@pytest.fixture(scope="module")
def on_small(small):
    """The model of these runs where the embedded one is not asked for, and a reward that reads 64 pixels."""
    return [f"model={small('sd15')}", "rewards=[colorfulness]"]


@pytest.fixture(scope="module")
def pair(on_small, tmp_path_factory):
    """The same four steps of SDO: two processes with a whole model each, and in shards."""
    root = tmp_path_factory.mktemp("pair")
    run(root / "whole", *SDO, *on_small, sharded=False)
    said = run(root / "shards", *SDO, *on_small)
    assert f"FSDP: UNet2DConditionModel and {UNITS} units inside (BasicTransformerBlock, ResnetBlock2D, " in said
    return root


# the same as with a whole model each


@pytest.mark.slow
def test_started_as_users_start_it(pair, on_small, tmp_path):
    """By accelerate's launcher and its own configuration file."""
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(CONFIG))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp.yaml")]
    argv = [*launch, "-m", "sdo_cli", *words_of(tmp_path / "run", *SDO, *on_small)]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), timeout=200)
    assert done.returncode == 0, done.stderr
    assert (
        f"FSDP: UNet2DConditionModel and {UNITS} units inside (" in done.stderr
        and "held-out prompts (3)" in done.stdout
    )
    assert near(unet(tmp_path / "run"), unet(pair / "shards"), 0)


def test_sdo_takes_the_same_steps(pair):
    same(pair / "whole", pair / "shards")
    scores = [json.loads((pair / name / "validation.json").read_text()) for name in ("whole", "shards")]
    for when in ("before", "after"):
        for name, rows in scores[0][when].items():
            assert torch.allclose(torch.tensor(scores[1][when][name]), torch.tensor(rows), atol=1e-5)


def test_the_pipeline_is_whole_and_loads_in_plain_diffusers(pair):
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(pair / "shards" / "pipeline")
    written = unet(pair / "shards")
    assert near(written, unet(pair / "whole"))
    assert all(torch.equal(value, written[name]) for name, value in loaded.unet.state_dict().items())
    # what is kept is the running mean, as the last checkpoint has it
    kept = load_file(pair / "shards" / "checkpoints" / "checkpoint-4" / "state.safetensors")
    means = [kept[f"/stepper/ema/shadow_params/{i}"] for i in range(len(written))]
    for value, (name, _) in zip(means, loaded.unet.named_parameters(), strict=True):
        assert torch.equal(value, written[name])


def test_checkpoints_hold_whole_tensors(pair):
    there = [load_file(pair / n / "checkpoints" / "checkpoint-2" / "state.safetensors") for n in ("whole", "shards")]
    assert {name: value.shape for name, value in there[0].items()} == {n: v.shape for n, v in there[1].items()}
    trained = [name for name in there[0] if name.startswith("/stepper/")]
    assert len(trained) >= 4 * PARAMETERS
    assert near({name: there[0][name] for name in trained}, {name: there[1][name] for name in trained})


def back_to_two(pair, name, folder):
    """A copy of a run that stopped after two steps."""
    shutil.copytree(pair / name, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    shutil.rmtree(folder / "pipeline")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))


@pytest.mark.parametrize(
    ("began", "sharded"),
    [
        pytest.param("shards", True, marks=pytest.mark.slow),
        pytest.param("shards", False, marks=pytest.mark.slow),
        ("whole", True),
    ],
)
def test_resumed_in_shards_or_not(pair, on_small, tmp_path, began, sharded):
    folder = tmp_path / "run"
    back_to_two(pair, began, folder)
    said = run(folder, *SDO, *on_small, "--resume", sharded=sharded)
    assert "resumed from" in said and "(step 2 of 4)" in said
    straight = pair / ("shards" if sharded else "whole")
    assert near(unet(folder), unet(straight), 0 if began == straight.name else 1e-5)
    same(straight, folder)


@pytest.mark.slow
def test_resumed_by_one_process_alone(pair, on_small, tmp_path):
    folder = tmp_path / "run"
    back_to_two(pair, "shards", folder)
    words = words_of(folder, *SDO, *on_small, "gradient_accumulation_steps=4", "--resume")
    process = Forked(words, env=environment())
    assert process.communicate(200)[1].count("resumed from") == 1 and process.returncode == 0
    assert near(unet(folder), unet(pair / "whole"))


RULES = {
    "ragged": ["gradient.rule=ragged", "gradient.shortcut_micro_batch=1", "gradient.rollout_micro_batch=1"],
    "ragged-chain": ["gradient.rule=ragged-chain"],
    "ragged-stored": ["gradient.rule=ragged-chain", "gradient.checkpointing=none", "guidance_scale=2"],
    "refl": ["gradient.rule=refl"],
    "drtune": ["gradient.rule=drtune", "guidance_scale=2", "gradient.negative_gradient=false"],
    "draft-k": ["gradient.rule=draft-k", "gradient.options={k: 2}"],
    "draft-lv": ["gradient.rule=draft-lv"],
    "alignprop": ["gradient.rule=alignprop", "gradient_checkpointing=true"],
    "updates": ["rollout.updates=2", "rollout.rescore=true", "gradient.shortcut_micro_batch=1"],
}


@pytest.mark.parametrize(
    "name",
    [name if name in ("ragged-chain", "updates") else pytest.param(name, marks=pytest.mark.slow) for name in RULES],
)
def test_rules_take_the_same_steps(on_small, tmp_path, name):
    """Also where samples end at different calls, and where some of them need one graph and others none."""
    (tmp_path / "ragged.py").write_text(RAGGED)
    words = ["--plugin", str(tmp_path / "ragged.py"), *FULL, *UNMEASURED, *on_small, *RULES[name], "max_train_steps=2"]
    run(tmp_path / "whole", *words, sharded=False)
    run(tmp_path / "shards", *words)
    same(tmp_path / "whole", tmp_path / "shards")
    calls = [[row["calls"] for row in metrics(tmp_path / kind)] for kind in ("whole", "shards")]
    assert (calls[0] != calls[1]) == name.startswith("ragged")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["NO_WRAP", "SIZE_BASED_WRAP"])
def test_weights_that_stay_gathered_are_never_stale(tmp_path, policy):
    """Checks draw with the running mean between steps."""
    words = [*FULL, *UNMEASURED, "ema_decay=0.5", "guard.steps=1", OWN, "guard.rewards=[colorfulness, aesthetic]"]
    words += ["guard.num_prompts=3", "validation.batch_size=1", "learning_rate=1e-3"]
    run(tmp_path / "whole", *words, sharded=False)
    how = {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_AUTO_WRAP_POLICY": policy, "FSDP_MIN_NUM_PARAMS": "20000"}
    run(tmp_path / "shards", *words, **how)
    same(tmp_path / "whole", tmp_path / "shards")
    rows = [[json.loads(line) for line in (tmp_path / n / "guard.jsonl").open()] for n in ("whole", "shards")]
    assert len(rows[0]) == 5
    assert near(unet(tmp_path / "whole"), unet(tmp_path / "shards"))
    for mine, theirs in zip(*rows, strict=True):
        for measure, values in mine["values"].items():
            assert theirs["values"][measure] == pytest.approx(values, rel=1e-4, abs=1e-4), (mine["step"], measure)


@pytest.mark.slow
def test_bf16(tmp_path):
    words = [*FULL, *UNMEASURED, "mixed_precision=bf16"]
    run(tmp_path / "whole", *words, sharded=False)
    run(tmp_path / "shards", *words)
    same(tmp_path / "whole", tmp_path / "shards", 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_other_families(small, tmp_path, kind, precision):
    words = ["finetune", "--recipe", recipe_file(tmp_path, small(kind)), "train=full", "learning_rate=1e-4"]
    for name, sharded in (("whole", False), ("shards", True)):
        argv = [*words, f"mixed_precision={precision}", "--out", str(tmp_path / name)]
        codes, _, errs = finish(start(argv, sharded=sharded, HF_HUB_OFFLINE="1"))
        assert codes == [0, 0], errs
        assert ("FSDP: " in errs[0]) == sharded
    same(tmp_path / "whole", tmp_path / "shards", 1e-5 if precision == "no" else 2e-2)
    part = "transformer" if kind == "sd3" else "unet"
    tuned = [getattr(plain(tmp_path / name / "pipeline"), part).state_dict() for name in ("whole", "shards")]
    assert near(*tuned, 1e-5 if precision == "no" else 1e-3)


def test_each_process_keeps_half(on_small, tmp_path):
    codes, _, errs = finish(start(["shards", tmp_path, *FULL, *UNMEASURED, *on_small], call="several:main"))
    assert codes == [0, 0], errs
    found = [json.loads((tmp_path / f"shards-{rank}.json").read_text()) for rank in range(2)]
    total = found[0]["whole"]
    assert sum(part["mine"] for part in found) == total
    for part in found:
        assert 0.45 * total < part["mine"] < 0.55 * total
        # gradients and AdamW's two moments too
        assert part["gradients"] == part["mine"] and part["optimizer"] == 2 * part["mine"]


# stopping and failing


@pytest.mark.slow
def test_what_one_is_told_all_stop_for_and_go_on_from(tmp_path):
    folder = tmp_path / "run"
    words = [*FULL, *UNMEASURED, "checkpointing_steps=1000"]
    processes = start(words_of(folder, "--json", *words, "max_train_steps=4000"))
    lines_until(processes[0], '"training", "done": 1')
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errs = finish(processes)
    assert codes == [75, 75] and "stopped (SIGTERM)" in errs[0] and errs[1] == ""
    assert saved_at_its_last_step(folder)
    done = len(metrics(folder))
    assert f"(step {done} of {done + 1})" in run(folder, *words, f"max_train_steps={done + 1}", "--resume")


@pytest.mark.slow
def test_one_that_raises_ends_all_with_its_message(tmp_path):
    words = [*fragile(tmp_path), "train=full"]
    processes = start(words_of(tmp_path / "run", "--json", *words))
    lines_until(processes[0], '"training", "done": 1')
    begin = time.monotonic()
    codes, _, errs = finish(processes)
    assert time.monotonic() - begin < 30 and codes == [2, 2]
    assert "process 1: " in errs[0] and errs[0].count("the sky fell") == 1 and errs[1] == ""


@pytest.mark.slow
def test_one_that_is_killed_ends_all(tmp_path):
    processes = start(words_of(tmp_path / "run", "--json", *FULL, *UNMEASURED, "max_train_steps=4000"))
    lines_until(processes[0], '"training", "done": 2')
    processes[1].kill()
    begin = time.monotonic()
    codes, _, errs = finish(processes)
    assert time.monotonic() - begin < 30 and codes == [1, -9]
    assert "process 1: ended without a word" in errs[0] and "Traceback" not in errs[0]


@pytest.mark.slow
def test_one_with_nan_makes_all_skip_the_step(tmp_path):
    words = words_of(tmp_path / "run", *FULL, *UNMEASURED)
    codes, _, errs = finish(start(words, call="several:sick"))
    assert codes == [0, 0] and "step 2 skipped" in errs[0], errs
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [False, True, False, False]


# plans in step


def test_parts_in_step_make_the_calls_that_any_of_them_needs():
    mode = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]])
    plan = Plan(mode, (mode > 0).double(), endpoint=torch.tensor([2, 1, 3, 0]))
    parts = [plan.rows(slice(i, i + 1), in_step=True) for i in range(4)]
    assert [(p.calls_run, p.last, p.graphs, p.most_live) for p in parts] == [(4, 3, [True] * 3 + [False], 3)] * 4
    assert not any(part.is_one_step_deep() for part in parts)
    alone = [plan.rows(slice(i, i + 1)) for i in range(4)]
    assert [(p.calls_run, p.last, p.most_live) for p in alone] == [
        (3, None, 3),
        (2, None, 0),
        (4, None, 1),
        (1, None, 0),
    ]
    assert [p.is_one_step_deep() for p in alone] == [False, True, True, True]
    assert int(plan.mode.max()) == Mode.THROUGH


# what is taken from accelerate's configuration, and what is refused


@pytest.fixture
def configured(monkeypatch):
    """The environment of two processes with these settings of FSDP."""

    def configure(**settings):
        for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
            monkeypatch.delenv(name)
        for name, value in {"WORLD_SIZE": "2", **FSDP, **settings}.items():
            monkeypatch.setenv(name, value)

    return configure


REFUSED = {
    "asks for FSDP 1": {"FSDP_VERSION": "1"},
    "asks for MEGATRON_LM": {"ACCELERATE_USE_MEGATRON_LM": "true", "ACCELERATE_USE_FSDP": "false"},
    "has fsdp_offload_params": {"FSDP_OFFLOAD_PARAMS": "true"},
    "has fsdp_activation_checkpointing": {"FSDP_ACTIVATION_CHECKPOINTING": "True"},
    "has fsdp_forward_prefetch": {"FSDP_FORWARD_PREFETCH": "true"},
    "has fsdp_ignored_modules": {"FSDP_IGNORED_MODULES": "mid_block"},
    "has parallelism_config": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
    "Invalid auto wrap policy": {"FSDP_AUTO_WRAP_POLICY": "BY_LUCK"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(configured, said):
    configured(**REFUSED[said])
    with pytest.raises(EnvironmentFault, match=said) as fault, joined(shards=True):
        pass
    assert fault.value.remedy


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "trains a LoRA"),
        (["train=full", "mixed_precision=fp16"], "fp16"),
        (["train=full", "optimizer=adamw8bit"], "adamw8bit"),
        (["train=full", "mixed_precision=no"], "has mixed_precision bf16, the recipe no"),
    ],
)
def test_recipes_that_do_not_go_with_it(configured, words, said):
    configured(ACCELERATE_MIXED_PRECISION="bf16" if "recipe no" in said else "no")
    with pytest.raises(EnvironmentFault, match=said) as fault:
        check_shardable(load_recipe("quickstart", words).recipe, "FSDP")
    assert fault.value.remedy


def test_a_lora_with_fsdp_is_refused_once(tmp_path):
    codes, _, errs = finish(start(words_of(tmp_path / "run")))
    assert codes == [2, 2] and errs[0].count("trains a LoRA") == 1 and "--gpus N" in errs[0] and errs[1] == ""


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 13),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock"}, 4),
        ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, 0),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "100000000"}, 0),
    ],
)
def test_units_are_those_of_the_configuration(configured, settings, count):
    configured(**settings)
    sharding = asked_for()
    assert sharding.plugin.reshard_after_forward is True
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert len(sharding._units(load_family("embedded").denoiser)) == count


def test_a_class_the_model_does_not_have_is_refused(configured):
    configured(FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer")
    with pytest.raises(EnvironmentFault, match="LlamaDecoderLayer"):
        asked_for()._units(load_family("embedded").denoiser)


def test_nothing_asked_for_is_nothing(configured):
    configured(ACCELERATE_USE_FSDP="false")
    assert asked_for() is None


def test_what_only_draws_is_refused(configured):
    configured()
    with pytest.raises(EnvironmentFault, match="for sdo finetune with train: full"), joined():
        pass
