"""FID, KID and IS of the same features by other programs: scipy's matrix root, the estimator written out, and, with the
extra [paper] (pytest -m paper), torch-fidelity."""

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


@pytest.mark.paper
def test_torch_fidelity_agrees(features):
    from torch_fidelity import metric_fid, metric_isc, metric_kid

    x, y = (part.double() for part in features)
    theirs = metric_fid.fid_statistics_to_metric(*map(metric_fid.fid_features_to_statistics, (x, y)), verbose=False)
    assert distances.fid(x, y) == pytest.approx(theirs[metric_fid.KEY_METRIC_FID], rel=1e-10)
    x = x[: len(y)]  # one subset of all, whatever the order
    theirs = metric_kid.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=len(y), verbose=False)
    value, _ = distances.kid(x, y, len(y), 1, torch.Generator())
    assert value == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_MEAN], rel=1e-10)
    theirs = metric_isc.isc_features_to_metric(y, splits=1)
    value, _ = distances.inception_score(y, 1, torch.Generator())
    assert value == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_MEAN], rel=1e-10)
