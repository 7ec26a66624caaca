"""VAN in timm: ``timm.create_model("van_b1")`` after importing this module.

Data configuration, head and first-convolution surgery, and ``features_only``
are timm's own; pretrained weights come through this program's checked loader,
since timm's refuses the official pickles.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.layers.format import Format
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from van_deploy.model.preprocess import OFFICIAL
from van_deploy.model.van import STAGES, VAN
from van_deploy.model.variants import VARIANTS, VanConfig

__all__ = ["TimmVan"]


class TimmVan(VAN):
    """A :class:`~van_deploy.model.van.VAN` with timm's arguments and feature interface.

    Args:
        cfg: the variant's architecture.
        num_classes: outputs of the head; 0 leaves the pooled features.
        in_chans: channels of the input.
        drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth of the last block.
    """

    def __init__(
        self,
        cfg: VanConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        config = replace(cfg, num_classes=num_classes or 1, in_chans=in_chans)
        super().__init__(config, drop_rate, drop_path_rate)
        if num_classes == 0:
            self.reset_classifier(0)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"norm{stage + 1}"}
            for stage, dim in enumerate(cfg.embed_dims)
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str | Format = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the stages' feature maps ``(N, C, H, W)``, after their LayerNorm.

        Unless ``intermediates_only``, the pooled features come first. The
        arguments are timm's; ``norm`` changes nothing, since every stage ends
        in its own norm.

        Raises:
            ValueError: another format than NCHW is asked for.
        """
        if Format(output_fmt) is not Format.NCHW:
            raise ValueError("VAN's feature maps are NCHW.")
        take, last = feature_take_indices(STAGES, indices)
        maps = []
        for stage in range(last + 1 if stop_early or intermediates_only else STAGES):
            x = self._stage(x, stage + 1)
            if stage in take:
                maps.append(x)
        if intermediates_only:
            return maps
        return x.mean(dim=(2, 3)), maps

    def _stage(self, x: Tensor, stage: int) -> Tensor:
        x = self.get_submodule(f"patch_embed{stage}")(x)
        blocks = self.get_submodule(f"block{stage}")
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                x = block(x)
        norm = self.get_submodule(f"norm{stage}")
        normalised: Tensor = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        return normalised


def _default_cfg(name: str) -> dict[str, Any]:
    """Return timm's data configuration of a variant."""
    weights = VARIANTS[name].weights
    hub = {"hf_hub_id": weights.repo_id, "hf_hub_filename": weights.filename} if weights else {}
    return {
        "num_classes": 1000,
        "input_size": (3, OFFICIAL.image_size, OFFICIAL.image_size),
        "pool_size": (7, 7),
        "crop_pct": OFFICIAL.crop_pct,
        "interpolation": OFFICIAL.interpolation,
        "fixed_input_size": False,
        "mean": OFFICIAL.mean,
        "std": OFFICIAL.std,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/Visual-Attention-Network/VAN-Classification",
        **hub,
    }


default_cfgs = generate_default_cfgs({f"{name}.in1k": _default_cfg(name) for name in VARIANTS})


def _create_van(name: str, pretrained: bool, **options: Any) -> nn.Module:
    overlay = dict(options.pop("pretrained_cfg_overlay", None) or {})
    if pretrained and not {"file", "url", "state_dict"} & overlay.keys():
        from van_deploy.model.checkpoint import load_van

        overlay["state_dict"] = load_van(name).model.state_dict()
    model: nn.Module = build_model_with_cfg(
        TimmVan,
        name,
        pretrained,
        pretrained_cfg_overlay=overlay,
        model_cfg=VARIANTS[name].config,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **options,
    )
    return model


@register_model
def van_b0(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return van_b0, 4.1 M parameters."""
    return _create_van("van_b0", pretrained, **options)


@register_model
def van_b1(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return van_b1, 13.9 M parameters."""
    return _create_van("van_b1", pretrained, **options)


@register_model
def van_b2(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return van_b2, 26.6 M parameters."""
    return _create_van("van_b2", pretrained, **options)


@register_model
def van_b3(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return van_b3, 44.8 M parameters."""
    return _create_van("van_b3", pretrained, **options)


@register_model
def van_b4(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return van_b4, 60.3 M parameters."""
    return _create_van("van_b4", pretrained, **options)


@register_model
def van_b5(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return van_b5, 90.0 M parameters."""
    return _create_van("van_b5", pretrained, **options)


@register_model
def van_b6(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return van_b6, 199.8 M parameters."""
    return _create_van("van_b6", pretrained, **options)
