"""Every kernel once on small shapes, for compute-sanitizer: see tests/test_kernels_sanitizer.py."""

import os
from functools import partial

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or reads past a tensor land in the same block

import torch
from hires_kernels import add_bias, group_norm, local_attention, neighborhood_patch_attention, qk_norm_rope

CUDA = torch.device("cuda")


def draw(count, batch, tokens, dim, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, tokens, count, 2, dim, generator=generator).to(CUDA, dtype).unbind(2)


def tables(tokens, dim):
    return torch.ones(tokens, dim, device=CUDA), torch.zeros(tokens, dim, device=CUDA)


def npa(backend):
    """Text and masks (more items than multiprocessors), no text, and shifts with patches past the edge, of any side."""
    for dim, grid, window, patch, text, shift, forms in (
        (128, (24, 20), (8, 10), None, 77, None, ("patch", "global")),
        (64, (16, 16), (8, 8), None, None, None, ("patch",)),
        (64, (11, 13), (5, 7), None, 3, torch.tensor([[1, 2], [0, 3]]), ("patch",)),
        (64, (11, 13), (5, 7), (4, 7), 3, torch.tensor([[4, 2], [0, 7]]), ("patch",)),
    ):
        image, words = draw(3, 2, grid[0] * grid[1], dim), None if text is None else draw(3, 2, text, dim)
        options = {"grid": grid, "window": window, "patch": patch, "text": words, "shift": shift, "backend": backend}
        for text_rows in forms:
            neighborhood_patch_attention(*image, rope=tables(len(image[0][0]), dim), text_rows=text_rows, **options)


def local():
    for dim, form, order in ((128, {"radius": 3}, "hilbert"), (64, {"window": 4}, "raster")):
        groups = draw(3, 1, 9 * 17, dim), draw(3, 1, 19, dim), draw(2, 1, 3 * 5, dim)
        image, text, guidance = ([x.detach().requires_grad_() for x in group] for group in groups)
        options = {"grid": (9, 17), "guidance_grid": (3, 5), "order": order, "backend": "triton", **form}
        outputs = local_attention(*image, text=tuple(text), guidance=tuple(guidance), **options)
        torch.autograd.grad([x.float().sum() for x in outputs], [*image, *text, *guidance])


def prologue():
    image, text = draw(2, 2, 24, 128), draw(2, 2, 7, 128)
    weight = (torch.ones(128, device=CUDA, dtype=torch.bfloat16),) * 2
    for places in (None, torch.tensor([0, 5], device=CUDA)):
        qk_norm_rope(*image, weight, tables(24, 128), text=text, places=places, backend="triton")


def images():
    """Several chunks, the last one short, and channels of no power of two."""
    for channels, dtype in ((24, torch.float16), (64, torch.bfloat16)):
        x, values = torch.randn(2, channels, 50, 51).to(CUDA, dtype), torch.ones(channels, device=CUDA, dtype=dtype)
        for shift in (None, values):
            group_norm(x, 8, values, values, silu=True, shift=shift, backend="triton")
        add_bias(x, x, values, backend="triton")


if __name__ == "__main__":
    for run in (prologue, images, partial(npa, "triton"), partial(npa, "gluon"), local):
        run()
        torch.cuda.synchronize()
        print(run, flush=True)
    print("ran")
