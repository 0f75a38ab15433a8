"""FID, KID and IS from stored features, in float64.

The formulas and constants are those of torchmetrics (tests hold them to its numbers on the same images). They take
features, not images, so that one extraction serves every score, every bootstrap replicate and every paired test.
"""

import torch
from torch import Tensor

KID_DEGREE, KID_COEFFICIENT = 3, 1.0
ROWS = 128  # samples whose products are held at a time: blocks of memory that malloc keeps, larger ones are mapped anew
MOMENTS = 2**25  # numbers of all second moments that are kept


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
    product = x.double() @ y.double().T
    return product.div_(x.shape[1]).add_(KID_COEFFICIENT).pow_(KID_DEGREE)


def fid_replicates(x: Tensor, y: Tensor, x_prompts: Tensor, y_prompts: Tensor, draws: Tensor) -> Tensor:
    """FID of resampled prompts, (replicates,); arguments as in `kid_replicates`.

    Where they fit into memory, second moments are summed once per prompt, so that the covariances of all replicates
    are one product of matrices; the trace is then Σ √λ(R Σ₁ Rᵀ) with Σ₂ = RᵀR.
    """
    draws = draws.double()
    if draws.shape[1] * x.shape[1] ** 2 > MOMENTS:
        return torch.tensor([fid(x, y, w[x_prompts], w[y_prompts]) for w in draws], dtype=torch.float64)
    centre = y.double().mean(0)  # moments about it, as small differences of large sums lose digits
    (mean_x, cov_x), (mean_y, cov_y) = (
        _moments(samples.double() - centre, prompts, draws) for samples, prompts in ((x, x_prompts), (y, y_prompts))
    )
    values, vectors = torch.linalg.eigh(cov_y)
    root = values.clamp(min=0).sqrt()[:, :, None] * vectors.mT
    trace = torch.linalg.eigvalsh(root @ cov_x @ root.mT).clamp(min=0).sqrt().sum(1)
    totals = cov_x.diagonal(dim1=1, dim2=2).sum(1) + cov_y.diagonal(dim1=1, dim2=2).sum(1)
    return (mean_x - mean_y).square().sum(1) + totals - 2 * trace


def _moments(x: Tensor, prompts: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Means (replicates, d) and covariances (replicates, d, d), n − 1 below, of samples x (n, d)."""
    size, d = draws.shape[1], x.shape[1]
    first = torch.zeros(size, d, dtype=x.dtype).index_add_(0, prompts, x)
    second = torch.zeros(size, d, d, dtype=x.dtype)
    for rows in torch.arange(len(x)).split(ROWS):
        second.index_add_(0, prompts[rows], x[rows, :, None] * x[rows, None, :])
    count = (draws @ torch.bincount(prompts, minlength=size).to(x.dtype))[:, None]
    mean = draws @ first / count
    products = (draws @ second.flatten(1)).unflatten(1, (d, d))
    return mean, (products - count[..., None] * mean[:, :, None] * mean[:, None, :]) / (count[..., None] - 1)


def kid(x: Tensor, y: Tensor, subset_size: int, subsets: int, generator: torch.Generator) -> tuple[float, float]:
    """Kernel distance of fakes x (n, d) to reals y (m, d): mean and spread over random subsets (Bińkowski et al. 2018).

    Each block is the unbiased estimator of MMD² on `subset_size` ≤ min(n, m) samples a side. Draws come from
    `generator`, in torchmetrics' order; the spread is the population one, as there.
    """
    blocks = []
    for _ in range(subsets):
        reals = y[torch.randperm(len(y), generator=generator)[:subset_size].to(x.device)]
        fakes = x[torch.randperm(len(x), generator=generator)[:subset_size].to(x.device)]
        within = sum(k.sum() - k.diagonal().sum() for k in (kernel(fakes, fakes), kernel(reals, reals)))
        across = kernel(fakes, reals).sum()
        blocks.append(within / (subset_size * (subset_size - 1)) - 2 * across / subset_size**2)
    values = torch.stack(blocks)
    return float(values.mean()), float(values.std(unbiased=False))


def kid_replicates(x: Tensor, y: Tensor, x_prompts: Tensor, y_prompts: Tensor, draws: Tensor) -> Tensor:
    """KID of resampled prompts, (replicates,).

    `x_prompts` (n,), `y_prompts` (m,): the prompt of each sample, 0 … P − 1; `draws` (replicates, P): how often each
    prompt was drawn, on both sides. Two copies of one prompt are never compared with each other within a side: a
    sample beside itself would pass for similarity. The kernel is evaluated once, whatever the number of replicates.
    """
    draws = draws.double()
    within = [
        _pairs(_kernel_sums(z, z, prompts, prompts, draws.shape[1], own=False), draws)
        / _pairs(_pair_counts(prompts, draws.shape[1]), draws)
        for z, prompts in ((x, x_prompts), (y, y_prompts))
    ]
    across = _kernel_sums(x, y, x_prompts, y_prompts, draws.shape[1])
    counts = [torch.bincount(p, minlength=draws.shape[1]).double() for p in (x_prompts, y_prompts)]
    mean_across = ((draws @ across) * draws).sum(1) / ((draws @ counts[0]) * (draws @ counts[1]))
    return within[0] + within[1] - 2 * mean_across


def _kernel_sums(x: Tensor, y: Tensor, x_prompts: Tensor, y_prompts: Tensor, size: int, own: bool = True) -> Tensor:
    """Σ of the kernel over the samples of each pair of prompts, (size, size); `own` = false: no sample with itself."""
    total = torch.zeros(size, size, dtype=torch.float64, device=x.device)
    for rows in torch.arange(len(x), device=x.device).split(ROWS):
        values = kernel(x[rows], y)
        if not own:
            values[torch.arange(len(rows), device=x.device), rows] = 0
        by_column = torch.zeros(len(rows), size, dtype=torch.float64, device=x.device)
        total.index_add_(0, x_prompts[rows], by_column.index_add_(1, y_prompts, values))
    return total


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
