"""The two fused branches of a transformer block, as functions over a tuple of parameters.

Our own ViT, the model families and the integrations hold their weights under their own names and pass them here as a
``BlockParams``, provided that their modules are plain (``plain.py``). The canonical block is

    x = x + drop_path(gamma1 · proj(out_norm(attention(qkv(LN1(x))))))        [+ v where value_skip]
    x = x + drop_path(gamma2 · fc2(inner_norm(act(fc1(LN2(x))))))

All norms are LayerNorms, or all are RMSNorms (``norm``). A norm that is None is left out (post-norm layers normalise
what a branch returns). With value_skip "only", v takes the place of x in the first line, so that x may have another
width than v.
``run_blocks`` takes x through a stack of blocks, all at once where ``vit_fast.prepare`` has prepared them.
Every operation below goes through ``ops``, which draws the seeds of dropout.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .block_params import BlockParams, Norm
from .kernels.reference import attention_weights, split_heads
from .kernels.tracing import is_recording
from .plain import why_not_plain

Stack = nn.Sequential | nn.ModuleList
Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]  # calls a block
PREPARED = "_vit_fast_prepared"  # the attribute of a stack of blocks that holds its prepared weights


def pack(projections: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) of one linear layer that computes several layers of the same input at once. Where only some layers
    have a bias, the others get 0."""
    biases = [linear.bias for linear in projections]
    if any(bias is not None for bias in biases):
        zeros = (linear.weight.new_zeros(linear.out_features) for linear in projections)
        bias = torch.cat([zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)])
    else:
        bias = None
    return torch.cat([linear.weight for linear in projections]), bias


def drop_path_scale(x: torch.Tensor, rate: float, training: bool, scale_by_keep: bool = True) -> torch.Tensor | None:
    """Stochastic depth as a factor a sample: [B] of 0 or 1/(1 − rate), without ``scale_by_keep`` of 0 or 1; None where
    nothing is dropped. One seed a branch (``ops.keep_samples``).

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """
    if not training or rate == 0.0:
        return None
    keep = ops.keep_samples(x, rate).to(x.dtype)
    return keep.div_(1.0 - rate) if scale_by_keep else keep


def drops_not_covered(*rates: float) -> str | None:
    """Why the fused branches do not cover a block's current drop rates, or None."""
    return "a drop rate is 1" if max(rates) >= 1 else None


def drop_rate(module: nn.Module | None) -> float:
    """The current rate of an ``nn.Dropout``: 0 in eval mode, and for any other module."""
    return module.p if type(module) is nn.Dropout and module.training else 0.0


def attend(
    qkv: torch.Tensor,
    p: BlockParams,
    attn_drop: float = 0.0,
    bias: torch.Tensor | None = None,
    *,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    rope_layout: str = "half",
    num_prefix: int = 0,
    rel_pos: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention on the packed projection [B, N, 3C] → [B, N, C], with qk-norm where the block has one; the options are
    those of ``ops.attention``."""
    return ops.attention(
        qkv, p.num_heads, p.scale, bias=bias, rel_pos=rel_pos, key_lengths=key_lengths, rope=rope,
        rope_layout=rope_layout, num_prefix=num_prefix, q_norm=p.q_norm, k_norm=p.k_norm, norm=p.norm,
        dropout_p=attn_drop,
    )  # fmt: skip


def attention_probabilities(
    qkv: torch.Tensor, p: BlockParams, queries: slice | torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax probabilities [B, H, N, N] of a packed projection; ``queries`` selects query tokens."""
    q, k, _ = split_heads(qkv, None, None, p.num_heads)
    if p.q_norm is not None:
        q = ops.layer_norm(q, *p.q_norm, norm=p.norm)
    if p.k_norm is not None:
        k = ops.layer_norm(k, *p.k_norm, norm=p.norm)
    return attention_weights(q if queries is None else q[:, :, queries], k, p.scale)


def latent_attention(
    attn: Any, latent: torch.Tensor, x: torch.Tensor, norm: Norm | None = None, **options: Any
) -> torch.Tensor:
    """An ``nn.MultiheadAttention`` whose queries are the same for each image: [1, L, C] on tokens norm(x) [B, N, D] →
    [B, L, C]; ``options`` are those of ``ops.attention``."""
    width, weight, bias = attn.embed_dim, attn.in_proj_weight, attn.in_proj_bias
    q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.chunk(3)
    if weight is None:  # the tokens have a width of their own
        x = x if norm is None else ops.layer_norm(x, *norm)
        k, v = F.linear(x, attn.k_proj_weight, k_bias), F.linear(x, attn.v_proj_weight, v_bias)
        q = F.linear(latent, attn.q_proj_weight, q_bias)
    else:
        kv_weight, kv_bias = weight[width:], None if bias is None else bias[width:]
        kv = F.linear(x, kv_weight, kv_bias) if norm is None else ops.layer_norm_linear(x, *norm, kv_weight, kv_bias)
        k, v = kv.chunk(2, dim=-1)
        q = F.linear(latent, weight[:width], q_bias)
    q = q.expand(x.shape[0], -1, -1)
    y = ops.attention(q, attn.num_heads, attn.head_dim**-0.5, k=k, v=v, **options)
    return F.linear(y, attn.out_proj.weight, attn.out_proj.bias)


def project_qkv(x: torch.Tensor, p: BlockParams) -> torch.Tensor:
    """LN1 and the qkv projection: [B, N, C] → [B, N, 3C]."""
    if p.norm1 is None:
        return ops.linear(x.to(p.qkv_weight.dtype), p.qkv_weight, p.qkv_bias)
    return ops.layer_norm_linear(x, *p.norm1, p.qkv_weight, p.qkv_bias, norm=p.norm)


def attention_branch(
    x: torch.Tensor,
    p: BlockParams,
    *,
    row_scale: torch.Tensor | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    qkv: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    rope_layout: str = "half",
    num_prefix: int = 0,
    rel_pos: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """x plus the attention branch; ``qkv``: the projection, where the caller has computed it already; ``bias`` and what
    follows: as ``ops.attention`` takes them."""
    if qkv is None:
        qkv = project_qkv(x, p)
    out = attend(
        qkv, p, attn_drop, bias, rope=rope, rope_layout=rope_layout, num_prefix=num_prefix, rel_pos=rel_pos,
        key_lengths=key_lengths,
    )  # fmt: skip
    residual = qkv.chunk(3, dim=-1)[2] if p.value_skip else x
    out = ops.linear_residual(
        out, p.proj_weight, p.proj_bias, p.gamma1, residual,
        row_scale=row_scale, norm=p.norm, inner_norm=p.out_norm, dropout_p=proj_drop,
    )  # fmt: skip
    return x + out if p.value_skip is True else out  # x last: v + proj is the smaller sum, and rounds less


def mlp_branch(
    x: torch.Tensor,
    p: BlockParams,
    *,
    row_scale: torch.Tensor | None = None,
    hidden_drop: float = 0.0,
    out_drop: float = 0.0,
) -> torch.Tensor:
    """x plus the MLP branch; hidden_drop acts after the activation, out_drop after fc2."""
    if p.norm2 is not None:
        return ops.layernorm_mlp(
            x, *p.norm2, p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias, p.activation, p.gamma2,
            row_scale=row_scale, norm=p.norm, inner_norm=p.inner_norm, dropout_p=hidden_drop, out_dropout_p=out_drop,
        )  # fmt: skip
    hidden = ops.linear(x.to(p.fc1_weight.dtype), p.fc1_weight, p.fc1_bias, p.activation)
    if hidden_drop:
        hidden = ops.dropout(hidden, hidden_drop)
    return ops.linear_residual(
        hidden, p.fc2_weight, p.fc2_bias, p.gamma2, x,
        row_scale=row_scale, norm=p.norm, inner_norm=p.inner_norm, dropout_p=out_drop,
    )  # fmt: skip


def pass_over_prepared(blocks: nn.Module, reason: str) -> None:
    """Records that a call runs the blocks of a stack one by one. If the stack is prepared, a warning gives the reason,
    once."""
    prepared = _prepared(blocks)
    if prepared is not None:
        prepared.need_weights(blocks, reason)
        prepared.pass_over(reason)


def pass_over_stack(blocks: Stack, reason: str) -> None:
    """Records that a call runs the blocks of a stack one by one, as ``pass_over_prepared`` does, unless the blocks
    themselves use what is prepared of them."""
    if len(blocks) == 0 or PREPARED not in vars(blocks[0]):
        pass_over_prepared(blocks, reason)


def _prepared(blocks: nn.Module) -> Any:
    """The prepared weights of a stack, or None. A graph that is recorded or compiled uses the model's own weights."""
    prepared: Any = blocks.__dict__.get(PREPARED)
    if torch.compiler.is_compiling() or is_recording():
        if prepared is not None:
            prepared.need_weights(blocks, "a graph uses the model's own")
        return None
    return prepared


def prepared_for(block: nn.Module, x: torch.Tensor) -> Any:
    """The prepared weights of a block alone (``prepared.Prepared``) where they serve tokens x, else None."""
    if PREPARED not in block.__dict__:
        return None
    prepared = _prepared(block)
    return prepared if prepared is not None and prepared.serves(x, block) else None


def call_blocks(blocks: nn.Sequential, x: torch.Tensor, run: Run | None, recomputes: bool) -> torch.Tensor:
    """``run_blocks`` over a whole ``nn.Sequential``. If the stack carries a hook or is of another class, its own
    ``__call__`` runs instead, unless its blocks are recomputed in the backward (``recomputes``)."""
    if not recomputes and (reason := why_not_plain(blocks, (nn.Sequential,))):
        pass_over_stack(blocks, f"the stack {reason}")
        return blocks(x)
    return run_blocks(blocks, x, run=run)


def run_blocks(
    blocks: Stack,
    x: torch.Tensor,
    first: int = 0,
    last: int | None = None,
    run: Run | None = None,
) -> torch.Tensor:
    """x through blocks[first:last] of an ``nn.Sequential`` or ``nn.ModuleList``.

    Prepared weights (``vit_fast.prepare``) are used where they exist and apply to this call; otherwise
    ``run(block, x)``, by default ``block(x)``, is called for each block.
    """
    prepared = _prepared(blocks)
    if prepared is not None and prepared.serves(x, blocks):
        return prepared.run(x, first, last)
    chosen: Any = blocks if (first, last) == (0, None) else blocks[first:last]  # slicing builds a new module
    for block in chosen:
        x = block(x) if run is None else run(block, x)
    return x
