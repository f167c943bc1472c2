"""DeepSpeed's ZeRO: gloo processes do what they do with a whole optimizer each; what cannot be is refused.

What runs DeepSpeed is skipped where it is not installed: `pip install -e '.[dev,deepspeed]'`. Or in a folder beside:

    pip install --target D --no-deps deepspeed hjson py-cpuinfo msgpack einops ninja
    PYTHONPATH=D python -m pytest -m '' tests/test_zero.py

On the CPU DeepSpeed builds its communication with a C++ compiler, once.
"""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
import yaml
from forked import Forked
from safetensors.torch import load_file
from test_checkpoints import lines_until
from test_guard import OWN
from test_parallel import environment, finish, fragile, free_port, metrics, saved_at_its_last_step, words_of
from test_sharded import FSDP, FULL, RAGGED, RULES, SDO, UNMEASURED, back_to_two, near, same, unet

from sdo_cli.errors import EnvironmentFault
from sdo_cli.installed import install_extra
from sdo_cli.optimizers.zero import settings
from sdo_cli.parallel import zero
from sdo_cli.parallel.world import World, joined
from sdo_cli.parallel.zero import Zero, zero_asked_for
from sdo_cli.recipe.load import load_recipe
from sdo_cli.training.sharding import check_shardable

runs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
NAMES = ("whole", "zero-1", "zero-2")
# what `accelerate launch` sets for CONFIG
LAUNCHED = {"ACCELERATE_USE_DEEPSPEED": "true"}
CONFIG = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "main_process_port": 0,
    "mixed_precision": "no",
    "deepspeed_config": {"zero_stage": 2},
}
# a file as they go round: for transformers' trainer, everything auto
FILE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "zero_optimization": {
        "stage": 1,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e7,
        "allgather_bucket_size": "auto",
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "stage3_max_live_parameters": 1e9,
    },
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
}


def variables(name):
    """Of two processes: ``zero-1`` and ``zero-2``, ``shards``, or ``whole``."""
    if name == "shards":
        return FSDP
    return {**LAUNCHED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": name[-1]} if name in NAMES[1:] else {}


def start(argv, name, **more):
    """Two processes as a launcher starts them, by rank."""
    port, call = free_port(), more.pop("call", None)
    how = {} if call is None else {"call": call}
    return [Forked(argv, env=environment(rank, 2, port) | variables(name) | more, **how) for rank in range(2)]


def run(out, *words, name, **more):
    codes, outs, errs = finish(start(words_of(out, *words), name, **more))
    assert codes == [0, 0], errs
    assert not outs[1] and not errs[1] and (f"DeepSpeed ZeRO {name[-1]}: " in errs[0]) == (name in NAMES[1:]), errs
    return errs[0]


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """The same four steps of SDO: two processes with a whole optimizer each, and with parts of one."""
    root = tmp_path_factory.mktemp("trio")
    for name in NAMES:
        run(root / name, *SDO, name=name)
    return root


stages = pytest.mark.parametrize("name", ["zero-1", "zero-2"])
slowly_1 = pytest.mark.parametrize("name", [pytest.param("zero-1", marks=pytest.mark.slow), "zero-2"])


# the same as with a whole optimizer each


@runs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("how", ["settings", "file"])
def test_started_as_users_start_it(trio, tmp_path, how):
    """By accelerate's launcher and its own configuration, or DeepSpeed's file."""
    (tmp_path / "zero.json").write_text(json.dumps(FILE))
    inner = CONFIG["deepspeed_config"] if how == "settings" else {"deepspeed_config_file": str(tmp_path / "zero.json")}
    # accelerate wants no other settings beside a file
    outer = {key: value for key, value in CONFIG.items() if how == "settings" or key != "mixed_precision"}
    (tmp_path / "ds.yaml").write_text(yaml.safe_dump({**outer, "deepspeed_config": inner}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "ds.yaml")]
    argv = [*launch, "-m", "sdo_cli", *words_of(tmp_path / "run", *SDO)]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), timeout=200)
    assert done.returncode == 0, done.stderr
    name = "zero-2" if how == "settings" else "zero-1"
    assert f"DeepSpeed ZeRO {name[-1]}: " in done.stderr and "held-out prompts (3)" in done.stdout
    assert near(unet(tmp_path / "run"), unet(trio / name), 0)


@runs_deepspeed
@stages
def test_sdo_takes_the_same_steps(trio, name):
    same(trio / "whole", trio / name)
    assert near(unet(trio / "whole"), unet(trio / name), 1e-6)
    scores = [json.loads((trio / which / "validation.json").read_text()) for which in ("whole", name)]
    for when in ("before", "after"):
        for measure, rows in scores[0][when].items():
            assert torch.allclose(torch.tensor(scores[1][when][measure]), torch.tensor(rows), atol=1e-5)


@runs_deepspeed
def test_the_pipeline_loads_in_plain_diffusers(trio):
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(trio / "zero-2" / "pipeline")
    written = unet(trio / "zero-2")
    assert all(torch.equal(value, written[key]) for key, value in loaded.unet.state_dict().items())


@runs_deepspeed
@stages
def test_checkpoints_hold_whole_tensors(trio, name):
    there = [load_file(trio / n / "checkpoints" / "checkpoint-2" / "state.safetensors") for n in ("whole", name)]
    assert {key: value.shape for key, value in there[0].items()} == {key: v.shape for key, v in there[1].items()}
    trained = [key for key in there[0] if key.startswith("/stepper/")]
    assert len([key for key in trained if "exp_avg" in key]) > 400
    assert near({key: there[0][key] for key in trained}, {key: there[1][key] for key in trained})
    trees = []
    for which in ("whole", name):
        tree = json.loads((trio / which / "checkpoints" / "checkpoint-2" / "state.json").read_text())
        trees.append(dict(tree["state"]["dict"])["stepper"])
    assert trees[0] == trees[1]


@runs_deepspeed
@pytest.mark.parametrize(
    ("began", "name"),
    [
        pytest.param("zero-1", "zero-1", marks=pytest.mark.slow),
        ("zero-2", "zero-2"),
        pytest.param("zero-1", "zero-2", marks=pytest.mark.slow),
        pytest.param("whole", "zero-2", marks=pytest.mark.slow),
        pytest.param("zero-2", "whole", marks=pytest.mark.slow),
        pytest.param("zero-1", "shards", marks=pytest.mark.slow),
    ],
)
def test_resumed_dealt_out_or_not(trio, tmp_path, began, name):
    folder = tmp_path / "run"
    back_to_two(trio, began, folder)
    said = run(folder, *SDO, "--resume", name=name)
    assert "resumed from" in said and "(step 2 of 4)" in said
    straight = trio / ("whole" if name == "shards" else name)
    assert near(unet(folder), unet(straight), 0 if began == name else 1e-6)
    same(straight, folder)


@runs_deepspeed
@pytest.mark.slow
def test_resumed_by_one_process_alone(trio, tmp_path):
    folder = tmp_path / "run"
    back_to_two(trio, "zero-2", folder)
    words = words_of(folder, *SDO, "gradient_accumulation_steps=4", "--resume")
    process = Forked(words, env=environment() | LAUNCHED)
    assert process.communicate(200)[1].count("resumed from") == 1 and process.returncode == 0
    assert near(unet(folder), unet(trio / "whole"), 1e-6)


@runs_deepspeed
@pytest.mark.slow
@stages
@pytest.mark.parametrize("rule", RULES)
def test_rules_take_the_same_steps(tmp_path, rule, name):
    """Also where samples end at different calls, or some have nothing to do; buckets are sent within a pass."""
    (tmp_path / "ragged.py").write_text(RAGGED)
    small = {"zero_optimization": {"stage": int(name[-1]), "reduce_bucket_size": 20000, "reduce_scatter": False}}
    (tmp_path / "zero.json").write_text(json.dumps(small))
    words = ["--plugin", str(tmp_path / "ragged.py"), *FULL, *UNMEASURED, *RULES[rule], "max_train_steps=3"]
    run(tmp_path / "whole", *words, name="whole")
    run(tmp_path / name, *words, name=name, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "zero.json"))
    same(tmp_path / "whole", tmp_path / name)
    assert near(unet(tmp_path / "whole"), unet(tmp_path / name), 1e-6)
    calls = [[row["calls"] for row in metrics(tmp_path / kind)] for kind in ("whole", name)]
    assert (calls[0] != calls[1]) == (rule.startswith("ragged") and name == "zero-2")


@runs_deepspeed
@pytest.mark.slow
@stages
def test_one_without_any_gradient_sends_zeros(tmp_path, name):
    """Each has one sample, and one of the two has nothing to do."""
    (tmp_path / "ragged.py").write_text(RAGGED)
    words = ["--plugin", str(tmp_path / "ragged.py"), *FULL, *UNMEASURED, *RULES["ragged"]]
    words += ["gradient_accumulation_steps=1", "max_train_steps=2"]
    run(tmp_path / "whole", *words, name="whole")
    run(tmp_path / name, *words, name=name)
    same(tmp_path / "whole", tmp_path / name)
    assert near(unet(tmp_path / "whole"), unet(tmp_path / name), 1e-6)


@runs_deepspeed
@pytest.mark.slow
@stages
def test_checks_draw_with_the_running_mean_and_steps_go_on_from_the_weights(tmp_path, name):
    words = [*FULL, *UNMEASURED, "ema_decay=0.5", "guard.steps=1", OWN, "guard.rewards=[colorfulness, aesthetic]"]
    words += ["guard.num_prompts=3", "validation.batch_size=1", "learning_rate=1e-3", "max_grad_norm=0.3"]
    run(tmp_path / "whole", *words, name="whole")
    run(tmp_path / name, *words, name=name)
    same(tmp_path / "whole", tmp_path / name)
    assert near(unet(tmp_path / "whole"), unet(tmp_path / name))


@runs_deepspeed
@pytest.mark.slow
@stages
def test_bf16(tmp_path, name):
    words = [*FULL, *UNMEASURED, "mixed_precision=bf16"]
    run(tmp_path / "whole", *words, name="whole")
    run(tmp_path / name, *words, name=name)
    same(tmp_path / "whole", tmp_path / name, 1e-3)


@runs_deepspeed
@slowly_1
def test_each_process_keeps_half(tmp_path, name):
    codes, _, errs = finish(start(["dealt", tmp_path, *FULL, *UNMEASURED], name, call="several:main"))
    assert codes == [0, 0], errs
    for part in (json.loads((tmp_path / f"dealt-{rank}.json").read_text()) for rank in range(2)):
        # two moments; the flat parts are padded by a few elements
        assert abs(part["optimizer"] - part["whole"]) <= 8
        assert part["gradients"] == (0 if name == "zero-2" else part["whole"])


# stopping and failing


@runs_deepspeed
@pytest.mark.slow
@stages
def test_what_one_is_told_all_stop_for_and_go_on_from(tmp_path, name):
    folder = tmp_path / "run"
    words = [*FULL, *UNMEASURED, "checkpointing_steps=1000"]
    processes = start(words_of(folder, "--json", *words, "max_train_steps=4000"), name)
    lines_until(processes[0], '"training", "done": 1')
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errs = finish(processes)
    assert codes == [75, 75] and "stopped (SIGTERM)" in errs[0] and errs[1] == ""
    assert saved_at_its_last_step(folder)
    done = len(metrics(folder))
    said = run(folder, *words, f"max_train_steps={done + 1}", "--resume", name=name)
    assert f"(step {done} of {done + 1})" in said


@runs_deepspeed
@pytest.mark.slow
@stages
def test_one_that_raises_ends_all_with_its_message(tmp_path, name):
    words = [*fragile(tmp_path), "train=full"]
    processes = start(words_of(tmp_path / "run", "--json", *words), name)
    lines_until(processes[0], '"training", "done": 1')
    begin = time.monotonic()
    codes, _, errs = finish(processes)
    assert time.monotonic() - begin < 30 and codes == [2, 2]
    assert "process 1: " in errs[0] and errs[0].count("the sky fell") == 1 and errs[1] == ""


@runs_deepspeed
@pytest.mark.slow
@stages
def test_one_that_is_killed_ends_all(tmp_path, name):
    processes = start(words_of(tmp_path / "run", "--json", *FULL, *UNMEASURED, "max_train_steps=4000"), name)
    lines_until(processes[0], '"training", "done": 2')
    processes[1].kill()
    begin = time.monotonic()
    codes, _, errs = finish(processes)
    assert time.monotonic() - begin < 30 and codes == [1, -9]
    assert "process 1: ended without a word" in errs[0] and "Traceback" not in errs[0]


@runs_deepspeed
@slowly_1
@pytest.mark.parametrize("call", ["several:sick", "several:steep"])
def test_one_with_nan_makes_all_skip_the_step_and_nothing_of_it_is_left(tmp_path, name, call):
    """A reward that is not finite, or only its gradient."""
    for which in ("whole", name):
        codes, _, errs = finish(start(words_of(tmp_path / which, *FULL, *UNMEASURED), which, call=call))
        assert codes == [0, 0] and "step 2 skipped" in errs[0], errs
        assert [row["skipped"] for row in metrics(tmp_path / which)] == [False, True, False, False]
    assert near(unet(tmp_path / "whole"), unet(tmp_path / name), 1e-6)


# what is taken from the configuration, and what is refused


@pytest.fixture
def configured(monkeypatch, tmp_path):
    """The environment of two processes whose DeepSpeed file is this; ``there`` is the version that is installed."""

    def configure(tree=None, there="0.19.8", **settings):
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            monkeypatch.delenv(name)
        for name, value in {"WORLD_SIZE": "2", **LAUNCHED, **settings}.items():
            monkeypatch.setenv(name, value)
        if tree is not None:
            (tmp_path / "zero.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
        monkeypatch.setattr(zero, "version", lambda name: there)

    return configure


def test_settings_and_files_are_read(configured):
    configured(ACCELERATE_DEEPSPEED_ZERO_STAGE="1")
    assert zero_asked_for().stage == 1
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "false" and zero_asked_for() is None
    configured({**FILE, "zero_optimization": {**FILE["zero_optimization"], "stage": 2}})
    found = zero_asked_for()
    assert found.stage == 2
    assert found.carried == {"reduce_bucket_size": 5e7, "reduce_scatter": True, "contiguous_gradients": True}


REFUSED = {
    "ZeRO stage 3": {"stage": 3},
    "ZeRO stage 0": {"stage": 0},
    "zero_optimization.offload_optimizer": {"offload_optimizer": {"device": "cpu"}},
    "zero_optimization.offload_param": {"offload_param": {"device": "nvme"}},
    "zero_optimization.round_robin_gradients": {"round_robin_gradients": True},
    "zero_optimization.zero_quantized_gradients": {"zero_quantized_gradients": True},
    "has fp16": {"/fp16": {"enabled": True}},
    "has bf16": {"/bf16": {"enabled": True}},
    "has scheduler": {"/scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}},
    "has activation_checkpointing": {"/activation_checkpointing": {"partition_activations": True}},
    "has prescale_gradients": {"/prescale_gradients": True},
    "has communication_data_type": {"/communication_data_type": "bf16"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(configured, said):
    tree = json.loads(json.dumps(FILE))
    for key, value in REFUSED[said].items():
        (tree if key[0] == "/" else tree["zero_optimization"])[key.lstrip("/")] = value
    configured(tree)
    with pytest.raises(EnvironmentFault, match=said) as fault, joined(shards=True):
        pass
    assert fault.value.remedy and fault.value.exit_code == 2
    if said == "ZeRO stage 3":
        assert "FSDP" in fault.value.remedy


def test_offload_in_accelerates_own_settings_is_refused(configured):
    configured(ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu")
    with pytest.raises(EnvironmentFault, match=r"zero_optimization\.offload_optimizer"):
        zero_asked_for()


@pytest.mark.parametrize("tree", ["{", {"train_batch_size": 4}])
def test_files_that_are_none_are_said(configured, tree):
    configured(tree)
    with pytest.raises(EnvironmentFault, match="configuration of DeepSpeed: ") as fault:
        zero_asked_for()
    assert "docs/clusters.md" in fault.value.remedy


def test_settings_beside_a_file_are_said(configured):
    configured(FILE, ACCELERATE_CONFIG_DS_FIELDS="deepspeed_config_file,mixed_precision")
    with pytest.raises(EnvironmentFault, match="using `deepspeed_config_file`, the following") as fault:
        zero_asked_for()
    assert "mixed_precision" in fault.value.remedy


def test_one_that_is_too_old_is_said(configured):
    configured(there="0.18.9")
    with pytest.raises(EnvironmentFault, match=r"deepspeed 0\.18\.9 is too old, sdo needs 0\.19\.8") as fault:
        zero_asked_for()
    assert fault.value.remedy == install_extra("deepspeed")


def without_deepspeed():
    """`sdo`, where DeepSpeed is not installed."""
    from importlib.metadata import PackageNotFoundError

    from sdo_cli.cli.app import main

    def version(name):
        raise PackageNotFoundError(name)

    zero.version = version
    main()


def test_one_that_is_not_installed_is_said(tmp_path):
    processes = start(words_of(tmp_path / "run", *FULL), "zero-2", call="test_zero:without_deepspeed")
    codes, _, errs = finish(processes)
    assert codes == [2, 2] and errs[0].count("DeepSpeed, which is not installed") == 1
    assert "Traceback" not in errs[0] and "[deepspeed]'" in errs[0] and not (tmp_path / "run").exists()


def made(tree, *words):
    """DeepSpeed's configuration for this recipe and this file."""
    world = World(0, 2, zero=Zero(tree["zero_optimization"]["stage"], tree))
    return settings(load_recipe("quickstart", ["train=full", *words]).recipe, world)


def test_auto_is_what_the_recipe_says():
    found = made(FILE, "train_batch_size=3", "gradient_accumulation_steps=5", "max_grad_norm=0.7")
    assert found["train_batch_size"] == 30 and found["train_micro_batch_size_per_gpu"] == 3
    assert found["gradient_accumulation_steps"] == 5 and found["gradient_clipping"] == 0.7
    assert found["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e7,
        "contiguous_gradients": True,
    }
    assert made({"zero_optimization": {"stage": 2}})["zero_optimization"]["reduce_bucket_size"] == 2**26
    assert found["gradient_allreduce_op"] == "sum" and found["managed_gradient_accumulation"] is False


def test_the_same_in_both_is_well():
    said = {"train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.7, "gradient_accumulation_steps": 1}
    params = {"lr": 2e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    words = ["train_batch_size=3", "gradient_accumulation_steps=5", "max_grad_norm=0.7", "learning_rate=2e-4"]
    words += ["adam_weight_decay=0.01"]
    # the launcher says an accumulation of 1 when nobody chose
    assert made({**FILE, **said, "optimizer": {"type": "AdamW", "params": params}}, *words)["train_batch_size"] == 30


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"train_batch_size": 7}, "train_batch_size: 7 there, "),
        ({"train_micro_batch_size_per_gpu": 9}, "train_micro_batch_size_per_gpu: 9 there, "),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps: 3 there, "),
        ({"gradient_clipping": 0.5}, r"gradient_clipping: 0\.5 there, 1\.0 here"),
        ({"optimizer": {"type": "Lion", "params": {"lr": "auto"}}}, r"optimizer\.type: Lion there, AdamW here"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3.0}}}, r"optimizer\.params\.lr: 3\.0 there, "),
        (
            {"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}},
            r"optimizer\.params\.amsgrad: True there, unknown",
        ),
    ],
)
def test_what_differs_from_the_recipe_is_refused(said, what):
    with pytest.raises(EnvironmentFault, match=what) as fault:
        made({**FILE, **said})
    assert "auto" in fault.value.remedy


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "trains a LoRA"),
        (["train=full", "mixed_precision=fp16"], "fp16"),
        (["train=full", "optimizer=adamw8bit"], "8bit"),
    ],
)
def test_recipes_that_do_not_go_with_it(words, said):
    with pytest.raises(EnvironmentFault, match=said) as fault:
        check_shardable(load_recipe("quickstart", words).recipe, "DeepSpeed")
    assert fault.value.remedy and "DeepSpeed" in fault.value.message


def test_what_only_draws_is_refused(configured):
    configured()
    with pytest.raises(EnvironmentFault, match="DeepSpeed, which is for sdo finetune with train: full"), joined():
        pass
