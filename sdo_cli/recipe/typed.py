"""A plain tree to frozen dataclasses, collecting every mistake on the way."""

import dataclasses
import difflib
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode
from omegaconf.errors import OmegaConfBaseException

from sdo_cli.recipe.document import Document, Key

SCALARS: dict[type, tuple[Any, str]] = {
    bool: (BooleanNode, "true or false"),
    int: (IntegerNode, "a whole number"),
    float: (FloatNode, "a number"),
    str: (StringNode, "text"),
}
# stands for a value that could not be read; its problem is already noted
BROKEN: Any = object()


def suggestion(word: str, known: list[str]) -> str:
    """``did you mean …`` or the list of what there is."""
    near = nearest(word, known)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"


def nearest(word: str, known: list[str]) -> list[str]:
    """The one it was probably meant to be; none where nothing is like it."""
    return difflib.get_close_matches(word, known, n=1, cutoff=0.6)


# what other trainers call it: diffusers' scripts, kohya's, everyday speech
ALIASES = {
    "lr": "learning_rate",
    "unet_lr": "learning_rate",
    "steps": "max_train_steps",
    "max_steps": "max_train_steps",
    "num_train_steps": "max_train_steps",
    "batch_size": "train_batch_size",
    "bs": "train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "sampling_steps": "num_inference_steps",
    "sample_steps": "num_inference_steps",
    "inference_steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "scheduler": "solver",
    "sampler": "solver",
    "pretrained_model_name_or_path": "model",
    "base_model": "model",
    "checkpoint": "model",
    "rank": "lora.rank",
    "network_dim": "lora.rank",
    "network_alpha": "lora.alpha",
    "dim": "lora.rank",
    "alpha": "lora.alpha",
    "network_weights": "lora.start_from",
    "reward": "rewards",
    "prompt": "prompts",
    "precision": "mixed_precision",
    "warmup_steps": "lr_warmup_steps",
    "weight_decay": "adam_weight_decay",
    "ema": "ema_decay",
    "kl": "kl_weight",
    "save_steps": "checkpointing_steps",
    "save_every_n_steps": "checkpointing_steps",
    "out": "output_dir",
    "resolution": "height",
    "rule": "gradient.rule",
}


def _explained(word: str, known: list[str], key: Key) -> str:
    """A suggestion, and the command that says more of it."""
    if not key and (meant := ALIASES.get(word)):
        return f"did you mean {meant}? (sdo recipe explain {meant})"
    command = " ".join(["sdo recipe explain", ".".join((*key, *nearest(word, known)))]).strip()
    return f"{suggestion(word, known)} ({command})"


class Reader:
    """Turns the tree of a document into ``schema`` objects; problems go to the document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._reported: set[Key] = set()

    def follow_up(self, key: Key, text: str) -> None:
        """Like :meth:`problem`, but silent where the same key, a part of it or its whole is reported already."""
        if not any(key[: len(old)] == old or old[: len(key)] == key for old in self._reported):
            self.problem(key, text)

    def problem(self, key: Key, text: str) -> Any:
        self._reported.add(key)
        self.document.problems.append(f"{self.document.origin(key)}: {'.'.join(key) or 'recipe'}: {text}")
        return BROKEN

    def read(self, value: Any, hint: Any, key: Key) -> Any:
        """``value`` as ``hint`` wants it, or BROKEN."""
        if dataclasses.is_dataclass(hint):
            return self._dataclass(value, hint, key)
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            if value is None:
                return None
            return self.read(value, next(a for a in arguments if a is not type(None)), key)
        if origin is Literal:
            if value in arguments:
                return value
            # YAML reads a bare `no` as false
            if value is False and "no" in arguments:
                return "no"
            return self.problem(key, f"{value!r} is not one of {', '.join(arguments)}")
        if origin is list:
            if not isinstance(value, list):
                return self.problem(key, f"must be a list, not {value!r}; write - before each entry")
            return self._all([self.read(v, arguments[0], (*key, str(i))) for i, v in enumerate(value)])
        if origin is dict:
            if not isinstance(value, dict):
                return self.problem(key, f"must be a mapping, not {value!r}; write key: value")
            pairs = {str(k): self.read(v, arguments[1], (*key, str(k))) for k, v in value.items()}
            return BROKEN if any(v is BROKEN for v in pairs.values()) else pairs
        if hint is Any:
            return value
        return self._scalar(value, hint, key)

    def _all(self, values: list[Any]) -> Any:
        return BROKEN if any(v is BROKEN for v in values) else values

    def _scalar(self, value: Any, hint: type, key: Key) -> Any:
        node, wanted = SCALARS[hint]
        if value is None:
            return self.problem(key, f"is empty; must be {wanted}")
        if isinstance(value, dict | list) or (isinstance(value, bool) and hint is not bool):
            return self.problem(key, f"must be {wanted}, not {value!r}")
        if isinstance(value, str) and (value == "???" or "${" in value):
            return self.problem(key, f"is not filled in: {value!r}; write the value itself")
        try:
            read = node(value)._value()
        except OmegaConfBaseException:
            read = None
        return read if isinstance(read, hint) else self.problem(key, f"must be {wanted}, not {value!r}")

    def _dataclass(self, value: Any, schema: Any, key: Key) -> Any:
        if isinstance(value, str) and hasattr(schema, "SHORTHAND"):
            value = {schema.SHORTHAND: value}
        if isinstance(value, list) and hasattr(schema, "OF_A_LIST"):
            value = {schema.OF_A_LIST: value}
        if not isinstance(value, dict):
            return self.problem(key, f"must be a mapping with keys like {dataclasses.fields(schema)[0].name}")
        hints = get_type_hints(schema)
        known = [f.name for f in dataclasses.fields(schema)]
        for word in value:
            if word not in known:
                self.problem((*key, str(word)), f"unknown key; {_explained(str(word), known, key)}")
        given = {name: self.read(value[name], hints[name], (*key, name)) for name in known if name in value}
        for f in dataclasses.fields(schema):
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and f.name not in value:
                given[f.name] = self.problem((*key, f.name), "is missing; every recipe needs it")
        # what could not be read gets a blank, so that later checks still find their own mistakes
        for f in dataclasses.fields(schema):
            if given.get(f.name) is BROKEN:
                given.pop(f.name)
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and f.name not in given:
                given[f.name] = _blank(hints[f.name])
        return schema(**given)


def _blank(hint: Any) -> Any:
    return hint() if dataclasses.is_dataclass(hint) and isinstance(hint, type) else (get_origin(hint) or hint)()
