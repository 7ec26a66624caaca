"""PyTorch: the original network, which everything else is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from van_deploy.runners.base import Images, Logits

__all__ = ["TorchRunner", "one_torch_thread"]


class TorchRunner:
    """Runs a module on the CPU in its own dtype.

    Args:
        model: a network in eval mode. It is borrowed, not copied.
        name: what reports call it.
    """

    def __init__(self, model: nn.Module, name: str = "pytorch") -> None:
        self.model = model
        self.name = name

    def __enter__(self) -> TorchRunner:
        """Return the runner; the network is loaded already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: the network is its owner's."""

    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` of ``images (N, C, H, W)``, or the first map, float32."""
        return next(iter(self.run_all(images).values()))

    @torch.inference_mode()
    def run_all(self, images: Images) -> dict[str, Logits]:
        """Return every output by its number, float32."""
        dtype = next(self.model.parameters()).dtype
        found = self.model(torch.from_numpy(images).to(dtype))
        outputs = found if isinstance(found, tuple) else (found,)
        return {str(index): output.float().numpy() for index, output in enumerate(outputs)}


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Hold PyTorch to one thread, here and in threads that are started inside.

    On a busy machine several wait for each other, and small operations on several take
    longer than on one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
