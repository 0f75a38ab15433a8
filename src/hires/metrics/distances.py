"""FID, KID and IS from stored features, in float64.

The formulas and constants are those of torchmetrics (tests hold them to its numbers on the same images). They take
features, not images, so that one extraction serves every score, every bootstrap replicate and every paired test.
"""

import torch
from torch import Tensor

KID_DEGREE, KID_COEFFICIENT = 3, 1.0


def _root(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean (d,) of weighted samples x (n, d), and a matrix R (≤ d, d) with RᵀR their covariance (n − 1 below)."""
    if weights is None:
        weights = torch.ones(len(x), dtype=x.dtype, device=x.device)
    drawn = weights > 0
    x, weights = x[drawn], weights[drawn, None]
    mean = (weights * x).sum(0) / weights.sum()
    root = (x - mean) * (weights / (weights.sum() - 1)).sqrt()
    if len(root) > root.shape[1]:
        root = torch.linalg.qr(root, mode="r").R
    return mean, root


def fid(x: Tensor, y: Tensor, x_weights: Tensor | None = None, y_weights: Tensor | None = None) -> float:
    """Fréchet distance between Gaussians fitted to x (n, d) and y (m, d) (Heusel et al. 2017, equation 6).

    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½, where with Σ = RᵀR the last trace is the sum of the singular values of
    R₁R₂ᵀ: no eigenvalues of an unsymmetric product, and a small matrix where n < d. Optional weights (n,), (m,) count
    how often a sample was drawn.
    """
    (mean_x, root_x), (mean_y, root_y) = _root(x.double(), x_weights), _root(y.double(), y_weights)
    trace = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return float((mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * trace)


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """The cubic kernel (xᵀy/d + 1)³ of KID (Bińkowski et al. 2018), (n, m) in float64."""
    return (x.double() @ y.double().T / x.shape[1] + KID_COEFFICIENT) ** KID_DEGREE


def kid(x: Tensor, y: Tensor, subset_size: int, subsets: int, generator: torch.Generator) -> tuple[float, float]:
    """Kernel distance of fakes x (n, d) to reals y (m, d): mean and spread over random subsets (Bińkowski et al. 2018).

    Each block is the unbiased estimator of MMD² on `subset_size` ≤ min(n, m) samples a side. Draws come from
    `generator`, in torchmetrics' order; the spread is the population one, as there.
    """
    k_xx, k_xy, k_yy = kernel(x, x), kernel(x, y), kernel(y, y)
    blocks = []
    for _ in range(subsets):
        j = torch.randperm(len(y), generator=generator)[:subset_size].to(x.device)
        i = torch.randperm(len(x), generator=generator)[:subset_size].to(x.device)
        within = k_xx[i][:, i].sum() - k_xx[i, i].sum() + k_yy[j][:, j].sum() - k_yy[j, j].sum()
        across = k_xy[i][:, j].sum()
        blocks.append(within / (subset_size * (subset_size - 1)) - 2 * across / subset_size**2)
    values = torch.stack(blocks)
    return float(values.mean()), float(values.std(unbiased=False))


def kid_replicates(x: Tensor, y: Tensor, x_prompts: Tensor, y_prompts: Tensor, draws: Tensor) -> Tensor:
    """KID of resampled prompts, (replicates,).

    `x_prompts` (n,), `y_prompts` (m,): the prompt of each sample, 0 … P − 1; `draws` (replicates, P): how often each
    prompt was drawn, on both sides. Two copies of one prompt are never compared with each other within a side: a
    sample beside itself would pass for similarity.
    """
    draws = draws.double()

    def groups(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        p = draws.shape[1]
        total = torch.zeros(p, p, dtype=torch.float64, device=values.device)
        by_row = torch.zeros(p, values.shape[1], dtype=torch.float64, device=values.device).index_add_(0, rows, values)
        return total.index_add_(1, columns, by_row)

    def within(samples: Tensor, prompts: Tensor) -> Tensor:
        k = kernel(samples, samples).fill_diagonal_(0)
        return _pairs(groups(k, prompts, prompts), draws) / _pairs(_pair_counts(prompts, draws.shape[1]), draws)

    across = groups(kernel(x, y), x_prompts, y_prompts)
    counts = [torch.bincount(p, minlength=draws.shape[1]).double() for p in (x_prompts, y_prompts)]
    mean_across = ((draws @ across) * draws).sum(1) / ((draws @ counts[0]) * (draws @ counts[1]))
    return within(x, x_prompts) + within(y, y_prompts) - 2 * mean_across


def _pairs(sums: Tensor, draws: Tensor) -> Tensor:
    """Σ_{p ≠ q} w_p w_q s_pq + Σ_p w_p s_pp for each row w of `draws`."""
    own = sums.diagonal()
    return ((draws @ sums) * draws).sum(1) - (draws.square() - draws) @ own


def _pair_counts(prompts: Tensor, size: int) -> Tensor:
    counts = torch.bincount(prompts, minlength=size).double()
    return torch.outer(counts, counts) - counts.diag()


def inception_score(logits: Tensor, splits: int, generator: torch.Generator) -> tuple[float, float]:
    """IS of logits (n, classes): mean and spread (ddof = 1) over `splits` (Salimans et al. 2016); 0 for one split.

    exp of the mean KL divergence of each sample's class distribution from that of its split. `generator` shuffles
    the samples, in torchmetrics' order.
    """
    logits = logits.double()[torch.randperm(len(logits), generator=generator).to(logits.device)]
    values = []
    for log_p in logits.log_softmax(1).chunk(splits):
        p = log_p.exp()
        values.append((p * (log_p - p.mean(0, keepdim=True).log())).sum(1).mean().exp())
    stacked = torch.stack(values)
    return float(stacked.mean()), float(stacked.std()) if len(values) > 1 else 0.0


def inception_score_replicates(logits: Tensor, prompts: Tensor, draws: Tensor) -> Tensor:
    """IS in one split of resampled prompts, (replicates,); arguments as in `kid_replicates`."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    weights = draws.double()[:, prompts]
    weights = weights / weights.sum(1, keepdim=True)
    marginal = weights @ p
    entropy = -torch.special.xlogy(marginal, marginal).sum(1)
    return (weights @ (p * log_p).sum(1) + entropy).exp()
