"""A trained MMSegmentation model as a function from images to class ids; the checkpoint never runs code."""

import argparse
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.cli import choose_device
from ldm.data.classes import ClassTable, same_names
from ldm.files import atomic_write
from ldm.util import UserError
from ldm.weights.files import StandIn, refusal
from post_processing.segmentation.config import fill_preprocessor, read_config

# mmengine writes loss histories beside the weights; their pickles ask for these two names.
HISTORY_BUFFER = "mmengine.logging.history_buffer.HistoryBuffer"
HISTORY_METHOD = "builtins.getattr"


def allowed_globals(replaced: Mapping[str, Any]) -> list[Any]:
    """Everything but tensors that a segmentor checkpoint may contain, for torch's weights_only reader.

    Args:
        replaced: name in the file -> what to call in its place.
    """
    numpy_core = getattr(np, "_core", None) or np.core
    numbers = {type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "u8", "u4", "u1", "?")}
    named = [
        (numpy_core.multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")
    ]
    named += [(numpy_core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [np.ndarray, np.dtype, *numbers, *named, *((substitute, name) for name, substitute in replaced.items())]


def read_checkpoint(path: str | Path, replaced: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a segmentor checkpoint without running anything in it.

    mmengine's own loader retries with an unrestricted unpickler when the safe one refuses; this one stops.

    Args:
        path: .pth file of scripts/train_segmentor.py, or any mmengine checkpoint.
        replaced: see allowed_globals; None = loss histories are dropped.
    Returns:
        The dictionary in the file; `state_dict` holds the weights, `meta` (if there) the classes.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint, is truncated, or contains anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"segmentor checkpoint not found: {path}. Give the segmentor.pth of a training.")
    try:
        replaced = replaced or {HISTORY_BUFFER: StandIn, HISTORY_METHOD: StandIn}
        with torch.serialization.safe_globals(allowed_globals(replaced)), path.open("rb") as file, \
                warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the pickle's protocol
            # Torch goes by the ending of a path and takes .safetensors for just that, whatever is in the file.
            is_pickle = file.peek(2)[:1] == b"\x80" or file.peek(2)[:2] == b"PK"
            content = torch.load(file if is_pickle else path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"segmentor checkpoint {path}: contains something other than weights and plain values, or is "
                        f"no torch file ({refusal(error)}). Expected tensors only; nothing was run. Save the "
                        "state_dict alone.") from error
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(
            f"segmentor checkpoint {path}: cannot be read ({refusal(error)}). Is the file complete?") from error
    if not isinstance(content, dict):
        raise ValueError(f"segmentor checkpoint {path}: holds a {type(content).__name__}. Expected a dictionary of "
                         "weights.")
    return content if "state_dict" in content else {"state_dict": content}


def save_checkpoint(path: str | Path, model: torch.nn.Module, class_table: ClassTable, **meta: Any) -> None:
    """Write weights, class table and further plain values as one file, atomically."""
    path = Path(path)
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    table = class_table.to_dict()
    meta = {"class_table": table, "dataset_meta": dataset_meta(class_table), **meta}
    atomic_write(path, lambda file: torch.save({"state_dict": state_dict, "meta": meta}, file))


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside a distributed wrapper."""
    return getattr(model, "module", model)


def list_heads(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Decode heads of an mmseg model, the one that predicts last, auxiliary ones before."""
    heads = []
    for name in ("auxiliary_head", "decode_head"):
        head = getattr(model, name, None)
        heads += [] if head is None else list(head) if isinstance(head, torch.nn.ModuleList) else [head]
    return heads


def dataset_meta(class_table: ClassTable) -> dict[str, Any]:
    """Class names and colours in the form that MMSegmentation keeps them."""
    return {"classes": list(class_table.names), "palette": [list(map(int, colour)) for colour in class_table.colours]}


class Segmentor:
    """An mmseg model in evaluation mode that takes batches of images as they are on disk."""

    def __init__(self, model: torch.nn.Module, class_table: ClassTable, device: str | torch.device = "cpu") -> None:
        """Wrap an mmseg segmentor; ValueError if its head has another number of classes than the table."""
        self.head = list_heads(model)[-1]
        count = self.head.num_classes
        if count != class_table.num_classes:
            raise ValueError(f"segmentor: it has {count} classes. Expected the {class_table.num_classes} of class "
                             f"table {class_table.name}. Give the table that it was trained with.")
        mean = getattr(model.data_preprocessor, "mean", None)  # (C, 1, 1), or (1, 1, 1) for all
        self.channels = mean.numel() if isinstance(mean, torch.Tensor) and mean.numel() > 1 else 3
        if self.channels != 3 and getattr(model.data_preprocessor, "channel_conversion", False):
            raise UserError(f"segmentor: data_preprocessor has {self.channels} means and turns BGR to RGB, which drops "
                            "bands. Expected bgr_to_rgb=False for images that are not RGB. Change its config.")
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.class_table = class_table

    @torch.inference_mode()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores of every pixel.

        Args:
            images: (B, C, H, W) uint8 in [0, 255], any device; C = 3 is RGB, others the bands of a .npy.
        Returns:
            (B, K, H, W) float32 on the segmentor's device.
        Raises:
            ValueError: for another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"segmentor: got images of {images.dtype}, shape {tuple(images.shape)}. Expected uint8, "
                             f"(B, {self.channels}, H, W).")
        return self.scores(images.to(self.device, non_blocking=True))

    def scores(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores, differentiable: (B, C, H, W) in [0, 255] on the device (see logits) -> (B, K, H, W) float32."""
        # mmseg's models normalise what mmseg loads: BGR, or any other bands as they are.
        ordered = images.flip(1) if self.channels == 3 else images
        inputs = self.model.data_preprocessor({"inputs": list(ordered)}, training=False)["inputs"]
        size = tuple(images.shape[-2:])
        metas = [{"ori_shape": size, "img_shape": size, "pad_shape": size, "padding_size": [0, 0, 0, 0]}] * len(images)
        scores = self.model.inference(inputs.contiguous(memory_format=torch.channels_last), metas).float()
        if scores.shape[1] > 1:
            return scores
        return torch.cat([torch.zeros_like(scores), scores], dim=1)  # a sigmoid is the softmax of 0 and its score

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Most likely class of every pixel: (B, 3, H, W) uint8 RGB -> (B, H, W) uint8 on the segmentor's device."""
        logits = self.logits(images)
        if getattr(self.head, "out_channels", None) == 1:  # class 1 is above its threshold, mmseg's default 0.3
            return (logits[:, 1].sigmoid() > self.head.threshold).to(torch.uint8)
        return logits.argmax(dim=1).to(torch.uint8)


def require_mmseg() -> None:
    """Import MMSegmentation's models and choose its registry; UserError with what to install if that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of mmcv, about operators that no config of ours uses
            import mmseg.models  # noqa: F401  registers the models
        from mmengine.registry import init_default_scope
    except ImportError as error:
        raise UserError(f"MMSegmentation cannot be imported ({error}). Expected the packages of requirements/seg.txt "
                        "and, with --no-deps, requirements/seg.nodeps.txt. Install them.") from error
    init_default_scope("mmseg")


def build_model(config: str | Path | Mapping[str, Any]) -> torch.nn.Module:
    """Build an mmseg model with random weights; pretrained backbones named in the config are not fetched.

    Args:
        config: path of an mmengine config (see read_config), or its contents.
    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it describes no model of the installed MMSegmentation.
    """
    require_mmseg()
    from mmengine.config import Config
    from mmseg.apis import init_model

    source = "given as a mapping" if isinstance(config, Mapping) else str(config)
    config = Config(dict(config)) if isinstance(config, Mapping) else read_config(config)
    fill_preprocessor(config, source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about defaults of mmseg's own
            return init_model(config, checkpoint=None, device="cpu")
    except Exception as error:  # of any class of mmseg that the config names
        raise UserError(f"segmentor config {source}: its model cannot be built ({type(error).__name__}: "
                        f"{str(error)[:300]}). Expected one of MMSegmentation 1.x. See --debug.") from error


def load_segmentor(config: str | Path, checkpoint: str | Path, device: str | torch.device = "cpu",
                   class_table: ClassTable | None = None, default_table: ClassTable | None = None,
                   names_suffice: bool = False) -> Segmentor:
    """Load a trained segmentor.

    Args:
        config: mmengine config of the model (see build_model).
        checkpoint: its weights (see read_checkpoint).
        device: where it runs.
        class_table: what its class ids mean; None = the table stored in the checkpoint.
        default_table: where none is stored.
        names_suffice: where none is stored or given, take one of the class names that mmseg stored: for uses that never
            read a mask with it.
    Returns:
        The segmentor in evaluation mode.
    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the weights do not fit the config, or the class table does not fit the weights.
    """
    content = read_checkpoint(checkpoint)
    meta = content.get("meta") or {}
    stored, names = meta.get("class_table"), (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")
    if class_table is None:
        class_table = default_table if stored is None else ClassTable.load(stored)
    if class_table is None and names_suffice and names:
        classes = [{"id": index, "name": str(name), "colour": [1, 0, index]} for index, name in enumerate(names)]
        class_table = ClassTable.load({"name": Path(checkpoint).name, "classes": classes})
    if class_table is None:
        raise UserError(f"segmentor checkpoint {checkpoint}: no class table inside. Give it with --classes; commands "
                        "without that flag need a segmentor.pth of scripts/train_segmentor.py, which holds one.")
    names = list(names or class_table.names)
    if not same_names(names, class_table.names):
        raise UserError(f"segmentor checkpoint {checkpoint}: trained on classes {names}. Expected "
                        f"{list(class_table.names)} of class table {class_table.name}. Give the table that it was "
                        "trained with.")
    model = build_model(config)
    report = check_weights(model, content["state_dict"])
    if report:
        raise ValueError(f"segmentor checkpoint {checkpoint}: does not fit {config}: {report}. Give the pair of one "
                         "training.")
    model.load_state_dict(content["state_dict"])
    return Segmentor(model, class_table, device)


def segmentor_of(args: argparse.Namespace, table: Any = None) -> Segmentor:
    """The segmentor of --segmentor on --device, with the class table of --classes, else another one, else its own."""
    spec = args.classes or table
    return load_segmentor(*args.segmentor, device=choose_device(args.device),
                          class_table=ClassTable.load(spec) if spec else None)  # fmt: skip


def check_weights(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> str:
    """Say in one line how weights differ from a model in names and shapes; "" if they fit."""
    own = model.state_dict()
    missing = sorted(set(own) - set(state_dict))
    unexpected = sorted(set(state_dict) - set(own))
    shapes = [
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state_dict and state_dict[name].shape != own[name].shape
    ]
    parts = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    return "; ".join(parts)
