"""Tests of differences: p-values from a bootstrap, their correction, intervals over trials."""

from collections.abc import Sequence
from math import nan, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05
COVERAGE = 0.95


def p_value(difference: float, replicates: NDArray[np.float64], n: int) -> float:
    """Two-sided p of a difference of zero: Student's t with n − 1 degrees and the bootstrap's standard error.

    A bootstrap's variance of a mean of n is (n − 1) / n of the unbiased one (Efron and Tibshirani 1993, chapter 5).
    The share of replicates beyond zero could not go below two in a thousand, which no correction for many comparisons
    would leave significant. One replicate tells nothing. Where all are the same the sign test's p is left: of n pairs
    that differ alike.
    """
    if len(replicates) < 2 or n < 2 or difference == 0:
        return 1.0
    error = float(np.std(replicates, ddof=1)) * sqrt(n / (n - 1))
    return float(2 * stats.t.sf(abs(difference) / error, n - 1)) if error > 0 else 2.0 ** (1 - n)


def holm(p: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """p-values corrected for their number by Holm's step-down rule (Holm 1979), in the order given."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% of Student's t around the mean of some trials; NaN below two."""
    if len(values) < 2:
        return nan, nan
    half = stats.t.ppf((1 + COVERAGE) / 2, len(values) - 1) * np.std(values, ddof=1) / sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def t_p_value(values: Sequence[float]) -> float:
    """Two-sided p of a mean of zero by Student's t; where all trials say the same, 1 if that is zero, else 0."""
    error = np.std(values, ddof=1) / sqrt(len(values))
    if error == 0:
        return float(np.mean(values) == 0)
    return float(2 * stats.t.sf(abs(np.mean(values)) / error, len(values) - 1))
