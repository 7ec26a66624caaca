"""VAN in timm: ``timm.create_model("van_b1")`` after importing this module.

timm does the data configuration, the adaptation of head and first convolution, and
``features_only``; pretrained weights are loaded by :func:`load_van`, since timm's
loader rejects the official pickles.
"""

from dataclasses import replace
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from van_deploy.model.checkpoint import load_van
from van_deploy.model.preprocess import OFFICIAL
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig, Variant

__all__: list[str] = []


def _default_cfg(variant: Variant) -> dict[str, Any]:
    """Return timm's data configuration of a variant."""
    repo, _, file = (variant.weights or "").partition(":")
    return {
        "num_classes": 1000,
        "input_size": (3, OFFICIAL.image_size, OFFICIAL.image_size),
        **{key: getattr(OFFICIAL, key) for key in ("crop_pct", "interpolation", "mean", "std")},
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/Visual-Attention-Network/VAN-Classification",
        **({"hf_hub_id": repo, "hf_hub_filename": file} if file else {}),
    }


default_cfgs = generate_default_cfgs({f"{v.name}.in1k": _default_cfg(v) for v in VARIANTS.values()})


def _van(cfg: VanConfig, num_classes: int = 1000, in_chans: int = 3, **options: Any) -> VAN:
    """Return a network from timm's arguments."""
    if drop_rate := options.pop("drop_rate", 0):  # timm's scripts always pass it
        raise ValueError(f"drop_rate is {drop_rate}, and a VAN has no dropout: use drop_path_rate.")
    return VAN(replace(cfg, num_classes=num_classes, in_chans=in_chans), **options)


def _register(variant: Variant) -> None:
    """Register a variant with timm under its name."""
    features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}

    def create(pretrained: bool = False, **options: Any) -> Any:
        extra = dict(options.pop("pretrained_cfg_overlay", None) or {})
        if pretrained and not {"file", "url", "state_dict"} & extra.keys():
            extra["state_dict"] = load_van(variant.name).model.state_dict()
        options.update(model_cfg=variant.config, feature_cfg=features, pretrained_cfg_overlay=extra)
        return build_model_with_cfg(_van, variant.name, pretrained, **options)

    create.__name__, create.__doc__ = variant.name, f"Return {variant.name}."
    globals()[variant.name] = register_model(create)  # timm adds the name to __all__


for _variant in VARIANTS.values():
    _register(_variant)
