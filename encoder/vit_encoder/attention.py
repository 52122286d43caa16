"""Self-attention with 2D rotary embeddings, as every encoder has it."""

from __future__ import annotations

from torch import Tensor, nn
from vit_kernels import rotary_2d, rotary_2d_qkv_, varlen_attention

from vit_encoder.modules import has_hooks


class Attention(nn.Module):
    """Self-attention within each sequence, queries and keys rotated by patch position.

    Args:
        hidden_size: channels of a token.
        heads: a divisor of them.
        interleaved: which channels the rotation pairs, as for `rotary_2d`.
    """

    def __init__(self, hidden_size: int, heads: int, *, interleaved: bool) -> None:
        super().__init__()
        self.heads = heads
        self.interleaved = interleaved
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, cu_seqlens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Shapes: x and result [tokens, hidden], cu_seqlens [sequences + 1], cos and sin [positions, head_dim // 2]."""
        qkv = self.qkv(x)  # [tokens, 3 * hidden]
        # A hook may keep what it was shown, and the rotation would change that.
        qkv = qkv.clone() if has_hooks(self.qkv) else qkv
        qkv = qkv.unflatten(-1, (3 * self.heads, -1))  # [tokens, 3 * heads, head_dim]
        q, k, v = rotated(qkv, cos, sin, self.interleaved)  # 3 x [tokens, heads, head_dim]
        x = varlen_attention(q, k, v, cu_seqlens)  # [tokens, heads, head_dim]
        return self.out_proj(x.flatten(1))  # [tokens, hidden]


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [tokens, heads, head_dim] with q and k rotated: where they lie, unless that would lose a gradient."""
    q, k, v = qkv.chunk(3, dim=1)
    if qkv.requires_grad:
        return *rotary_2d(q, k, cos, sin, interleaved=interleaved), v
    rotary_2d_qkv_(qkv, cos, sin, interleaved=interleaved)
    return q, k, v
