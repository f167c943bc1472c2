#!/usr/bin/env bash
# safetensors 0.8.0: saving the same tensors with the same metadata (two or more entries) twice gives files of different
# bytes, in one process too: the entries stand in the header in an order drawn anew for every file. Tensors stand in a
# fixed order, and a file with one entry, or none, is the same every time.
#
# So a hash of the file says nothing about whether two runs made the same weights. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import hashlib
import json

import numpy
import safetensors
from safetensors.numpy import save

tensors = {"b": numpy.arange(6, dtype=numpy.float32), "a": numpy.ones(3, dtype=numpy.float16)}


def headers(metadata):
    """Of forty times the same: how many different files, and how many different ones but for the order of entries."""
    files = [save(tensors, metadata=metadata) for _ in range(40)]
    read = [json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")]) for file in files]
    return len({hashlib.sha256(file).hexdigest() for file in files}), len({json.dumps(r, sort_keys=True) for r in read})


two = headers({"format": "pt", "title": "mine"})
one = headers({"format": "pt"})
print("safetensors", safetensors.__version__)
print("two entries: different files, different contents:", two)
print("one entry:", one)
assert safetensors.__version__ == "0.8.0"
assert two == (2, 1) and one == (1, 1)
PYTHON
echo "as described"
