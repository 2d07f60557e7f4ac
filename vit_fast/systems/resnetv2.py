"""ResNetV2, the convolutional stem of hybrid ViTs, in two numeric modes.

Images [B, in, H, W] → feature map [B, w·4·2^(k−1), H/16, W/16] for k = 3 blocks; w = 64·width_factor.

    root   stdconv 7×7 /2 → GroupNorm(32) → ReLU → max pool 3×3 /2
    unit   r = x, or where the stride or the width changes r = GroupNorm(stdconv 1×1(x))
           y = ReLU(GN(stdconv 1×1 x)); y = ReLU(GN(stdconv 3×3 y)); y = GN(stdconv 1×1 y); out = ReLU(r + y)

==============  ==================================  ============================================
                "jeonsworld"                        "google"
==============  ==================================  ============================================
filters         (W − mean)/√(var + 1e-5)            (W − mean)/(std + 1e-5)
padding         3 (7×7), 1 (3×3), 0                 SAME: the odd pixel at the high side
max pool        no padding: 224 → 112 → 55          SAME with −∞: 224 → 112 → 56
projection's    GroupNorm(one group a channel,      GroupNorm(32, eps 1e-6) as everywhere
norm            eps 1e-5)
==============  ==================================  ============================================

The modes have the same parameters, but weights trained in one give noise in the other. Convolutions run in PyTorch.
Sources: Kolesnikov et al., "Big Transfer", 2019; Qiao et al., "Weight Standardization", 2019; google-research's
vision_transformer ("google") and jeonsworld's ViT-pytorch ("jeonsworld").
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MODES = ("jeonsworld", "google")
_EPS = 1e-5


def standardise(weight: torch.Tensor, mode: str) -> torch.Tensor:
    """Filters [out, in, kh, kw] with mean 0 and variance 1 each; 16-bit filters are standardised in float32."""
    exact = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    var, mean = torch.var_mean(exact, dim=(1, 2, 3), keepdim=True, correction=0)
    scale = torch.sqrt(var) + _EPS if mode == "google" else torch.sqrt(var + _EPS)
    return ((exact - mean) / scale).to(weight.dtype)


def _same(size: Any, kernel: int, stride: int) -> Any:
    """The (low, high) padding of TensorFlow's and JAX's SAME."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: torch.Tensor, kernel: int, stride: int, value: Any = 0.0) -> torch.Tensor:
    top, bottom = _same(x.shape[2], kernel, stride)
    left, right = _same(x.shape[3], kernel, stride)
    return F.pad(x, (left, right, top, bottom), value=value) if top + bottom + left + right else x


class StdConv2d(nn.Conv2d):
    """Convolution without bias whose filters are standardised in the forward."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_chans, out_chans, kernel, stride, padding=(kernel - 1) // 2, bias=False)
        self.mode = MODES[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = standardise(self.weight, self.mode)
        if self.mode == "google":
            return F.conv2d(_pad_same(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)


class Root(nn.Module):
    """The first convolution and max pool: [B, in, H, W] → [B, w, ~H/4, ~W/4]."""

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        self.conv = StdConv2d(in_chans, width, 7, 2)
        self.gn = nn.GroupNorm(32, width, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.gn(self.conv(x)))
        if self.conv.mode == "google":
            x = _pad_same(x, 3, 2, float("-inf"))
        return F.max_pool2d(x, 3, 2)


class Unit(nn.Module):
    """Bottleneck: [B, c_in, h, w] → [B, 4·mid, h/stride, w/stride]."""

    downsample: StdConv2d | None
    gn_proj: Any  # an nn.GroupNorm in units with a downsample, else None

    def __init__(self, c_in: int, mid: int, stride: int) -> None:
        super().__init__()
        out = 4 * mid
        self.conv1, self.gn1 = StdConv2d(c_in, mid, 1), nn.GroupNorm(32, mid, eps=1e-6)
        self.conv2, self.gn2 = StdConv2d(mid, mid, 3, stride), nn.GroupNorm(32, mid, eps=1e-6)
        self.conv3, self.gn3 = StdConv2d(mid, out, 1), nn.GroupNorm(32, out, eps=1e-6)
        self.downsample = self.gn_proj = None
        if stride != 1 or c_in != out:
            self.downsample, self.gn_proj = StdConv2d(c_in, out, 1, stride), nn.GroupNorm(out, out, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = x if self.downsample is None else self.gn_proj(self.downsample(x))
        x = F.relu(self.gn1(self.conv1(x)))
        x = F.relu(self.gn2(self.conv2(x)))
        return F.relu(skip + self.gn3(self.conv3(x)))


class ResNetV2(nn.Module):
    """The stem. Keys: root.conv, root.gn, body.block{1…}.unit{1…}.{conv1…3, gn1…3, downsample, gn_proj}.

    Args:
        in_chans: channels of the images.
        num_layers: units of each block; () leaves the root alone.
        width_factor: w = 64·width_factor, a multiple of 32.
        mode: "jeonsworld" or "google".
    Raises:
        ValueError: bad arguments.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_layers: Sequence[int] = (3, 4, 9),
        width_factor: float = 1,
        mode: str = "jeonsworld",
    ) -> None:
        super().__init__()
        width, num_layers = int(64 * width_factor), tuple(num_layers)
        if width < 32 or width % 32:
            raise ValueError(
                f"vit_fast.systems.hybrid: resnet.width_factor is {width_factor} (width {width}), "
                "expected a width of a multiple of 32"
            )
        if any(isinstance(units, bool) or not isinstance(units, int) or units < 1 for units in num_layers):
            raise ValueError(
                f"vit_fast.systems.hybrid: resnet.num_layers is {num_layers}, expected counts of 1 or more"
            )
        self.num_layers, self.out_chans = num_layers, width
        self.root = Root(in_chans, width)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for index, units in enumerate(num_layers):
            mid = width * 2**index
            block: OrderedDict[str, nn.Module] = OrderedDict()
            for unit in range(units):
                block[f"unit{unit + 1}"] = Unit(self.out_chans, mid, 2 if index and not unit else 1)
                self.out_chans = 4 * mid
            blocks[f"block{index + 1}"] = nn.Sequential(block)
        self.body = nn.Sequential(blocks)
        self.set_mode(mode)

    def set_mode(self, mode: str) -> None:
        """Switches the arithmetic; the parameters stay."""
        if mode not in MODES:
            raise ValueError(f"vit_fast.systems.hybrid: hybrid_mode is {mode!r}, expected one of {', '.join(MODES)}")
        self.mode = mode
        for module in self.modules():
            if isinstance(module, StdConv2d):
                module.mode = mode
            elif isinstance(module, Unit) and module.gn_proj is not None:
                norm = module.gn_proj
                norm.num_groups, norm.eps = (32, 1e-6) if mode == "google" else (norm.num_channels, 1e-5)

    @staticmethod
    def feature_size(size: tuple[int, int], num_layers: Sequence[int], mode: str) -> tuple[int, int]:
        """(rows, columns) of the feature map of an image size."""
        half = [-(-n // 2) for n in size]
        quarter = [-(-n // 2) if mode == "google" else (n - 3) // 2 + 1 for n in half]
        for _ in num_layers[1:]:
            quarter = [-(-n // 2) for n in quarter]
        rows, columns = (max(n, 0) for n in quarter)
        return rows, columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.root(x))
