"""Whether differences between pairs exceed the noise; written out, as nothing here needs SciPy."""

import math
from collections.abc import Sequence
from statistics import mean, stdev


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of a paired t-test: are these differences 0 on average?

    The distribution function of Student's t for n - 1 degrees of freedom is a finite sum.

    Args:
        differences: One for each pair, n >= 2.

    Returns:
        p in [0, 1]; 1 if all are 0, 0 if all are one other number.

    Source:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.

    >>> round(t_test([1.0, 2.0, 3.0, 4.0, 5.0]), 4)  # t = 3 / (1.5811 / sqrt 5) = 4.2426
    0.0132
    """
    n, average, spread = len(differences), mean(differences), stdev(differences)
    if spread == 0:
        return 1.0 if average == 0 else 0.0
    degrees = n - 1
    angle = math.atan(abs(average) / (spread / math.sqrt(n)) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return max(0.0, 1 - inside)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number.

    Source:
        Holm, A simple sequentially rejective multiple test procedure, 1979.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, so_far = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        so_far = max(so_far, min(1.0, p_values[i] * (len(p_values) - place)))
        corrected[i] = so_far
    return corrected
