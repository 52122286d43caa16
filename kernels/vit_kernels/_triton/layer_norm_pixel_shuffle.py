"""Triton kernel and launcher of layer_norm_pixel_shuffle."""

import torch
import triton
import triton.language as tl

from vit_kernels._triton.configurations import Configuration, current_target


@triton.jit(do_not_specialize=("height", "width"))
def layer_norm_pixel_shuffle_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_tile,
    stride_token,
    eps,
    height,
    width,
    CHANNELS: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program normalises and moves BLOCK_WIDTH tokens of one grid row; all channels of a token are one block."""
    OUT_CHANNELS: tl.constexpr = CHANNELS * FACTOR * FACTOR
    tile = (tl.program_id(0) // height).to(tl.int64)
    h = tl.program_id(0) % height
    w = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)  # [BLOCK_WIDTH]
    c = tl.arange(0, BLOCK_CHANNELS)[None, :]  # [1, BLOCK_CHANNELS]
    in_token = c < CHANNELS  # [1, BLOCK_CHANNELS]
    mask = (w < width)[:, None] & in_token  # [BLOCK_WIDTH, BLOCK_CHANNELS]

    cell = (h * width + w).to(tl.int64)[:, None]  # [BLOCK_WIDTH, 1]
    source = x_ptr + tile * stride_tile + cell * stride_token + c  # [BLOCK_WIDTH, BLOCK_CHANNELS]
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_WIDTH, BLOCK_CHANNELS]
    mean = tl.sum(x, 1)[:, None] / CHANNELS  # [BLOCK_WIDTH, 1]
    centred = tl.where(mask, x - mean, 0.0)  # [BLOCK_WIDTH, BLOCK_CHANNELS]
    variance = tl.sum(centred * centred, 1)[:, None] / CHANNELS  # [BLOCK_WIDTH, 1]
    weight = tl.load(weight_ptr + c, mask=in_token, other=0.0).to(tl.float32)  # [1, BLOCK_CHANNELS]
    bias = tl.load(bias_ptr + c, mask=in_token, other=0.0).to(tl.float32)  # [1, BLOCK_CHANNELS]
    out = centred * tl.rsqrt(variance + eps) * weight + bias  # [BLOCK_WIDTH, BLOCK_CHANNELS]

    token = ((h // FACTOR) * (width // FACTOR) + w // FACTOR).to(tl.int64)[:, None]  # [BLOCK_WIDTH, 1]
    channel = ((h % FACTOR * FACTOR + w % FACTOR) * CHANNELS)[:, None]  # [BLOCK_WIDTH, 1]
    target = out_ptr + tile * (height * width) * CHANNELS + token * OUT_CHANNELS + channel + c  # as source
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int, factor: int, eps: float
) -> torch.Tensor:
    """x [tiles, height * width, channels] -> [tiles, tokens, channels * factor**2] on the current stream."""
    tiles, _, channels = x.shape
    out = x.new_empty(tiles, (height // factor) * (width // factor), channels * factor * factor)
    block_channels = triton.next_power_of_2(max(channels, 1))
    # Tokens enough to share a read of weight and bias, few enough for a tile to fill a GPU and for the registers.
    block_width = min(4, triton.next_power_of_2(width), triton.cdiv(8192, block_channels))
    if out.numel():
        layer_norm_pixel_shuffle_kernel[(tiles * height, triton.cdiv(width, block_width))](
            x,
            weight,
            bias,
            out,
            x.stride(0),
            x.stride(1),
            eps,
            height,
            width,
            CHANNELS=channels,
            FACTOR=factor,
            BLOCK_WIDTH=block_width,
            BLOCK_CHANNELS=block_channels,
            **options(x.dtype),
        )
    return out


def options(dtype: torch.dtype) -> Configuration:
    """What the kernel is launched with on the current device besides its arguments."""
    if not triton.__version__.startswith("3.6.") or dtype == torch.float32 or triton.knobs.runtime.interpret:
        return {}
    # That compiler takes up to 100 registers where 96 spill nothing and leave room for a fifth block.
    return {"maxnreg": 96} if current_target().startswith("sm") else {}
