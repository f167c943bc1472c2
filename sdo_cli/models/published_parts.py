"""Saved CLIP encoders and tokenizers as every program reads them.

transformers 5 writes ``CLIPTextModel`` without the level ``text_model.``, and words in ``tokenizer.json`` alone: with
transformers 4, and in ComfyUI, the encoder then starts at random, without an error.
"""

import json
from pathlib import Path

from sdo_cli.models.lora_files import published


def publish_weights(component: str, folder: Path) -> None:
    """Rename what lies in a saved CLIP encoder's folder; nothing where it has the published names."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stream:
            metadata, names = stream.metadata(), list(stream.keys())
        renamed = {name: published(component, name) for name in names}
        if all(old == new for old, new in renamed.items()):
            continue
        save_file({renamed[name]: value for name, value in load_file(path).items()}, path, metadata=metadata)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        tree = json.loads(index.read_text(encoding="utf-8"))
        tree["weight_map"] = {published(component, name): file for name, file in tree["weight_map"].items()}
        index.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def publish_words(folder: Path) -> None:
    """Beside ``tokenizer.json`` of a byte-pair tokenizer also ``vocab.json`` and ``merges.txt``."""
    whole = folder / "tokenizer.json"
    if not whole.is_file() or (folder / "vocab.json").is_file():
        return
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(str(whole)).model
    if type(model).__name__ == "BPE":
        model.save(str(folder))
