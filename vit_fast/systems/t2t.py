"""T2T-ViT: three soft splits with a performer or a transformer between them, then a narrow deep ViT.

    t = attention1(split7(images));  t = attention2(split3(t));  x = project(split3(t))
    x = [cls | x] + sinusoid table;  timm blocks;  logits = head(norm(x)[:, 0])

Token transformer: one head, scale (input width)^-0.5, the residual is v since the widths differ.
Token performer: softmax attention by positive random features φ(u) = exp(u wᵀ − ½|u|²)/√m with a frozen w [m, e]:
y = φ(q) (φ(k)ᵀ v) / (φ(q)·Σ φ(k) + 1e-8), linear in the number of tokens. φ reaches e^(m/2)/√m and the sums over
3136 tokens more than float16 holds: φ and both sums are float32 (float64 for float64 tokens), under autocast too.
Images [B, in_chans, H, W] of any size whose soft splits fit; logits [B, num_classes] in train and in eval mode. The
performer's two dropouts of 0.1 are on in train mode whatever drop_rate is. pos_embed and w are frozen and in the
``state_dict``, whose keys are the original's. Released weights need the backbone's scale (embed_dim/num_heads)^-0.5.
Source: Yuan et al., "Tokens-to-Token ViT", 2021; Choromanski et al., "Rethinking Attention with Performers", 2020.
"""

import contextlib
import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vit_fast import ops, plain
from vit_fast.block import attention_branch, drop_path_scale, mlp_branch, run_blocks
from vit_fast.block_params import BlockParams, Norm
from vit_fast.checkpoints.fitting import resized_table
from vit_fast.checkpoints.loading import load_state_dict, loads
from vit_fast.layers import Block, Mlp
from vit_fast.pos_embed import check_policy

from . import arguments
from .soft_split import as_image, sinusoid_table, soft_split, split_grid

FAMILY = "t2t"

_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
_EPSILON = 1e-8


class _TokenAttention(nn.Module):
    """v + proj(attention(x)), one head: [B, N, dim] → [B, N, in_dim]."""

    def __init__(self, dim: int, in_dim: int, qkv_bias: bool, scale: float, drop: float, attn_drop: float) -> None:
        super().__init__()
        self.scale, self.drop, self.attn_drop = scale, drop, attn_drop
        self.qkv = nn.Linear(dim, in_dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(in_dim, in_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        out = ops.attention(qkv, 1, self.scale, dropout_p=self.attn_drop if self.training else 0.0)
        return qkv.chunk(3, dim=-1)[2] + F.dropout(self.proj(out), self.drop, self.training)


class Token_transformer(plain.Fusible, nn.Module):
    """x = v + proj(attention(norm1(x))); x = x + mlp(norm2(x)): [B, N, dim] → [B, N, in_dim]."""

    SUBMODULES = plain.submodules(
        norm1=(nn.LayerNorm,),
        attn=(_TokenAttention,),
        attn__qkv=plain.LINEAR,
        attn__proj=plain.LINEAR,
        norm2=(nn.LayerNorm,),
        mlp=(Mlp,),
        mlp__fc1=plain.LINEAR,
        mlp__fc2=plain.LINEAR,
    )

    def __init__(
        self,
        dim: int,
        in_dim: int,
        num_heads: int = 1,
        mlp_ratio: float = 1.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        dim, in_dim = arguments.integer(FAMILY, "dim", dim), arguments.integer(FAMILY, "in_dim", in_dim)
        if arguments.integer(FAMILY, "num_heads", num_heads) != 1:
            arguments.fail(FAMILY, "num_heads", num_heads, "1: a token transformer has one head")
        arguments.positive(FAMILY, "mlp_ratio", mlp_ratio)
        drop, attn_drop = arguments.rate(FAMILY, "drop", drop), arguments.rate(FAMILY, "attn_drop", attn_drop)
        self.drop_path = arguments.rate(FAMILY, "drop_path", drop_path)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _TokenAttention(dim, in_dim, qkv_bias, float(qk_scale or dim**-0.5), drop, attn_drop)
        self.norm2 = nn.LayerNorm(in_dim)
        self.mlp = Mlp(in_dim, int(in_dim * mlp_ratio), "gelu", True, drop, {})

    def params(self) -> BlockParams:
        """The weights as the fused branches take them."""
        attn, mlp = self.attn, self.mlp
        return BlockParams(
            Norm.of(self.norm1), attn.qkv.weight, attn.qkv.bias, attn.proj.weight, attn.proj.bias,
            Norm.of(self.norm2), mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
            num_heads=1, scale=attn.scale, value_skip="only",
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_fused():
            x = self.attn(plain.layer_norm(self.norm1, x))
            branch = self.mlp(plain.layer_norm(self.norm2, x))
            scale = drop_path_scale(x, self.drop_path, self.training)
            return x + (branch if scale is None else branch * scale[:, None, None])
        p, attn, mlp = self.params(), self.attn, self.mlp
        drop, attn_drop = (attn.drop, attn.attn_drop) if attn.training else (0.0, 0.0)
        x = attention_branch(x, p, attn_drop=attn_drop, proj_drop=drop)
        row_scale = drop_path_scale(x, self.drop_path, self.training)
        drop = mlp.drop if mlp.training else 0.0
        return mlp_branch(x, p, row_scale=row_scale, hidden_drop=drop, out_drop=drop)


def performer_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """φ(q) (φ(k)ᵀ v) / (φ(q)·Σ φ(k) + 1e-8) with φ(u) = exp(u wᵀ − ½|u|²)/√m: [B, N, e], w [m, e] → [B, N, e].

    In float32, or float64 for float64 inputs; the result has the dtype of v.
    """
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    device_type = v.device.type
    autocast = torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if autocast else contextlib.nullcontext():
        w = w.to(dtype)

        def features(u: torch.Tensor) -> torch.Tensor:
            u = u.to(dtype)
            return torch.exp(u @ w.t() - u.square().sum(-1, keepdim=True) / 2) / math.sqrt(w.shape[0])

        kp, qp = features(k), features(q)
        denominator = qp @ kp.sum(1)[:, :, None]
        y = qp @ (kp.transpose(1, 2) @ v.to(dtype)) / (denominator + _EPSILON)
    return y.to(v.dtype)


class Token_performer(plain.Fusible, nn.Module):
    """x = v + proj(performer attention(norm1(x))); x = x + mlp(norm2(x)): [B, N, dim] → [B, N, in_dim·head_cnt]."""

    SUBMODULES = plain.submodules(
        norm1=(nn.LayerNorm,),
        kqv=plain.LINEAR,
        proj=plain.LINEAR,
        norm2=(nn.LayerNorm,),
        mlp=(nn.Sequential,),
        mlp__0=plain.LINEAR,
        mlp__1=(nn.GELU,),
        mlp__2=plain.LINEAR,
    )
    mlp: Any  # an nn.Sequential of Linear, GELU, Linear

    def __init__(
        self, dim: int, in_dim: int, head_cnt: int = 1, kernel_ratio: float = 0.5, dp1: float = 0.1, dp2: float = 0.1
    ) -> None:
        super().__init__()
        dim, in_dim = arguments.integer(FAMILY, "dim", dim), arguments.integer(FAMILY, "in_dim", in_dim)
        self.emb = in_dim * arguments.integer(FAMILY, "head_cnt", head_cnt)
        arguments.positive(FAMILY, "kernel_ratio", kernel_ratio)
        self.m = int(self.emb * kernel_ratio)
        if self.m < 1:
            arguments.fail(FAMILY, "kernel_ratio", kernel_ratio, f"{1 / self.emb:g} or more: one feature of {self.emb}")
        self.kqv = nn.Linear(dim, 3 * self.emb)
        self.proj = nn.Linear(self.emb, self.emb)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(self.emb)
        self.dp1, self.dp2 = arguments.rate(FAMILY, "dp1", dp1), arguments.rate(FAMILY, "dp2", dp2)
        self.mlp = nn.Sequential(nn.Linear(self.emb, self.emb), nn.GELU(), nn.Linear(self.emb, self.emb))
        self.w = nn.Parameter(torch.empty(self.m, self.emb), requires_grad=False)
        with torch.no_grad():
            nn.init.orthogonal_(self.w)
            self.w.mul_(math.sqrt(self.m))

    def not_covered(self) -> str | None:
        return None if self.mlp[1].approximate == "none" else "mlp.1 is another GELU"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dp1, dp2 = (self.dp1, self.dp2) if self.training else (0.0, 0.0)
        if not self.is_fused():
            k, q, v = self.kqv(plain.layer_norm(self.norm1, x)).chunk(3, dim=-1)
            x = v + F.dropout(self.proj(performer_attention(q, k, v, self.w)), dp1)
            return x + F.dropout(self.mlp(plain.layer_norm(self.norm2, x)), dp2)
        kqv, proj, norm, (fc1, _, fc2) = self.kqv, self.proj, Norm.of(self.norm2), self.mlp
        projected = ops.layer_norm_linear(x, *Norm.of(self.norm1), kqv.weight, kqv.bias)
        k, q, v = projected.chunk(3, dim=-1)
        y = performer_attention(q, k, v, self.w)
        x = ops.linear_residual(y, proj.weight, proj.bias, None, v, dropout_p=dp1)
        if dp2 == 0.0:
            return ops.layernorm_mlp(x, *norm, fc1.weight, fc1.bias, fc2.weight, fc2.bias, "gelu", None)
        hidden = ops.layer_norm_linear(x, *norm, fc1.weight, fc1.bias, "gelu")
        return ops.linear_residual(hidden, fc2.weight, fc2.bias, None, x, dropout_p=dp2)


class T2T_module(nn.Module):
    """Images [B, in_chans, H, W] → tokens [B, rows·columns, embed_dim], a sixteenth of each side."""

    def __init__(
        self,
        img_size: arguments.Size = 224,
        tokens_type: str = "performer",
        in_chans: int = 3,
        embed_dim: int = 768,
        token_dim: int = 64,
    ) -> None:
        super().__init__()
        self.img_size = arguments.pair(FAMILY, "img_size", img_size)
        self.in_chans = arguments.integer(FAMILY, "in_chans", in_chans)
        token_dim, embed_dim = (
            arguments.integer(FAMILY, "token_dim", token_dim), arguments.integer(FAMILY, "embed_dim", embed_dim)
        )  # fmt: skip
        layer = {"performer": Token_performer, "transformer": Token_transformer}
        arguments.one_of(FAMILY, "tokens_type", tokens_type, tuple(layer))
        self.grids: list[tuple[int, int]] = []
        for split in _SPLITS:
            self.grids.append(split_grid(self.grids[-1] if self.grids else self.img_size, *split))
        if min(self.grids[0]) < 1:
            arguments.fail(FAMILY, "img_size", img_size, "3 pixels a side or more")
        self.grid_size = self.grids[2]
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.attention1 = layer[tokens_type](self.in_chans * 49, token_dim)
        self.attention2 = layer[tokens_type](token_dim * 9, token_dim)
        self.project = nn.Linear(token_dim * 9, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        arguments.check_images(FAMILY, x, self.in_chans)
        arguments.check_float(FAMILY, x)
        if tuple(x.shape[2:]) != self.img_size:
            arguments.fail_images(FAMILY, x, f"{self.img_size[0]}×{self.img_size[1]}")
        x = self.attention1(soft_split(x.to(plain.dtype_of(self.project)), *_SPLITS[0]))
        x = self.attention2(soft_split(as_image(x, self.grids[0]), *_SPLITS[1]))
        return self.project(soft_split(as_image(x, self.grids[1]), *_SPLITS[2]))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class T2T_ViT(nn.Module):
    """Images [B, in_chans, H, W] → logits [B, num_classes]. Arguments: see ``build``."""

    def __init__(
        self,
        img_size: arguments.Size = 224,
        tokens_type: str = "performer",
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: arguments.Layer | None = nn.LayerNorm,
        token_dim: int = 64,
    ) -> None:
        super().__init__()
        embed_dim, depth = arguments.integer(FAMILY, "embed_dim", embed_dim), arguments.integer(FAMILY, "depth", depth)
        arguments.check_heads(
            FAMILY, "num_heads", arguments.integer(FAMILY, "num_heads", num_heads), "embed_dim", embed_dim
        )
        arguments.positive(FAMILY, "mlp_ratio", mlp_ratio)
        self.num_classes = arguments.integer(FAMILY, "num_classes", num_classes, 0)
        self.num_features = self.embed_dim = embed_dim
        self.drop_rate = arguments.rate(FAMILY, "drop_rate", drop_rate)
        attn_drop_rate = arguments.rate(FAMILY, "attn_drop_rate", attn_drop_rate)
        drop_path_rate = arguments.rate(FAMILY, "drop_path_rate", drop_path_rate)
        make_norm = arguments.norm_maker(FAMILY, norm_layer, 1e-5)

        self.tokens_to_token = T2T_module(img_size, tokens_type, in_chans, embed_dim, token_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = sinusoid_table(self.tokens_to_token.num_patches + 1, embed_dim)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, mlp_ratio, qkv_bias, False, True, self.drop_rate, attn_drop_rate, None, rate,
                "gelu", make_norm, {},
            )
            for rate in rates
        )  # fmt: skip
        block: Any
        for block in self.blocks:
            block.attn.scale = float(qk_scale or block.attn.scale)
        self.norm = make_norm(embed_dim)
        self.head = nn.Linear(embed_dim, self.num_classes) if self.num_classes else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_weights)
        self.default_cfg = dict(
            input_size=(self.tokens_to_token.in_chans, *self.tokens_to_token.img_size),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            crop_pct=0.9,
            interpolation="bicubic",
            num_classes=self.num_classes,
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay."""
        return {"cls_token"}

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new head, freshly initialised; 0 for none."""
        self.num_classes = arguments.integer(FAMILY, "num_classes", num_classes, 0)
        like = self.cls_token
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images → the normalised class token [B, embed_dim]."""
        x = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = run_blocks(self.blocks, F.dropout(x, self.drop_rate, self.training))
        return plain.layer_norm(self.norm, x, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def _preset(dim: int, depth: int, heads: int, ratio: float, tokens_type: str = "performer") -> dict[str, Any]:
    return dict(tokens_type=tokens_type, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=ratio)


PRESETS = {
    "t2t_vit_7": _preset(256, 7, 4, 2.0),
    "t2t_vit_10": _preset(256, 10, 4, 2.0),
    "t2t_vit_12": _preset(256, 12, 4, 2.0),
    "t2t_vit_14": _preset(384, 14, 6, 3.0),
    "t2t_vit_19": _preset(448, 19, 7, 3.0),
    "t2t_vit_24": _preset(512, 24, 8, 3.0),
    "t2t_vit_t_14": _preset(384, 14, 6, 3.0, "transformer"),
    "t2t_vit_t_19": _preset(448, 19, 7, 3.0, "transformer"),
    "t2t_vit_t_24": _preset(512, 24, 8, 3.0, "transformer"),
    "t2t_vit_14_resnext": _preset(384, 14, 32, 3.0),
    "t2t_vit_14_wide": _preset(768, 4, 12, 3.0),
}


def build(**options: Any) -> T2T_ViT:
    """A T2T-ViT.

    Args:
        img_size: 224, or (height, width); tokens are counted from the soft splits, so any size fits.
        tokens_type: "performer" (default) or "transformer".
        in_chans, num_classes: 3, 1000; 0 classes for no head.
        embed_dim, depth, num_heads, mlp_ratio: 768, 12, 12, 4.0.
        qkv_bias: False.
        qk_scale: the backbone's; None or 0 for (embed_dim/num_heads)^-0.5.
        drop_rate, attn_drop_rate, drop_path_rate: 0, in train mode, backbone only.
        norm_layer: a LayerNorm class or partial, default eps 1e-5; the backbone's.
        token_dim: 64, width of the token layers.
    Raises:
        TypeError, ValueError: bad arguments or sizes.
    """
    return T2T_ViT(**options)


@loads(T2T_ViT)
def load(
    model: T2T_ViT, source: arguments.Source, pos_embed: str = "R4", old_grid: tuple[int, int] | None = None
) -> T2T_ViT:
    """Loads a state_dict or a file; a head of another number of classes is left out, with a warning in the log.

    Args:
        source: a state_dict, or the path of a ``.pth``, ``.tar``, ``.pt``, ``.safetensors`` or ``.npz`` file. EMA
            weights are taken where the file has them.
        pos_embed: how a table of another grid is fitted: "R1" … "R5" (``resize_pos_embed``), or "recompute", the
            sinusoid table of the new grid (another table).
        old_grid: the grid of the file's table. None: the model's own where the counts agree, else square.
    Raises:
        WeightsError: unreadable file, or keys or shapes that do not fit.
    """
    if pos_embed != "recompute":
        check_policy(pos_embed)
    state, own = arguments.state_of(FAMILY, source), model.state_dict()
    heads = [key for key in state if key.startswith("head.")]
    if any(key not in own or own[key].shape != state[key].shape for key in heads):
        logging.getLogger("vit_fast").warning(
            "t2t.load: the file's head has %d classes, the model %d: the head keeps its initial weights",
            len(state[heads[0]]), model.num_classes,
        )  # fmt: skip
        state = {key: value for key, value in state.items() if key not in heads}
        state |= {key: value for key, value in own.items() if key.startswith("head.")}
    table = state.get("pos_embed")
    if table is not None and pos_embed == "recompute":
        state["pos_embed"] = sinusoid_table(*own["pos_embed"].shape[1:])
    elif table is not None and table.dim() == 3 and (old_grid or table.shape[1] != own["pos_embed"].shape[1]):
        state["pos_embed"] = resized_table(
            "vit_fast.systems.t2t: pos_embed", table, old_grid, model.tokens_to_token.grid_size, pos_embed, 1
        )
    return load_state_dict(model, state)
