"""Triton kernel and launcher of pixel_shuffle."""

import torch
import triton
import triton.language as tl


@triton.jit
def pixel_shuffle_kernel(
    x_ptr,
    out_ptr,
    stride_tile,
    stride_token,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program moves BLOCK_WIDTH tokens of one grid row, BLOCK_CHANNELS channels of each."""
    COLUMNS: tl.constexpr = WIDTH // FACTOR
    OUT_CHANNELS: tl.constexpr = CHANNELS * FACTOR * FACTOR
    tile = tl.program_id(0) // HEIGHT
    h = tl.program_id(0) % HEIGHT
    w = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    c = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (w < WIDTH)[:, None] & (c < CHANNELS)[None, :]

    source = x_ptr + tile.to(tl.int64) * stride_tile + (h * WIDTH + w).to(tl.int64)[:, None] * stride_token + c[None, :]
    values = tl.load(source, mask=mask)

    token = (h // FACTOR) * COLUMNS + w // FACTOR
    channel = (h % FACTOR * FACTOR + w % FACTOR) * CHANNELS
    target = out_ptr + tile.to(tl.int64) * (HEIGHT // FACTOR * COLUMNS * OUT_CHANNELS)
    tl.store(target + (token * OUT_CHANNELS + channel)[:, None] + c[None, :], values, mask=mask)


def launch(x: torch.Tensor, height: int, width: int, factor: int) -> torch.Tensor:
    """x [tiles, height * width, channels] -> [tiles, tokens, channels * factor**2] on the current stream."""
    tiles, _, channels = x.shape
    out = x.new_empty(tiles, (height // factor) * (width // factor), channels * factor * factor)
    block_width = min(8, triton.next_power_of_2(width))
    block_channels = min(512, triton.next_power_of_2(channels))
    if out.numel():
        grid = (tiles * height, triton.cdiv(width, block_width), triton.cdiv(channels, block_channels))
        pixel_shuffle_kernel[grid](
            x,
            out,
            x.stride(0),
            x.stride(1),
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            FACTOR=factor,
            BLOCK_WIDTH=block_width,
            BLOCK_CHANNELS=block_channels,
        )
    return out
