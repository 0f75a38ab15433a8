"""Check the kernel on this machine's GPU, one line a shape: `python -m hires_kernels.hopper`."""

import torch

from hires_kernels import neighborhood_patch_attention
from hires_kernels.fused.npa import Triple

SHAPES = {  # grid, window, text tokens, batch, heads, head dim, dtype
    "FLUX": ((128, 128), (64, 64), 512, 1, 2, 128, torch.bfloat16),
    "FLUX, 832x1216": ((104, 152), (52, 76), 256, 1, 2, 128, torch.bfloat16),
    "FLUX, tiles of padding": ((96, 72), (38, 52), 256, 1, 2, 128, torch.bfloat16),
    "SDXL, window 64": ((128, 128), (64, 64), None, 2, 2, 64, torch.float16),
    "SDXL, window 32": ((128, 128), (32, 32), None, 2, 2, 64, torch.float16),
    "FLUX, rising scores": ((128, 128), (64, 64), 512, 1, 2, 128, torch.bfloat16),
    "FLUX, steep scores": ((128, 128), (64, 64), 512, 1, 2, 128, torch.bfloat16),
    "SDXL, rising scores": ((128, 128), (64, 64), None, 2, 2, 64, torch.float16),
}
# by how much: rows' maxima pass those of their first step, and steep ones what weights of bfloat16 have room for
RISES = {"rising": 8, "steep": 64}


def check(name: str) -> None:
    grid, window, text_tokens, batch, heads, dim, dtype = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int) -> Triple:
        query, key, value = torch.randn(batch, tokens, 3, heads, dim, generator=generator).to("cuda", dtype).unbind(2)
        return query, key, value

    image, text = draw(grid[0] * grid[1]), None if text_tokens is None else draw(text_tokens)
    for word, rise in RISES.items():
        if word in name:
            image[1].mul_(torch.linspace(0, rise, grid[0] * grid[1], device="cuda").view(-1, 1, 1))
    angles = torch.rand(grid[0] * grid[1], dim // 2, generator=generator).repeat_interleave(2, 1) * 100
    rope = angles.cos().cuda(), angles.sin().cuda()

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        def cast(tensors: Triple) -> Triple:
            query, key, value = (x.to(dtype) for x in tensors)
            return query, key, value

        inputs = None if text is None else cast(text)
        outputs = neighborhood_patch_attention(
            *cast(image), grid=grid, window=window, text=inputs, rope=rope, backend=backend
        )
        return [x for x in outputs if x is not None]

    truth, plain, given = run("reference", torch.float64), run("reference", dtype), run("gluon", dtype)
    repeats = all(all(map(torch.equal, given, run("gluon", dtype))) for _ in range(100))
    for rows, exact, low, result in zip(("image", "text"), truth, plain, given):
        error, allowed = (result - exact).abs().max(), 2 * (low - exact).abs().max()
        allowed += torch.finfo(dtype).eps * exact.abs().max()
        verdict = "right" if error <= allowed and repeats else "WRONG"
        print(f"{name}, {rows} rows: {verdict}, error {error:.1e} of {allowed:.1e}, same bits {repeats}", flush=True)


def main() -> None:
    for name in SHAPES:
        check(name)


if __name__ == "__main__":
    main()
