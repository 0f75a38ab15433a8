"""Low-pass filters, LFM, SG and MultiDiffusion against independent references."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from hires.errors import HiresError
from hires.methods import (
    gamma,
    latent_frequency_mixing,
    low_pass,
    multidiffusion,
    resize,
    sharpen,
    structure_guidance,
    views,
    wavelet_guidance,
)
from hires.methods.diffusehigh import DB4, approximation

KERNELS = ["bilinear", "bicubic", "nearest", "lanczos", "fft", "wavelet"]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def triangle(x):
    return np.clip(1 - np.abs(x), 0, None)


def lanczos(x):
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def cubic(a):
    def kernel(x):
        x = np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return kernel


def down_matrix(n, m, kernel):
    """Antialiased resampling: the kernel stretched by n/m, border weights renormalised."""
    scale = n / m
    weights = kernel((np.arange(n)[None] + 0.5 - (np.arange(m)[:, None] + 0.5) * scale) / scale)
    return weights / weights.sum(1, keepdims=True)


def up_matrix(n, m, kernel, reach):
    """Interpolation at the output's pixel centres, the border sample repeated outwards."""
    matrix = np.zeros((m, n))
    for i in range(m):
        centre = (i + 0.5) * n / m - 0.5
        for j in range(math.floor(centre) - reach + 1, math.floor(centre) + reach + 1):
            matrix[i, min(max(j, 0), n - 1)] += kernel(centre - j)
    return matrix


def legall_matrix(n):
    """One 5/3 level without its details, from the analysis and synthesis filters on the mirrored signal."""
    analysis, synthesis = np.array([-1, 2, 6, 2, -1]) / 8, np.array([0.5, 1, 0.5])

    def mirror(i):
        return (2 * (n - 1) - i if i > n - 1 else i) if i >= 0 else -i

    low = np.zeros(((n + 1) // 2, n))
    for k in range(len(low)):
        for tap, weight in enumerate(analysis):
            low[k, mirror(2 * k + tap - 2)] += weight
    back = np.zeros((n, len(low)))
    for i in range(n):
        for tap, weight in enumerate(synthesis):
            j = mirror(i + tap - 1)
            if j % 2 == 0:
                back[i, j // 2] += weight
    return low, back


def legall(n, levels):
    if levels == 0 or n < 2:
        return np.eye(n)
    low, back = legall_matrix(n)
    return back @ legall(len(low), levels - 1) @ low


def ideal(n, factor):
    """Circulant matrix of the ideal low-pass: every sample through the kept complex exponentials."""
    kept = [k for k in range(-(n // 2), (n + 1) // 2) if abs(k) <= factor * n / 2]
    basis = np.exp(2j * np.pi * np.outer(np.arange(n), kept) / n)
    return (basis @ basis.conj().T / n).real


def matrix(kernel, n, factor):
    m = int(n * factor)
    if kernel == "bilinear":
        return up_matrix(m, n, triangle, 1) @ down_matrix(n, m, triangle)
    if kernel == "bicubic":
        return up_matrix(m, n, cubic(-0.75), 2) @ down_matrix(n, m, cubic(-0.5))
    if kernel == "lanczos":
        inside = lanczos(np.arange(m)[None] + 0.5 - (np.arange(n)[:, None] + 0.5) * m / n)
        return inside / inside.sum(1, keepdims=True) @ down_matrix(n, m, lanczos)
    if kernel == "nearest":
        up, down = np.zeros((n, m)), np.zeros((m, n))
        up[np.arange(n), np.floor((np.arange(n) + 0.5) * m / n).astype(int)] = 1
        down[np.arange(m), np.floor((np.arange(m) + 0.5) * n / m).astype(int)] = 1
        return up @ down
    return ideal(n, factor) if kernel == "fft" else legall(n, round(math.log2(1 / factor)))


@pytest.mark.parametrize("size", [(32, 48), (21, 40), (16, 17)])
@pytest.mark.parametrize("factor", [1 / 2, 1 / 4, 1 / 8])
@pytest.mark.parametrize("kernel", KERNELS)
def test_low_pass_is_its_dense_matrix(kernel, factor, size):
    x = noise(2, 3, *size)
    rows, columns = (torch.from_numpy(matrix(kernel, n, factor)) for n in size)
    torch.testing.assert_close(
        low_pass(x, kernel, factor), (rows @ x.double() @ columns.T).float(), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_low_pass_keeps_constants_and_drops_what_oscillates(kernel):
    flat = torch.full((1, 1, 32, 32), 3.0)
    torch.testing.assert_close(low_pass(flat, kernel, 1 / 4), flat)
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 1, 32, 32)
    if kernel != "nearest":  # which takes samples, and so lets the finest stripes through as a constant
        assert low_pass(stripes, kernel, 1 / 4)[..., 8:-8].abs().max() < 0.02


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic", "lanczos", "fft", "wavelet"])
def test_low_pass_of_everything_is_everything(kernel):
    x = noise(1, 2, 12, 16)
    torch.testing.assert_close(low_pass(x, kernel, 1.0), x, atol=1e-5, rtol=1e-5)


def test_low_pass_refuses_what_leaves_nothing():
    with pytest.raises(HiresError, match="leaves 2x1 of 16x15"):
        low_pass(noise(1, 1, 16, 15), "bilinear", 1 / 8)
    with pytest.raises(HiresError, match="wavelet"):
        low_pass(noise(1, 1, 16, 16), "wavelet", 0.3)


@pytest.mark.parametrize(
    "kernel, filter", [("lanczos", Image.Resampling.LANCZOS), ("nearest", Image.Resampling.NEAREST)]
)
@pytest.mark.parametrize("size", [(40, 64), (8, 12), (14, 60)])
def test_resize_is_pil(kernel, filter, size):
    x = noise(1, 1, 20, 30)
    want = Image.fromarray(x[0, 0].numpy()).resize((size[1], size[0]), filter)
    torch.testing.assert_close(resize(x, size, kernel)[0, 0], torch.from_numpy(np.array(want)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_lfm_is_the_formula(kernel):
    z_lu, z_ru = noise(2, 4, 32, 24), noise(2, 4, 32, 24, seed=1)
    want = z_ru + low_pass(z_lu, kernel, 1 / 4) - low_pass(z_ru, kernel, 1 / 4)
    torch.testing.assert_close(latent_frequency_mixing(z_lu, z_ru, kernel, 1 / 4), want, atol=1e-5, rtol=1e-5)


def test_lfm_takes_each_band_from_its_side():
    rows = torch.arange(32).view(1, 1, 32, 1).expand(1, 1, 32, 32)
    slow, fast = torch.cos(2 * math.pi * rows / 32), torch.cos(2 * math.pi * rows * 12 / 32)
    mixed = latent_frequency_mixing(slow + fast, 5 * slow + 7 * fast, "fft", 1 / 4)
    torch.testing.assert_close(mixed, slow + 7 * fast, atol=1e-4, rtol=1e-4)


def test_sg_is_the_formula():
    x0, reference = noise(1, 4, 16, 16), noise(1, 4, 16, 16, seed=1)
    low = low_pass(reference)
    want = x0 + 0.3 * (low - low_pass(x0))
    assert torch.equal(structure_guidance(x0, low, 0.3), want)
    assert torch.equal(structure_guidance(x0, low, 0.0), x0)


def test_sg_of_weight_one_takes_over_the_low_band():
    x0, reference = noise(1, 4, 32, 32), noise(1, 4, 32, 32, seed=1)
    guided = structure_guidance(x0, low_pass(reference, "fft", 1 / 4), 1.0, "fft", 1 / 4)
    torch.testing.assert_close(low_pass(guided, "fft", 1 / 4), low_pass(reference, "fft", 1 / 4), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        guided - low_pass(guided, "fft", 1 / 4), x0 - low_pass(x0, "fft", 1 / 4), atol=1e-5, rtol=1e-5
    )


def wavelet_bands(n):
    """Analysis matrices (low, high) of one db4 level on the mirrored signal, tap by tap, and their adjoints on it."""
    low, count = np.array(DB4), (n + 7) // 2
    high = np.array([(-1) ** k * low[7 - k] for k in range(8)])
    analysis, synthesis = np.zeros((2, count, n)), np.zeros((2, n, count))
    for band, taps in enumerate((low, high)):
        for k in range(count):
            for tap in range(8):
                place = 2 * k - 6 + tap
                if 0 <= place < n:
                    synthesis[band, place, k] += taps[tap]
                analysis[band, k, -1 - place if place < 0 else min(place, 2 * n - 1 - place)] += taps[tap]
    return analysis, synthesis


def test_db4_is_daubechies():
    """Orthonormal to its even shifts, and its high-pass blind to polynomials of degree 3: what defines it."""
    taps = np.array(DB4)
    for shift in range(4):
        assert taps[2 * shift :] @ taps[: 8 - 2 * shift] == pytest.approx(float(shift == 0), abs=1e-11)
    for degree in range(4):
        moment = sum((-1) ** k * taps[k] * k**degree for k in range(8))
        assert moment == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("size", [(16, 22), (17, 24), (31, 9)])
def test_wavelet_guidance_replaces_one_band(size):
    """The transform in full: (low, low) of the reference, the other three bands of the image, then its inverse."""
    image, reference = noise(2, 3, *size).double(), noise(2, 3, *size, seed=1).double()
    (rows, back_rows), (columns, back_columns) = (wavelet_bands(n) for n in size)
    want, whole = np.zeros(image.shape), np.zeros(image.shape)
    for i in range(2):
        for j in range(2):
            for at in np.ndindex(*image.shape[:2]):
                source = reference if i == j == 0 else image
                for into, x in ((want, source), (whole, image)):
                    band = rows[i] @ x[at].numpy() @ columns[j].T
                    into[at] += back_rows[i] @ band @ back_columns[j].T
    np.testing.assert_allclose(whole, image, atol=1e-9)  # the bands make up the image
    given = wavelet_guidance(image, approximation(reference))
    np.testing.assert_allclose(given, want, atol=1e-9)


def test_sharpening_is_the_unsharp_mask():
    x = noise(1, 2, 6, 7).double()
    weights = np.exp(-np.array([[i * i + j * j for j in (-1, 0, 1)] for i in (-1, 0, 1)]) / 2)
    weights /= weights.sum()
    want = np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        b, c, i, j = at
        rows, columns = ([n - abs(n - abs(k)) for k in (m - 1, m, m + 1)] for m, n in ((i, 5), (j, 6)))
        blurred = sum(weights[p, q] * x[b, c, rows[p], columns[q]] for p in range(3) for q in range(3))
        want[at] = x[at] + 0.7 * (x[at] - blurred)
    np.testing.assert_allclose(sharpen(x, 0.7), want, atol=1e-12)
    assert sharpen(x, 0.0) is x


def test_gamma():
    shares = [0.9, 0.6, 0.3, 0.1]
    assert gamma("sigma", shares, 1, 2) == gamma("one_minus_alpha_bar", shares, 1, 2) == 0.3
    assert gamma("normalised", shares, 1, 1) == 1
    assert gamma("normalised", shares, 1, 3) == pytest.approx(0.1 / 0.6)
    assert [gamma("t_raw", shares, 1, step) for step in range(4)] == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("s", [1, 2, 3, 4])
def test_half_overlap_has_two_s_minus_one_squared_views(s):
    corners = views((8 * s, 12 * s), (8, 12), 0.5)
    assert len(set(corners)) == len(corners) == (2 * s - 1) ** 2
    assert corners[0] == (0, 0) and corners[-1] == (8 * (s - 1), 12 * (s - 1))


@pytest.mark.parametrize(
    "size, view, overlap", [((20, 44), (16, 12), 0.5), ((12, 12), (12, 12), 0.5), ((30, 22), (8, 8), 0.2)]
)
def test_views_cover_the_canvas_on_even_corners(size, view, overlap):
    covered = torch.zeros(size)
    for i, j in views(size, view, overlap):
        assert i % 2 == j % 2 == 0 and i + view[0] <= size[0] and j + view[1] <= size[1]
        covered[i : i + view[0], j : j + view[1]] += 1
    assert covered.min() >= 1


def test_view_larger_than_the_canvas():
    with pytest.raises(HiresError, match="larger than the canvas of 12"):
        views((12, 64), (16, 16))


@pytest.mark.parametrize("view_batch", [1, 4, 100])
def test_multidiffusion_is_the_mean_over_views(view_batch):
    latents, scale = noise(3, 2, 20, 24), torch.tensor([1.0, 2.0, -1.0])

    def predict(crops, images, places):
        assert len(crops) <= view_batch
        for crop, image, (i, j, n) in zip(crops, images, places, strict=True):
            assert n == image and torch.equal(crop, latents[image, :, i : i + 8, j : j + 12])
        return torch.tanh(crops - crops.mean((2, 3), keepdim=True)) * scale[images].view(-1, 1, 1, 1)

    # Pixel by pixel: which views hold it, and the mean of what each says about it.
    want = torch.zeros_like(latents)
    corners = views((20, 24), (8, 12), 0.5)
    for image in range(3):
        outputs = {
            (i, j): predict(
                latents[image : image + 1, :, i : i + 8, j : j + 12], torch.tensor([image]), [(i, j, image)]
            )[0]
            for i, j in corners
        }
        for y in range(20):
            for x in range(24):
                holders = [(i, j) for i, j in corners if 0 <= y - i < 8 and 0 <= x - j < 12]
                want[image, :, y, x] = torch.stack([outputs[i, j][:, y - i, x - j] for i, j in holders]).mean(0)
    torch.testing.assert_close(multidiffusion(predict, latents, (8, 12), 0.5, view_batch), want)
