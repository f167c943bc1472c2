"""Loads an open_clip model and embeds images and prompts: shared by every reward that stands on CLIP."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.base import scoring_dtype
from rewards.checkpoints import UNREADABLE, reason
from rewards.clip_origin import origin_of
from rewards.kept_prompts import KeptPrompts
from rewards.preprocess import Preprocess
from sdo_cli import embedded
from sdo_cli.errors import EnvironmentFault

# what open_clip reads with weights and preprocessing in one place
SCHEMES = ("local-dir:", "hf-hub:")


class ClipEncoder:
    """A frozen open_clip model.

    Args:
        model: ``embedded``, a folder with ``open_clip_config.json``, ``hf-hub:owner/name``, or an architecture's name.
        pretrained: the open_clip tag or weight file when ``model`` is an architecture's name.
        tag: what a weight file was published as or trained like, where it does not tell (``rewards/clip_origin.py``).

    Raises:
        EnvironmentFault: no weights, or such as do not fit; options that contradict each other; an unknown origin.
    """

    def __init__(self, model: str = "embedded", pretrained: str | None = None, tag: str | None = None) -> None:
        identifier = _identifier(model)
        if identifier.startswith(SCHEMES):
            if pretrained is not None or tag is not None:
                raise EnvironmentFault(
                    f"the CLIP model {model} brings its own weights",
                    remedy="leave `pretrained` and `tag` out, or name an architecture",
                )
            self._take(*_load(identifier))
            return
        if pretrained is None:
            raise EnvironmentFault(
                f"no CLIP weights: {model!r} is neither embedded nor a folder",
                remedy="give a folder with open_clip_config.json, or `pretrained` with an open_clip tag or file",
            )
        self._take(*_named(model, pretrained, tag))

    @classmethod
    def untrained(cls, model: str) -> "ClipEncoder":
        """The architecture (name or folder) without weights: the caller loads them."""
        encoder = cls.__new__(cls)
        encoder._take(*_load(_identifier(model), weights=False))
        return encoder

    def _take(self, net: Any, tokenize: Any) -> None:
        import open_clip

        self.tokenize = tokenize
        self.net = net.eval().requires_grad_(False)
        self.preprocess = evaluation_transform(open_clip.get_model_preprocess_cfg(self.net))
        self._texts = KeptPrompts()

    @property
    def width(self) -> int:
        """Length of an embedding."""
        # models with a text tower of its own (SigLIP, CoCa) say it there
        text = getattr(self.net, "text", None)
        return int(self.net.text_projection.shape[-1] if text is None else text.output_dim)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "ClipEncoder":
        self.net.to(device=device, dtype=dtype)
        self._texts.clear()
        return self

    def gradient_checkpointing(self) -> None:
        """Recompute the layers of the image tower in its backward pass."""
        self.net.visual.set_grad_checkpointing(True)

    def images(self, images: Tensor) -> Tensor:
        """Unit-length embeddings ``[B, D]`` of images ``[B, 3, H, W]`` in [0, 1]; gradients flow."""
        dtype = next(self.net.parameters()).dtype
        seen = self.net.encode_image(self.preprocess(images).to(dtype))
        return F.normalize(seen.to(scoring_dtype(dtype)), dim=-1)

    def patch_tokens(self, images: Tensor, layer: int) -> Tensor:
        """Patch tokens ``[B, T, D]`` after block ``layer`` (1 the first) of a vision transformer; gradients flow.

        Later blocks are not computed.

        Raises:
            EnvironmentFault: the image tower is no open_clip vision transformer, or has fewer blocks.
        """
        blocks = getattr(getattr(self.net.visual, "transformer", None), "resblocks", None)
        if blocks is None or not 1 <= layer <= len(blocks):
            depth = "is no vision transformer" if blocks is None else f"has {len(blocks)} blocks, not {layer}"
            raise EnvironmentFault(
                f"the image tower of this CLIP model {depth}", remedy="choose another model, or another layer"
            )
        dtype = next(self.net.parameters()).dtype

        def stop(block: Any, inputs: Any, output: Tensor) -> None:
            raise _Reached(output)

        handle = blocks[layer - 1].register_forward_hook(stop)
        try:
            self.net.encode_image(self.preprocess(images).to(dtype))
        except _Reached as reached:
            tokens = reached.tokens if self.net.visual.transformer.batch_first else reached.tokens.transpose(0, 1)
        finally:
            handle.remove()
        # the first token stands for the whole picture
        return tokens[:, 1:].to(scoring_dtype(dtype))

    def prompts(self, prompts: list[str]) -> Tensor:
        """Unit-length embeddings ``[B, D]``, each made alone and kept; no gradient."""
        return self._texts.rows(prompts, self._read)

    def _read(self, prompt: str) -> Tensor:
        parameter = next(self.net.parameters())
        read = self.net.encode_text(self.tokenize([prompt]).to(parameter.device))
        return F.normalize(read.to(scoring_dtype(parameter.dtype)), dim=-1)


class _Reached(Exception):
    """Ends a forward pass at the block whose output is wanted."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__("reached")
        self.tokens = tokens


def evaluation_transform(settings: Mapping[str, Any]) -> Preprocess:
    """open_clip's evaluation transform, from what a model says of its preprocessing.

    Raises:
        EnvironmentFault: pictures that are not square, or borders that are not black.
    """
    sides, fit = settings["size"], settings.get("resize_mode") or "shortest"
    sides = {sides} if isinstance(sides, int) else set(sides)
    if len(sides) > 1 or (fit == "longest" and settings.get("fill_color")):
        raise EnvironmentFault(
            "this open_clip model wants pictures that are not square, or with coloured borders",
            remedy="choose one that takes squares",
        )
    return Preprocess(
        size=sides.pop(),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation="bilinear" if settings.get("interpolation") == "bilinear" else "bicubic",
        fit=fit,
    )


def _identifier(model: str) -> str:
    try:
        name = embedded.folder(model) if embedded.is_embedded(model) else Path(model).expanduser()
    except KeyError as fault:
        raise EnvironmentFault(str(fault.args[0]), remedy="write `embedded`") from fault
    return f"local-dir:{name}" if name.is_dir() else model


def _named(architecture: str, pretrained: str, tag: str | None) -> tuple[Any, Any]:
    """The architecture of a name with a tag's or a file's weights, computed as these were trained."""
    import open_clip

    # as open_clip reads names: OpenAI's are spelt ViT-L/14
    architecture, file = architecture.replace("/", "-"), str(Path(pretrained).expanduser())
    is_tag = bool(open_clip.get_pretrained_cfg(architecture, pretrained))
    if open_clip.get_model_config(architecture) is None or not (is_tag or Path(file).is_file()):
        # open_clip says what is wrong
        return _load(architecture, pretrained=pretrained)
    pretrained = pretrained if is_tag else file
    origin = origin_of(architecture, pretrained, tag)
    if origin.folder is not None:
        return _load(f"local-dir:{origin.folder}", checkpoint=pretrained)
    trained = origin.trained
    return _load(
        architecture,
        pretrained=pretrained,
        force_quick_gelu=trained.quick_gelu,
        force_preprocess_cfg=trained.preprocess,
    )


def _load(identifier: str, *, weights: bool = True, checkpoint: str | None = None, **more: Any) -> tuple[Any, Any]:
    """Network and tokenizer.

    Args:
        checkpoint: a weight file in place of the one that a folder would be read with.
        more: of ``open_clip.create_model``.
    """
    import open_clip

    own = weights and checkpoint is None
    # it warns of the weights that are left out on purpose
    logging.disable(logging.NOTSET if own else logging.WARNING)
    try:
        net = open_clip.create_model(identifier, precision="fp32", load_weights=own, require_pretrained=own, **more)
        if checkpoint is not None:
            open_clip.load_checkpoint(net, checkpoint)
        return net, open_clip.get_tokenizer(identifier)
    except UNREADABLE as fault:
        raise EnvironmentFault(
            f"cannot load the CLIP model {identifier.removeprefix('local-dir:')!r}: {reason(fault)}",
            remedy="check the name, folder and weight file, or try the embedded model",
        ) from fault
    finally:
        logging.disable(logging.NOTSET)
