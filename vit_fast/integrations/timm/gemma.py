"""timm's Gemma4 encoder: blocks with a normalisation before and behind each branch, and its patch embedding.

    x = x + drop_path(norm2(o_proj(attention(q_norm(q), k_norm(k), v_norm(v)))))    q, k, v of norm1(x), scale 1
    x = x + drop_path(norm4(down_proj(act(gate_proj(h)) · up_proj(h))))             h = norm3(x)

RoPE turns the two halves of a head, one for each axis of the image, by themselves. With the quarters of a head in the
order 0, 2, 1, 3, for q and k alike, that is one rotation of halves, and the scores stay what they are.
The projections, which may clamp what they read and write, are called as modules. The position of a patch is the sum of
two rows of a table, which timm picks by a product with zeros and ones.
Source: timm/models/gemma4_vit.py.
"""

from typing import Any

import timm.models.gemma4_vit as gemma
import torch
from torch import nn

from vit_fast import ops
from vit_fast.block import drops_not_covered, prepared_for
from vit_fast.block_params import Norm
from vit_fast.integrations import Fused, given, mask_options, norm_kind, not_taken
from vit_fast.kernels.tracing import autocasts
from vit_fast.plain import LINEAR, submodules

from .parts import (
    DROP_PATHS,
    DROPOUTS,
    NORMS,
    Path,
    added,
    attention_drop,
    head_norms_not_covered,
    known_norm,
    normalise,
    spread,
)


def _one_rotation(x: torch.Tensor) -> torch.Tensor:
    """[..., D] with its quarters in the order 0, 2, 1, 3."""
    return x.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)


def _head_norm(norm: Any) -> Norm:
    """A normalisation of heads whose quarters are in the order of ``_one_rotation``."""
    weight, bias, eps = known_norm(norm)
    turned = [None if part is None else _one_rotation(part) for part in (weight, bias)]
    return Norm(turned[0], turned[1], eps)


class FastGemma4Block(Fused, gemma.Gemma4Block):
    """[B, N, C] → [B, N, C]."""

    SUBMODULES = submodules(
        norm1=NORMS,
        attn=(gemma.Gemma4Attention,),
        attn__q_norm=NORMS,
        attn__k_norm=NORMS,
        attn__v_norm=NORMS,
        attn__attn_drop=DROPOUTS,
        attn__proj_drop=DROPOUTS,
        norm2=NORMS,
        norm3=NORMS,
        norm4=NORMS,
        drop_path=DROP_PATHS,
    )
    RUNS_PARTS = True
    CALLED = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp")
    attn: Any
    mlp: Any
    norm1: Any
    norm2: Any
    norm3: Any
    norm4: Any
    drop_path: Any

    def not_covered(self) -> str | None:
        return head_norms_not_covered(self.attn)

    def forward(self, x: torch.Tensor, rope_cos: torch.Tensor, rope_sin: torch.Tensor, *args: Any, **kw: Any) -> Any:
        options = dict(zip(("attn_mask",), args, strict=False)) | kw
        mask = options.pop("attn_mask", None)
        if reason := given(args[1:], options) or self.not_fused():
            return self.run_library(reason, x, rope_cos, rope_sin, *args, **kw)
        drop, path = attention_drop(self.attn), Path.of(self.drop_path)
        reason = not_taken(x, self.norm1.weight) or drops_not_covered(drop, path.rate)
        if reason is not None:
            return self.run_library(reason, x, rope_cos, rope_sin, *args, **kw)
        scores = x.shape[0], self.attn.num_heads, x.shape[1], x.shape[1]
        masked: dict[str, Any] = {} if mask is None else mask_options(self, mask, x.dtype, scores)
        if (prepared := prepared_for(self, x)) is not None:
            return prepared.run_block(x, rope=(rope_cos, rope_sin), masked=masked)
        return self.branches(x, rope_cos, rope_sin, masked, drop, path)

    def fused_parts(self, *inputs: Any, **options: Any) -> Any:
        cos, sin = options["rope"]
        return self.branches(inputs[0], cos, sin, options["masked"], 0.0, Path.of(self.drop_path))

    def branches(
        self,
        x: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        masked: dict[str, Any],
        drop: float,
        path: Path,
    ) -> torch.Tensor:
        """Both branches; ``drop`` is the rate of dropout of the probabilities."""
        attn = self.attn
        y = normalise(x, self.norm1)
        q, k, v = attn.q_proj(y), attn.k_proj(y), attn.v_proj(y)
        v = normalise(v.unflatten(2, (attn.num_kv_heads, -1)), attn.v_norm).flatten(2).to(k.dtype)
        if attn.num_kv_groups > 1:
            k, v = (spread(part, attn.num_kv_heads, attn.num_kv_groups) for part in (k, v))
        q, k = (_one_rotation(part.unflatten(2, (attn.num_heads, -1))).flatten(2) for part in (q, k))
        cos, sin = (_one_rotation(table).unsqueeze(1) for table in (rope_cos, rope_sin))
        y = ops.attention(
            q, attn.num_heads, 1.0, k=k, v=v, **masked, rope=(cos, sin), rope_layout="half",
            q_norm=_head_norm(attn.q_norm), k_norm=_head_norm(attn.k_norm), norm=norm_kind(attn.q_norm), dropout_p=drop,
        )  # fmt: skip
        x = added(x, normalise(attn.proj_drop(attn.o_proj(y)), self.norm2), path)
        return added(x, normalise(self.mlp(normalise(x, self.norm3)), self.norm4), path)


class FastGemma4PatchEmbed(Fused, gemma.Gemma4PatchEmbed):
    """[B, in_chans, H, W], pixels 0…1 → ([B, N, C], places (x, y) [B, N, 2], None)."""

    OPERATION = "patch_embed"
    SUBMODULES = submodules(input_proj=LINEAR)

    def _not_taken(self, x: Any, patch_coord: Any, patch_valid: Any) -> str | None:
        """Why these are no images that one operation projects, or None."""
        if isinstance(x, dict) or patch_coord is not None or patch_valid is not None:
            return "the patches are given, and their projection is a linear layer of PyTorch"
        if reason := not_taken(x, self.input_proj.weight, dims=4):
            return reason
        if autocasts(x.device.type):
            return "autocast is on"
        for size, patch in zip(x.shape[2:], self.patch_size, strict=True):
            if size % patch or not 0 < size // patch <= self.position_embedding_size:
                return f"images of {x.shape[2]}×{x.shape[3]} are no whole number of patches, or too many"
        channels = self.input_proj.in_features // (self.patch_size[0] * self.patch_size[1])
        return None if x.shape[1] == channels else f"the images have {x.shape[1]} channels, not {channels}"

    def forward(self, x: Any, patch_coord: Any = None, patch_valid: Any = None) -> Any:
        if reason := self.not_fused() or self._not_taken(x, patch_coord, patch_valid):
            return self.run_library(reason, x, patch_coord, patch_valid)
        (batch, channels), (height, width) = x.shape[:2], self.patch_size
        rows, columns = x.shape[2] // height, x.shape[3] // width
        by_column, by_row = self.position_embedding_table
        places = (by_column[:columns] + by_row[:rows, None]).flatten(0, 1)[None]
        weight = self.input_proj.weight.unflatten(1, (channels, height, width))
        half = (0.5,) * channels  # (x − 0.5)/0.5: pixels become −1…1
        tokens = ops.patch_embed(x, weight, None, places, None, (height, width), half, half)
        return tokens, self._default_patch_coord(batch, rows, columns, x.device)[0].flip(-1), None


FAST: dict[type[nn.Module], type[Fused]] = {
    gemma.Gemma4Block: FastGemma4Block,
    gemma.Gemma4PatchEmbed: FastGemma4PatchEmbed,
}
