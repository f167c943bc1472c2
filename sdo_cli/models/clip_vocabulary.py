"""CLIP's tokenizer as files. Every family of Stable Diffusion reads prompts with the one vocabulary of CLIP, and
open_clip, which sdo depends on, carries it: so a single-file checkpoint needs no download for it."""

import gzip
import json
from pathlib import Path

# of the 262,145 merges in the file CLIP uses the first 48,894: 49,408 words less 512 bytes and 2 marks
MERGES = 49152 - 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"


def write_clip_tokenizer(folder: Path, *, pad_token: str = END, model_max_length: int = 77) -> None:
    """Write ``vocab.json``, ``merges.txt`` and their configs as ``transformers.CLIPTokenizer`` reads them.

    Args:
        pad_token: the end mark for CLIP ViT-L (SD 1.x, first encoder of SDXL and SD 3), ``!`` for the OpenCLIP
            encoders (SD 2.x, second encoder of SDXL and SD 3).
    """
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode

    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, START, END])}
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    settings = marks | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": model_max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(marks, indent=2), encoding="utf-8")
