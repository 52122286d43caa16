"""Slow fp64 references, written from the definitions and sharing no code with the ops."""

import itertools

import torch
from torch import Tensor


def pixel_shuffle_reference(x: Tensor, height: int, width: int, factor: int = 2) -> Tensor:
    """Gather factor x factor neighbourhoods of a height x width grid into channels, one output cell at a time.

    Source: Meta's llama-models, `llama4/vision/encoder.py`, `PixelShuffle` (right on non-square grids).

    Args:
        x: [tiles, height * width, channels], any dtype.

    Returns:
        [tiles, (height // factor) * (width // factor), channels * factor**2] in x's dtype: values are only moved.
    """
    tiles, _, channels = x.shape
    rows, columns = height // factor, width // factor
    out = x.new_empty(tiles, rows * columns, factor * factor * channels)
    for i in range(rows):
        for j in range(columns):
            cells = [(factor * i + dh) * width + factor * j + dw for dh in range(factor) for dw in range(factor)]
            out[:, i * columns + j] = torch.cat([x[:, cell] for cell in cells], dim=-1)
    return out


def layer_norm_pixel_shuffle_reference(
    x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, factor: int = 2, eps: float = 1e-5
) -> Tensor:
    """Each token's channels to mean 0 and variance 1, times weight plus bias, in fp64; then the pixel shuffle.

    Source: Ba et al., Layer Normalization (arXiv 1607.06450), equation 4; as `pixel_shuffle_reference`.

    Args:
        x: [tiles, height * width, channels]; weight, bias: [channels].

    Returns:
        [tiles, (height // factor) * (width // factor), channels * factor**2] as float64.
    """
    centred = x.double() - x.double().mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return pixel_shuffle_reference(centred / deviation * weight.double() + bias.double(), height, width, factor)


def rotary_2d_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True
) -> tuple[Tensor, Tensor]:
    """Rotate channel pairs as the real and imaginary parts of complex numbers, in fp64.

    Source: Su et al., RoFormer (arXiv 2104.09864), equation 34, with the tables given.

    Args:
        q, k: [tokens, heads, head_dim]; cos, sin: [positions, head_dim // 2]; token t takes row t % positions.

    Returns:
        q and k rotated, as float64.
    """
    positions = cos.shape[0]

    def rotate(x: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=torch.float64, device=x.device)
        half = x.shape[-1] // 2
        pairs = [(2 * j, 2 * j + 1) if interleaved else (j, j + half) for j in range(half)]
        for j, (real, imaginary) in enumerate(pairs):
            rows = torch.arange(x.shape[0], device=x.device) % positions
            a, b = x[..., real].double(), x[..., imaginary].double()
            c, s = cos[rows, j, None].double(), sin[rows, j, None].double()
            out[..., real], out[..., imaginary] = a * c - b * s, a * s + b * c
        return out

    return rotate(q), rotate(k)


def rotary_2d_qkv_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, kv_heads: int, interleaved: bool = True
) -> Tensor:
    """The first heads of a packed qkv rotated as `rotary_2d_reference` does, the last kv_heads as they are.

    Args:
        qkv: [tokens, heads + 2 * kv_heads, head_dim].

    Returns:
        A new tensor of that shape, as float64.
    """
    q, k, v = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    return torch.cat([*rotary_2d_reference(q, k, cos, sin, interleaved=interleaved), v.double()], dim=1)


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence and head, in fp64; rows outside every sequence are zero.

    So are the probabilities of a row whose every score is -inf: no key is left to attend to.

    Source: Vaswani et al., Attention Is All You Need (arXiv 1706.03762), equation 1.

    Args:
        q: [total_tokens, heads, head_dim]; k, v: [total_tokens_k, kv_heads, head_dim];
        cu_seqlens, cu_seqlens_k: integer [sequences + 1].

    Returns:
        [total_tokens, heads, head_dim] as float64.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    bounds = cu_seqlens.tolist()
    bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.tolist()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    for sequence in range(len(bounds) - 1):
        queries = slice(bounds[sequence], bounds[sequence + 1])
        keys = slice(bounds_k[sequence], bounds_k[sequence + 1])
        if keys.start == keys.stop:
            continue
        for head in range(q.shape[1]):
            scores = q[queries, head].double() @ k[keys, head // group].double().T * scale
            keyless = (scores == -torch.inf).all(-1, keepdim=True)
            p = torch.softmax(scores.masked_fill(keyless, 0), dim=-1).masked_fill(keyless, 0)
            out[queries, head] = p @ v[keys, head // group].double()
    return out


def varlen_attention_lse_reference(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """log(sum(exp(q k^T * scale))) over the keys of each sequence, in fp64; -inf for a query without keys.

    Of infinite scores it is the limit: -inf of -inf alone, +inf where one is +inf and none NaN.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691), section 3.1: L, the log-sum-exp of a row.

    Args:
        q, k, cu_seqlens, cu_seqlens_k, scale: as for `varlen_attention_reference`.

    Returns:
        [heads, total_tokens] as float64.
    """
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float64, device=q.device)
    boundaries = [cu.tolist() for cu in (cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k)]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    for (start, stop), (start_k, stop_k) in zip(*map(itertools.pairwise, boundaries), strict=True):
        for head in range(q.shape[1]):
            keys = k[start_k:stop_k, head * k.shape[1] // q.shape[1]].double()
            for token in range(start, stop):
                scores = (keys * q[token, head].double()).sum(-1) * factor
                largest = scores.max() if len(scores) else scores.new_zeros(())
                largest = torch.where(largest.isinf(), 0.0, largest)
                lse[head, token] = (scores - largest).exp().sum().log() + largest
    return lse


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """u * Phi(u) of u = x @ weight.T + bias with the normal distribution's cdf Phi, in fp64.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units (arXiv 1606.08415), section 2.

    Args:
        x: [tokens, in_features].
        weight: [out_features, in_features].
        bias: [out_features].

    Returns:
        [tokens, out_features] as float64.
    """
    u = (x.double()[:, None] * weight.double()).sum(-1) + bias.double()
    return u * torch.special.ndtr(u)


def scaled_linear_reference(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """activation(x_scale * weight_scale * (x @ weight.T) + bias), over out_scale where there is one, in fp64.

    Source: Dettmers et al., LLM.int8() (arXiv 2208.07339), equation 3; Hendrycks and Gimpel, Gaussian Error Linear
    Units (arXiv 1606.08415), section 2, with both forms of the GELU.

    Args:
        x: [tokens, in_features], weight: [out_features, in_features], 8-bit; x_scale, out_scale: [tokens];
        weight_scale, bias: [out_features]; activation: None, "gelu" or "gelu_tanh".

    Returns:
        [tokens, out_features] as float64, not yet rounded or saturated.
    """
    product = (x.double()[:, None] * weight.double()).sum(-1)
    u = product * x_scale.double()[:, None] * weight_scale.double()
    u = activation_reference(u if bias is None else u + bias.double(), activation)
    return u if out_scale is None else u / out_scale.double()[:, None]


def add_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x + residual, and the layer norm, or without a bias the RMS norm, of that sum in the dtype of x, in fp64.

    Source: Ba et al., Layer Normalization (arXiv 1607.06450), equation 4; Zhang and Sennrich, Root Mean Square Layer
    Normalization (arXiv 1910.07467), equation 4.

    Args:
        x, residual: [tokens, channels]; weight, bias: [channels].

    Returns:
        Both [tokens, channels] as float64.
    """
    stored = (x + residual).double()
    centred = stored if bias is None else stored - stored.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return x.double() + residual.double(), normed if bias is None else normed + bias.double()


def activation_reference(x: Tensor, activation: str | None) -> Tensor:
    """x itself, its GELU (the erf form, or the tanh form), or the SiLU of its first half times its second, in fp64.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units (arXiv 1606.08415), section 2; Shazeer, GLU Variants
    Improve Transformer (arXiv 2002.05202), equation 5.

    Args:
        x: [rows, features]; activation: None, "gelu", "gelu_tanh" or "gated_silu".

    Returns:
        [rows, features], or half as many features where gated, as float64.
    """
    u = x.double()
    if activation == "gelu":
        return u * torch.special.ndtr(u)
    if activation == "gelu_tanh":
        return 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
    if activation == "gated_silu":
        gate, up = u.tensor_split(2, dim=-1)
        return gate / (1 + torch.exp(-gate)) * up
    return u
