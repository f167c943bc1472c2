#!/usr/bin/env bash
# transformers 5.23.0 saves a CLIPTextModel under other names than 4.57.1 does, and 4.57.1 loads such a folder with a
# warning alone: every tensor is missing, and the encoder starts at random.
#
# 5 writes `encoder.layers.…` where every published Stable Diffusion folder, and 4, have `text_model.encoder.layers.…`.
# 5 reads both. A pipeline saved with 5 therefore draws other pictures for who has 4. Fails if either changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6 transformers==5.23.0
"$folder/env/bin/python" -m pip install --quiet --target "$folder/four" --no-deps \
  transformers==4.57.1 tokenizers==0.22.1 huggingface_hub==0.36.0
"$folder/env/bin/python" -m pip install --quiet requests==2.32.5
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import torch
import transformers
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

torch.manual_seed(0)
config = CLIPTextConfig(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
CLIPTextModel(config).save_pretrained("saved")
names = sorted(load_file("saved/model.safetensors"))
print("transformers", transformers.__version__, "wrote", len(names), "tensors, the first:", names[0])
assert transformers.__version__ == "5.23.0" and not any(name.startswith("text_model.") for name in names)
PYTHON
PYTHONPATH="$folder/four" "$folder/env/bin/python" - <<'PYTHON'
import transformers
from transformers import CLIPTextModel

_, said = CLIPTextModel.from_pretrained("saved", output_loading_info=True)
missing, unexpected = said["missing_keys"], said["unexpected_keys"]
print("transformers", transformers.__version__, "loaded it:", len(missing), "missing,", len(unexpected), "unexpected")
assert transformers.__version__ == "4.57.1" and len(missing) == len(unexpected) > 10
PYTHON
echo "as described"
