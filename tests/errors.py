"""The error of a call, for tests of messages to the user."""

from collections.abc import Callable
from typing import Any

import pytest

from van_deploy.errors import VanDeployError


def error_of(
    kind: type[VanDeployError], call: Callable[..., object], *arguments: Any, **options: Any
) -> VanDeployError:
    """Return the error of a call, which must be of this kind and say what to do next."""
    with pytest.raises(kind) as error:
        call(*arguments, **options)
    assert error.value.remedy
    return error.value
