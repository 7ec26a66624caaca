"""The preprocessing that other programs' files describe, in this program's terms.

Each function returns values of :class:`~van_deploy.model.preprocess.Preprocessing`
by their names, with the defaults of the code that would have read the file:
timm's ``resolve_data_config``, torchvision's reference ``train.py``,
Transformers' image processors and mmpretrain's pipelines. What cannot be done
exactly is a :class:`~van_deploy.errors.UsageError` that names the key.
"""

from __future__ import annotations

import ast
import re
import reprlib
from collections.abc import Mapping, Set
from typing import Any

from van_deploy.config.sizes import parse_image_size
from van_deploy.errors import UsageError

Values = dict[str, Any]
Given = Mapping[str, Any]

_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
_CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers

# Transformers 4.30.2: how each processor resizes, and its defaults for size, crop_size,
# resample, mean and std. ConvNeXt's default for a size of 384 and more is to squash.
_PROCESSORS: dict[str, tuple[str, int, int, int, Values]] = {
    "ConvNext": ("crop_pct", 384, 0, 2, _HALF),
    "ViT": ("squash", 224, 0, 2, _HALF),
    "DeiT": ("squash", 256, 224, 3, _HALF),
    "Bit": ("center", 224, 224, 3, _CLIP),
    "CLIP": ("center", 224, 224, 3, _CLIP),
}
_LONGEST_CONFIG = 2**20  # characters
_CONVNEXT_SQUASHES_FROM = 384  # pixels
_KNOWN = re.compile(  # read below, or of no meaning for the pixels
    "do_(resize|center_crop|rescale|normalize|convert_rgb)|size|resample|crop_size|crop_pct"
    "|rescale_factor|image_mean|image_std|image_processor_type|feature_extractor_type"
    "|_?processor_class|return_tensors|(input_)?data_format|device|disable_grouping"
    "|default_to_square|_?valid_processor_keys"
)
# What :func:`from_arguments` reads.
_TIMM = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
ARGUMENTS = (*_TIMM, "img_size", "input_size", "val_resize_size", "val_crop_size")


def _require(fits: object, key: str, value: object, wanted: str = "which is not supported") -> None:
    if not fits:
        raise UsageError(f"{key} is {reprlib.repr(value)}, {wanted}.")


def from_arguments(args: Given) -> Values:
    """Return what a training script's arguments say, torchvision's or timm's.

    Mean and std of torchvision's reference ``train.py`` are fixed; timm's leave what they do
    not say to the model.
    """
    if {"val_resize_size", "val_crop_size"} & args.keys():
        backend = str(args.get("backend", "pil"))
        _require(backend.lower() == "pil", "backend", backend, "and images are resized by Pillow")
        cut = _cut(args.get("val_resize_size", 256), args.get("val_crop_size", 224))
        return {**_IMAGENET, "interpolation": args.get("interpolation"), **cut}
    size = list(args.get("input_size") or ())[1:] or args.get("img_size")
    size = size[0] if isinstance(size, list) and len(size) == 1 else size
    return {name: args.get(name) for name in _TIMM} | {"image_size": parse_image_size(size)}


def from_config(config: Given) -> Values:
    """Return what a ``config.json`` says: Transformers' size, or timm's ``pretrained_cfg``.

    The latter's fields once stood beside it.
    """
    if "architecture" not in config:
        return {"image_size": config["image_size"]}
    cfg = config.get("pretrained_cfg") or config
    for key in ("crop_border_pixels", "label_offset"):
        _require(not cfg.get(key), key, cfg.get(key))
    stated = {name: value for name, value in from_arguments(cfg).items() if value}
    return {**_IMAGENET, "interpolation": "bicubic", "crop_pct": 0.875, "image_size": 224, **stated}


def from_processor(processor: Given) -> Values:
    """Return what a Transformers ``preprocessor_config.json`` describes.

    Which resize is meant depends on the processor. Without a type it is the one that
    Transformers takes for a VAN, ``ConvNextImageProcessor``.
    """
    given = {key: value for key, value in processor.items() if value is not None}
    kind = given.get("image_processor_type") or given.get("feature_extractor_type") or "ConvNext"
    name = re.sub(r"(ImageProcessor(Fast)?|FeatureExtractor)$", "", str(kind))
    _require(name in _PROCESSORS, "its type", kind, f"none of those known: {list(_PROCESSORS)}")
    for key, value in given.items():
        _require(not value or _KNOWN.fullmatch(key), key, value, "which is not known here")
    for key in ("do_resize", "do_rescale"):
        _require(given.get(key, True), key, given.get(key))
    factor = given.get("rescale_factor", 1 / 255)
    _require(abs(factor * 255 - 1) < 1e-3, "rescale_factor", factor, "not 1/255")
    how, size, crop, resample, colour = _PROCESSORS[name]
    resample = given.get("resample", resample)
    _require(resample in range(len(_RESAMPLE)), "resample", resample, "none of Pillow's filters")
    values = {key: given.get(f"image_{key}", colour[key]) for key in ("mean", "std")}
    if not given.get("do_normalize", True):
        values = {"mean": 0.0, "std": 1.0}
    values |= {"interpolation": _RESAMPLE[resample], "crop_rounding": "floor"}
    edges = {"height", "width"} if how == "squash" else {"shortest_edge"}
    size = _square("size", given.get("size", size), edges)
    if how == "crop_pct":
        pct = given.get("crop_pct", 224 / 256)
        if size >= _CONVNEXT_SQUASHES_FROM:
            return {**values, **_cut(size, size), "crop_mode": "squash"}
        _require(isinstance(pct, int | float) and 0 < pct <= 1, "crop_pct", pct, "not in (0, 1]")
        whole = {"resize_size": int(size / pct), "crop_pct": float(pct)}
        return {**values, **whole, "image_size": size}
    crops = given.get("do_center_crop", bool(crop))
    _require(crops == bool(crop) or (crop and how == "squash"), "do_center_crop", crops)
    side = _square("crop_size", given.get("crop_size", crop)) if crops else size
    return {**values, **_cut(size, side), "crop_mode": how}


def from_openmmlab(config: Given) -> Values:
    """Return what an OpenMMLab configuration's preprocessor and test pipeline do.

    Of a segmenter or detector (not ``is_classifier``) only the mean and std are read: its images
    keep their own sizes, so nothing is said of resizing.
    """
    model, loader = config.get("model") or {}, config.get("test_dataloader") or {}
    pipeline = config.get("test_pipeline") or (loader.get("dataset") or {}).get("pipeline") or []
    steps = [*pipeline, *(config.get("train_pipeline") or [])]
    steps += [s for step in steps if isinstance(step, dict) for s in step.get("transforms") or []]
    steps += [config.get("data_preprocessor"), model.get("data_preprocessor")]
    steps += [config.get("img_norm_cfg")]
    colour: Given = next((s for s in steps if isinstance(s, dict) and s.get("mean")), {})
    rgb = not colour or colour.get("to_rgb") or colour.get("bgr_to_rgb")
    _require(rgb, "to_rgb", False, "so the network takes BGR: not supported")
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
            one_side = kind == "ResizeEdge" or (isinstance(size, list) and size[1:] == [-1])
            size = size[0] if one_side and isinstance(size, list) else _square("scale", size)
            values["interpolation"] = step.get("interpolation", "bilinear")
            values["crop_mode"] = "center" if one_side else "squash"
        elif kind == "CenterCrop":
            crop = _square("crop_size", step.get("crop_size"))
        else:
            known = re.match(r"(Normalize|LoadImage|Pack|ToTensor|ImageToTensor|Collect)", kind)
            _require(known, "a step of the test pipeline", kind)
    return values | _cut(size, crop or size)


def python_config(text: object) -> Values:
    """Return the plain values assigned in the text of an OpenMMLab configuration; runs nothing."""

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
        lines = ast.parse(text[:_LONGEST_CONFIG]).body if isinstance(text, str) else []
        found = [node for node in lines if isinstance(node, ast.Assign)]
        return {ast.unparse(node.targets[0]): value(node.value) for node in found}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _cut(size: Any, crop: Any) -> Values:
    """Return the geometry of a resize to ``size`` pixels and a centre crop of ``crop``."""
    for key, side in (("the resized side", size), ("the crop", crop)):
        _require(type(side) is int and side > 0, key, side, "no number of pixels")
    return {"image_size": crop, "resize_size": size, "crop_pct": min(1.0, crop / size)}


def _square(key: str, size: Any, edges: Set[str] = frozenset({"height", "width"})) -> Any:
    """Return the side that a size means: a number, two equal ones, or one of each of ``edges``."""
    fits = not isinstance(size, Mapping) or size.keys() == edges
    _require(fits, key, size, f"not {' and '.join(sorted(edges))}")
    sides = list(size.values()) if isinstance(size, Mapping) else size
    sides = sides if isinstance(sides, list | tuple) else [sides]
    fits = len(sides) in (1, 2) and sides[0] == sides[-1]
    _require(fits, key, size, "and only squares are supported")
    return sides[0]
