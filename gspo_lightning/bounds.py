"""Bounds of numbers that a user sets, in one wording.

Decides how a number out of range is refused: by its name, its bound and its value. A bound that
depends on another setting is worded by whoever knows both.
"""

import math


def check_at_least(low: int, owner: str = "", /, **values: float | None) -> None:
    """Refuse numbers below ``low``, NaN and infinities; ``None`` is a setting left open.

    Args:
        low: The smallest number that is allowed.
        owner: What stands before a name in the message, such as ``sampler.``.
        values: The numbers by name.

    Raises:
        ValueError: Naming setting, bound and value.

    >>> check_at_least(1, "sampler.", group_size=8, batch_size=None)
    """
    for name, value in values.items():
        if value is not None and not (hasattr(value, "__float__") and low <= value < math.inf):
            raise ValueError(f"{owner}{name} must be >= {low}, got {value!r}")


def check_positive(owner: str = "", /, **values: float | None) -> None:
    """As :func:`check_at_least`, for numbers that must be above 0."""
    for name, value in values.items():
        if value is not None and not (hasattr(value, "__float__") and 0 < value < math.inf):
            raise ValueError(f"{owner}{name} must be above 0, got {value!r}")
