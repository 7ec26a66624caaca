"""Images for van_digits in the way that the processes that time take them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of eight inputs for van_digits, noise of natural size."""
    values = np.random.default_rng(0).standard_normal((8, 3, 64, 64)).astype(np.float32)
    np.save(tmp_path / "none.npy", values)
    return tmp_path
