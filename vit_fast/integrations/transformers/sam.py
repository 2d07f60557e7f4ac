"""SAM's image encoder: the form of its layers."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from vit_fast import backends, ops
from vit_fast.block import prepared_for
from vit_fast.block_params import Norm
from vit_fast.integrations import given, not_dense
from vit_fast.plain import LINEAR

from .layer import ACTIVATIONS, NORM, Layer, Modules, Parts, Settings, linear


class SamForm(Layer):
    """SAM: [B, rows, columns, C] with decomposed relative positions, in windows or over the whole image."""

    MODULES: ClassVar[Modules] = dict(
        layer_norm1=NORM,
        attn=("{}VisionAttention", "{}VisionSdpaAttention"),
        attn__qkv=LINEAR,
        attn__proj=LINEAR,
        layer_norm2=NORM,
        mlp=("{}MLPBlock",),
        mlp__lin1=LINEAR,
        mlp__act=ACTIVATIONS,
        mlp__lin2=LINEAR,
    )
    ARGUMENTS = READS = ()
    SCALE, DROPOUT = "scale", "dropout"
    window_size: int
    window_partition: Any  # methods of the library's layer
    window_unpartition: Any

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn, mlp = self.attn, self.mlp
        return Parts(self.layer_norm1, attn, (attn.qkv,), attn.proj, self.layer_norm2, (mlp.lin1,), mlp.act, mlp.lin2)

    def attention_dropout_rate(self, attention: Any) -> float:
        return 0.0 if "Sdpa" in type(attention).__name__ else super().attention_dropout_rate(attention)

    def fused(self, x: torch.Tensor, settings: Settings, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        if reason := not_dense(x, 4):
            return reason
        if reason := self._not_taken(x.flatten(1, 2), settings) or given(args, named):
            return reason
        if (prepared := prepared_for(self, x)) is not None:
            return prepared.run_block(x)
        return backends.run_block(self.add_branches, x, settings.parts, {})

    def add_attention(self, x: torch.Tensor, parts: Parts, options: dict[str, Any]) -> torch.Tensor:
        attention, size = parts.attention, self.window_size
        tokens = ops.layer_norm(x, *Norm.of(parts.norm1))
        if size:
            tokens, padded = self.window_partition(tokens, size)  # pads with zeros, so that the norm comes first
        _, height, width, channels = tokens.shape
        qkv = linear(tokens.flatten(1, 2), parts.qkv[0])
        if attention.use_rel_pos:
            heads = attention.num_attention_heads
            q = qkv[..., :channels].unflatten(2, (heads, -1)).transpose(1, 2).unflatten(2, (height, width))
            rows = attention.get_rel_pos(height, height, attention.rel_pos_h)
            columns = attention.get_rel_pos(width, width, attention.rel_pos_w)
            options["rel_pos"] = (
                torch.einsum("bnhwc,hkc->bnhwk", q, rows).flatten(2, 3),
                torch.einsum("bnhwc,wkc->bnhwk", q, columns).flatten(2, 3),
            )
        y = ops.attention(
            qkv, attention.num_attention_heads, attention.scale, **options,
            dropout_p=self.attention_dropout_rate(attention),
        )  # fmt: skip
        y = y.unflatten(1, (height, width))
        if size:
            y = self.window_unpartition(y, size, padded, x.shape[1:3])
        return ops.linear_residual(y, parts.out.weight, parts.out.bias, None, x)
