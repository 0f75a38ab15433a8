"""Linear layers in 8 bits: weights quantised once for each output channel, activations anew for each token.

e4m3 with a float32 scale a row on both sides: y = (x₈ w₈ᵀ) · s_x · s_w + b. GPUs of compute capability 8.9 and above
multiply in 8 bits; elsewhere the same numbers are multiplied in float32, which shows the error and saves no time.

The layers of the repeated blocks are replaced. Left as they are: modulation ("norm…linear", a few rows that scale and
shift all tokens), LoRA matrices, the U-Net's projections of text, everything outside the blocks (embeddings of time,
text and image, the last projection), and layers whose sides 16 doesn't divide.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
SENSITIVE = ("norm", "lora_", "attn2.to_k", "attn2.to_v")  # parts of names


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (…, n) -> (e4m3 of the same shape, float32 scales (…, 1)); x ≈ x₈ · scale."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


class Fp8Linear(nn.Module):
    """What stands in for an nn.Linear, of which it keeps the bias."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantise(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.native = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantise(x.flatten(0, -2))
        if self.native and rows.is_cuda:
            bias = None if self.bias is None else self.bias.to(torch.bfloat16)
            product = torch._scaled_mm(
                rows,
                self.weight.t(),
                scale_a=scale,
                scale_b=self.scale.t(),
                bias=bias,
                out_dtype=torch.bfloat16,  # the only one for scales by row
                use_fast_accum=True,
            )
        else:
            product = rows.float() @ self.weight.float().t() * scale * self.scale.t()
            if self.bias is not None:
                product = product + self.bias.float()
        return product.to(x.dtype).unflatten(0, x.shape[:-1])


def quantised_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, attribute, layer) of every layer that is replaced."""
    kinds = getattr(model, "_repeated_blocks", ())
    found = []
    for block in model.modules():
        if type(block).__name__ not in kinds:
            continue
        for name, layer in block.named_modules():
            if type(layer) is not nn.Linear or any(part in name for part in SENSITIVE):
                continue
            if layer.in_features % 16 == 0 and layer.out_features % 16 == 0:
                parent, _, attribute = name.rpartition(".")
                found.append((block.get_submodule(parent), attribute, layer))
    return found


def only_8_bits(model: nn.Module) -> None:
    """Replace the layers of `quantised_layers` for good: their 16-bit weights are let go, layer by layer."""
    for parent, attribute, layer in quantised_layers(model):
        setattr(parent, attribute, Fp8Linear(layer))


@contextmanager
def fp8_linears(model: nn.Module) -> Iterator[None]:
    """Within it the layers of `quantised_layers` run in 8 bits; afterwards the model is as it was.

    The quantised weights stay in memory for the next time, half as large as those in 16 bits, which stay as well; a
    model after `only_8_bits` has none and is left alone.
    """
    layers = quantised_layers(model)
    try:
        for parent, attribute, layer in layers:
            setattr(parent, attribute, _twin(layer))
        yield
    finally:
        for parent, attribute, layer in layers:
            setattr(parent, attribute, layer)


def _twin(layer: nn.Linear) -> Fp8Linear:
    """The layer's quantised twin, made anew when its weights have changed or moved."""
    weight = layer.weight
    key = (weight.device, weight.data_ptr(), weight._version)
    kept: Any = layer.__dict__.get("_fp8")
    if kept is None or kept[0] != key:
        kept = layer.__dict__["_fp8"] = key, Fp8Linear(layer)
    return kept[1]
