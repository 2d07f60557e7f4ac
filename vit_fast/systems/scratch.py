"""A ViT written from scratch around torch's TransformerEncoder, as tutorials build it.

    tokens = [cls | unfold(images) @ weight] + table[:N];  logits = linear_layer(encoder(tokens)[:, 0])

Tutorials often feed [B, N, C] to encoder layers that are not batch-first: attention then runs over the batch, and the
class token never sees a patch. Here attention is over the tokens; ``compat="literal"`` keeps the arithmetic of such a
page, with one class token a sample.
Parameters: weight [C·P², D] (both embeddings), cls_token_embedding [1, 1, D], position_embedding_table
[max_num_token, D], transformer_encoder.layers.{i}.* as torch names them, linear_layer.*.
Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020; torch.nn.TransformerEncoder (post-norm, ReLU).
"""

import copy
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vit_fast import ops
from vit_fast.checkpoints.errors import WeightsError
from vit_fast.checkpoints.loading import load_state_dict, loads
from vit_fast.kernels.activation_names import ACTIVATIONS, GATED
from vit_fast.kernels.tracing import untraced
from vit_fast.pos_embed import check_policy, resize_pos_embed

from . import arguments
from .encoder_layer import Encoder, EncoderLayer

FAMILY = "scratch"


def image2emb_naive(image: torch.Tensor, patch_size: int, weight: torch.Tensor) -> torch.Tensor:
    """Patches by unfold and one matrix product: [B, C, H, W], weight [C·P², D] → [B, n, D]."""
    patches = F.unfold(image, kernel_size=patch_size, stride=patch_size).transpose(1, 2)
    return patches @ weight


def image2emb_conv(image: torch.Tensor, kernel: torch.Tensor, stride: int) -> torch.Tensor:
    """Patches by convolution: [B, C, H, W], kernel [D, C, P, P] → [B, n, D]; equal to the naive way for
    kernel = weightᵀ.reshape(D, C, P, P)."""
    return ops.patch_embed(image, kernel, None, None, None, stride)


class ScratchViT(nn.Module):
    """Images [B, ic, image_h, image_w] → logits [B, num_classes]; with labels [B] the mean cross-entropy alone.

    Train and eval mode differ in dropout only. Arguments: see ``build``.
    """

    def __init__(
        self,
        image_h: int,
        image_w: int,
        ic: int,
        patch_size: int,
        model_dim: int,
        max_num_token: int,
        num_classes: int,
        nhead: int,
        num_layers: int,
        dim_feedforward: int = 2048,
        embed: str = "conv",
        compat: str | None = None,
        bs: int = 1,
        dropout: float = 0.1,
        activation: str = "relu",
        pre_norm: bool = False,
        patch_bias: bool = False,
        final_norm: bool = False,
        dynamic_img_size: bool = False,
        pos_embed_policy: str = "R4",
    ) -> None:
        super().__init__()
        given = dict(
            image_h=image_h, image_w=image_w, ic=ic, patch_size=patch_size, model_dim=model_dim,
            max_num_token=max_num_token, num_classes=num_classes, nhead=nhead, num_layers=num_layers,
            dim_feedforward=dim_feedforward, bs=bs,
        )  # fmt: skip
        given = {name: arguments.integer(FAMILY, name, value) for name, value in given.items()}
        for name in ("image_h", "image_w"):
            if given[name] % given["patch_size"]:
                arguments.fail(FAMILY, name, given[name], f"a multiple of patch_size {given['patch_size']}")
        arguments.check_heads(FAMILY, "nhead", given["nhead"], "model_dim", given["model_dim"])
        arguments.one_of(FAMILY, "embed", embed, ("conv", "naive"))
        arguments.one_of(FAMILY, "compat", compat, (None, "literal"))
        arguments.one_of(FAMILY, "activation", activation, tuple(name for name in ACTIVATIONS if name not in GATED))
        self.image_size, self.in_chans = (given["image_h"], given["image_w"]), given["ic"]
        self.patch_size, self.num_classes, self.embed = given["patch_size"], given["num_classes"], embed
        self.grid_size = tuple(side // self.patch_size for side in self.image_size)
        self.literal, self.dynamic_img_size = compat == "literal", dynamic_img_size
        self.pos_embed_policy = check_policy(pos_embed_policy)
        dim, needed = given["model_dim"], 1 + self.grid_size[0] * self.grid_size[1]
        if given["max_num_token"] < needed:
            arguments.fail(
                FAMILY, "max_num_token", given["max_num_token"],
                f"{needed} or more: one class token and {self.grid_size[0]}×{self.grid_size[1]} patches",
            )  # fmt: skip
        self.weight = nn.Parameter(torch.randn(self.in_chans * self.patch_size**2, dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if patch_bias else None
        self.cls_token_embedding = nn.Parameter(torch.randn(given["bs"] if self.literal else 1, 1, dim))
        self.position_embedding_table = nn.Parameter(torch.randn(given["max_num_token"], dim))
        layer = EncoderLayer(
            dim, given["nhead"], given["dim_feedforward"], arguments.rate(FAMILY, "dropout", dropout), activation,
            pre_norm=pre_norm,
        )  # fmt: skip
        norm = nn.LayerNorm(dim) if final_norm else None
        self.transformer_encoder = Encoder([copy.deepcopy(layer) for _ in range(given["num_layers"])], norm)
        self.linear_layer = nn.Linear(dim, self.num_classes)
        self.default_cfg = dict(input_size=(self.in_chans, *self.image_size), num_classes=self.num_classes)

    def _position_rows(self, grid: Any) -> Any:
        """[1 + rows·columns, D] of the table, resized where the grid is not the model's."""
        table = self.position_embedding_table[: 1 + self.grid_size[0] * self.grid_size[1]]
        return resize_pos_embed(table, self.grid_size, grid, self.pos_embed_policy, 1)

    @untraced
    def _check(self, image: torch.Tensor) -> Any:
        arguments.check_images(FAMILY, image, self.in_chans)
        arguments.check_float(FAMILY, image)
        size = tuple(operator.index(side) for side in image.shape[2:])
        if not self.dynamic_img_size and size != self.image_size:
            arguments.fail_images(FAMILY, image, f"{self.image_size[0]}×{self.image_size[1]} or dynamic_img_size=True")
        if any(side < self.patch_size or side % self.patch_size for side in size):
            arguments.fail_images(FAMILY, image, f"multiples of the patch {self.patch_size}×{self.patch_size}")
        if self.literal and image.shape[0] != self.cls_token_embedding.shape[0]:
            raise ValueError(
                f"vit_fast.systems.scratch: images have batch size {image.shape[0]}, "
                f"expected {self.cls_token_embedding.shape[0]} (bs, one class token a sample in literal mode)"
            )
        return tuple(side // self.patch_size for side in size)

    def tokens(self, image: torch.Tensor) -> torch.Tensor:
        """Images → tokens with positions [B, 1 + n, D]."""
        grid = self._check(image)
        rows = self._position_rows(grid)[None]
        prefix = self.cls_token_embedding + rows[:, :1]
        if self.embed == "conv":
            kernel = self.weight.t().reshape(-1, self.in_chans, self.patch_size, self.patch_size)
            return ops.patch_embed(image, kernel, self.bias, rows[:, 1:], prefix, self.patch_size)
        x = image2emb_naive(image.to(self.weight.dtype), self.patch_size, self.weight)
        x = (x if self.bias is None else x + self.bias) + rows[:, 1:]
        return torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)

    def forward(self, image: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        x = self.tokens(image)
        x = self.transformer_encoder(x.transpose(0, 1)).transpose(0, 1) if self.literal else self.transformer_encoder(x)
        logits = self.linear_layer(x[:, 0])
        if label is None:
            return logits
        if not isinstance(label, torch.Tensor) or label.numel() != logits.shape[0]:
            came = list(label.shape) if isinstance(label, torch.Tensor) else type(label).__name__
            raise ValueError(f"vit_fast.systems.scratch: label is {came}, expected a tensor [{logits.shape[0]}]")
        return F.cross_entropy(logits, label.reshape(-1))


PRESETS = {
    "vit_from_scratch": dict(
        image_h=8, image_w=8, ic=3, patch_size=4, model_dim=8, max_num_token=16, num_classes=10, nhead=8, num_layers=6
    ),
}


def build(
    image_h: int = 8,
    image_w: int = 8,
    ic: int = 3,
    patch_size: int = 4,
    model_dim: int = 8,
    max_num_token: int = 16,
    num_classes: int = 10,
    nhead: int = 8,
    num_layers: int = 6,
    dim_feedforward: int = 2048,
    embed: str = "conv",
    compat: str | None = None,
    bs: int = 1,
    **options: Any,
) -> ScratchViT:
    """The from-scratch ViT; the defaults are those of the tutorial page.

    Args:
        image_h, image_w, ic: image size, multiples of patch_size, and channels.
        model_dim, nhead, num_layers, dim_feedforward: width, heads, layers, hidden width of the MLPs.
        max_num_token: rows of the position table; the first 1 + (image_h/P)·(image_w/P) are used.
        embed: "conv" or "naive", which give the same numbers.
        compat: None, or "literal": attention over the batch and one class token a sample (``bs`` of them).
        bs: batch size, read in literal mode alone.
        options: dropout (0.1), activation ("relu"; "gelu", "gelu_tanh", "quick_gelu"), pre_norm, patch_bias,
            final_norm (False each); dynamic_img_size (False) with pos_embed_policy ("R4") resizes the patch rows of
            the table to images of other sizes.
    Returns:
        ``ScratchViT``: images → logits, or (images, label) → mean cross-entropy.
    Raises:
        TypeError, ValueError: bad arguments or sizes.
    """
    return ScratchViT(
        image_h, image_w, ic, patch_size, model_dim, max_num_token, num_classes, nhead, num_layers, dim_feedforward,
        embed, compat, bs, **options,
    )  # fmt: skip


@loads(ScratchViT)
def load(model: ScratchViT, source: arguments.Source, old_grid: tuple[int, int] | None = None) -> ScratchViT:
    """Loads a state_dict or a file strictly; a position table of another image size is resized.

    Args:
        source: a state_dict, or the path of a ``.pth``, ``.pt``, ``.safetensors`` or ``.npz`` file.
        old_grid: the patch grid of the file's table. None: the model's own where its rows fit, else the square
            root of its patch rows.
    Raises:
        WeightsError: unreadable file, or keys or shapes that do not fit.
    """
    state = arguments.state_of(FAMILY, source)
    table, own = state.get("position_embedding_table"), model.position_embedding_table
    if table is not None and table.dim() == 2 and (old_grid is not None or table.shape != own.shape):
        side = math.isqrt(max(table.shape[0] - 1, 0))
        grid = tuple(old_grid) if old_grid is not None else (side, side)
        used = 1 + grid[0] * grid[1]
        if table.shape[0] < used or (old_grid is None and table.shape[0] != used) or used < 2:
            raise WeightsError(
                f"vit_fast.systems.scratch: position_embedding_table has {table.shape[0]} rows, "
                f"expected {own.shape[0]}, or pass old_grid"
            )
        rows = resize_pos_embed(table[:used], grid, model.grid_size, model.pos_embed_policy, 1)
        state["position_embedding_table"] = torch.cat([rows, own.detach()[rows.shape[0] :].to(rows)])
    return load_state_dict(model, state)
