"""Check the kernel on this machine's GPU, one line a shape: `python -m hires_kernels.hopper`."""

import torch

from hires_kernels import neighborhood_patch_attention

SHAPES = {  # grid, window, text tokens, batch, heads, head dim, dtype
    "FLUX": ((128, 128), (64, 64), 512, 1, 2, 128, torch.bfloat16),
    "FLUX, 832x1216": ((104, 152), (52, 76), 256, 1, 2, 128, torch.bfloat16),
    "FLUX, tiles of padding": ((96, 72), (38, 52), 256, 1, 2, 128, torch.bfloat16),
    "SDXL, window 64": ((128, 128), (64, 64), None, 2, 2, 64, torch.float16),
    "SDXL, window 32": ((128, 128), (32, 32), None, 2, 2, 64, torch.float16),
    "FLUX, rising scores": ((128, 128), (64, 64), 512, 1, 2, 128, torch.bfloat16),
    "SDXL, rising scores": ((128, 128), (64, 64), None, 2, 2, 64, torch.float16),
}


def main() -> None:
    for name, (grid, window, text_tokens, batch, heads, dim, dtype) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)

        def draw(tokens: int, size=(batch, heads, dim), dtype=dtype, generator=generator) -> tuple[torch.Tensor, ...]:
            packed = torch.randn(size[0], tokens, 3, *size[1:], generator=generator)
            return packed.to("cuda", dtype).unbind(2)

        image, text = draw(grid[0] * grid[1]), None if text_tokens is None else draw(text_tokens)
        if "rising" in name:  # maxima of rows grow by far more than the kernel lets pass
            image[1].mul_(torch.linspace(0, 8, grid[0] * grid[1], device="cuda").view(-1, 1, 1))
        angles = torch.rand(grid[0] * grid[1], dim // 2, generator=generator).repeat_interleave(2, 1) * 100
        rope = angles.cos().cuda(), angles.sin().cuda()

        def run(backend, dtype, image=image, text=text, rope=rope, grid=grid, window=window):
            inputs = None if text is None else tuple(x.to(dtype) for x in text)
            outputs = neighborhood_patch_attention(
                *(x.to(dtype) for x in image), grid=grid, window=window, text=inputs, rope=rope, backend=backend
            )
            return [x for x in outputs if x is not None]

        truth, plain, given = run("reference", torch.float64), run("reference", dtype), run("gluon", dtype)
        repeats = all(all(map(torch.equal, given, run("gluon", dtype))) for _ in range(100))
        for rows, exact, low, result in zip(("image", "text"), truth, plain, given):
            error, allowed = (result - exact).abs().max(), 2 * (low - exact).abs().max()
            allowed += torch.finfo(dtype).eps * exact.abs().max()
            verdict = "right" if error <= allowed and repeats else "WRONG"
            print(
                f"{name}, {rows} rows: {verdict}, error {error:.1e} of {allowed:.1e}, same bits {repeats}", flush=True
            )


if __name__ == "__main__":
    main()
