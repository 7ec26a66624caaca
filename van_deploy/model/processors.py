"""Convert the preprocessing configurations of other projects to ``Preprocessing`` values.

Each function returns values of :class:`~van_deploy.model.preprocess.Preprocessing`
by name, with the defaults of the program that reads the file: timm's
``resolve_data_config``, torchvision's reference ``train.py``, Transformers' image
processors and mmpretrain's pipelines. Preprocessing that cannot be reproduced
exactly is a :class:`~van_deploy.errors.UsageError` that names the key; a network of BGR
images is a :class:`~van_deploy.errors.CheckpointError`, since no other preprocessing suits it.
"""

import ast
import re
import reprlib
from collections.abc import Mapping, Set
from typing import Any

from van_deploy.config.sizes import parse_image_size
from van_deploy.errors import CheckpointError, UsageError

Values = dict[str, Any]
Source = Mapping[str, Any]

_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
_CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers

# Transformers 4.30.2: the resize mode of each processor, and its defaults for size, crop_size,
# resample, mean and std. ConvNeXt resizes both sides (squash) for sizes of 384 and more.
_PROCESSORS: dict[str, tuple[str, int, int, int, Values]] = {
    "ConvNext": ("crop_pct", 384, 0, 2, _HALF),
    "ViT": ("squash", 224, 0, 2, _HALF),
    "DeiT": ("squash", 256, 224, 3, _HALF),
    "Bit": ("center", 224, 224, 3, _CLIP),
    "CLIP": ("center", 224, 224, 3, _CLIP),
}
_MAX_CONFIG_LENGTH = 2**20  # characters
_CONVNEXT_SQUASH_SIZE = 384  # pixels
_KNOWN_KEYS = re.compile(  # read below, or without effect on the pixels
    "do_(resize|center_crop|rescale|normalize|convert_rgb)|size|resample|crop_size|crop_pct"
    "|rescale_factor|image_mean|image_std|image_processor_type|feature_extractor_type"
    "|_?processor_class|return_tensors|(input_)?data_format|device|disable_grouping"
    "|default_to_square|_?valid_processor_keys"
)
# Keys that :func:`from_arguments` reads.
_TIMM_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_SIZE_KEYS = ("img_size", "image_size", "input_size", "crop_size")
ARGUMENT_KEYS = (*_TIMM_KEYS, *_SIZE_KEYS, "val_resize_size", "val_crop_size")


def _require(supported: object, key: str, value: object, reason: str = "not supported") -> None:
    if not supported:
        raise UsageError(f"{key} is {reprlib.repr(value)}, {reason}.")


def _require_rgb(is_rgb: object) -> None:
    if not is_rgb:
        message = "The network takes BGR images, which are not supported."
        remedy = "Save its state_dict alone, with weight[:, [2, 1, 0]] in the first convolution, "
        raise CheckpointError(message, f"{remedy}and give --mean and --std in the order of RGB.")


def from_arguments(args: Source) -> Values:
    """Return the values of a training script's arguments, torchvision's or timm's.

    Mean and std of torchvision's reference ``train.py`` are fixed; timm's missing arguments
    have the model's defaults.
    """
    if {"val_resize_size", "val_crop_size"} & args.keys():
        backend = str(args.get("backend", "pil"))
        _require(backend.lower() == "pil", "backend", backend, "but only pil is supported")
        sizes = _resize_and_crop(args.get("val_resize_size", 256), args.get("val_crop_size", 224))
        return {**_IMAGENET, "interpolation": args.get("interpolation"), **sizes}
    shape, crop = args.get("input_size") or (), args.get("crop_size")
    _require(not crop, "crop_size", crop, "of which it is unknown what is resized to what size")
    _require(isinstance(shape, list | tuple), "input_size", shape, "not channels, height, width")
    size: Any = list(shape[1:] if len(shape) > 2 else shape)
    size = size or args.get("img_size") or args.get("image_size")
    size = size[0] if isinstance(size, list) and len(size) == 1 else size
    return {key: args.get(key) for key in _TIMM_KEYS} | {"image_size": parse_image_size(size)}


def from_config(config: Source) -> Values:
    """Return the values of a ``config.json``: Transformers' size, or timm's ``pretrained_cfg``.

    Older versions of timm wrote the keys of ``pretrained_cfg`` at the top level.
    """
    if "architecture" not in config:
        return {"image_size": config["image_size"]}
    cfg = config.get("pretrained_cfg") or config
    border = cfg.get("crop_border_pixels")
    _require(not border, "crop_border_pixels", border)
    values = {name: value for name, value in from_arguments(cfg).items() if value}
    return {**_IMAGENET, "interpolation": "bicubic", "crop_pct": 0.875, "image_size": 224, **values}


def from_processor(processor: Source) -> Values:
    """Return the values of a Transformers ``preprocessor_config.json``.

    The resize mode depends on the processor's type. Without a type it is the one that
    Transformers uses for a VAN, ``ConvNextImageProcessor``.
    """
    config = {key: value for key, value in processor.items() if value is not None}
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "ConvNext"
    name = re.sub(r"(ImageProcessor(Fast)?|FeatureExtractor)$", "", str(kind))
    _require(name in _PROCESSORS, "its type", kind, f"but these are supported: {list(_PROCESSORS)}")
    _require_rgb(not config.get("do_flip_channel_order"))
    for key, value in config.items():
        _require(not value or _KNOWN_KEYS.fullmatch(key), key, value, "an unknown key")
    for key in ("do_resize", "do_rescale"):
        _require(config.get(key, True), key, config.get(key))
    factor = config.get("rescale_factor", 1 / 255)
    _require(abs(factor * 255 - 1) < 1e-3, "rescale_factor", factor, "not 1/255")
    mode, size, crop, resample, colour = _PROCESSORS[name]
    resample = config.get("resample", resample)
    _require(resample in range(len(_RESAMPLE)), "resample", resample, "not a filter of Pillow")
    values = {key: config.get(f"image_{key}", colour[key]) for key in ("mean", "std")}
    if not config.get("do_normalize", True):
        values = {"mean": 0.0, "std": 1.0}
    values |= {"interpolation": _RESAMPLE[resample], "crop_rounding": "floor"}
    edges = {"height", "width"} if mode == "squash" else {"shortest_edge"}
    size = _square_side("size", config.get("size", size), edges)
    if mode == "crop_pct":
        pct = config.get("crop_pct", 224 / 256)
        if size >= _CONVNEXT_SQUASH_SIZE:
            return {**values, **_resize_and_crop(size, size), "crop_mode": "squash"}
        _require(isinstance(pct, int | float) and 0 < pct <= 1, "crop_pct", pct, "not in (0, 1]")
        values |= {"resize_size": int(size / pct), "crop_pct": float(pct)}
        return {**values, "image_size": size}
    crops = config.get("do_center_crop", bool(crop))
    _require(crops == bool(crop) or (crop and mode == "squash"), "do_center_crop", crops)
    side = _square_side("crop_size", config.get("crop_size", crop)) if crops else size
    return {**values, **_resize_and_crop(size, side), "crop_mode": mode}


def from_openmmlab(config: Source) -> Values:
    """Return the values of an OpenMMLab configuration's preprocessor and test pipeline.

    Only mean and std are read from a segmenter's or detector's (not ``is_classifier``), since
    its images are not resized to a fixed size.
    """
    model, loader = config.get("model") or {}, config.get("test_dataloader") or {}
    pipeline = config.get("test_pipeline") or (loader.get("dataset") or {}).get("pipeline") or []
    steps = [*pipeline, *(config.get("train_pipeline") or [])]
    steps += [s for step in steps if isinstance(step, dict) for s in step.get("transforms") or []]
    preprocessors = [model.get("data_preprocessor"), config.get("data_preprocessor")]
    steps += [*preprocessors, config.get("img_norm_cfg")]
    colour: Source = next((s for s in steps if isinstance(s, dict) and s.get("mean")), {})
    is_step = colour not in preprocessors  # mmcv's Normalize converts to RGB by default
    _require_rgb(not colour or colour.get("to_rgb", colour.get("bgr_to_rgb", is_step)))
    values: Values = {k: [float(x) / 255 for x in colour.get(k) or ()] for k in ("mean", "std")}
    if not (config["is_classifier"] and pipeline):
        return values
    size = crop = None
    for step in pipeline:
        kind = str(step.get("type"))
        if kind in ("ResizeEdge", "Resize"):
            backend, edge = step.get("backend", "cv2"), step.get("edge", "short")
            _require((backend, edge) == ("pillow", "short"), kind, step, "not pillow's short edge")
            size = step.get("scale", step.get("size"))
            is_edge = kind == "ResizeEdge" or (isinstance(size, list) and size[1:] == [-1])
            size = size[0] if is_edge and isinstance(size, list) else _square_side("scale", size)
            values["interpolation"] = step.get("interpolation", "bilinear")
            values["crop_mode"] = "center" if is_edge else "squash"
        elif kind == "CenterCrop":
            crop = _square_side("crop_size", step.get("crop_size"))
        else:
            known = re.match(r"(Normalize|LoadImage|Pack|ToTensor|ImageToTensor|Collect)", kind)
            _require(known, "a step of the test pipeline", kind)
    return values | _resize_and_crop(size, crop or size)


def parse_python_config(text: object) -> Values:
    """Return the literal values assigned in an OpenMMLab configuration, without executing it."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Call):
            return {word.arg: value(word.value) for word in node.keywords if word.arg}
        if isinstance(node, ast.List | ast.Tuple):
            return [value(item) for item in node.elts]
        try:
            return ast.literal_eval(node)
        except ValueError:
            return None

    try:
        lines = ast.parse(text[:_MAX_CONFIG_LENGTH]).body if isinstance(text, str) else []
        assignments = [node for node in lines if isinstance(node, ast.Assign)]
        return {ast.unparse(node.targets[0]): value(node.value) for node in assignments}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _resize_and_crop(size: Any, crop: Any) -> Values:
    """Return the values of a resize to ``size`` pixels and a centre crop of ``crop`` pixels."""
    for key, side in (("the resized side", size), ("the crop", crop)):
        _require(type(side) is int and side > 0, key, side, "not a number of pixels")
    return {"image_size": crop, "resize_size": size, "crop_pct": min(1.0, crop / size)}


def _square_side(key: str, size: Any, edges: Set[str] = frozenset({"height", "width"})) -> Any:
    """Return the side of a square given as a number, two equal ones, or a dict of ``edges``."""
    if isinstance(size, Mapping):
        _require(size.keys() == edges, key, size, f"not {' and '.join(sorted(edges))}")
        size = list(size.values())
    sides = size if isinstance(size, list | tuple) else [size]
    is_square = len(sides) in (1, 2) and sides[0] == sides[-1]
    _require(is_square, key, size, "but only squares are supported")
    return sides[0]
