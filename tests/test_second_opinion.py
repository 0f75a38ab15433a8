"""FID and KID of the same features by other programs: scipy's matrix root, and the estimator written out."""

import numpy as np
import pytest
import torch
from scipy import linalg

from hires.metrics import distances


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 24, generator=generator) for n in (90, 70))
    return x, 1.2 * y + 0.1


def test_fid_is_scipys(features):
    x, y = (part.double().numpy() for part in features)
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert distances.fid(*features) == pytest.approx(expected, rel=1e-10)
    owners = [torch.arange(len(part)) for part in features]
    once = torch.ones(1, 90, dtype=torch.long)
    assert distances.fid_replicates(*features, *owners, once).item() == pytest.approx(expected, rel=1e-9)


def test_kid_is_the_unbiased_estimator_written_out(features):
    x, y = (part.double().numpy()[:40] for part in features)

    def k(a, b):
        return (a @ b / 24 + 1) ** 3

    def within(z):
        return np.mean([k(z[i], z[j]) for i in range(40) for j in range(40) if i != j])

    expected = within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    value, _ = distances.kid(*(part[:40] for part in features), 40, 1, torch.Generator().manual_seed(0))
    assert value == pytest.approx(expected, rel=1e-10)
    owners, once = torch.arange(40), torch.ones(1, 40, dtype=torch.long)
    replicate = distances.kid_replicates(*(part[:40] for part in features), owners, owners, once)
    assert replicate.item() == pytest.approx(expected, rel=1e-10)
