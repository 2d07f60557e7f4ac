"""The backend ``torch``: the reference, in plain PyTorch, on every device and for every call.

``ops`` calls the differentiable functions of ``kernels.reference`` directly where this backend is chosen. The forward
functions here run inside a registered operator that is called with this backend's name; the backward functions also
follow the forward of a backend that has none of its own.
"""

import torch

from vit_fast.kernels import reference
from vit_fast.precisions import forms

from .base import Backend


class Torch(Backend):
    name = "torch"

    def __init__(self) -> None:
        super().__init__()
        self.forward = {
            "patch_embed": reference.patch_embed,
            "attention": reference.attention_fwd,
            "layer_norm": reference.layer_norm_fwd,
            "layer_norm_linear": reference.layer_norm_linear_fwd,
            "linear_residual": reference.linear_residual,
            "layernorm_mlp": reference.layernorm_mlp_fwd,
        } | {form.operation: form.reference for form in forms()}
        self.forward |= {form.linear: reference.packed_linear for form in forms() if form.linear}
        self.inference = {
            "attention": reference.attention,
            "layer_norm": reference.layer_norm,
            "layer_norm_linear": reference.layer_norm_linear,
            "layernorm_mlp": reference.layernorm_mlp,
        }
        self.keep_mask = reference.keep_mask
        self.backward = {
            "patch_embed": reference.patch_embed_bwd,
            "attention": reference.attention_bwd,
            "layer_norm": reference.layer_norm_bwd,
            "layer_norm_linear": reference.layer_norm_linear_bwd,
            "linear_residual": reference.linear_residual_bwd,
            "layernorm_mlp": reference.layernorm_mlp_bwd,
        }

    def version(self) -> str | None:
        return torch.__version__


TORCH = Torch()
