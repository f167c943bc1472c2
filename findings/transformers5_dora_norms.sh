#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: `load_adapter` puts a DoRA's two matrices into a text encoder and leaves its
# learned norms out; it raises nothing and lists them as "unexpected", and the encoder computes with the base's norms.
#
# The state dict is peft's own, saved from an adapter of the same configuration, and diffusers' load_lora_weights goes
# this way for text encoders. peft's `set_peft_model_state_dict` loads the same dict whole. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import copy

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel

torch.manual_seed(0)
sizes = CLIPTextConfig(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
base = CLIPTextModel(sizes).eval()
settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True)
words = torch.arange(9)[None]


def adapted():
    model = copy.deepcopy(base)
    model.add_adapter(copy.deepcopy(settings))
    return model


trained = adapted()
with torch.no_grad():
    for name, value in trained.named_parameters():
        if "lora_" in name:
            value += 0.5 * torch.randn_like(value)
saved = {key: value.clone() for key, value in get_peft_model_state_dict(trained).items()}
norms = [key for key in saved if "magnitude" in key]

loaded = copy.deepcopy(base)
loaded.load_adapter(adapter_state_dict=dict(saved), peft_config=copy.deepcopy(settings))
by_peft = adapted()
set_peft_model_state_dict(by_peft, dict(saved))


def error(model):
    kept = get_peft_model_state_dict(model)
    halves = ("lora_A", "lora_B", "magnitude")
    return {half: max((kept[k] - saved[k]).abs().max().item() for k in saved if half in k) for half in halves}


print("transformers", transformers.__version__, "peft", peft.__version__, "norms in the dict:", len(norms))
print("load_adapter, largest error:", error(loaded))
print("set_peft_model_state_dict, largest error:", error(by_peft))
with torch.no_grad():
    want, got = trained.eval()(words)[0], loaded.eval()(words)[0]
print("outputs differ by", (want - got).abs().max().item())
assert transformers.__version__ == "5.23.0" and len(norms) == 2
assert error(loaded)["lora_A"] == error(loaded)["lora_B"] == 0 and error(loaded)["magnitude"] > 0.1
assert set(error(by_peft).values()) == {0}
PYTHON
echo "as described"
