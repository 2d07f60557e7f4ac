"""A vision layer of transformers as two fused branches: the base of the forms that these layers have.

    x = x + drop_path(gamma1 · out(attention(q, k, v)))    q, k, v of norm1(x)
    x = x + drop_path(gamma2 · fc2(act(fc1(norm2(x)))))    or fc2(act(gate(norm2(x))) · up(norm2(x)))

A form says where a layer keeps its modules (``MODULES``, ``parts``), what its forward takes beside the input, and how
it passes masks, rotary tables and sequence bounds to its attention. Three projections stay three, after one norm, and
so do gate and up, but where ``prepare`` has packed them: packing would copy their weights in each call.
Source: transformers/models/*/modeling_*.py, version 5.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import (
    FastGELUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
    SiLUActivation,
)
from transformers.utils import output_capturing

from vit_fast import backends, ops
from vit_fast.block import drop_path_scale, drop_rate, drops_not_covered, pack, pass_over_prepared, prepared_for
from vit_fast.block_params import BlockParams, Norm
from vit_fast.integrations import GATED_BY, GELU, Fused, additive, norm_kind, not_taken
from vit_fast.kernels.reference import activate
from vit_fast.key_masks import key_lengths
from vit_fast.plain import LINEAR, TENSORS
from vit_fast.twin import linears

Modules = Mapping[str, tuple[Any, ...]]
NORM = (nn.LayerNorm,)
_ACTIVATIONS = {
    FastGELUActivation: "gelu_tanh",  # √(2/π) to ten digits
    NewGELUActivation: "gelu_tanh",
    QuickGELUActivation: "quick_gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
}
ACTIVATIONS = (GELUActivation, GELUTanh, nn.GELU, *_ACTIVATIONS)
_KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "vit_fast")  # all are softmax(scale · q kᵀ) v
_IGNORED = ("output_hidden_states", "return_dict", "num_items_in_batch")  # keyword arguments that no attention reads


def activation_of(module: nn.Module) -> str | None:
    """The name of an activation, or None where it is not known."""
    kind = type(module)
    if kind is nn.GELU:
        return GELU.get(str(module.approximate))
    if kind is GELUActivation:
        return "gelu" if module.act is F.gelu else None
    if kind is GELUTanh:
        act: Any = module.act
        exact = isinstance(act, partial) and act.func is F.gelu and act.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if exact else None
    return _ACTIVATIONS.get(kind)


def linear(x: torch.Tensor, module: nn.Linear) -> torch.Tensor:
    parameters: dict[str, Any] = module._parameters
    return ops.linear(x, parameters["weight"], parameters["bias"])


class Parts(NamedTuple):
    """The sub-modules of a layer that its fused forward reads."""

    norm1: nn.LayerNorm  # or an RMSNorm
    attention: Any  # the module that knows the heads, the scale and the dropout of the probabilities
    qkv: tuple[Any, ...]  # three, or one that is packed
    out: Any
    norm2: nn.LayerNorm
    fc1: tuple[Any, ...]  # one, or gate and up
    act: Any
    fc2: Any


def _other_attention(attention: Any) -> str | None:
    """Why the attention that the model's config names is not ours, or None."""
    config = attention.__dict__.get("config")
    runs_as = None if config is None else getattr(config, "_attn_implementation", None)
    if runs_as is None or runs_as in _KERNELS:  # None: the model has one attention only
        return None
    return f"its attention runs as {runs_as!r}"


class Settings(NamedTuple):
    """The ``settings`` of a layer."""

    parts: Parts
    dropouts: tuple[float, float]  # rates of dropout of the two branches
    drop_paths: tuple[float, float]  # rates of stochastic depth of the two branches


def attention_modules(name: str, cls: str, projections: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    return {name: (cls,), **{f"{name}__{projection}": LINEAR for projection in projections}}


MAYBE_LINEAR = (nn.Linear, NoneType)
GATED = ("gate_proj", "up_proj", "down_proj")
MLP = dict(mlp=("{}MLP",), mlp__fc1=LINEAR, mlp__activation_fn=ACTIVATIONS, mlp__fc2=LINEAR)


def mlp_parts(mlp: Any) -> tuple[tuple[nn.Linear, ...], nn.Module, nn.Linear]:
    """(fc1 or gate and up, activation, fc2) of an MLP under the names that transformers uses."""
    if "gate_proj" in mlp._modules:
        return (mlp.gate_proj, mlp.up_proj), mlp.act_fn, mlp.down_proj
    if "up_proj" in mlp._modules:
        return (mlp.up_proj,), mlp.act_fn, mlp.down_proj
    if "linear_fc1" in mlp._modules:
        return (mlp.linear_fc1,), mlp.act_fn, mlp.linear_fc2
    return (mlp.fc1,), mlp._modules.get("activation_fn") or mlp.act, mlp.fc2


GATED_MLP = {**{name: LINEAR for name in GATED}, "act_fn": ACTIVATIONS}


class Layer(Fused):
    """[B, N, C] → [B, N, C]; base of the forms."""

    RUNS_PREPARED = True
    RUNS_PARTS = True
    STACKABLE = False
    MODULES: ClassVar[Modules] = {}  # as for ``plain.submodules``; "{}Name" stands for a family's own class
    ARGUMENTS: tuple[str, ...] = ("attention_mask",)  # what the library's forward takes by position after the input
    READS: tuple[str, ...] = ("attention_mask",)  # the arguments that the fused forward takes too
    HEADS, SCALE, DROPOUT = "num_attention_heads", "scaling", "attention_dropout"
    CAUSAL_UNMASKED = False  # whether its attention is causal in calls without a mask, and in those alone

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        steps = ("project", "add_attention", "add_mlp")
        if any(getattr(cls, step) is not getattr(Layer, step) for step in steps):
            cls.RUNS_PREPARED = False  # ``params`` does not describe what it computes

    @staticmethod
    def ignores(hook: Any) -> bool:
        """transformers leaves the hooks that record attention weights on a model; inactive ones are ignored."""
        if getattr(hook, "__module__", None) != output_capturing.__name__:
            return False
        collected = output_capturing._active_collector.get()
        return collected is None or "attentions" not in collected

    @classmethod
    def parts(cls, self: Any) -> Parts:
        """The sub-modules of a layer, which may be an instance of the library's class."""
        raise NotImplementedError

    @classmethod  # also called on the library's instance, which has no ``parts``
    def not_covered(cls, self: Any) -> str | None:  # type: ignore[override]
        parts = cls.parts(self)
        attention = parts.attention
        if getattr(attention, "is_causal", False) and not cls.CAUSAL_UNMASKED:
            return "its attention is causal"
        if reason := _other_attention(attention):
            return reason
        if activation_of(parts.act) is None:
            return f"its activation is {parts.act}"
        return None

    def scale(self, attention: Any) -> float:
        """The factor of the scores."""
        return getattr(attention, self.SCALE)

    def not_folded(self) -> str | None:
        parts = self.parts(self)
        if norm_kind(parts.norm1) != norm_kind(parts.norm2):
            return "the blocks have LayerNorms and RMSNorms"
        act = activation_of(parts.act)
        return f"the blocks gate by {act}" if len(parts.fc1) > 1 and act not in GATED_BY else None

    def params(self) -> BlockParams:
        """The weights for folding, with q, k and v, and gate and up, packed."""
        parts, (gamma1, gamma2) = self.parts(self), self.gammas()
        qkv, fc1 = (pack(layers) for layers in (parts.qkv, parts.fc1))
        act = str(activation_of(parts.act))
        return BlockParams(
            norm1=Norm.of(parts.norm1),
            qkv_weight=qkv[0],
            qkv_bias=qkv[1],
            proj_weight=parts.out.weight,
            proj_bias=parts.out.bias,
            norm2=Norm.of(parts.norm2),
            fc1_weight=fc1[0],
            fc1_bias=fc1[1],
            fc2_weight=parts.fc2.weight,
            fc2_bias=parts.fc2.bias,
            num_heads=getattr(parts.attention, self.HEADS),
            scale=self.scale(parts.attention),
            activation=GATED_BY[act] if len(parts.fc1) > 1 else act,
            gamma1=gamma1,
            gamma2=gamma2,
            norm=norm_kind(parts.norm1),
        )

    def gammas(self) -> tuple[Any, Any]:
        """LayerScale of the two branches, or None."""
        return None, None

    def drop_path_rates(self) -> tuple[float, float]:
        """The current rates of stochastic depth of the two branches."""
        module = self._modules.get("drop_path")
        rate = getattr(module, "drop_prob", 0.0) if module is not None and module.training else 0.0
        return rate, rate

    def dropout_rates(self) -> tuple[float, float]:
        """The current rates of dropout of the two branches, behind their last layer."""
        rate = drop_rate(self._modules.get("dropout"))
        return rate, rate

    def attention_dropout_rate(self, attention: Any) -> float:
        """The current rate of dropout of the probabilities."""
        return getattr(attention, self.DROPOUT) if attention.training else 0.0

    def attention_options(self, x: torch.Tensor, named: Mapping[str, Any]) -> dict[str, Any] | str:
        """The options of ``ops.attention`` for what a call gives beside the input, or why there are none."""
        options: dict[str, Any] = {}
        if self.CAUSAL_UNMASKED and named.get("attention_mask") is None:
            return "its attention is causal where no mask is given"
        for name, value in named.items():
            if value is None or value is False or name in _IGNORED:
                continue
            if name not in self.READS:
                return f"{name} is given"
            if name == "attention_mask":
                if type(value) not in TENSORS or value.dim() != 4:
                    return "attention_mask is no tensor of 4 dimensions"
                lengths = key_lengths(self, value, x.shape[0])
                options |= {"bias": value} if lengths is None else lengths
            elif name == "position_embeddings":
                options["rope"] = tuple(value)
            elif name == "cu_seqlens":
                options["cu_seqlens"] = value.to(torch.int32)  # int64 while torch.jit traces
        if "rope" in options:
            options["num_prefix"] = int(x.shape[1]) - int(options["rope"][0].shape[-2])
        return options

    def settings(self) -> Settings:
        return Settings(self.parts(self), self.dropout_rates(), self.drop_path_rates())

    def _not_taken(self, x: torch.Tensor, settings: Settings) -> str | None:
        """Why the fused forward does not take x, or the layer in its current state, or None."""
        parts = settings.parts
        if reason := not_taken(x, parts.qkv[0]._parameters["weight"], *self.gammas()):
            return reason
        for norm in (parts.norm1, parts.norm2):
            if norm_kind(norm) == "rms" and norm.weight.dtype != x.dtype:
                return f"the input is {x.dtype}, an RMSNorm is {norm.weight.dtype}"
        rates = self.attention_dropout_rate(parts.attention), *settings.dropouts, *settings.drop_paths
        return drops_not_covered(*rates) or _other_attention(parts.attention)  # the config is no part of the layer

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        result, settings = self.look()
        if result is None:
            result = self.fused(hidden_states, settings, args, options)
        if isinstance(result, str):
            return self.run_library(result, hidden_states, *args, **options)
        return result

    def fused(self, x: torch.Tensor, settings: Settings, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """What the library's forward returns, or why the fused one cannot compute it."""
        if len(args) > len(self.ARGUMENTS):
            return "a mask or another argument beside the input is given"
        if reason := self._not_taken(x, settings):
            return reason
        options = self.attention_options(x, dict(zip(self.ARGUMENTS, args, strict=False)) | dict(named))
        if isinstance(options, str):
            return options
        if "cu_seqlens" in options and self.RUNS_PREPARED:
            pass_over_prepared(self, "cu_seqlens is given")
        elif (prepared := prepared_for(self, x)) is not None:
            return prepared.run_block(x, **self.with_float_bias(options, x.dtype))
        return backends.run_block(self.add_branches, x, settings.parts, options)

    def fused_parts(self, *inputs: Any, **options: Any) -> Any:
        return self.add_branches(inputs[0], self.parts(self), options)

    def layers_of_one_input(self) -> Sequence[Sequence[nn.Linear]]:
        parts = self.parts(self)
        return [layers for layers in (parts.qkv, parts.fc1) if len(layers) > 1]

    def add_branches(self, x: torch.Tensor, parts: Parts, options: dict[str, Any]) -> torch.Tensor:
        """x plus both branches."""
        return self.add_mlp(self.add_attention(x, parts, options), parts)

    def project(self, x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, dict[str, Any]]:
        """The first argument of ``ops.attention``, and k and v where they are not packed."""
        norm1, kind = Norm.of(parts.norm1), norm_kind(parts.norm1)
        if len(parts.qkv) == 1:
            qkv = parts.qkv[0]
            return ops.layer_norm_linear(x, *norm1, qkv.weight, qkv.bias, norm=kind), {}
        normal = ops.layer_norm(x, *norm1, norm=kind)
        q, k, v = linears(normal, parts.qkv)
        return q, {"k": k, "v": v}

    def add_attention(self, x: torch.Tensor, parts: Parts, options: dict[str, Any]) -> torch.Tensor:
        """x plus the attention branch."""
        attention, (q, kv) = parts.attention, self.project(x, parts)
        y = ops.attention(
            q, getattr(attention, self.HEADS), self.scale(attention), **kv, **self.with_float_bias(options, q.dtype),
            dropout_p=self.attention_dropout_rate(attention),
        )  # fmt: skip
        row_scale = drop_path_scale(x, self.drop_path_rates()[0], True)
        return ops.linear_residual(
            y, parts.out.weight, parts.out.bias, self.gammas()[0], x,
            row_scale=row_scale, dropout_p=self.dropout_rates()[0],
        )  # fmt: skip

    @staticmethod
    def with_float_bias(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The options of attention, with a mask as what is added to the scores."""
        bias = options.get("bias")
        return options if bias is None else options | {"bias": additive(bias, dtype)}

    def add_mlp(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        """x plus the MLP branch."""
        gamma, fc2, act = self.gammas()[1], parts.fc2, str(activation_of(parts.act))
        norm2, kind = Norm.of(parts.norm2), norm_kind(parts.norm2)
        row_scale, dropout = drop_path_scale(x, self.drop_path_rates()[1], True), self.dropout_rates()[1]
        if len(parts.fc1) == 1:
            fc1 = parts.fc1[0]
            return ops.layernorm_mlp(
                x, *norm2, fc1.weight, fc1.bias, fc2.weight, fc2.bias, act, gamma,
                row_scale=row_scale, norm=kind, out_dropout_p=dropout,
            )  # fmt: skip
        normal = ops.layer_norm(x, *norm2, norm=kind)
        gate, up = linears(normal, parts.fc1)
        return ops.linear_residual(
            activate(gate, act) * up, fc2.weight, fc2.bias, gamma, x, row_scale=row_scale, dropout_p=dropout
        )
