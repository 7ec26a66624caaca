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
from collections.abc import Mapping
from typing import Any

from van_deploy.config.sizes import parse_image_size
from van_deploy.errors import UsageError

__all__ = [
    "from_mmpretrain",
    "from_openmmlab_colour",
    "from_processor",
    "from_timm",
    "from_timm_config",
    "from_torchvision",
    "python_config",
]

Values = dict[str, Any]

_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
_CLIP = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers

# Transformers 4.30.2: how each processor resizes, and its defaults for size, crop_size,
# resample, mean and std. ConvNeXt's default for a size of 384 and more is to squash.
_PROCESSORS: dict[str, tuple[str, int, int, int, Values]] = {
    "ConvNext": ("crop_pct", 384, 0, 2, _HALF),
    "ViT": ("squash", 224, 0, 2, _HALF),
    "DeiT": ("squash", 256, 224, 3, _HALF),
    "Bit": ("center", 224, 224, 3, _CLIP),
    "CLIP": ("center", 224, 224, 3, _CLIP),
    "MobileNetV1": ("center", 256, 224, 2, _HALF),
    "MobileNetV2": ("center", 256, 224, 2, _HALF),
}
_CONVNEXT_SQUASHES_FROM = 384  # pixels
_KNOWN = re.compile(  # read below, or of no meaning for the pixels
    "do_(resize|center_crop|rescale|normalize|convert_rgb)|size|resample|crop_size|crop_pct"
    "|rescale_factor|image_mean|image_std|image_processor_type|feature_extractor_type"
    "|_?processor_class|return_tensors|(input_)?data_format|device|disable_grouping"
    "|default_to_square|_?valid_processor_keys"
)

# timm 1.0's PretrainedCfg: read below, read in configs.py, or of no meaning for the pixels.
_KNOWN_TO_TIMM = re.compile(
    "mean|std|interpolation|crop_(pct|mode)|(input|img|test_input|min_input|pool|test_pool)_size"
    "|fixed_input_size|test_crop_pct|num_classes|label_(names|descriptions)|url|file|state_dict"
    "|hf_hub_(id|filename)|source|architecture|tag|custom_load|first_conv|classifier|license"
    "|description|origin_url|paper_(name|ids)|notes"
)


def from_timm(args: Mapping[str, Any]) -> Values:
    """Return what timm's ``train.py`` arguments say; what they leave out is the model's own."""
    values = {name: args.get(name) for name in ("mean", "std", "interpolation", "crop_pct")}
    values["crop_mode"] = args.get("crop_mode")
    size = list(args.get("input_size") or ())[1:] or args.get("img_size")
    values["image_size"] = parse_image_size(
        size[0] if isinstance(size, list) and len(size) == 1 else size
    )
    return values


def from_timm_config(config: Mapping[str, Any]) -> Values:
    """Return what a timm ``config.json`` says, in its ``pretrained_cfg`` or, as once, beside it."""
    cfg = config.get("pretrained_cfg") or config
    for key in ("crop_border_pixels", "label_offset"):
        if cfg.get(key):
            raise UsageError(f"{key} is {cfg[key]!r}, which is not supported.")
    if "pretrained_cfg" in config:  # where it is not, configs.py looks at every field
        unknown = [k for k, v in cfg.items() if v and not _KNOWN_TO_TIMM.fullmatch(k)]
        if unknown:
            raise UsageError(f"pretrained_cfg has {', '.join(unknown)[:200]}: not known here.")
    return {
        **_IMAGENET,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "image_size": 224,
        **{name: value for name, value in from_timm(cfg).items() if value},
    }


def from_torchvision(args: Mapping[str, Any]) -> Values:
    """Return what torchvision's reference ``train.py`` arguments say; mean and std are fixed."""
    size, crop = args.get("val_resize_size", 256), args.get("val_crop_size", 224)
    if args.get("backend", "pil").lower() != "pil":
        raise UsageError(f"backend is {args['backend']!r}: images are resized by Pillow here.")
    return {**_IMAGENET, "interpolation": args.get("interpolation"), **_cut(size, crop)}


def from_processor(processor: Mapping[str, Any]) -> Values:
    """Return what a Transformers ``preprocessor_config.json`` describes.

    Which resize is meant depends on the processor. Without a type it is the one that
    Transformers takes for a VAN, ``ConvNextImageProcessor``.
    """
    given = {key: value for key, value in processor.items() if value is not None}
    kind = given.get("image_processor_type") or given.get("feature_extractor_type") or "ConvNext"
    name = re.sub(r"(ImageProcessor(Fast)?|FeatureExtractor)$", "", str(kind))
    if name not in _PROCESSORS:
        raise UsageError(f"{kind!r} is none of the processors known: {', '.join(_PROCESSORS)}.")
    unknown = [key for key, value in given.items() if value and not _KNOWN.fullmatch(key)]
    if unknown:
        raise UsageError(f"{', '.join(unknown)[:200]} is not known here.")
    for switch in ("do_resize", "do_rescale"):
        if not given.get(switch, True):
            raise UsageError(f"{switch} is false.")
    factor = given.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > 1e-3:
        raise UsageError(f"rescale_factor is {reprlib.repr(factor)}, not 1/255.")
    how, size, crop, resample, colour = _PROCESSORS[name]
    resample = given.get("resample", resample)
    if not isinstance(resample, int) or not 0 <= resample < len(_RESAMPLE):
        raise UsageError(f"resample is {reprlib.repr(resample)}, none of Pillow's filters.")
    values = {key: given.get(f"image_{key}", colour[key]) for key in ("mean", "std")}
    if not given.get("do_normalize", True):
        values = {"mean": 0.0, "std": 1.0}
    return {
        **values,
        **_geometry(given, how, size, crop),
        "interpolation": _RESAMPLE[resample],
        "crop_rounding": "floor",
    }


def _geometry(given: Mapping[str, Any], how: str, size: int, crop: int) -> Values:
    """Return the sides that a processor resizes to and cuts out."""
    stated = given.get("size", size)
    edges = {"height", "width"} if how == "squash" else {"shortest_edge"}
    if isinstance(stated, Mapping) and stated.keys() != edges:
        raise UsageError(f"size is {reprlib.repr(stated)}, not {' and '.join(sorted(edges))}.")
    size = _square("size", stated)
    if how == "crop_pct":
        pct = given.get("crop_pct", 224 / 256)
        if size >= _CONVNEXT_SQUASHES_FROM:
            return {"image_size": size, "resize_size": size, "crop_pct": 1.0, "crop_mode": "squash"}
        if isinstance(pct, bool) or not isinstance(pct, int | float) or not 0 < pct <= 1:
            raise UsageError(f"crop_pct is {reprlib.repr(pct)}, not in (0, 1].")
        return {"image_size": size, "resize_size": int(size / pct), "crop_pct": pct}
    crops = given.get("do_center_crop", bool(crop))
    if crops != bool(crop) and (crops or how == "center"):
        raise UsageError(f"do_center_crop is {str(crops).lower()}.")
    side = _square("crop_size", given.get("crop_size", crop)) if crops else size
    return {**_cut(size, side), "crop_mode": how}


def from_mmpretrain(config: Mapping[str, Any]) -> Values:
    """Return what an mmpretrain configuration's preprocessor and test pipeline do."""
    model, loader = config.get("model") or {}, config.get("test_dataloader") or {}
    pipeline = config.get("test_pipeline") or (loader.get("dataset") or {}).get("pipeline") or []
    colour = config.get("data_preprocessor") or model.get("data_preprocessor") or {}
    values: Values = {}
    size = crop = None
    for step in pipeline:
        kind = str(step.get("type"))
        if kind in ("ResizeEdge", "Resize"):
            if step.get("backend", "cv2") != "pillow":
                raise UsageError(f"{kind}'s backend is not pillow: its pixels are not Pillow's.")
            if step.get("edge", "short") != "short":
                raise UsageError(f"{kind}'s edge is {reprlib.repr(step['edge'])}.")
            size = step.get("scale", step.get("size"))
            one_side = kind == "ResizeEdge" or (isinstance(size, list) and size[1:] == [-1])
            size = size[0] if one_side and isinstance(size, list) else _square("scale", size)
            values["interpolation"] = step.get("interpolation", "bilinear")
            values["crop_mode"] = "center" if one_side else "squash"
        elif kind == "CenterCrop":
            crop = _square("crop_size", step.get("crop_size"))
        elif kind == "Normalize":
            colour = step
        elif not re.match(r"(LoadImage|Pack|ToTensor|ImageToTensor|Collect)", kind):
            raise UsageError(f"the test pipeline has {kind!r}.")
    if colour.get("mean") and not colour.get("to_rgb", False):
        raise UsageError("to_rgb is false: the network takes BGR.")
    for key in ("mean", "std"):
        if colour.get(key):
            values[key] = [float(number) / 255 for number in colour[key]]
    return values | (_cut(size, crop or size) if pipeline else {})


def from_openmmlab_colour(config: Mapping[str, Any]) -> Values:
    """Return the mean and std of a segmenter's or detector's configuration, for its backbone.

    Their images keep their own sizes, so nothing is said of resizing.
    """
    pipelines = [config.get(name) for name in ("test_pipeline", "train_pipeline")]
    steps = [step for pipeline in pipelines for step in pipeline or [] if isinstance(step, dict)]
    steps += [inner for step in steps for inner in step.get("transforms") or []]
    found = [step for step in steps if step.get("type") == "Normalize"]
    model = config.get("model") or {}
    places = (config.get("data_preprocessor"), model.get("data_preprocessor"))
    colour: Mapping[str, Any] = next(
        filter(None, (*places, config.get("img_norm_cfg"), *found)), {}
    )
    if colour.get("mean") and not (colour.get("to_rgb") or colour.get("bgr_to_rgb")):
        raise UsageError("neither to_rgb nor bgr_to_rgb is true: the network takes BGR.")
    return {
        key: [float(number) / 255 for number in colour[key]]
        for key in ("mean", "std")
        if colour.get(key)
    }


def python_config(text: str) -> dict[str, Any]:
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
        body = ast.parse(text).body
        return {
            target.id: value(node.value)
            for node in body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _cut(size: Any, crop: Any) -> Values:
    """Return the geometry of a resize to ``size`` pixels and a centre crop of ``crop``."""
    for key, side in (("resized side", size), ("crop", crop)):
        if isinstance(side, bool) or not isinstance(side, int) or side <= 0:
            raise UsageError(f"the {key} is {reprlib.repr(side)}.")
    return {"image_size": crop, "resize_size": size, "crop_pct": min(1.0, crop / size)}


def _square(key: str, size: Any) -> Any:
    """Return the side that a size means: a number, or two equal ones."""
    sides = list(size.values()) if isinstance(size, Mapping) else size
    if not isinstance(sides, list | tuple):
        return size
    if len(sides) not in (1, 2) or sides[0] != sides[-1]:
        raise UsageError(f"{key} is {reprlib.repr(size)}: only squares are supported.")
    return sides[0]
