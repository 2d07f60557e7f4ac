"""The baselines in PyTorch: timm's own module, in its dtype, compiled or in float8, and the same network built by
another library.

All have the same weights. torchvision computes attention in nn.MultiheadAttention, transformers in
scaled_dot_product_attention. Their parameters are timm's under other names: a network in which a tensor of one library
has no counterpart in the other is not the same, and the library then has no such model. ``best_attention`` finds
the attention kernel with which a module is fastest on a device.
"""

import contextlib
import importlib
import re
import statistics
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit_fast.precisions import FP8

from . import measure, scaled_mm
from .providers import COMPILE_MODES, FREEZING, SCALED_MM

# (pattern of a tensor's name in the library, timm's name); attn.q, attn.k and attn.v are the thirds of attn.qkv.
_TORCHVISION = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.(.+)", r"patch_embed.proj.\1"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_(\d)\.(.+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(.+)", r"blocks.\1.attn.qkv.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.0\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.3\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.ln\.(.+)", r"norm.\1"),
    (r"heads\.head\.(.+)", r"head.\1"),
)
# Releases of transformers name the same tensors differently: each rule takes the older and the newer name.
_TRANSFORMERS_VIT = (
    (r"vit\.embeddings\.cls_token", "cls_token"),
    (r"vit\.embeddings\.position_embeddings", "pos_embed"),
    (r"vit\.embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"vit\.(?:encoder\.)?layers?\.(\d+)\.layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
    (r"vit\.(?:encoder\.)?layers?\.(\d+)\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.(.+)",
     r"blocks.\1.attn.\2.\3"),
    (r"vit\.(?:encoder\.)?layers?\.(\d+)\.attention\.(?:output\.dense|o_proj)\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"vit\.(?:encoder\.)?layers?\.(\d+)\.layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
    (r"vit\.(?:encoder\.)?layers?\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"vit\.(?:encoder\.)?layers?\.(\d+)\.(?:output\.dense|mlp\.fc2)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"vit\.layernorm\.(.+)", r"norm.\1"),
    (r"classifier\.(.+)", r"head.\1"),
)  # fmt: skip
_TRANSFORMERS_SIGLIP = (
    (r"(?:vision_model\.)?embeddings\.patch_embedding\.(.+)", r"patch_embed.proj.\1"),
    (r"(?:vision_model\.)?embeddings\.position_embedding\.weight", "pos_embed"),
    (r"(?:vision_model\.)?encoder\.layers\.(\d+)\.layer_norm(\d)\.(.+)", r"blocks.\1.norm\2.\3"),
    (r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(.+)", r"blocks.\1.attn.\2.\3"),
    (r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"(?:vision_model\.)?encoder\.layers\.(\d+)\.mlp\.(.+)", r"blocks.\1.mlp.\2"),
    (r"(?:vision_model\.)?post_layernorm\.(.+)", r"norm.\1"),
    (r"(?:vision_model\.)?head\.probe", "attn_pool.latent"),
    (r"(?:vision_model\.)?head\.attention\.in_proj_(.+)", r"attn_pool.qkv.\1"),
    (r"(?:vision_model\.)?head\.attention\.out_proj\.(.+)", r"attn_pool.proj.\1"),
    (r"(?:vision_model\.)?head\.layernorm\.(.+)", r"attn_pool.norm.\1"),
    (r"(?:vision_model\.)?head\.mlp\.(.+)", r"attn_pool.mlp.\1"),
)
_HIDDEN_ACTS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}


class NoSuchModel(Exception):
    """A library that is absent, or that cannot build this network; the text says why."""


def _parts(state):
    """timm's state_dict and the slices of its tensors that other libraries hold: {name: (tensor, timm's names of its
    sources)}."""
    parts = {name: (tensor, (name,)) for name, tensor in state.items()}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for word, third in zip("qkv", tensor.chunk(3)):
                parts[name.replace(".attn.qkv.", f".attn.{word}.")] = (third, (name,))
    for kind in ("weight", "bias"):
        pair = (f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}")
        if all(name in state for name in pair):
            parts[f"attn_pool.qkv.{kind}"] = (torch.cat([state[name] for name in pair]), pair)
    return parts


def _load(library, module, timm_state, rules):
    """Copies timm's weights into a library's module, every tensor of either side once."""
    parts, theirs = _parts(timm_state), module.state_dict()
    names = {name: re.sub(*rule, name) for name in theirs for rule in rules if re.fullmatch(rule[0], name)}
    sources = {name: parts[target] for name, target in names.items() if target in parts}
    if left := set(timm_state) - {origin for _, origins in sources.values() for origin in origins}:
        raise NoSuchModel(f"{library} has no such model (no place for {min(left)})")
    for name, tensor in theirs.items():
        if name not in sources or sources[name][0].numel() != tensor.numel():
            raise NoSuchModel(f"{library} has no such model (nothing of timm's fits {name} {list(tensor.shape)})")
    module.load_state_dict({name: sources[name][0].reshape(theirs[name].shape) for name in theirs}, strict=True)


def _import(library):
    try:
        return importlib.import_module(library)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == library
        raise NoSuchModel(f"{library} {'is not installed' if absent else f'fails to import: {error}'}") from error


def _refuse(library, model, pools, activations):
    """Raises where the networks differ in what no tensor shows: pooling and activation."""
    pool, activation = getattr(model, "global_pool", None), type(model.blocks[0].mlp.act).__name__
    if pool not in pools:
        raise NoSuchModel(f"{library} has no such model (pooling {pool!r})")
    if activation not in activations or getattr(model.blocks[0].mlp.act, "approximate", "none") != "none":
        raise NoSuchModel(f"{library} has no such model (activation {activation})")


def torchvision_model(model: Any) -> nn.Module:
    """torchvision's module with the weights of a timm model."""
    _import("torchvision")
    from torchvision.models.vision_transformer import VisionTransformer

    _refuse("torchvision", model, ("token",), ("GELU",))
    block, (height, width) = model.blocks[0], model.patch_embed.img_size
    if height != width or model.patch_embed.proj.in_channels != 3:
        raise NoSuchModel("torchvision has no such model (its images are square and have three channels)")
    module = VisionTransformer(
        image_size=height,
        patch_size=model.patch_embed.proj.kernel_size[0],
        num_layers=len(model.blocks),
        num_heads=block.attn.num_heads,
        hidden_dim=model.embed_dim,
        mlp_dim=block.mlp.fc1.out_features,
        num_classes=model.num_classes or 1,
        norm_layer=partial(nn.LayerNorm, eps=block.norm1.eps),
    )
    if not model.num_classes:
        module.heads = nn.Identity()
    _load("torchvision", module, model.state_dict(), _TORCHVISION)
    return module


class Logits(nn.Module):
    """Returns the logits of a transformers model as a tensor."""

    def __init__(self, model: nn.Module, field: str) -> None:
        super().__init__()
        self.model, self.field = model, field

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return getattr(self.model(pixel_values=pixels), self.field)


def transformers_model(model: Any) -> nn.Module:
    """transformers' module, attending by scaled_dot_product_attention, with the weights of a timm model."""
    transformers = _import("transformers")
    _refuse("transformers", model, ("token", "map"), _HIDDEN_ACTS)
    block, projection = model.blocks[0], model.patch_embed.proj
    kwargs = dict(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act=_HIDDEN_ACTS[type(block.mlp.act).__name__],
        layer_norm_eps=block.norm1.eps,
        patch_size=projection.kernel_size[0],
        num_channels=projection.in_channels,
    )
    height, width = model.patch_embed.img_size
    if model.global_pool == "map":
        if height != width:
            raise NoSuchModel("transformers has no such model (its SigLIP images are square)")
        config = transformers.SiglipVisionConfig(image_size=height, **kwargs)
        module = transformers.AutoModel.from_config(config, attn_implementation="sdpa")
        rules: tuple[tuple[str, str], ...] = _TRANSFORMERS_SIGLIP
        field = "pooler_output"
    else:
        config = transformers.ViTConfig(
            image_size=(height, width), qkv_bias=block.attn.qkv.bias is not None, num_labels=model.num_classes, **kwargs
        )
        module = transformers.AutoModelForImageClassification.from_config(config, attn_implementation="sdpa")
        rules, field = _TRANSFORMERS_VIT, "logits"
    _load("transformers", module, model.state_dict(), rules)
    return Logits(module, field)


def float8_model(model: nn.Module) -> nn.Module:
    """timm's model in float8, where its device and dtype allow it."""
    weight = next(model.parameters())
    if missing := FP8.why_emulated(weight.device):
        raise NoSuchModel(missing)
    if weight.dtype == torch.float32:
        raise NoSuchModel("float8 is compared with 16-bit weights, not with float32")
    return scaled_mm.quantised(model)


LIBRARIES = {
    "torchvision": torchvision_model,
    "transformers": transformers_model,
    SCALED_MM: float8_model,
}


def build(names: Iterable[str], model: nn.Module, device: torch.device) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """({baseline: module}, {baseline: why it has none}) of a timm model; modules of libraries are built on ``device``.

    Names that are not in ``LIBRARIES`` get the timm model itself.
    """
    modules, absent = {}, {}
    for name in names:
        try:
            with device:
                modules[name] = LIBRARIES[name](model).eval() if name in LIBRARIES else model
        except NoSuchModel as reason:
            absent[name] = str(reason)
        except Exception as error:  # another release of the library, with other arguments or names
            lines = str(error).strip().splitlines() or [""]
            absent[name] = f"{name} cannot build it: {type(error).__name__}: {lines[0][:300]}"
    return modules, absent


def compiled_model(model: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The model through torch.compile, as one of ``COMPILE_MODES``; it compiles in the first call.

    Freezing makes constants of the weights, which a CPU then packs for its matrix products. It is set around the first
    call: as an option of torch.compile it does not reach Dynamo, which makes inputs of the weights, and nothing is
    frozen. It is an option too, so that Dynamo does not take the graph of ``compile`` of the same model.
    """
    if name != FREEZING:
        return torch.compile(model, mode=COMPILE_MODES[name], dynamic=False)
    compiled = torch.compile(model, options={"freezing": True}, dynamic=False)
    import torch._inductor.config as inductor

    calls = 0

    def call(pixels: torch.Tensor) -> Any:
        nonlocal calls
        with inductor.patch(freezing=True) if calls == 0 else contextlib.nullcontext():
            out = compiled(pixels)
        calls += 1
        return out

    return call


@contextlib.contextmanager
def _attention(backend, fast_path):
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _attentions(module, device):
    """{name: function that makes a context} of a module's possible attention kernels, torch's own choice first."""
    ways = {"torch's choice": partial(_attention, None, True)}
    if device.type != "cuda":
        return ways
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    ways |= {name: partial(_attention, backend, True) for name, backend in backends.items()}
    if any(isinstance(part, nn.MultiheadAttention) for part in module.modules()):
        backends = {"torch's choice": None} | backends
        ways |= {f"{name}, no fast path": partial(_attention, backend, False) for name, backend in backends.items()}
    return ways


def best_attention(
    module: nn.Module, call: Callable[[], Any], device: torch.device
) -> tuple[str, Callable[[], AbstractContextManager[None]]]:
    """(name, function that makes a context) of the fastest attention kernel; torch's own choice unless 2 % are gained.

    Only a GPU has several. With nn.MultiheadAttention each is also tried without its fast path, which cannot use all.
    """
    ways = _attentions(module, device)
    times: dict[str, float] = {}
    own = next(iter(ways))
    for name, way in ways.items() if len(ways) > 1 else ():
        # A backend that cannot run this module on this device raises, and warns of each reason.
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"), way():
            call()
            times[name] = statistics.median(measure.step_times(call, 5, device))
    best = min(times, key=lambda name: times[name], default=own)
    if own in times and times[best] > 0.98 * times[own]:
        best = own
    return best, ways[best]
