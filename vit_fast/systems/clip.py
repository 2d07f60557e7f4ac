"""CLIP's image tower, with the arguments and outputs of OpenAI, CLIP-ReID, open_clip or a plain ReID tutorial page.

    x = [class_embedding (+ cv_emb); conv1(image)] + positional_embedding;  x = ln_pre(x)
    block:  x = x + out_proj(attention(in_proj(ln_1(x))));  x = x + c_proj(act(c_fc(ln_2(x))))      LayerNorm eps 1e-5

======== ============================ ==============================================================================
variant  sizes are given as           forward returns (B images, N = 1 + patches, D width)
======== ============================ ==============================================================================
openai   input_resolution             ln_post(x[:, 0]) @ proj: [B, output_dim], or [B, D] without a projection
plain    num_patches                  the same
clip_reid h_resolution, w_resolution  (input of the last block [B, N, D], ln_post(x) [B, N, D], ln_post(x) @ proj)
         (the grid)
open_clip image_size                  pooled [B, output_dim]; with output_tokens (pooled, patch tokens [B, N − 1, D])
======== ============================ ==============================================================================

Training and evaluation give the same output, except with open_clip's patch_dropout. State_dict keys are the originals',
without the prefix "visual.". In 16 bits ``convert_weights`` keeps LayerNorms and embeddings in float32, as OpenAI does.
Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021 (OpenAI CLIP);
Li et al., "CLIP-ReID", 2023; open_clip.
"""

import math
import operator
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vit_fast import plain
from vit_fast.block import attention_branch, call_blocks, mlp_branch, run_blocks
from vit_fast.block_params import BlockParams, Norm
from vit_fast.checkpoints.clip import CLIP_SCALARS
from vit_fast.checkpoints.errors import WeightsError
from vit_fast.checkpoints.fitting import resized_table
from vit_fast.checkpoints.loading import load_state_dict, loads
from vit_fast.checkpoints.report import log_left_out
from vit_fast.kernels.reference import activate
from vit_fast.kernels.tracing import untraced
from vit_fast.layers import LayerScale
from vit_fast.pos_embed import check_policy, resize_pos_embed

from . import arguments

VARIANTS = ("openai", "clip_reid", "open_clip", "plain")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _openai(resolution: int, patch: int, width: int, layers: int, out: int) -> dict[str, Any]:
    return dict(
        variant="openai", input_resolution=resolution, patch_size=patch, width=width, layers=layers,
        heads=width // 64, output_dim=out,
    )  # fmt: skip


def _open_clip(width: int, layers: int, out: int, mlp_ratio: float = 4.0) -> dict[str, Any]:
    return dict(
        variant="open_clip", image_size=224, patch_size=14, width=width, layers=layers, heads=16,
        mlp_ratio=mlp_ratio, output_dim=out,
    )  # fmt: skip


def _reid(grid: Any, stride: int) -> dict[str, Any]:
    return dict(
        variant="clip_reid", h_resolution=grid[0], w_resolution=grid[1], patch_size=16, stride_size=stride,
        width=768, layers=12, heads=12, output_dim=512, mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip


PRESETS = {
    "ViT-B/32": _openai(224, 32, 768, 12, 512),
    "ViT-B/16": _openai(224, 16, 768, 12, 512),
    "ViT-L/14": _openai(224, 14, 1024, 24, 768),
    "ViT-L/14@336px": _openai(336, 14, 1024, 24, 768),
    "ViT-H-14": _open_clip(1280, 32, 1024),
    "ViT-g-14": _open_clip(1408, 40, 1024, 4.3637),
    "ViT-bigG-14": _open_clip(1664, 48, 1280, 4.9231),
    "clip_reid_vit_b16_s16_256x128": _reid((16, 8), 16),
    "clip_reid_vit_b16_s12_256x128": _reid((21, 10), 12),
}


class Activation(nn.Module):
    """An activation of ``ops.layernorm_mlp`` by its name."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return activate(x, self.activation)


class ResidualAttentionBlock(plain.Fusible, nn.Module):
    """Pre-norm block over weights under CLIP's names: [B, N, D] → [B, N, D]."""

    SUBMODULES = plain.submodules(
        ln_1=plain.NORM,
        **plain.multihead_submodules("attn"),
        ls_1=(LayerScale, nn.Identity),
        ln_2=plain.NORM,
        mlp=(nn.Sequential,),
        mlp__c_fc=plain.LINEAR,
        mlp__gelu=(Activation,),
        mlp__c_proj=plain.LINEAR,
        ls_2=(LayerScale, nn.Identity),
    )
    mlp: Any  # an nn.Sequential of c_fc, gelu, c_proj

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        activation: str,
        make_norm: arguments.Layer,
        ls_init_value: float | None,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.ln_1 = make_norm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True, **dd)
        self.ls_1 = nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value, **dd)
        self.ln_2 = make_norm(width)
        layers = dict(
            c_fc=nn.Linear(width, hidden, **dd), gelu=Activation(activation), c_proj=nn.Linear(hidden, width, **dd)
        )
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls_2 = nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value, **dd)

    def not_covered(self) -> str | None:
        return plain.multihead_not_covered(self.attn)

    def params(self) -> BlockParams:
        """The weights as the fused branches take them."""
        attn, mlp = self.attn, self.mlp
        return BlockParams(
            norm1=Norm.of(self.ln_1),
            qkv_weight=attn.in_proj_weight,
            qkv_bias=attn.in_proj_bias,
            proj_weight=attn.out_proj.weight,
            proj_bias=attn.out_proj.bias,
            norm2=Norm.of(self.ln_2),
            fc1_weight=mlp.c_fc.weight,
            fc1_bias=mlp.c_fc.bias,
            fc2_weight=mlp.c_proj.weight,
            fc2_bias=mlp.c_proj.bias,
            num_heads=attn.num_heads,
            scale=attn.head_dim**-0.5,
            activation=mlp.gelu.activation,
            gamma1=getattr(self.ls_1, "gamma", None),
            gamma2=getattr(self.ls_2, "gamma", None),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_fused():
            p, attn = self.params(), self.attn
            return mlp_branch(attention_branch(x, p, attn_drop=attn.dropout if attn.training else 0.0), p)
        y = plain.layer_norm(self.ln_1, x)
        x = x + self.ls_1(self.attn(y, y, y, need_weights=False)[0])
        return x + self.ls_2(self.mlp(plain.layer_norm(self.ln_2, x)))


class Transformer(nn.Module):
    """The blocks: [B, N, D] → [B, N, D]."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return call_blocks(self.resblocks, x, self._run_block, self.grad_checkpointing)

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(the input of the last block, its output)."""
        last = run_blocks(self.resblocks, x, 0, -1, self._run_block)
        return last, run_blocks(self.resblocks, last, -1, None, self._run_block)

    def _run_block(self, block: nn.Module, x: torch.Tensor) -> Any:
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        return checkpoint(block, x, use_reentrant=False) if recompute else block(x)


def _fail_size(subject: str, size: Any, wanted: str) -> NoReturn:
    raise ValueError(f"vit_fast.systems.clip: {subject} {size[0]}×{size[1]}, expected {wanted}")


class ImageTower(nn.Module):
    """The tower; ``build`` describes the arguments, the head of this file the outputs."""

    def __init__(
        self,
        variant: str,
        *,
        patch_size: arguments.Size,
        width: int,
        stride_size: arguments.Size | None = None,
        layers: int = 12,
        heads: int | None = None,
        output_dim: int | None = None,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        activation: str | arguments.Layer = "quick_gelu",
        img_size: arguments.Size | None = None,
        image_size: arguments.Size | None = None,
        input_resolution: arguments.Size | None = None,
        h_resolution: int | None = None,
        w_resolution: int | None = None,
        num_patches: int | None = None,
        dynamic_img_size: bool = False,
        allow_floor: bool = False,
        pos_embed_policy: str | None = None,
        ls_init_value: float | None = None,
        patch_dropout: float = 0.0,
        no_ln_pre: bool = False,
        pool_type: str = "tok",
        final_ln_after_pool: bool = False,
        output_tokens: bool = False,
        act_layer: arguments.Layer | None = None,
        norm_layer: arguments.Layer | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.variant = arguments.one_of("clip", "variant", variant, VARIANTS)
        self.patch_size = arguments.pair("clip", "patch_size", patch_size)
        stride = patch_size if stride_size is None else stride_size
        self.stride_size = arguments.pair("clip", "stride_size", stride)
        self.width = width = arguments.integer("clip", "width", width)
        layers = arguments.integer("clip", "layers", layers)
        if heads is None and variant == "plain":
            heads = 12  # the plain page's constructor fixes it, whatever the width
        if heads is None and width // 64 == 0:
            arguments.fail("clip", "heads", None, f"a number for width {width} (the default is width // 64)")
        heads = arguments.integer("clip", "heads", width // 64 if heads is None else heads)
        arguments.check_heads("clip", "heads", heads, "width", width)
        self.in_chans = in_chans = arguments.integer("clip", "in_chans", in_chans)
        self.output_dim = output_dim = (
            None if output_dim is None else arguments.integer("clip", "output_dim", output_dim)
        )
        hidden = int(width * arguments.positive("clip", "mlp_ratio", mlp_ratio))
        activation = activation if act_layer is None else act_layer
        self.activation = arguments.activation_name("clip", "activation", activation)
        if self.activation is None:
            arguments.fail("clip", "activation", activation, "GELU, QuickGELU or ReLU")
        make_norm = arguments.norm_maker("clip", norm_layer, 1e-5, **dd)
        if variant != "open_clip" and (pool_type != "tok" or final_ln_after_pool or output_tokens):
            arguments.fail(
                "clip", "variant", variant, "'open_clip' for pool_type, final_ln_after_pool and output_tokens"
            )
        self.pool_type = arguments.one_of("clip", "pool_type", pool_type, ("tok", "avg", "none"))
        self.final_ln_after_pool, self.output_tokens = final_ln_after_pool, output_tokens
        self.patch_dropout = arguments.rate("clip", "patch_dropout", patch_dropout)
        self.dynamic_img_size, self.allow_floor = dynamic_img_size, allow_floor
        self.pos_embed_policy = check_policy(pos_embed_policy or ("R5" if variant == "open_clip" else "R3"))
        sizes = [size for size in (img_size, image_size, input_resolution) if size is not None]
        self._set_sizes(sizes, h_resolution, w_resolution, num_patches)
        self.default_cfg = dict(mean=tuple(mean), std=tuple(std), num_classes=output_dim or 0)
        if self.grid_size is not None:
            parts = zip(self.grid_size, self.patch_size, self.stride_size)
            nominal = self.img_size or tuple((grid - 1) * stride + patch for grid, patch, stride in parts)
            self.default_cfg["input_size"] = (self.in_chans, *nominal)

        scale = width**-0.5
        self.conv1 = nn.Conv2d(in_chans, width, self.patch_size, self.stride_size, bias=False, **dd)
        self.class_embedding = nn.Parameter(scale * torch.randn(width, **dd))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + self.num_patches, width, **dd))
        self.ln_pre = nn.Identity() if no_ln_pre else make_norm(width)
        blocks = (
            ResidualAttentionBlock(width, heads, hidden, self.activation, make_norm, ls_init_value, dd)
            for _ in range(layers)
        )
        self.transformer = Transformer(blocks)
        self.ln_post = make_norm(width)
        self.proj = None if output_dim is None else nn.Parameter(scale * torch.randn(width, output_dim, **dd))

    def _set_sizes(
        self, sizes: Any, h_resolution: int | None, w_resolution: int | None, num_patches: int | None
    ) -> None:
        """img_size, grid_size and num_patches; the arguments may leave the first or the first two open (None)."""
        if len(sizes) > 1:
            arguments.fail("clip", "img_size", sizes, "one of img_size, image_size and input_resolution")
        self.img_size = arguments.pair("clip", "img_size", sizes[0]) if sizes else None
        self.grid_size = self._grid(self.img_size, "img_size is") if sizes else None
        if h_resolution is not None or w_resolution is not None:
            grid = arguments.pair("clip", "(h_resolution, w_resolution)", (h_resolution, w_resolution))
            if self.grid_size not in (None, grid):
                arguments.fail("clip", "(h_resolution, w_resolution)", grid, f"{self.grid_size}, the grid of img_size")
            self.grid_size = grid
        if self.grid_size is None and num_patches is None:
            arguments.fail(
                "clip", "img_size", None, "an image size, a grid (h_resolution, w_resolution) or num_patches"
            )
        grid_size: Any = self.grid_size
        self.num_patches = math.prod(grid_size) if num_patches is None else num_patches
        self.num_patches = arguments.integer("clip", "num_patches", self.num_patches)
        if self.grid_size is not None and math.prod(self.grid_size) != self.num_patches:
            arguments.fail(
                "clip", "num_patches", num_patches, f"{math.prod(self.grid_size)}, a grid of {self.grid_size}"
            )

    def _grid(self, size: Any, subject: str) -> Any:
        """The grid (size − patch) // stride + 1. Pixels that fill no patch are dropped where patches overlap, as in the
        originals; where patches do not overlap they are an error unless allow_floor."""
        parts = list(zip(size, self.patch_size, self.stride_size, strict=True))
        if any(pixels < patch for pixels, patch, _ in parts):
            _fail_size(subject, size, f"at least one patch of {self.patch_size[0]}×{self.patch_size[1]}")
        if not self.allow_floor and any(patch == stride and pixels % patch for pixels, patch, stride in parts):
            patch = f"{self.patch_size[0]}×{self.patch_size[1]}"
            _fail_size(subject, size, f"multiples of the patch {patch}; allow_floor=True leaves the rest out")
        return tuple((pixels - patch) // stride + 1 for pixels, patch, stride in parts)

    @untraced
    def _check_images(self, images: torch.Tensor) -> Any:
        """Checks the images and returns their grid."""
        arguments.check_images("clip", images, self.in_chans)
        arguments.check_float("clip", images)
        size = tuple(operator.index(side) for side in images.shape[2:])
        hint = "dynamic_img_size=True resizes the position embedding"
        if self.img_size is not None and size != self.img_size and not (self.dynamic_img_size or self.allow_floor):
            _fail_size("images are", size, f"{self.img_size[0]}×{self.img_size[1]}; {hint}")
        grid = self._grid(size, "images are")
        if self.dynamic_img_size:
            return grid
        if self.grid_size is not None and grid != self.grid_size:
            wanted = f"a grid of {self.grid_size[0]}×{self.grid_size[1]} patches, got {grid[0]}×{grid[1]}"
            _fail_size("images are", size, f"{wanted}; {hint}")
        if math.prod(grid) != self.num_patches:
            _fail_size("images are", size, f"{self.num_patches} patches, got {grid[0]}×{grid[1]}; {hint}")
        return grid

    def _embed(self, images: torch.Tensor, cv_emb: torch.Tensor | None) -> Any:
        grid = self._check_images(images)
        table: torch.Tensor = self.positional_embedding
        if grid != self.grid_size and (self.grid_size is not None or math.prod(grid) != self.num_patches):
            table = resize_pos_embed(table, self.grid_size, grid, self.pos_embed_policy, 1)
        dtype = plain.dtype_of(self.conv1)
        table = table.to(dtype)
        prefix = self.class_embedding.to(dtype).expand(1, 1, -1)
        if cv_emb is not None:
            if cv_emb.shape != (images.shape[0], self.width):
                got, wanted = tuple(cv_emb.shape), (images.shape[0], self.width)
                raise ValueError(f"vit_fast.systems.clip: cv_emb has shape {got}, expected {wanted}")
            prefix = prefix + cv_emb.to(dtype)[:, None]
        x = plain.patch_embed(self.conv1, images, table[None, 1:], prefix + table[:1])
        if self.training and self.patch_dropout:
            x = self._drop_patches(x)
        return plain.layer_norm(self.ln_pre, x)

    def _drop_patches(self, x: torch.Tensor) -> torch.Tensor:
        """A random subset of each image's patch tokens, the class token in front."""
        keep = max(1, int((x.shape[1] - 1) * (1.0 - self.patch_dropout)))
        chosen = torch.rand((x.shape[0], x.shape[1] - 1), device=x.device).topk(keep, dim=1).indices[..., None] + 1
        return torch.cat([x[:, :1], x.gather(1, chosen.expand(-1, -1, x.shape[2]))], dim=1)

    def _project(self, x: torch.Tensor) -> Any:
        return None if self.proj is None else x @ self.proj.to(x.dtype)

    def _pool(self, x: torch.Tensor) -> Any:
        """open_clip's (pooled, tokens)."""
        if not self.final_ln_after_pool:
            x = plain.layer_norm(self.ln_post, x)
        if self.pool_type == "none":
            pooled = tokens = x
        else:
            tokens = x[:, 1:]
            pooled = x[:, 0] if self.pool_type == "tok" else tokens.mean(dim=1)
        return (plain.layer_norm(self.ln_post, pooled) if self.final_ln_after_pool else pooled), tokens

    def forward(self, images: torch.Tensor, cv_emb: torch.Tensor | None = None) -> Any:
        """images [B, in_chans, H, W], float; cv_emb [B, D] (clip_reid alone) is added to the class token."""
        arguments.check_traceable("clip", images)
        if cv_emb is not None and self.variant != "clip_reid":
            arguments.fail("clip", "variant", self.variant, "'clip_reid' where cv_emb is given")
        x = self._embed(images, cv_emb)
        if self.variant == "clip_reid":
            last, x = self.transformer.run(x)
            x = plain.layer_norm(self.ln_post, x)
            return last, x, self._project(x)
        x = self.transformer(x)
        if self.variant == "open_clip" and (self.output_tokens or self.pool_type != "tok"):
            pooled, tokens = self._pool(x)
        else:
            pooled, tokens = plain.layer_norm(self.ln_post, x[:, 0]), None
        pooled = pooled if self.proj is None else self._project(pooled)
        return (pooled, tokens) if self.output_tokens else pooled

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay."""
        return {"positional_embedding", "class_embedding"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward instead of keeping its activations."""
        self.transformer.grad_checkpointing = enable


def build(variant: str = "openai", **kwargs: Any) -> ImageTower:
    """An image tower with the arguments of one of its originals; every variant takes all of them.

    Args:
        variant: "openai", "clip_reid", "open_clip" or "plain".
        patch_size, width: P (int or pair) and D; no defaults.
        img_size, image_size or input_resolution: pixels, int or (height, width); h_resolution and w_resolution: the
            grid instead; num_patches: only its number of patches.
        stride_size: default patch_size; the grid is (size − patch) // stride + 1.
        layers, heads, mlp_ratio: 12, width // 64 ("plain": 12), 4.
        output_dim: width of the projection, None for none; 512 for open_clip.
        in_chans: channels of the images.
        activation: "quick_gelu" ("gelu" for open_clip), "gelu", "gelu_tanh" or "relu"; or act_layer, a class.
        norm_layer: a LayerNorm class or partial, default eps 1e-5; a subclass with a forward of its own runs unfused.
        ls_init_value, patch_dropout, no_ln_pre: LayerScale, patch dropout in training, no ln_pre.
        pool_type ("tok", "avg", "none"), final_ln_after_pool, output_tokens: open_clip alone.
        dynamic_img_size: takes any size and resizes positional_embedding by pos_embed_policy ("R5" for open_clip,
            else "R3"). allow_floor: drops pixels that do not fill a patch, as the originals do silently.
    Raises:
        TypeError, ValueError: bad arguments, named with what came and what is wanted.
    """
    arguments.one_of("clip", "variant", variant, VARIANTS)
    missing = [name for name in ("patch_size", "width") if name not in kwargs]
    if missing:
        raise TypeError(f"vit_fast.systems.clip: {' and '.join(missing)} not given, expected an int (pixels, D)")
    if variant == "open_clip":
        kwargs.setdefault("output_dim", 512)
        kwargs.setdefault("activation", "gelu")
    return ImageTower(variant, **kwargs)


def read(source: arguments.Source) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of any of the originals, TorchScript archives included."""
    return arguments.state_of("clip", source, torchscript=True)


def tower_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tower's own keys: what follows "visual." or "image_encoder.", or all keys where there is no such prefix; the
    rest is left out with a warning."""
    prefix = next((p for p in ("visual.", "image_encoder.") if any(key.startswith(p) for key in state)), "")
    tower = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    tower = {key: value for key, value in tower.items() if key not in CLIP_SCALARS}
    if "conv1.weight" in tower and "class_embedding" not in tower:
        raise WeightsError("vit_fast.systems.clip: weights are of a ResNet tower, expected a ViT's")
    if "class_embedding" in tower:
        rest = [key for key in state if not key.startswith(prefix) or key in CLIP_SCALARS]
        log_left_out("systems.clip", [(key, "not of the image tower") for key in rest])
    return tower


def infer_arguments(
    source: arguments.Source,
    *,
    heads: int | None = None,
    img_size: arguments.Size | None = None,
    stride_size: arguments.Size | None = None,
    activation: str | None = None,
) -> dict:
    """The arguments of ``build`` that fit a checkpoint.

    OpenAI's own archives determine all of them: they hold input_resolution, and OpenAI's program has width // 64 heads,
    QuickGELU, and patches without overlap. Other files determine shapes only; the caller has to give the rest.

    Args:
        source: a state_dict, a checkpoint around one, or a file, as for ``load``.
        heads: of the blocks.
        img_size: pixels, int or (height, width): a table of 144 rows may be 12×12, 16×9 or 18×8.
        stride_size: of overlapping patches; default the patch's own size, where the table's rows agree with it.
        activation: "quick_gelu" (OpenAI, CLIP-ReID), "gelu" (most of open_clip), ...
    Raises:
        ValueError: an argument that neither the file nor the caller determines, or that contradicts the file.
        WeightsError: no CLIP image tower.
    """
    whole = read(source)
    state = tower_state(whole)
    try:
        conv, table = state["conv1.weight"], state["positional_embedding"]
        hidden = state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    except KeyError as error:
        raise WeightsError(f"vit_fast.systems.clip: weights lack {error}, expected a CLIP image tower") from error
    width, in_chans, patch = conv.shape[0], conv.shape[1], tuple(conv.shape[2:])
    told = {}
    resolution = next((whole[key] for key in ("input_resolution", "visual.input_resolution") if key in whole), None)
    if resolution is not None:
        told = dict(heads=width // 64 or None, img_size=int(resolution), activation="quick_gelu")
    given = dict(heads=heads, img_size=img_size, activation=activation)
    chosen = {name: told.get(name) if value is None else value for name, value in given.items()}
    for name, value in chosen.items():
        if value is None:
            arguments.fail("clip.infer_arguments", name, None, "a value: the file does not tell it")
    size = arguments.pair("clip.infer_arguments", "img_size", chosen["img_size"])
    stride = arguments.pair("clip.infer_arguments", "stride_size", patch if stride_size is None else stride_size)
    grid = tuple((pixels - side) // step + 1 for pixels, side, step in zip(size, patch, stride, strict=True))
    if 1 + math.prod(grid) != table.shape[0]:
        raise ValueError(
            f"vit_fast.systems.clip.infer_arguments: img_size {size} and stride_size {stride} make {math.prod(grid)} "
            f"patches, expected {table.shape[0] - 1}, the rows of positional_embedding without the class token's"
        )
    proj = state.get("proj")
    return dict(
        chosen, patch_size=patch, stride_size=stride, width=width,
        layers=sum(key.endswith(".attn.in_proj_weight") for key in state),
        output_dim=None if proj is None else proj.shape[1], in_chans=in_chans, mlp_ratio=hidden / width,
        no_ln_pre="ln_pre.weight" not in state,
        ls_init_value=1.0 if "transformer.resblocks.0.ls_1.gamma" in state else None,
    )  # fmt: skip


def fit_table(state: dict[str, torch.Tensor], key: str, tower: ImageTower, old_grid: tuple[int, int] | None) -> None:
    """Resizes a position table of another grid, in ``state``. A table with the model's number of rows is not resized
    unless old_grid is given."""
    table = state.get(key)
    if table is None or table.dim() != 2 or tower.grid_size is None:
        return
    if old_grid is None and table.shape[0] == 1 + tower.num_patches:
        return
    try:
        subject = f"vit_fast.systems.clip: {key}"
        state[key] = resized_table(subject, table, old_grid, tower.grid_size, tower.pos_embed_policy, 1)
    except WeightsError:
        if old_grid is not None:
            raise


@loads(ImageTower)
def load(model: ImageTower, source: arguments.Source, old_grid: tuple[int, int] | None = None) -> ImageTower:
    """Loads weights of the originals, strictly; returns the model.

    Args:
        model: of ``build``.
        source: a state_dict, a checkpoint around one, or a file: ``.pt``, ``.pth``, ``.safetensors``, ``.npz``. Keys of
            a whole CLIP (or CLIP-ReID) are reduced to those behind "visual." ("image_encoder."). OpenAI's TorchScript
            archives are read by ``torch.jit.load``: take them from a source that you trust.
        old_grid: the (rows, columns) of the weights' positional_embedding; default the model's own grid where the
            count is the same, else a square. Another grid is resized by the model's pos_embed_policy.
    Raises:
        WeightsError: unreadable file, or keys and shapes that do not fit (listed).
    """

    def fit(state: dict[str, Any]) -> Any:
        fit_table(state, "positional_embedding", model, old_grid)
        return state

    return load_state_dict(model, tower_state(read(source)), fit)


def convert_weights(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    """OpenAI's mixed precision, in place: convolution, linear layers and projection in 16 bits; LayerNorms and
    embeddings stay as they are. CLIP-ReID's function of this name converts to float32."""
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[0].rpartition(".")[2]
        if leaf in ("conv1", "attn", "out_proj", "c_fc", "c_proj") or name.rpartition(".")[2] == "proj":
            parameter.data = parameter.data.to(dtype)
    return model
