"""The attention, the MLP and the norms of timm's blocks, and the two kinds of block that are made of them.

    pre-norm    x = x + drop_path1(gamma1 · attn(norm1(x)))      post-norm    x = x + drop_path1(norm1(attn(x)))
                x = x + drop_path2(gamma2 · mlp(norm2(x)))                    x = x + drop_path2(norm2(mlp(x)))

Source: timm/layers (attention.py, diff_attention.py, mlp.py, norm.py), timm/models/vitamin.py (GeGluMlp).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import timm.layers as layers
import torch
from timm.models.vision_transformer import DropPath, LayerScale, Mlp
from torch import nn

from vit_fast import backends, ops
from vit_fast.backends import select
from vit_fast.block import drop_path_scale, drop_rate, drops_not_covered, pack, prepared_for
from vit_fast.block_params import BlockParams, Norm
from vit_fast.integrations import GATED_BY, GELU, Fused, additive, given, mask_options, norm_kind, not_taken
from vit_fast.kernels import reference
from vit_fast.kernels.reference import activate
from vit_fast.plain import LINEAR, NOTHING
from vit_fast.twin import linears


def _classes(*names: str, of: Any = layers) -> tuple[type, ...]:
    """The classes of timm of these names; an older version lacks some."""
    return tuple(getattr(of, name) for name in names if hasattr(of, name))


NORMS = (nn.LayerNorm, nn.RMSNorm, *_classes("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32"))
NORM_OR_NONE = (*NORMS, *NOTHING)
DROPOUTS = (nn.Dropout, *NOTHING)
SCALES = (LayerScale, *NOTHING)
DROP_PATHS = (DropPath, *NOTHING)
OPTIONAL = (nn.Linear, *NOTHING)
SWIGLU = _classes("SwiGLU")
GEGLU: tuple[type, ...] = ()
try:
    from timm.models.vitamin import GeGluMlp

    GEGLU = (GeGluMlp,)
except ImportError:  # older timm has none
    pass
_DIFFERENTIAL = _classes("DiffAttention")
_ADDED = {"bias"}  # an option of attention that PyTorch refuses where its shape is wrong

ACTIVATIONS = {
    layers.GELU: "gelu",
    layers.GELUTanh: "gelu_tanh",
    layers.QuickGELU: "quick_gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}
_SPLIT = dict.fromkeys(SWIGLU, ("fc1_g", "fc1_x", "fc2")) | dict.fromkeys(GEGLU, ("w0", "w1", "w2"))

MLP = dict(
    mlp=(Mlp, layers.GluMlp, *SWIGLU, *GEGLU),
    mlp__fc1=OPTIONAL,
    mlp__fc1_g=OPTIONAL,
    mlp__fc1_x=OPTIONAL,
    mlp__w0=OPTIONAL,
    mlp__w1=OPTIONAL,
    mlp__act=(nn.GELU, nn.Sigmoid, *ACTIVATIONS),
    mlp__drop1=DROPOUTS,
    mlp__norm=NORM_OR_NONE,
    mlp__fc2=OPTIONAL,
    mlp__w2=OPTIONAL,
    mlp__drop2=DROPOUTS,
)


def attention_submodules(*classes: type, **more: tuple[type, ...]) -> dict[str, tuple[type, ...]]:
    """The arguments of ``submodules`` for an attention of these classes; ``more`` parts than any attention has."""
    parts = dict(
        qkv=OPTIONAL, q_norm=NORM_OR_NONE, k_norm=NORM_OR_NONE, attn_drop=DROPOUTS, proj=LINEAR, proj_drop=DROPOUTS
    )  # fmt: skip
    return dict(attn=classes) | {f"attn__{name}": kinds for name, kinds in (parts | more).items()}


def activation(mlp: Any) -> str | None:
    """The word in ``ops`` of the activation of an Mlp or a GluMlp, or None."""
    act = type(mlp.act)
    word = GELU.get(mlp.act.approximate) if act is nn.GELU else ACTIVATIONS.get(act)
    if type(mlp) is Mlp:
        return word
    return None if word is None or mlp.gate_last else GATED_BY.get(word)


def norm_of(norm: Any) -> Norm | None:
    """The ``Norm`` of a normalisation; None for an Identity or None."""
    found: Norm | None = None if norm is None else Norm.of(norm)
    return found


def layer_scales(block: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gammas of the modules ls1 and ls2; None where one is an Identity or missing."""
    first, second = block._modules.get("ls1"), block._modules.get("ls2")
    return first and first._parameters.get("gamma"), second and second._parameters.get("gamma")


def known_norm(norm: Any) -> Norm:
    """The ``Norm`` of a normalisation that every block has."""
    found: Norm = Norm.of(norm)
    return found


def normalise(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """A normalisation of timm, or nothing where it is None or an Identity."""
    params = norm_of(norm)
    return x if params is None else ops.layer_norm(x, *params, norm=norm_kind(norm))


def head_scale(attn: Any) -> float:
    """The factor of the scores; fused attention of timm does not look at ``attn.scale``."""
    if not attn.fused_attn:
        return attn.scale
    size = getattr(attn, "head_dim", None)
    return (attn.proj.in_features // attn.num_heads if size is None else size) ** -0.5


def qkv_bias(attn: Any) -> torch.Tensor | None:
    """The bias of a packed projection, in one tensor; EVA and BEiT have none for k."""
    parameters = attn._parameters
    if parameters.get("q_bias") is None:
        return attn.qkv.bias
    return torch.cat((parameters["q_bias"], attn.k_bias, parameters["v_bias"])).to(attn.qkv.weight.dtype)


def spread(x: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """Keys or values of fewer heads, each repeated for its group of query heads."""
    return x.unflatten(2, (heads, -1)).repeat_interleave(groups, 2).flatten(2)


def project(attn: Any, x: torch.Tensor, norm: Any) -> tuple[Any, ...]:
    """(q, k, v, gate) of norm(x): q is the packed projection where k and v are None."""
    qkv, gate = attn.qkv, attn._modules.get("gate")
    if qkv is not None and gate is None and norm is not None:
        packed = ops.layer_norm_linear(x, *known_norm(norm), qkv.weight, qkv_bias(attn), norm=norm_kind(norm))
        return packed, None, None, None
    x = normalise(x, norm)
    if gate is not None:
        gate = ops.linear(x, gate.weight, gate.bias).sigmoid()
    if qkv is not None:
        return ops.linear(x, qkv.weight, qkv_bias(attn)), None, None, gate
    q, k, v = linears(x, (attn.q_proj, attn.k_proj, attn.v_proj))
    if getattr(attn, "num_kv_groups", 1) > 1:
        k, v = (spread(part, attn.num_kv_heads, attn.num_kv_groups) for part in (k, v))
    return q, k, v, gate


def rotation(attn: Any, table: torch.Tensor | None) -> dict[str, Any]:
    """The arguments of ``ops.attention`` for timm's table of sines and cosines [..., N, 2D]."""
    if table is None:
        return {}
    sin, cos = table.chunk(2, -1)
    layout = "half" if getattr(attn, "rotate_half", False) else "interleaved"
    return dict(rope=(cos, sin), rope_layout=layout, num_prefix=getattr(attn, "num_prefix_tokens", 0))


def _norms_of_heads(attn: Any) -> list[Any]:
    """The modules q_norm and k_norm of an attention, or none; an Identity normalises nothing."""
    parts = attn._modules
    return [parts["q_norm"], parts["k_norm"]] if "q_norm" in parts and "k_norm" in parts else []


def head_norms_not_covered(attn: Any) -> str | None:
    """Why ``ops.attention`` does not normalise q and k as an attention does, or None: it takes one kind for both."""
    kinds = {norm_kind(norm) for norm in _norms_of_heads(attn) if not isinstance(norm, NOTHING)}
    return "it has a LayerNorm and an RMSNorm for q and k" if len(kinds) > 1 else None


def head_norms(attn: Any) -> dict[str, Any]:
    """The arguments of ``ops.attention`` for the normalisation of q and k over each head."""
    norms = _norms_of_heads(attn)
    kinds = [norm_kind(norm) for norm in norms if not isinstance(norm, NOTHING)]
    return dict(q_norm=norm_of(norms[0]), k_norm=norm_of(norms[1]), norm=kinds[0]) if kinds else {}


def attend(attn: Any, q: torch.Tensor, k: Any, v: Any, drop: float, **options: Any) -> torch.Tensor:
    """softmax(scale·q kᵀ) v of the projections, [B, N, H·D]."""
    options |= head_norms(attn)
    if type(attn) in _DIFFERENTIAL:
        return differential(attn, *q.chunk(3, dim=-1), **options)
    return ops.attention(q, attn.num_heads, head_scale(attn), k=k, v=v, dropout_p=drop, **options)


def differential(attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """The difference of two attention maps, times the values: [B, N, H·2D].

    q and k have 2H heads of size D, two in a row for each head of v, which is 2D wide; its halves go one by one
    through the attention of 2H heads. A bias with heads has those of v.
    Source: Ye et al., "Differential Transformer", 2024; timm/layers/diff_attention.py.
    """
    heads, scale = attn.num_heads, attn.head_dim**-0.5 if attn.fused_attn else attn.scale
    if (bias := options.get("bias")) is not None and bias.shape[1] > 1:
        options["bias"] = bias.repeat_interleave(2, dim=1)
    halves = []
    for half in v.unflatten(2, (heads, 2, -1)).unbind(3):
        both = half.unsqueeze(3).expand(-1, -1, -1, 2, -1).flatten(2)
        halves.append(ops.attention(q, 2 * heads, scale, k=k, v=both, **options).unflatten(2, (heads, 2, -1)))
    first, second = torch.cat(halves, dim=-1).unbind(3)
    out = first - attn._compute_lambda().type_as(q) * second
    return (normalise(out, attn.sub_norm) * (1 - attn.lambda_init)).flatten(2)


def hidden(mlp: Any, x: torch.Tensor, norm: Any) -> torch.Tensor:
    """The activations between the layers of an MLP, act(fc1(norm(x))), gated where the MLP is."""
    if (names := _SPLIT.get(type(mlp))) is not None:
        x = normalise(x, norm)
        if type(mlp) in GEGLU:
            x = normalise(x, mlp.norm)
        gate, value = linears(x, [getattr(mlp, name) for name in names[:2]])
        return mlp.act(gate) * value
    fc1, word = mlp.fc1, activation(mlp)
    if norm is None:
        x = ops.linear(x, fc1.weight, fc1.bias)
        x = x if word is None else activate(x, word)
    else:
        x = ops.layer_norm_linear(x, *known_norm(norm), fc1.weight, fc1.bias, word, norm=norm_kind(norm))
    if word is not None:
        return x
    if type(mlp) is Mlp:
        return mlp.act(x)
    first, second = x.chunk(2, dim=-1)
    return first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second


def last_layer(mlp: Any) -> Any:
    """The linear layer that an MLP ends in."""
    return getattr(mlp, _SPLIT[type(mlp)][2]) if type(mlp) in _SPLIT else mlp.fc2


def inner_norm(mlp: Any) -> dict[str, Any]:
    """The arguments of ``ops`` for the normalisation before the last layer of an MLP."""
    params = None if type(mlp) in GEGLU else norm_of(mlp.norm)
    return {} if params is None else dict(inner_norm=params, norm=norm_kind(mlp.norm))


class Path(NamedTuple):
    """The current rate of a DropPath, and whether it divides what it keeps by the keep rate."""

    rate: float = 0.0
    scale_by_keep: bool = True

    @classmethod
    def of(cls, module: Any) -> "Path":
        drops = type(module) is DropPath and module.training
        return cls(module.drop_prob, module.scale_by_keep) if drops else NO_PATH

    def row_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """The argument of ``ops`` for the samples x."""
        return drop_path_scale(x, self.rate, True, self.scale_by_keep)


NO_PATH = Path()


def attention_branch(
    attn: Any,
    x: torch.Tensor,
    norm: Any,
    gamma: torch.Tensor | None,
    path: Path,
    attn_drop: float,
    proj_drop: float,
    residual: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """residual + drop_path(gamma·attn(norm(x))); ``options`` are those of ``ops.attention``."""
    inner: dict[str, Any] = {}
    proj, out_norm = attn.proj, attn._modules.get("norm")
    row_scale = path.row_scale(x)
    q, k, v, gate = project(attn, x, norm)
    y = attend(attn, q, k, v, attn_drop, **options)
    if gate is not None:
        y = normalise(y, out_norm) * gate
    elif (params := norm_of(out_norm)) is not None:
        inner = dict(inner_norm=params, norm=norm_kind(out_norm))
    return ops.linear_residual(
        y, proj.weight, proj.bias, gamma, residual, row_scale=row_scale, dropout_p=proj_drop, **inner
    )


def mlp_branch(
    mlp: Any,
    x: torch.Tensor,
    norm: Any,
    gamma: torch.Tensor | None,
    path: Path,
    drops: tuple[float, float],
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + drop_path(gamma·mlp(norm(x))), x the residual by default; ``drops`` act on the hidden activations and
    after the last layer."""
    inner, fc2, row_scale = inner_norm(mlp), last_layer(mlp), path.row_scale(x)
    word = None if residual is not None or type(mlp) in _SPLIT else activation(mlp)
    if word is not None and (not inner or inner["norm"] == norm_kind(norm)):
        fc1, inner["norm"] = mlp.fc1, norm_kind(norm)
        return ops.layernorm_mlp(
            x, *known_norm(norm), fc1.weight, fc1.bias, fc2.weight, fc2.bias, word, gamma,
            row_scale=row_scale, dropout_p=drops[0], out_dropout_p=drops[1], **inner,
        )  # fmt: skip
    y = ops.dropout(hidden(mlp, x, norm), drops[0])
    residual = x if residual is None else residual
    return ops.linear_residual(
        y, fc2.weight, fc2.bias, gamma, residual, row_scale=row_scale, dropout_p=drops[1], **inner
    )


def mlp_drops(mlp: Any) -> tuple[float, float]:
    """The current dropout rates of an MLP: of the hidden activations, and after the last layer."""
    return drop_rate(mlp.drop1), drop_rate(mlp.drop2)


def attention_drop(attn: Any) -> float:
    """The current dropout rate of the probabilities. With fused_attn timm reads the training flag of the attention, not
    of its Dropout."""
    trains = attn.training if attn.fused_attn else attn.attn_drop.training
    return getattr(attn.attn_drop, "p", 0.0) if trains else 0.0


class Words(NamedTuple):
    """What the operations take beside tensors, in a pre-norm block that drops nothing and has only the usual parts."""

    num_heads: int
    scale: float
    activation: str
    eps1: float
    eps2: float
    norm1: str
    norm2: str


class Settings(NamedTuple):
    """The ``settings`` of a block."""

    paths: tuple[Path, Path]  # of the branches
    drops: tuple[float, float]  # dropout rates of the probabilities, and behind the projection
    mlp_drops: tuple[float, float]
    not_covered: str | None  # why these rates do not go together
    words: Words | None = None

    @property
    def drop_anything(self) -> bool:
        return any((*self.drops, *self.mlp_drops, *(path.rate for path in self.paths)))


class TimmBlock(Fused):
    """A block of attention and MLP: [B, N, C] → [B, N, C].

    ``ARGUMENTS`` are those of the library's forward behind x; ``BIAS`` is the one that is added to the scores.
    """

    STACKABLE = False
    RUNS_PARTS = True
    ARGUMENTS: tuple[str, ...] = ("attn_mask", "is_causal")
    BIAS = "attn_mask"
    DIMS = 3  # of x
    attn: Any
    mlp: Any
    norm1: Any
    norm2: Any
    drop_path1: Any
    drop_path2: Any

    def gammas(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """LayerScale of the two branches."""
        return None, None

    def not_covered(self) -> str | None:
        return head_norms_not_covered(self.attn)

    def bias(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """What is added to the scores: the mask that is given, or values of the block."""
        return mask

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        options = dict(zip(self.ARGUMENTS, args, strict=False)) | kwargs
        mask, rope = options.pop(self.BIAS, None), options.pop("rope", None)
        reason, settings = self.look()
        if reason := given(args[len(self.ARGUMENTS) :], options) or reason:
            return self.run_library(reason, x, *args, **kwargs)
        gammas = self.gammas()
        attn: Any = self._modules["attn"]
        weight = attn._modules["proj"]._parameters["weight"]
        if reason := not_taken(x, weight, *gammas, dims=self.DIMS) or settings.not_covered:
            return self.run_library(reason, x, *args, **kwargs)
        options = rotation(attn, rope)
        if (bias := self.bias(mask)) is not None:
            scores = x.shape[0], attn.num_heads, x.shape[1], x.shape[1]
            padding = self.BIAS == "attn_mask"
            options |= mask_options(self, bias, x.dtype, scores) if padding else {"bias": additive(bias, x.dtype)}
        if (prepared := prepared_for(self, x)) is not None:
            return prepared.run_block(x, **options)
        return backends.run_block(self.fused, x, gammas, settings, options)

    def fused_parts(self, *inputs: Any, **options: Any) -> Any:
        return self.fused(inputs[0], self.gammas(), self.settings()._replace(words=None), options)

    def layers_of_one_input(self) -> Sequence[Sequence[nn.Linear]]:
        attn, mlp = self.attn, self.mlp
        groups = [(attn.q_proj, attn.k_proj, attn.v_proj)] if attn.qkv is None else []
        names = _SPLIT.get(type(mlp))
        return groups if names is None else [*groups, [getattr(mlp, name) for name in names[:2]]]

    def settle_twin(self) -> None:
        attn = self.attn
        if attn._parameters.get("q_bias") is not None:
            attn.qkv._parameters["bias"], attn._parameters["q_bias"] = qkv_bias(attn), None

    def settings(self) -> Settings:
        attn, of_mlp = self.attn, mlp_drops(self.mlp)
        paths = Path.of(self.drop_path1), Path.of(self.drop_path2)
        drops = attention_drop(attn), drop_rate(attn.proj_drop)
        reason = self.drops_not_covered(paths[0].rate, *drops)
        reason = reason or drops_not_covered(*(path.rate for path in paths), *drops, *of_mlp)
        return Settings(paths, drops, of_mlp, reason)

    def drops_not_covered(self, path: float, attn_drop: float, proj_drop: float) -> str | None:
        """Why the block does not drop at these rates as the library does, or None."""
        return "its attention drops weights" if attn_drop and type(self.attn) in _DIFFERENTIAL else None

    def fused(self, x: torch.Tensor, gammas: Any, settings: Any, options: dict[str, Any]) -> torch.Tensor:
        """The block on the fused operations.

        Args:
            gammas: LayerScale of the branches.
            settings: the block's ``settings``.
            options: arguments of ``ops.attention``.
        """
        raise NotImplementedError


class PreNormBlock(TimmBlock):
    """x + drop_path1(gamma1·attn(norm1(x))), then the same with the MLP."""

    RUNS_PREPARED = True

    def not_folded(self) -> str | None:
        attn, mlp = self.attn, self.mlp
        inside = (getattr(attn, name, None) for name in ("q_norm", "k_norm", "norm"))
        norms = (self.norm1, self.norm2, mlp.norm, *inside)
        if len({norm_kind(norm) for norm in norms if not isinstance(norm, NOTHING)}) > 1:
            return "the blocks have LayerNorms and RMSNorms"
        if type(attn) in _DIFFERENTIAL or self.DIMS != 3:
            return f"the blocks have a {type(attn).__name__}"
        if getattr(attn, "gate", None) is not None:
            return "the blocks gate their attention"
        if getattr(attn, "num_kv_groups", 1) > 1:
            return "the blocks have fewer heads of keys than of queries"
        if type(mlp) in GEGLU:
            return "the blocks have a GeGluMlp, which normalises its input again"
        if type(mlp) not in SWIGLU and activation(mlp) is None:
            return f"mlp is {type(mlp).__name__} with {type(mlp.act).__name__}"
        return None

    def params(self) -> BlockParams:
        """The weights for folding, with q, k, v and with gate and value packed where they are layers of their own."""
        attn, mlp = self.attn, self.mlp
        if attn.qkv is None:
            qkv_weight, its_bias = pack((attn.q_proj, attn.k_proj, attn.v_proj))
        else:
            qkv_weight, its_bias = attn.qkv.weight, qkv_bias(attn)
        if type(mlp) in SWIGLU:
            (fc1_weight, fc1_bias), word = pack((mlp.fc1_g, mlp.fc1_x)), "swiglu"
        else:
            fc1_weight, fc1_bias, word = mlp.fc1.weight, mlp.fc1.bias, activation(mlp) or ""
        gamma1, gamma2 = self.gammas()
        inner = inner_norm(mlp)
        return BlockParams(
            norm1=Norm.of(self.norm1),
            qkv_weight=qkv_weight,
            qkv_bias=its_bias,
            proj_weight=attn.proj.weight,
            proj_bias=attn.proj.bias,
            norm2=Norm.of(self.norm2),
            fc1_weight=fc1_weight,
            fc1_bias=fc1_bias,
            fc2_weight=mlp.fc2.weight,
            fc2_bias=mlp.fc2.bias,
            num_heads=attn.num_heads,
            scale=head_scale(attn),
            activation=word,
            gamma1=gamma1,
            gamma2=gamma2,
            norm=norm_kind(self.norm1),
            out_norm=norm_of(getattr(attn, "norm", None)),
            inner_norm=inner.get("inner_norm"),
            **{name: norm for name, norm in head_norms(attn).items() if name != "norm"},
        )

    def settings(self) -> Settings:
        found = super().settings()
        attn, mlp = self.attn, self.mlp
        inside = (getattr(attn, name, None) for name in ("gate", "norm", "q_norm", "k_norm"))
        plain = attn.qkv is not None and all(isinstance(part, NOTHING) for part in (*inside, mlp.norm))
        word = None if type(attn) in _DIFFERENTIAL or type(mlp) in _SPLIT else activation(mlp)
        if not plain or word is None or found.drop_anything:
            return found
        norms = (self.norm1, self.norm2)
        if any(norm.eps is None or norm.eps < 0 for norm in norms) or isinstance(self.norm1, NOTHING):
            return found
        words = Words(attn.num_heads, head_scale(attn), word, self.norm1.eps, self.norm2.eps, *map(norm_kind, norms))
        return found._replace(words=words)

    def fused(self, x: torch.Tensor, gammas: Any, settings: Any, options: dict[str, Any]) -> torch.Tensor:
        if settings.words is not None:
            return self.simple(x, gammas, settings.words, options)
        paths, drops = settings.paths, settings.drops
        x = attention_branch(self.attn, x, self.norm1, gammas[0], paths[0], drops[0], drops[1], x, **options)
        return mlp_branch(self.mlp, x, self.norm2, gammas[1], paths[1], settings.mlp_drops)

    def simple(self, x: torch.Tensor, gammas: Any, words: Words, options: dict[str, Any]) -> torch.Tensor:
        """``fused`` of a block that drops nothing and has no norm, gate or projection beside the usual ones."""
        parts: dict[str, Any] = self._modules
        attn, mlp = parts["attn"], parts["mlp"]._modules
        norm1, norm2, qkv, proj, fc1, fc2 = (
            part._parameters
            for part in (
                parts["norm1"], parts["norm2"], attn._modules["qkv"], attn._modules["proj"], mlp["fc1"], mlp["fc2"]
            )
        )  # fmt: skip
        direct = select.is_direct()
        run: Any = reference if direct else ops
        attend = run.attention if direct and options.keys() <= _ADDED else ops.attention
        bias = qkv_bias(attn) if attn._parameters.get("q_bias") is not None else qkv["bias"]
        y = run.layer_norm_linear(
            x, norm1["weight"], norm1.get("bias"), words.eps1, qkv["weight"], bias, norm=words.norm1
        )
        y = attend(y, words.num_heads, words.scale, **options)
        x = run.linear_residual(y, proj["weight"], proj["bias"], gammas[0], x)
        return run.layernorm_mlp(
            x, norm2["weight"], norm2.get("bias"), words.eps2, fc1["weight"], fc1["bias"], fc2["weight"], fc2["bias"],
            words.activation, gammas[1], norm=words.norm2,
        )  # fmt: skip


class PostNormBlock(TimmBlock):
    """x + drop_path1(norm1(attn(x))), then the same with the MLP."""

    def fused(self, x: torch.Tensor, gammas: Any, settings: Any, options: dict[str, Any]) -> torch.Tensor:
        paths, drops, (hidden_drop, out_drop) = settings.paths, settings.drops, settings.mlp_drops
        attn, mlp, proj, fc2 = self.attn, self.mlp, self.attn.proj, last_layer(self.mlp)
        q, k, v, gate = project(attn, x, None)
        y = normalise(attend(attn, q, k, v, drops[0], **options), getattr(attn, "norm", None))
        y = ops.linear(y if gate is None else y * gate, proj.weight, proj.bias)
        x = added(x, normalise(ops.dropout(y, drops[1]), self.norm1), paths[0])
        y = ops.dropout(hidden(mlp, x, None), hidden_drop)
        y = ops.linear(y if type(mlp) in GEGLU else normalise(y, mlp.norm), fc2.weight, fc2.bias)
        return added(x, normalise(ops.dropout(y, out_drop), self.norm2), paths[1])


def added(x: torch.Tensor, y: torch.Tensor, path: Path) -> torch.Tensor:
    """x + drop_path(y)."""
    row_scale = path.row_scale(x)
    return x + (y if row_scale is None else y * row_scale.view(-1, *[1] * (y.dim() - 1)))
