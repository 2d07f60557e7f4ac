"""CLIP, SigLIP, X-CLIP, CLIPSeg and BLIP: the forms of their layers, and the stack of those of CLIP and SigLIP."""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import output_capturing

from vit_fast import ops
from vit_fast.block import drop_rate, pass_over_stack, run_blocks
from vit_fast.block_params import Norm
from vit_fast.integrations import Swapped, given
from vit_fast.kernels.reference import activate
from vit_fast.plain import LINEAR, NOTHING
from vit_fast.twin import linears

from .layer import MLP, NORM, Layer, Modules, Parts, activation_of, attention_modules, linear, mlp_parts


class CLIPForm(Layer):
    """CLIP, SigLIP and the models that copy their layer."""

    MODULES: ClassVar[Modules] = dict(
        layer_norm1=NORM,
        **attention_modules("self_attn", "{}Attention", ("q_proj", "k_proj", "v_proj", "out_proj")),
        layer_norm2=NORM,
        **MLP,
    )
    HEADS, SCALE, DROPOUT = "num_heads", "scale", "dropout"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.self_attn
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return Parts(self.layer_norm1, attn, qkv, attn.out_proj, self.layer_norm2, *mlp_parts(self.mlp))


class CLIPStackForm(CLIPForm):
    """A layer of CLIP's form in a stack that can be prepared as a whole."""

    STACKABLE = True


class Phi4Form(CLIPForm):
    """The vision layer of Phi-4, whose attention is causal where transformers drops a mask without padding."""

    SCALE, DROPOUT = "scaling", "attention_dropout"
    CAUSAL_UNMASKED = True


class XCLIPVisionForm(CLIPForm):
    """X-CLIP's vision layer: CLIP's, whose attention has a token with a message of the other frames in addition."""

    MODULES: ClassVar[Modules] = {
        **CLIPForm.MODULES,
        "message_fc": LINEAR,
        "message_ln": NORM,
        "message_attn": ("{}Attention",),
        **{f"message_attn__{name}": LINEAR for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "drop_path": ("{}DropPath", *NOTHING),
    }
    READS = ()
    message_fc: Any
    message_ln: Any
    message_attn: Any
    drop_path: Any
    num_frames: int

    def drop_path_rates(self) -> tuple[float, float]:
        return 0.0, 0.0  # only the message drops

    def add_attention(self, x: torch.Tensor, parts: Parts, options: dict[str, Any]) -> torch.Tensor:
        message = self.message_fc(x[:, 0]).unflatten(0, (-1, self.num_frames))
        message = message + self.drop_path(self.message_attn(self.message_ln(message))[0])
        with_message = torch.cat([x, message.flatten(0, 1).unsqueeze(1)], dim=1)
        return super().add_attention(with_message, parts, options)[:, : x.shape[1]]


class MLCDForm(CLIPForm):
    """MLCD: CLIP's layer with rotary embedding of all tokens."""

    ARGUMENTS = ("position_embeddings", "attention_mask")
    READS = ARGUMENTS


class CLIPSegDecoderForm(CLIPForm):
    """The layer of CLIPSeg's decoder: CLIP's with the norms behind the branches."""

    def project(self, x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, dict[str, Any]]:
        q, k, v = linears(x, parts.qkv)
        return q, {"k": k, "v": v}

    def add_attention(self, x: torch.Tensor, parts: Parts, options: dict[str, Any]) -> torch.Tensor:
        return ops.layer_norm(super().add_attention(x, parts, options), *Norm.of(parts.norm1))

    def add_mlp(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        hidden = activate(linear(x, parts.fc1[0]), str(activation_of(parts.act)))
        x = ops.linear_residual(hidden, parts.fc2.weight, parts.fc2.bias, None, x)
        return ops.layer_norm(x, *Norm.of(parts.norm2))


class BlipForm(Layer):
    """BLIP, BLIP-2 and InstructBLIP: CLIP's layer with a packed projection, of which BLIP-2 gives q and v a bias."""

    MODULES: ClassVar[Modules] = dict(
        layer_norm1=NORM,
        self_attn=("{}Attention",),
        self_attn__dropout=(nn.Dropout, *NOTHING),
        self_attn__qkv=LINEAR,
        self_attn__projection=LINEAR,
        layer_norm2=NORM,
        **MLP,
    )
    ARGUMENTS: tuple[str, ...] = ()
    READS: tuple[str, ...] = ()
    HEADS, SCALE = "num_heads", "scale"

    @classmethod
    def parts(cls, self: Any) -> Parts:
        attn = self.self_attn
        return Parts(self.layer_norm1, attn, (attn.qkv,), attn.projection, self.layer_norm2, *mlp_parts(self.mlp))

    def attention_dropout_rate(self, attention: Any) -> float:
        if "dropout" in attention._modules:  # BLIP
            return drop_rate(attention.dropout)
        return super().attention_dropout_rate(attention)


class Encoder(Swapped):
    """A stack of layers, run one by one, or all at once where ``vit_fast.prepare`` has prepared them."""

    layers: nn.ModuleList

    def forward(self, inputs_embeds: torch.Tensor, *masks: Any, **options: Any) -> Any:
        reason = given(masks, options)
        if recorded := output_capturing._active_collector.get():  # may be requested by the config too
            reason = f"{next(iter(recorded))} are recorded"
        if reason is not None:
            pass_over_stack(self.layers, reason)
            return super().forward(inputs_embeds, *masks, **options)
        x = run_blocks(self.layers, inputs_embeds, run=lambda layer, x: layer(x, None))
        return BaseModelOutput(last_hidden_state=x)

    @staticmethod
    def stack(module: nn.Module) -> nn.Module:
        """The container of the blocks in a module that may be swapped to this class."""
        return module.get_submodule("layers")
