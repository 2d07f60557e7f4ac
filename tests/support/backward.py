"""Gradients of the operations other than attention, of random cases, and their metamorphic properties.

Forward and backward are the Triton kernels' own, interpreted. Eager is autograd of the reference at the dtype, truth is
the same in float64 (``trained_operations``). A case of each operation says which tensors it has; ``BackwardCase`` has
what is the same for all. LayerNorm's properties hold bit for bit. The other operations have products of PyTorch's, whose sums
on a CPU depend on where a tensor lies: of those the second run keeps the budget of the first.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from support import properties, sanitizer, trained_operations
from vit_fast.kernels import configs
from vit_fast.kernels.activation_names import GATED

BY_IMAGE = ("x", "images", "residual", "residual_grad", "row_scale")  # tensors whose first axis is the batch


@dataclass(frozen=True)
class BackwardCase(properties.Case):
    """Inputs are the incoming gradient and the tensors of the operation in the order of ``names``, None where absent.

    A subclass has ``operation``, ``names``, ``tensors(draw)``, the tensors by name in float64, and ``words()``.
    """

    kind: ClassVar[str] = "gradient"
    operation: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    wide: ClassVar[tuple[str, ...]] = ()  # tensors that may be float32 beside 16-bit weights

    dtype: str
    stream: str  # dtype of the tensors in ``wide``
    batch: int
    values: str
    layout: str
    relation: str
    seed: int

    def tensors(self, draw) -> dict[str, Any]:
        raise NotImplementedError

    def words(self) -> dict[str, Any]:
        return {}

    def config(self) -> Any:
        return None

    def row_scale(self):
        return (torch.arange(self.batch, dtype=torch.float64) % 3 - 1).abs() * 1.25

    def inputs(self, seed, filled=properties.filled):
        generator = properties.generator_of(seed)

        def draw(*shape, scale=1.0, values="normal"):
            return filled(shape, values, generator) * scale

        def rounded(name, t):
            if t is None:
                return None
            t = t.to(properties.DTYPES[self.dtype])  # so that float32 tensors hold numbers of 16 bits too
            return t.to(properties.DTYPES[self.stream]) if name in self.wide else t

        made = self.tensors(draw)
        tensors = [rounded(name, made[name]) for name in self.names]
        out = trained_operations.formula(self.problem(*(t if t is None else t.double() for t in tensors)))
        return rounded("grad", draw(*out.shape)), *tensors

    def problem(self, *tensors):
        given = dict(zip(self.names, tensors, strict=True))
        given.pop("residual_grad", None)
        return trained_operations.Problem(self.operation, given, self.words())

    @property
    def results(self):
        """The names of the tensors that get gradients."""
        return trained_operations.NAMES[self.operation]

    def kernel(self, grad, *tensors, needs=None):
        problem = self.problem(*tensors)
        past = dict(zip(self.names, tensors, strict=True)).get("residual_grad")
        more = {} if past is None else dict(residual_grad=past)
        _, saved = trained_operations.forward(problem)
        found = trained_operations.backward(problem, saved, grad, needs, self.config(), **more)
        present = [problem.tensors[name] is not None for name in self.results]
        if needs is not None:
            assert [result is not None for result in found] == [n and p for n, p in zip(needs, present, strict=True)]
        return [result.contiguous() for result in found if result is not None]  # as the operator does

    def autograd(self, grad, tensors, dtype=None):
        given = [t if t is None else t.to(dtype or t.dtype) for t in tensors]
        found = trained_operations.autograd(self.problem(*given), grad.to(dtype or grad.dtype))
        past = dict(zip(self.names, given, strict=True)).get("residual_grad")
        if past is not None:
            found["x"] = found["x"] + past
        return [found[name].contiguous() for name in self.results if name in found]

    def eager(self, grad, *tensors):
        """In one dtype: beside a float32 stream the kernels round what they multiply as they do without."""
        found = self.autograd(grad, tensors, properties.DTYPES[self.dtype])
        present = [t for n, t in zip(self.names, tensors, strict=True) if n in self.results and t is not None]
        return [result.to(t.dtype) for result, t in zip(found, present, strict=True)]

    def golden(self, grad, *tensors):
        return self.autograd(grad, tensors, torch.float64)

    def order(self, grad, *tensors):
        """Some times what float32 does to each result, measured on the reference; a sum of few terms may be lucky."""
        narrow, golden = self.autograd(grad, tensors, torch.float32), self.golden(grad, *tensors)
        changes = [(n.double() - g).abs().max().item() if g.numel() else 0.0 for n, g in zip(narrow, golden)]
        return [8 * change + 2.0**-22 * g.abs().max().item() for change, g in zip(changes, golden)]

    def named(self, inputs, results):
        """(name, result) of the gradients that there are."""
        given = dict(zip(self.names, inputs[1:], strict=True))
        return list(zip([name for name in self.results if given[name] is not None], results, strict=True))

    @property
    def by_image(self):
        return BY_IMAGE

    def of_images(self, inputs, images):
        """The inputs of some images, which ``images`` takes out of the first axis."""
        grad, *tensors = inputs
        pairs = zip(self.names, tensors, strict=True)
        return images(grad), *(images(t) if name in self.by_image and t is not None else t for name, t in pairs)

    @property
    def drops(self):
        return any(self.words().get(name, 0.0) > 0 for name in ("p", "out_p"))

    def same(self, inputs, actual, results):
        """Fails where a second run does not give the results of the first."""
        self.within_budget(inputs, actual)

    def relation_program_order(self, inputs, results):
        for order in (-1, self.seed):
            with sanitizer.program_order(order):
                self.same(inputs, self.kernel(*inputs), results)

    def relation_layout(self, inputs, results):
        self.same(inputs, self.kernel(*properties.all_laid_out(self.layout, *inputs)), results)

    def relation_layout_of_the_gradient(self, inputs, results):
        grad, *tensors = inputs
        self.same(inputs, self.kernel(properties.laid_out(grad, self.layout), *tensors), results)

    def relation_images_permuted(self, inputs, results):
        if self.drops:
            return
        order = properties.permutation(self.batch, self.seed)
        actual = self.kernel(*self.of_images(inputs, lambda t: t[order]))
        back = torch.argsort(order)
        named = self.named(inputs, actual)
        self.within_budget(inputs, [t[back].contiguous() if n in self.by_image else t for n, t in named])

    def relation_first_image_alone(self, inputs, results):
        """Its own gradients; also with dropout, whose mask begins with it."""
        alone = replace(self, batch=1).kernel(*self.of_images(inputs, lambda t: t[:1]))
        wanted = [t[:1] for n, t in self.named(inputs, results) if n in self.by_image]
        actual = [t for n, t in self.named(inputs, alone) if n in self.by_image]
        for one, other in zip(actual, wanted, strict=True):
            allowed = 4 * torch.finfo(other.dtype).eps * other.abs().max()
            assert (one - other).abs().max() <= allowed + max(self.order(*inputs)), f"relation '{self.relation}'"

    def relation_an_image_without_gradient(self, inputs, results):
        """It gets none, and those of the other images' pixels or rows stay as they are."""
        grad, *tensors = inputs
        image = self.seed % self.batch
        grad = grad.clone()
        grad[image] = 0
        tensors = [
            torch.zeros_like(t) if n == "residual_grad" and t is not None else t
            for n, t in zip(self.names, tensors, strict=True)
        ]
        actual = self.kernel(grad, *tensors)
        self.within_budget((grad, *tensors), actual)
        for name, result in self.named(inputs, actual):
            assert name not in self.by_image or not result[image].any()

    def relation_no_gradient(self, inputs, results):
        given = [t if t is None else torch.zeros_like(t) for t in inputs[:1]]
        past = [n == "residual_grad" for n in self.names]
        tensors = [torch.zeros_like(t) if p and t is not None else t for t, p in zip(inputs[1:], past, strict=True)]
        assert not any(result.any() for result in self.kernel(*given, *tensors))

    def relation_gradient_divided(self, inputs, results):
        grad, *tensors = inputs
        if not all(properties.can_shrink(t) for t in (grad, *results)):
            return
        quartered = [
            t / 4 if n == "residual_grad" and t is not None else t for n, t in zip(self.names, tensors, strict=True)
        ]
        self.same(inputs, [t * 4 for t in self.kernel(grad / 4, *quartered)], results)

    def relation_sum_of_gradients(self, inputs, results):
        """The gradients of two disjoint parts of the rows add up to those of all."""
        grad, *tensors = inputs
        part = (torch.arange(grad.shape[1]) % 2 == self.seed % 2)[None, :, None]
        first, second = grad * part, grad * ~part
        none = [
            torch.zeros_like(t) if n == "residual_grad" and t is not None else t
            for n, t in zip(self.names, tensors, strict=True)
        ]
        pairs = zip(self.kernel(first, *tensors), self.kernel(second, *none), results, strict=True)
        for (one, other, whole), order in zip(pairs, self.order(*inputs), strict=True):
            largest = max(t.abs().max().item() for t in (one, other, whole))
            allowed = 2 * torch.finfo(whole.dtype).eps * largest + 2 * order
            assert (one.double() + other.double() - whole.double()).abs().max() <= allowed, self.relation

    def relation_only_what_is_needed(self, inputs, results):
        """A random choice of the gradients: those keep the budget, the others are None (``kernel`` looks)."""
        draw = properties.generator_of(self.seed + 3)
        needs = (torch.rand(len(self.results), generator=draw) < 0.5).tolist()
        actual = iter(self.kernel(*inputs, needs=needs))
        given = dict(zip(self.names, inputs[1:], strict=True))
        merged = []
        for name, result in self.named(inputs, results):
            wanted = needs[self.results.index(name)] and given[name] is not None
            merged.append(next(actual) if wanted else result)
        self.within_budget(inputs, merged)


@dataclass(frozen=True)
class LayerNormBwdCase(BackwardCase):
    operation: ClassVar[str] = "layer_norm"
    names: ClassVar[tuple[str, ...]] = ("x", "weight", "bias", "residual_grad")
    wide: ClassVar[tuple[str, ...]] = ("weight", "bias")

    tokens: int
    width: int
    weight: bool
    bias: bool
    residual: bool  # whether a gradient of the residual is added to that of x
    norm: str
    mean: float
    rows: int
    block: int  # below the width, the kernels for wide rows run
    chunk: int
    programs: int

    def tensors(self, draw):
        shape = (self.batch, self.tokens, self.width)
        return dict(
            x=draw(*shape, values=self.values) + self.mean,
            weight=1 + draw(self.width, scale=0.3) if self.weight else None,
            bias=draw(self.width) if self.bias else None,
            residual_grad=draw(*shape) if self.residual else None,
        )

    def words(self):
        return dict(norm=self.norm)

    def config(self):
        return configs.LayerNormBwdConfig(self.rows, self.block, 4, self.programs, self.chunk)

    def same(self, inputs, actual, results):
        self.same_bits(actual, results)

    def relation_rows_permuted(self, inputs, results):
        order = properties.permutation(self.batch * self.tokens, self.seed)
        grad, x, weight, bias, past = inputs
        moved = properties.each(lambda t: t.flatten(0, 1)[order], grad, x, past)
        (dx, *_) = self.kernel(moved[0], moved[1], weight, bias, moved[2])
        self.same_bits([dx], [results[0].flatten(0, 1)[order]])

    def relation_other_programs(self, inputs, results):
        """dx does not depend on how rows are dealt out, and the sums keep the budget."""
        other = replace(self, programs=1 if self.programs > 1 else 7, chunk=3 * self.chunk)
        actual = other.kernel(*inputs)
        self.same_bits(actual[:1], results[:1])
        self.within_budget(inputs, actual)


@dataclass(frozen=True)
class LayerNormLinearBwdCase(BackwardCase):
    operation: ClassVar[str] = "layer_norm_linear"
    names: ClassVar[tuple[str, ...]] = ("x", "ln_weight", "ln_bias", "weight", "bias")
    wide: ClassVar[tuple[str, ...]] = ("x", "ln_weight", "ln_bias")

    tokens: int
    width: int
    features: int  # of the output; a gated activation has twice as many rows in the weight
    activation: str | None
    optional: bool  # LayerNorm parameters
    bias: bool
    norm: str

    def tensors(self, draw):
        rows = self.features * (2 if self.activation in GATED else 1)
        return dict(
            x=draw(self.batch, self.tokens, self.width, values=self.values),
            ln_weight=1 + draw(self.width, scale=0.2) if self.optional else None,
            ln_bias=draw(self.width, scale=0.2) if self.optional else None,
            weight=draw(rows, self.width, scale=self.width**-0.5),
            bias=draw(rows, scale=0.2) if self.bias else None,
        )

    def words(self):
        return dict(norm=self.norm, activation=self.activation)


@dataclass(frozen=True)
class LinearResidualBwdCase(BackwardCase):
    operation: ClassVar[str] = "linear_residual"
    names: ClassVar[tuple[str, ...]] = (
        "x", "weight", "bias", "gamma", "residual", "row_scale", "inner_weight", "inner_bias",
    )  # fmt: skip
    wide: ClassVar[tuple[str, ...]] = ("grad", "residual", "row_scale", "gamma", "inner_weight", "inner_bias")

    tokens: int
    width: int
    features: int
    bias: bool
    gamma: bool
    scaled: bool  # whether images have a row_scale
    inner: bool  # a norm before the product
    norm: str
    p: float

    def tensors(self, draw):
        return dict(
            x=draw(self.batch, self.tokens, self.width, values=self.values),
            weight=draw(self.features, self.width, scale=self.width**-0.5),
            bias=draw(self.features, scale=0.2) if self.bias else None,
            gamma=1 + draw(self.features, scale=0.3) if self.gamma else None,
            residual=draw(self.batch, self.tokens, self.features),
            row_scale=self.row_scale() if self.scaled else None,
            inner_weight=1 + draw(self.width, scale=0.2) if self.inner else None,
            inner_bias=draw(self.width, scale=0.2) if self.inner else None,
        )

    def words(self):
        return dict(norm=self.norm, inner=self.inner, p=self.p)

    def relation_dropped_images(self, inputs, results):
        """Drop path: an image whose scale is 0 gets no gradient past the residual."""
        grad, *tensors = inputs
        tensors[5] = torch.zeros(self.batch, dtype=grad.dtype)
        actual = self.kernel(grad, *tensors)
        assert not any(t.any() for n, t in self.named((grad, *tensors), actual) if n != "row_scale")

    def relation_probability_of_almost_zero(self, inputs, results):
        """All elements are kept, by the code of dropout: as without dropout."""
        replace(self, p=0.0).within_budget(inputs, replace(self, p=2.0**-60).kernel(*inputs))

    def relation_integers(self, inputs, results):
        """Small integers have exact sums: only the rounding to each result's dtype is left."""
        plain = replace(self, inner=False, p=0.0, stream=self.dtype)

        def filled(shape, _, generator):
            return properties.integers(shape, 3, generator)

        grad, x, weight, bias, gamma, *rest = plain.inputs(self.seed, filled)
        weight, bias, gamma = (t if t is None else t.round() for t in ((weight * self.width**0.5), bias, gamma))
        integers = (grad, x, weight, bias, gamma, rest[0], None, None, None)
        for name, result, golden in zip(
            [n for n in self.results if dict(zip(self.names, integers[1:]))[n] is not None],
            plain.kernel(*integers), plain.golden(*integers), strict=True,
        ):  # fmt: skip
            assert torch.equal(result, golden.to(result.dtype)), name


@dataclass(frozen=True)
class LayerNormMlpBwdCase(BackwardCase):
    operation: ClassVar[str] = "layernorm_mlp"
    names: ClassVar[tuple[str, ...]] = (
        "x", "ln_weight", "ln_bias", "w1", "b1", "w2", "b2", "gamma", "row_scale", "inner_weight", "inner_bias",
    )  # fmt: skip
    wide: ClassVar[tuple[str, ...]] = (
        "grad", "x", "ln_weight", "ln_bias", "gamma", "row_scale", "inner_weight", "inner_bias",
    )  # fmt: skip

    tokens: int
    width: int
    hidden: int
    activation: str
    optional: bool  # LayerNorm parameters
    biases: bool
    gamma: bool
    scaled: bool
    inner: bool
    recompute: bool
    norm: str
    p: float
    out_p: float
    block_m: int
    block_n: int
    block_k: int
    tma: bool

    def tensors(self, draw):
        rows = self.hidden * (2 if self.activation in GATED else 1)
        return dict(
            x=draw(self.batch, self.tokens, self.width, values=self.values),
            ln_weight=1 + draw(self.width, scale=0.2) if self.optional else None,
            ln_bias=draw(self.width, scale=0.2) if self.optional else None,
            w1=draw(rows, self.width, scale=self.width**-0.5),
            b1=draw(rows, scale=0.2) if self.biases else None,
            w2=draw(self.width, self.hidden, scale=self.hidden**-0.5),
            b2=draw(self.width, scale=0.2) if self.biases else None,
            gamma=1 + draw(self.width, scale=0.3) if self.gamma else None,
            row_scale=self.row_scale() if self.scaled else None,
            inner_weight=1 + draw(self.hidden, scale=0.2) if self.inner else None,
            inner_bias=draw(self.hidden, scale=0.2) if self.inner else None,
        )

    def words(self):
        return dict(
            norm=self.norm, activation=self.activation, inner=self.inner, recompute=self.recompute, p=self.p,
            out_p=self.out_p,
        )  # fmt: skip

    def config(self):
        return configs.LinearConfig(self.block_m, self.block_n, self.block_k, 2, 4, 2, self.tma)

    def relation_descriptors(self, inputs, results):
        self.same(inputs, replace(self, tma=not self.tma).kernel(*inputs), results)

    def relation_computed_again(self, inputs, results):
        """z kept or computed again."""
        self.within_budget(inputs, replace(self, recompute=not self.recompute).kernel(*inputs))

    def relation_dropped_images(self, inputs, results):
        """Drop path: an image whose scale is 0 hands the incoming gradient on."""
        grad, *tensors = inputs
        tensors[8] = torch.zeros(self.batch, dtype=grad.dtype)
        for name, result in self.named((grad, *tensors), self.kernel(grad, *tensors)):
            if name == "x":
                self.same_bits([result], [grad])
            else:
                assert name == "row_scale" or not result.any()

    def relation_probability_of_almost_zero(self, inputs, results):
        almost, none = replace(self, p=2.0**-60, out_p=2.0**-60), replace(self, p=0.0, out_p=0.0)
        none.within_budget(inputs, almost.kernel(*inputs))


@dataclass(frozen=True)
class PatchEmbedBwdCase(BackwardCase):
    operation: ClassVar[str] = "patch_embed"
    names: ClassVar[tuple[str, ...]] = ("images", "weight", "bias", "pos_embed", "prefix_tokens")
    wide: ClassVar[tuple[str, ...]] = ("images", "pos_embed", "prefix_tokens")

    channels: int
    size: tuple[int, int]
    patch: tuple[int, int]
    stride: tuple[int, int]
    features: int
    prefix: int  # at least 1, or −1: None
    per_image: bool
    bias: bool
    pos: bool
    channels_last: bool

    def tensors(self, draw):
        rows, columns = ((n - p) // s + 1 for n, p, s in zip(self.size, self.patch, self.stride, strict=True))
        taps = self.channels * self.patch[0] * self.patch[1]
        of_prefix = (self.batch if self.per_image else 1, self.prefix, self.features)
        return dict(
            images=draw(self.batch, self.channels, *self.size, values=self.values),
            weight=draw(self.features, self.channels, *self.patch, scale=taps**-0.5),
            bias=draw(self.features, scale=0.2) if self.bias else None,
            pos_embed=draw(1, rows * columns, self.features) if self.pos else None,
            prefix_tokens=draw(*of_prefix) if self.prefix >= 0 else None,
        )

    def inputs(self, seed, filled=properties.filled):
        grad, images, *rest = super().inputs(seed, filled)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return grad, images, *rest

    def words(self):
        return dict(stride=self.stride)

    @property
    def by_image(self):
        return ("images", "prefix_tokens") if self.per_image else ("images",)

    def relation_integers(self, inputs, results):
        """Small integers have exact sums: only the rounding to each result's dtype is left."""
        plain = replace(self, stream=self.dtype)

        def filled(shape, _, generator):
            return properties.integers(shape, 2, generator)

        grad, images, weight, *rest = plain.inputs(self.seed, filled)
        taps = self.channels * self.patch[0] * self.patch[1]
        integers = (grad, images, (weight * taps**0.5).round(), *rest)
        for result, golden in zip(plain.kernel(*integers), plain.golden(*integers), strict=True):
            assert torch.equal(result, golden.to(result.dtype))
