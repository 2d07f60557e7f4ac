"""``vit_fast.attention`` as an attention implementation of transformers, on request."""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from vit_fast import ops
from vit_fast.integrations import additive, mask_options
from vit_fast.kernels.arguments import UnsupportedError


def register_attention(name: str = "vit_fast") -> str:
    """Registers our attention with transformers, for every model of this process that asks for it.

        register_attention()
        model = AutoModel.from_pretrained(..., attn_implementation="vit_fast")    # or model.set_attn_implementation

    For models whose layers ``optimize`` has no fast class for; elsewhere ``optimize`` fuses more. Masks are those of
    transformers' "sdpa". Attention weights are not returned; a soft cap or attention sinks raise.

    Args:
        name: the value of ``attn_implementation`` to register.
    Returns:
        name.
    Raises:
        TypeError, ValueError: name is no str, or is one of transformers' own.
    """
    if not isinstance(name, str):
        raise TypeError(f"vit_fast.register_attention: name is {type(name).__name__}, expected a str")
    if AttentionInterface().get(name, attention_forward) is not attention_forward:
        raise ValueError(f"vit_fast.register_attention: name is {name!r}, which is another implementation's")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers asks of an attention: softmax(scaling · q kᵀ + mask) v, and no weights.

    Args:
        module: the attention of the model.
        query: [B, H, Nq, D].
        key, value: [B, heads, Nk, D]; heads divides H.
        attention_mask: [B or 1, H or 1, Nq, Nk], bool (True where a key counts) or added to the scores; or None.
        scaling: 1/√D where None.
        dropout: rate of dropout of the probabilities.
        is_causal: whether a call without a mask leaves out later keys; what the module says where None.
    Returns:
        ([B, Nq, H, D], None).
    Raises:
        UnsupportedError: what this attention does not compute, by name.
    """
    lacking = [option for option in ("softcap", "s_aux") if options.get(option) is not None]
    if lacking:
        raise UnsupportedError(
            f"vit_fast.attention: {type(module).__name__} asks for {', '.join(lacking)}, which vit_fast does not "
            "compute; use attn_implementation='sdpa'"
        )
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    masked: dict[str, Any] = {}
    if attention_mask is not None:
        masked = mask_options(module, attention_mask, query.dtype, (query.shape[0], heads, queries, keys))
    elif causal and queries > 1:
        earlier = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril()
        masked = {"bias": additive(earlier, query.dtype)}
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = ops.attention(q, heads, scale, k=k, v=v, **masked, dropout_p=dropout)
    return out.unflatten(2, (heads, -1)), None
