"""The tiles that kernels.py tries for each kind of kernel."""

from __future__ import annotations

import math

import torch

from van_deploy.kernels.launch import FEW, Launch, Tile, power_of_two_block

NAMES = {
    "depthwise": ("ROWS", "BLOCK_P", "BLOCK_C", "num_warps"),
    "pointwise": ("BLOCK_M", "BLOCK_N", "BLOCK_K", "REPEAT", "num_warps", "num_stages"),
    "layer_norm": ("BLOCK_M", "num_warps"),
    "patches": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
}


def candidates(launch: Launch) -> list[Tile]:
    """Return the tiles to try for a launch; the first is its own."""
    kind, own = launch.key.split("/")[0], dict(launch.tile)
    shapes = [a.shape for a in launch.arguments if isinstance(a, torch.Tensor)]
    has_few_pixels = math.prod(shapes[-1][:3]) < FEW
    values: list[tuple[int, ...]]
    if kind == "depthwise":
        height, channels, side = shapes[0][1], shapes[0][3], shapes[1][0]
        dilation = int(launch.key.split("/")[1].split("x")[1])
        if has_few_pixels:
            values = [(1, 4, 32, 2), (1, 16, 32, 4), (2, 8, 32, 2), (3, 8, 32, 4), (4, 8, 32, 2)]
        elif side == 3:
            values = [(4, 32, 32, 4), (7, 16, 32, 4), (7, 8, 32, 2), (14, 8, 32, 4)]
        elif dilation == 1:
            values = [(14, 8, 32, 4), (7, 16, 32, 4), (7, 8, 32, 2)]
        else:
            values = [(10, 8, 32, 4), (10, 16, 32, 4), (5, 16, 32, 4), (3, 16, 32, 4)]
        values = [v for v in values if (v[0] - 1) * dilation < height and channels % v[2] == 0]
    elif kind == "pointwise":
        inner = shapes[1][1]
        k, n, whole = own["BLOCK_K"], own["BLOCK_N"], power_of_two_block(inner, 64)
        if has_few_pixels:
            values = [(16, 32, k, 1, 2, 4), (16, 64, k, 1, 4, 4), (32, 32, k, 1, 4, 4)]
            values += [(64, 32, k, 1, 4, 4), (16, 16, k, 1, 1, 4)]
            values += [(16, 32, 128, 1, 4, 3)] if inner % 128 == 0 else []
        else:
            values = [(64, n, k, 1, 4, 3), (128, n, k, 1, 4, 4), (128, n, k, 1, 8, 3)]
            values += [(256, n, k, 1, 8, 3), (128, 64, k, 1, 4, 3)]
            values += [(64, n, whole, 4, 4, 3)] if inner == whole else []
    elif kind == "layer_norm":
        m = own["BLOCK_M"]
        values = [(m * 2, 4), (max(1, m // 2), 4), (max(1, m // 2), 2), (m * 2, 8)]
    else:
        kind, n = "patches", own["BLOCK_N"]
        values = [(128, n, 4, 3), (64, n, 4, 4), (64, n, 4, 2), (64, min(64, n), 2, 3)]
        if has_few_pixels:
            values = [(16, 16, 2, 4), (16, 32, 4, 5), (32, 32, 4, 3)]
    tiles = [own, *({**own, **dict(zip(NAMES[kind], v, strict=True))} for v in values)]
    return [tile for place, tile in enumerate(tiles) if tile not in tiles[:place]]
