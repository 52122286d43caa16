"""Triton kernel and launchers of pixel_shuffle and its backward."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=("height", "width"))
def pixel_shuffle_kernel(
    source_ptr,
    target_ptr,
    stride_tile,
    stride_token,
    height,
    width,
    CHANNELS: tl.constexpr,
    FACTOR: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program moves BLOCK_WIDTH tokens of one grid row, BLOCK_CHANNELS channels of each, or moves them back.

    The strides are the source's; the target is contiguous.
    """
    OUT_CHANNELS: tl.constexpr = CHANNELS * FACTOR * FACTOR
    tile = (tl.program_id(0) // height).to(tl.int64)
    h = tl.program_id(0) % height
    w = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)  # [BLOCK_WIDTH]
    c = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]  # [1, BLOCK_CHANNELS]
    mask = (w < width)[:, None] & (c < CHANNELS)  # [BLOCK_WIDTH, BLOCK_CHANNELS]

    cell = (h * width + w).to(tl.int64)[:, None]  # [BLOCK_WIDTH, 1]
    token = ((h // FACTOR) * (width // FACTOR) + w // FACTOR).to(tl.int64)[:, None]  # [BLOCK_WIDTH, 1]
    channel = ((h % FACTOR * FACTOR + w % FACTOR) * CHANNELS)[:, None]  # [BLOCK_WIDTH, 1]
    source_ptr += tile * stride_tile
    target_ptr += tile * (height * width) * CHANNELS
    if INVERSE:
        values = tl.load(source_ptr + token * stride_token + channel + c, mask=mask)  # [BLOCK_WIDTH, BLOCK_CHANNELS]
        tl.store(target_ptr + cell * CHANNELS + c, values, mask=mask)
    else:
        values = tl.load(source_ptr + cell * stride_token + c, mask=mask)  # [BLOCK_WIDTH, BLOCK_CHANNELS]
        tl.store(target_ptr + token * OUT_CHANNELS + channel + c, values, mask=mask)


def launch(x: torch.Tensor, height: int, width: int, factor: int) -> torch.Tensor:
    """x [tiles, height * width, channels] -> [tiles, tokens, channels * factor**2] on the current stream."""
    out = x.new_empty(x.shape[0], (height // factor) * (width // factor), x.shape[2] * factor * factor)
    _launch(x, out, height, width, x.shape[2], factor, inverse=False)
    return out


def launch_backward(grad: torch.Tensor, height: int, width: int, factor: int) -> torch.Tensor:
    """The inverse of `launch`."""
    channels = grad.shape[2] // (factor * factor)
    out = grad.new_empty(grad.shape[0], height * width, channels)
    _launch(grad, out, height, width, channels, factor, inverse=True)
    return out


def _launch(
    source: torch.Tensor, target: torch.Tensor, height: int, width: int, channels: int, factor: int, inverse: bool
) -> None:
    block_width = min(8, triton.next_power_of_2(width))
    block_channels = min(512, triton.next_power_of_2(channels))
    if target.numel():
        grid = (source.shape[0] * height, triton.cdiv(width, block_width), triton.cdiv(channels, block_channels))
        pixel_shuffle_kernel[grid](
            source,
            target,
            source.stride(0),
            source.stride(1),
            height,
            width,
            CHANNELS=channels,
            FACTOR=factor,
            INVERSE=inverse,
            BLOCK_WIDTH=block_width,
            BLOCK_CHANNELS=block_channels,
        )
