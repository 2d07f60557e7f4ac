"""torch.nn: ``TransformerEncoderLayer`` on the fused operations, pre-norm or post-norm.

    x = src + dropout1(self_attn(norm1(src)))                            where norm_first
    x = x + dropout2(linear2(dropout(activation(linear1(norm2(x))))))

    x = norm1(src + dropout1(self_attn(src)))                            elsewhere
    x = norm2(x + dropout2(linear2(dropout(activation(linear1(x))))))

Masks become a bias of the scores: whether a key padding mask is a prefix, a GPU tells only at the price of waiting for
it. ``nn.TransformerEncoder`` makes a nested tensor of a padded batch in eval mode where its layers are post-norm; the
layers then run torch's own kernel.
Source: torch/nn/modules/transformer.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vit_fast import ops
from vit_fast.block import (
    attention_branch,
    drop_rate,
    drops_not_covered,
    mlp_branch,
    pass_over_stack,
    prepared_for,
    run_blocks,
)
from vit_fast.block_params import BlockParams, Norm
from vit_fast.plain import LINEAR, TENSORS, Fusible, multihead_submodules, submodules

from . import Found, Fused, Swapped, given, instances, is_empty, not_dense, not_taken

_FUNCTIONS = {F.relu: "relu", F.gelu: "gelu", torch.relu: "relu", F.silu: "silu"}


def _activation(act):
    """The name of an activation, or None. torch itself takes a tanh GELU for the exact one in eval mode, but not in
    training."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else None
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(act)) or _FUNCTIONS.get(act)


class FastTransformerEncoderLayer(Fused, nn.TransformerEncoderLayer):
    """torch's TransformerEncoderLayer as two fused branches: [B, N, C] → [B, N, C], or [N, B, C] → [N, B, C]."""

    RUNS_PARTS = True
    SUBMODULES = submodules(
        norm1=(nn.LayerNorm,),
        **multihead_submodules("self_attn"),
        dropout1=(nn.Dropout,),
        norm2=(nn.LayerNorm,),
        linear1=LINEAR,
        activation=(nn.ReLU, nn.GELU, nn.SiLU, type(None)),
        dropout=(nn.Dropout,),
        linear2=LINEAR,
        dropout2=(nn.Dropout,),
    )

    def not_covered(self) -> str | None:
        attn = self.self_attn
        if attn.in_proj_weight is None:
            return "q, k and v differ in width"
        if attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
            return "its attention adds keys"
        if _activation(self.activation) is None:
            return f"its activation is {self.activation}"
        return None

    def params(self) -> BlockParams:
        """The weights as the fused branches take them; no norms where they follow the branches."""
        attn = self.self_attn
        return BlockParams(
            norm1=Norm.of(self.norm1) if self.norm_first else None,
            qkv_weight=attn.in_proj_weight,
            qkv_bias=attn.in_proj_bias,
            proj_weight=attn.out_proj.weight,
            proj_bias=attn.out_proj.bias,
            norm2=Norm.of(self.norm2) if self.norm_first else None,
            fc1_weight=self.linear1.weight,
            fc1_bias=self.linear1.bias,
            fc2_weight=self.linear2.weight,
            fc2_bias=self.linear2.bias,
            num_heads=attn.num_heads,
            scale=attn.head_dim**-0.5,
            activation=_activation(self.activation),
        )

    def _drops(self) -> tuple[float, float, float, float]:
        """The current dropout rates: attention weights, attention output, hidden MLP, output."""
        attn = self.self_attn.dropout if self.self_attn.training else 0.0
        return attn, drop_rate(self.dropout1), drop_rate(self.dropout), drop_rate(self.dropout2)

    def _not_taken(self, src: Any, masks: Sequence[Any], is_causal: bool) -> str | None:
        """Why the fused forward does not take a call, or None."""
        if reason := not_taken(src, self.self_attn.in_proj_weight):
            return reason
        if any(mask is not None and type(mask) not in TENSORS for mask in masks):
            return "a mask is no tensor"
        if is_empty(src, 0):
            return "the input has no tokens or images"
        if is_causal and masks[0] is None:
            return "is_causal is given without src_mask"
        return drops_not_covered(*self._drops())

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        masks = src_mask, src_key_padding_mask
        if reason := self.not_fused() or self._not_taken(src, masks, is_causal):
            return self.run_library(reason, src, *masks, is_causal=is_causal)
        attn_drop, proj_drop, hidden_drop, out_drop = self._drops()
        p = self.params()
        batch_first = self.self_attn.batch_first
        x = src if batch_first else src.transpose(0, 1)
        bias = _bias(x, p.num_heads, *masks)
        if (prepared := prepared_for(self, x)) is not None:
            x = prepared.run_block(x, bias=bias)
            return x if batch_first else x.transpose(0, 1)
        return self.branches(x, p, bias, attn_drop, proj_drop, hidden_drop, out_drop, batch_first)

    def fused_parts(self, *inputs: Any, **options: Any) -> Any:
        return self.branches(inputs[0], self.params(), options["bias"], 0.0, 0.0, 0.0, 0.0, True)

    def branches(
        self,
        x: torch.Tensor,
        p: BlockParams,
        bias: Any,
        attn_drop: float,
        proj_drop: float,
        hidden_drop: float,
        out_drop: float,
        batch_first: bool,
    ) -> torch.Tensor:
        """Both branches, with their rates of dropout: [B, N, C] → the same, or [N, B, C] where not ``batch_first``.

        The batch moves before the second branch, so that the output is no view: FSDP2 warns of one.
        """
        x = attention_branch(x, p, attn_drop=attn_drop, proj_drop=proj_drop, bias=bias)
        x = x if batch_first else x.transpose(0, 1)
        x = x if self.norm_first else ops.layer_norm(x, *Norm.of(self.norm1))
        x = mlp_branch(x, p, hidden_drop=hidden_drop, out_drop=out_drop)
        return x if self.norm_first else ops.layer_norm(x, *Norm.of(self.norm2))


def _bias(x, num_heads, src_mask, key_padding_mask):
    """What two masks add to the scores of x, or None. Bool masks are True where a key does not count."""
    bias = None
    if src_mask is not None:
        bias = _added(src_mask, x)
        if bias.dim() == 3:
            bias = bias.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        keys = _added(key_padding_mask, x)[:, None, None]
        bias = keys if bias is None else bias + keys
    return bias if bias is None or bias.dim() == 4 else bias[None, None]


def _added(mask, x):
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask, -torch.inf)
    return mask


class FastTransformerEncoder(Swapped, nn.TransformerEncoder):
    """torch's TransformerEncoder, whose layers run all at once where ``vit_fast.prepare`` has prepared them."""

    layers: nn.ModuleList

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        reason = given((mask, src_key_padding_mask, is_causal), {}) or not_dense(src, 3)
        attention: Any = self.layers[0].self_attn
        if reason is None and not getattr(attention, "batch_first", False):
            reason = "its layers are not batch_first"
        if reason is not None:
            pass_over_stack(self.layers, reason)
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        x = run_blocks(self.layers, src)
        return x if self.norm is None else self.norm(x)

    @staticmethod
    def stack(module: nn.Module) -> nn.Module:
        """The container of the blocks in a module that may be swapped to this class."""
        return module.get_submodule("layers")


FAST = {nn.TransformerEncoderLayer: FastTransformerEncoderLayer}
STACKS = {nn.TransformerEncoder: FastTransformerEncoder}


def find(model: nn.Module) -> Iterator[Found]:
    """The layers of torch, but not those of vit_fast's own models, which are subclasses and fused already."""
    for found in instances(model, FAST):
        if not isinstance(found[1], Fusible) or isinstance(found[1], Fused):
            yield found
