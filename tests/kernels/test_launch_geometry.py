"""Grids and index arithmetic of every kernel at sizes that nobody can allocate.

The launch functions run on meta tensors, with recorders in place of the kernels. Then the device code itself runs on
stand-ins for Triton's values (``support.launch_geometry``): an integer that leaves its width is an error, and what the
stores address tells which tile of the output a program writes.

Shapes are random over what a ViT can have, with batches up to 2³¹. Expected grids and tiles come from the shapes alone.
"""

import collections
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from support import properties
from support.launch_geometry import (
    DTYPES,
    GRID_LIMIT,
    MEMORY,
    bytes_of,
    ceiling,
    meta,
    random_batch,
    random_tokens,
    random_width,
    recording,
)  # fmt: skip
from vit_fast.kernels import (
    attention,
    configs,
    layer_norm,
    layernorm_mlp,
    linear,
    patch_embed,
    prepared_blocks,
    prepared_linear,
)
from vit_fast.kernels import fp8_blocks as fp8_blocks_kernels
from vit_fast.kernels.arguments import MAX_ROWS, UnsupportedError
from vit_fast.kernels.prepared_layer import PreparedLayer

PROBLEMS = 2000 if properties.FULL else 600


@dataclass
class Problem:
    """One call of an operation and what its launches must be, told by the shapes alone."""

    memory: int  # bytes of what goes in and comes out
    out: torch.Tensor
    programs: Callable  # launch → the least number of programs
    tiles: Callable  # launch → the number of tiles of the output
    is_corner: Callable  # launch, element of out → whether a tile begins there
    passed: Callable  # launch → pairs of an argument as it came and as it must be

    def written(self, launch, program):
        """The first elements of the tiles that a program writes."""
        return [min(store.first for store in launch.run(program).out_ptr.stores)]


class LayerNorm(Problem):
    widest = 65536

    @staticmethod
    def call(x, width):
        """(the output, its elements a row)"""
        return layer_norm.layer_norm_fwd(x, meta(width), meta(width), 1e-6)[0], width

    @classmethod
    def random(cls, batch, tokens):
        width, skip, dtype = random_width(), random.choice((0, 0, 1)), random.choice(DTYPES)
        if random.random() < 0.1:
            width = random.randint(cls.widest // 4 + 1, cls.widest)
        x = meta(batch, tokens + skip, width, dtype=dtype)[:, skip:]
        out, elements = cls.call(x, width)
        rows = batch * tokens

        def per_program(launch):
            return launch.arguments.get("ROWS", 1)

        def passed(launch):
            yield launch.width, width
            yield width <= launch.BLOCK, "ROWS" in launch.arguments
            yield launch.arguments.get("rows", rows), rows
            yield launch.stride_xc, 1
            if launch.TWO_STRIDES:
                yield (launch.stride_xo, launch.stride_xi, launch.inner), (*x.stride()[:2], tokens)
            elif rows > 1:
                yield launch.stride_xi, x.stride(1 if tokens > 1 else 0)

        return cls(
            bytes_of(x, out),
            out,
            lambda launch: ceiling(rows, per_program(launch)),
            lambda launch: ceiling(rows, per_program(launch)),
            lambda launch, element: element % (per_program(launch) * elements) == 0,
            passed,
        )

    def written(self, launch, program):
        seen = launch.run(program)
        (y,), (mean,), (rstd,) = seen.y_ptr.stores[:1], seen.mean_ptr.stores, seen.rstd_ptr.stores
        assert mean.first == rstd.first and y.first == mean.first * self.out.shape[-1]
        return [y.first]


class RowPartials(LayerNorm):
    widest = 16384

    @staticmethod
    def call(x, width):
        partials = layer_norm.row_partials(x)
        assert partials.width >= width and partials.values.shape == (2, 1, x.numel() // width)
        return partials.values, 1

    def written(self, launch, program):
        mean, squares = launch.run(program).partials_ptr.stores
        assert squares.first == mean.first + self.out.shape[2]
        return [mean.first]


class RowStatistics(Problem):
    @classmethod
    def random(cls, batch, tokens):
        width, part, rows = random_width(), random.choice((16, 32, 128, 1024)), batch * tokens
        values = meta(2, ceiling(width, part), rows, dtype=torch.float32)
        out = layer_norm.row_statistics(layer_norm.RowPartials(values, part), width, 1e-5).values

        def passed(launch):
            yield (launch.rows, launch.width, launch.eps, launch.PARTIAL_WIDTH), (rows, width, 1e-5, part)

        def count(launch):
            return ceiling(rows, launch.ROWS)

        def is_corner(launch, element):
            return element < rows and element % launch.ROWS == 0

        return cls(bytes_of(values, out), out, count, count, is_corner, passed)

    def written(self, launch, program):
        mean, rstd = launch.run(program).statistics_ptr.stores
        assert rstd.first == mean.first + self.out.shape[1]
        return [mean.first]


class Linear(Problem):
    @classmethod
    def random(cls, batch, tokens):
        dtype, activation = random.choice(DTYPES), random.choice((None, "gelu", "swiglu"))
        in_features, out_features = random_width(), random.choice((1, 3, 4)) * random_width()
        x = meta(batch, tokens, in_features, dtype=dtype)
        weight = meta(out_features * (1 + (activation == "swiglu")), in_features, dtype=dtype)
        if random.random() < 0.2:
            weight = weight.T.contiguous().T
        residual = meta(batch, tokens + 1, out_features, dtype=dtype)[:, 1:] if activation is None else None
        row_scale = meta(batch) if activation is None else None
        bias = meta(weight.shape[0], dtype=dtype)
        out = linear.linear(x, weight, bias, activation, residual=residual, row_scale=row_scale)
        rows = batch * tokens

        def passed(launch):
            yield (launch.rows, launch.out_features, launch.in_features), (rows, out_features, in_features)
            yield (launch.stride_xi, launch.stride_xk), (in_features, 1)
            yield (launch.stride_wn, launch.stride_wk), weight.stride()
            if residual is not None:
                yield launch.rows_per_sample, tokens
                if launch.RESIDUAL_TWO_STRIDES:
                    strides = launch.residual.stride_outer, launch.residual.stride_inner
                    yield (*strides, launch.residual_inner), (*residual.stride()[:2], tokens)

        def count(launch):
            return ceiling(rows, launch.BLOCK_M) * ceiling(out_features, launch.BLOCK_N)

        def is_corner(launch, element):
            row, column = divmod(element, out_features)
            return row % launch.BLOCK_M == column % launch.BLOCK_N == 0

        return cls(bytes_of(x, weight, residual, out), out, count, count, is_corner, passed)


class LinearWithPartials(Problem):
    @classmethod
    def random(cls, batch, tokens):
        dtype, in_features, out_features = random.choice(DTYPES), random_width(), random_width()
        x, weight = meta(batch, tokens, in_features, dtype=dtype), meta(out_features, in_features, dtype=dtype)
        residual = meta(batch, tokens, out_features, dtype=dtype)
        order = dict(reverse_tiles=random.choice((False, True)))
        out, partials = linear.linear_with_partials(x, weight, meta(out_features), residual, **order)
        rows = batch * tokens

        def passed(launch):
            yield (launch.rows, launch.out_features, launch.in_features), (rows, out_features, in_features)
            yield partials.width, launch.BLOCK_N
            yield partials.values.shape, (2, ceiling(out_features, partials.width), rows)
            yield launch.partials_out_ptr is partials.values, True
            if launch.SPLIT_K > 1:
                workspace, semaphore = launch.split_k
                yield workspace.shape, (count(launch), launch.SPLIT_K, launch.BLOCK_M, launch.BLOCK_N)
                yield semaphore.numel() >= count(launch), True

        def count(launch):
            return ceiling(rows, launch.BLOCK_M) * ceiling(out_features, launch.BLOCK_N)

        def is_corner(launch, element):
            row, column = divmod(element, out_features)
            return row % launch.BLOCK_M == column % launch.BLOCK_N == 0

        memory = bytes_of(x, weight, residual, out, partials.values)
        return cls(memory, out, lambda launch: count(launch) * launch.SPLIT_K, count, is_corner, passed)

    def written(self, launch, program):
        """Where each of the programs of a tile would finish it."""
        seen = launch.run(program)
        if launch.SPLIT_K > 1:
            tile, size = program // launch.SPLIT_K, launch.BLOCK_M * launch.BLOCK_N
            assert [store.first for store in seen.split_k.workspace_ptr.stores] == [program * size]
            parts = range(tile * launch.SPLIT_K, (tile + 1) * launch.SPLIT_K)
            assert [load.first for load in seen.split_k.workspace_ptr.loads] == [part * size for part in parts]
            assert [count.first for count in seen.split_k.semaphore_ptr.stores] == [tile]
        corner = min(store.first for store in seen.out_ptr.stores)
        row, column = divmod(corner, self.out.shape[-1])
        _, parts, rows = launch.partials_out_ptr.shape
        stores = [store.first for store in seen.partials_out_ptr.stores]
        assert stores == [(column // launch.BLOCK_N + which * parts) * rows + row for which in range(2)]
        return [corner]


class FoldedLinear(Problem):
    @classmethod
    def random(cls, batch, tokens):
        dtype, activation = random.choice(DTYPES), random.choice((None, "gelu", "swiglu"))
        in_features, out_features = random_width(), random.choice((1, 3, 4)) * random_width()
        x, part = meta(batch, tokens, in_features, dtype=dtype), random.choice((16, 32, 64, 1024, 16384))
        weight = meta(out_features * (1 + (activation == "swiglu")), in_features, dtype=dtype)
        rows, parts = batch * tokens, ceiling(in_features, part)
        vector, finalised = meta(weight.shape[0], dtype=torch.float32), random.random() < 0.3
        values = meta(2, rows, dtype=torch.float32) if finalised else meta(2, parts, rows, dtype=torch.float32)
        part = 0 if finalised else part
        statistics = layer_norm.RowStatistics(values) if finalised else layer_norm.RowPartials(values, part)
        out = linear.folded_linear(x, statistics, 1e-6, weight, vector, vector, activation)

        def passed(launch):
            yield (launch.rows, launch.out_features, launch.in_features), (rows, out_features, in_features)
            yield (launch.norm.statistics_ptr is values, launch.norm.column_sum_ptr is vector), (True, True)
            yield (launch.PARTIAL_WIDTH, launch.norm.eps), (part, 1e-6)
            step = next(size for size in (1, 2, 4, 8, 16, 32) if size >= parts or size == 32)
            yield launch.PARTIALS_PER_STEP, 1 if finalised else step

        def count(launch):
            return ceiling(rows, launch.BLOCK_M) * ceiling(out_features, launch.BLOCK_N)

        def is_corner(launch, element):
            row, column = divmod(element, out_features)
            return row % launch.BLOCK_M == column % launch.BLOCK_N == 0

        return cls(bytes_of(x, weight, values, out), out, count, count, is_corner, passed)

    def written(self, launch, program):
        """Partials are read PARTIALS_PER_STEP at a time, means and M2, up to the last one; or mean and rstd once."""
        seen = launch.run(program)
        corner = min(store.first for store in seen.out_ptr.stores)
        _, *parts, rows = launch.norm.statistics_ptr.shape
        parts = parts[0] if parts else 1
        steps = [0, *range(launch.PARTIALS_PER_STEP, parts, launch.PARTIALS_PER_STEP)]
        steps = steps if len(steps) <= 64 else (*steps[:2], steps[-1])
        row = corner // self.out.shape[-1]
        loads = [load.first for load in seen.norm.statistics_ptr.loads]
        assert loads == [(step + which * parts) * rows + row for step in steps for which in range(2)]
        reach = launch.BLOCK_M + (launch.PARTIALS_PER_STEP - 1) * rows
        assert all(load.high - load.first < reach for load in seen.norm.statistics_ptr.loads)
        return [corner]


class PatchEmbed(Problem):
    @classmethod
    def random(cls, batch, tokens):
        dtype, width, prefix = random.choice(DTYPES), random_width(), random.choice((0, 1, 5))
        patch, across = random.choice((4, 8, 14, 16, 32)), random.randint(1, 40)
        down = max(1, min(tokens, 1024) // across)
        tokens = down * across
        images = meta(batch, 3, down * patch, across * patch + random.randrange(patch), dtype=dtype)
        if random.random() < 0.3:
            images = images.to(memory_format=torch.channels_last)
        prefix_tokens = meta(random.choice((1, batch)) or 1, prefix, width, dtype=dtype) if prefix and batch else None
        prefix = prefix if batch else 0
        weight, pos_embed = meta(width, 3, patch, patch, dtype=dtype), meta(1, tokens, width)
        out = patch_embed.patch_embed(images, weight, meta(width), pos_embed, prefix_tokens, (patch, patch))

        def passed(launch):
            yield (launch.rows, launch.tokens, launch.prefix_rows), (batch * tokens, tokens, batch * prefix)
            yield (launch.stride_ib, launch.stride_ic, launch.stride_ih, launch.stride_iw), images.stride()
            yield (launch.stride_pn, launch.stride_pc), (width, 1)
            if prefix:
                image_stride = prefix * width if prefix_tokens.shape[0] > 1 else 0
                yield (launch.stride_xb, launch.stride_xn, launch.stride_xc), (image_stride, width, 1)

        def count(launch):
            rows = ceiling(batch * tokens, launch.BLOCK_M) + ceiling(batch * prefix, launch.BLOCK_M)
            return rows * ceiling(width, launch.BLOCK_N)

        def is_corner(launch, element):
            row, column = divmod(element, width)
            image, token = divmod(row, prefix + tokens)
            index = image * prefix + token if token < prefix else image * tokens + token - prefix
            return index % launch.BLOCK_M == column % launch.BLOCK_N == 0

        return cls(bytes_of(images, out), out, count, count, is_corner, passed)


class Attention(Problem):
    @classmethod
    def random(cls, batch, tokens):
        dtype, heads = random.choice(DTYPES), random.choice((1, 3, 6, 12, 16, random.randint(1, 64)))
        head_size = random.choice((16, 32, 64, 72, 80, 88, 96, 104, 128, 256, random.randint(1, 256)))
        width, queries = heads * head_size, random.choice((1, tokens, tokens))
        batch = min(batch, 2**40 // (tokens * width))  # beyond what any GPU holds, and still few launches
        if queries == tokens:
            qkv = meta(batch, tokens, 3 * width, dtype=dtype)
            out, lse = attention.attention_fwd(qkv, heads, head_size**-0.5)
            memory, strides = bytes_of(qkv, out, lse), {"q": qkv.stride(), "k": qkv.stride(), "v": qkv.stride()}
        else:
            q, kv = meta(batch, queries, width, dtype=dtype), meta(batch, tokens, 2 * width, dtype=dtype)
            k, v = kv.chunk(2, dim=2)
            out, lse = attention.attention_fwd(q, heads, head_size**-0.5, k=k, v=v)
            memory, strides = bytes_of(q, kv, out, lse), {"q": q.stride(), "k": k.stride(), "v": v.stride()}
        assert lse.shape == (batch, heads, queries)

        def images_of(launch):
            return launch.out_ptr.shape[0]

        def passed(launch):
            yield (launch.num_heads, launch.num_queries, launch.num_keys), (heads, queries, tokens)
            yield launch.D, head_size
            for name, wanted in {**strides, "o": out.stride()}.items():
                axes = "bnc"
                yield tuple(launch.arguments[f"stride_{name}{axis}"] for axis in axes), wanted

        def blocks(launch):
            return ceiling(queries, launch.BLOCK_M)

        def programs(launch):
            per_program = launch.arguments.get("blocks_per_program", 1)
            return images_of(launch) * heads * ceiling(blocks(launch), per_program)

        def is_corner(launch, element):
            row, column = divmod(element, width)
            return row % queries % launch.BLOCK_M == column % head_size == 0

        return cls(memory, out, programs, lambda launch: images_of(launch) * heads * blocks(launch), is_corner, passed)

    def written(self, launch, program):
        seen = launch.run(program)
        _, queries, width = self.out.shape
        if launch.TMA:
            elements = [(image * queries + row) * width + column for image, row, column in seen.out_ptr.stores]
        else:
            elements = [s.first for s in seen.out_ptr.stores if s.first % width % launch.D == 0]
        heads = [element % width // launch.D for element in elements]
        rows = [element // width for element in elements]
        for row, head, lse in zip(rows, heads, seen.lse_ptr.stores, strict=True):
            assert lse.first == (row // queries * launch.num_heads + head) * queries + row % queries
        return elements


PROBLEM_KINDS = (LayerNorm, RowPartials, RowStatistics, Linear, LinearWithPartials, FoldedLinear, PatchEmbed, Attention)


@pytest.mark.parametrize("kind", PROBLEM_KINDS, ids=lambda kind: kind.__name__)
def test_random_problems(kind):
    """Grid, arguments and some programs of every launch, up to sizes that no GPU holds."""
    seen = 0
    for _ in range(PROBLEMS):
        with recording(random.choice((80, 86, 90, 100, 120)), random.choice((1, 108, 132))) as launches:
            try:
                problem = kind.random(random_batch(), random_tokens())
            except UnsupportedError as error:
                refused = int(re.search(r"(\d+) rows", str(error))[1])
                assert (
                    kind not in (LayerNorm, RowPartials, RowStatistics, Attention)
                    and refused > MAX_ROWS
                    and not launches
                )
                continue
        if problem.out.numel() == 0:
            assert not launches
            continue
        if kind is not Attention:
            assert len(launches) == 1
        for launch in launches:
            assert type(launch.grid) is tuple and len(launch.grid) == 1 and type(launch.grid[0]) is int
            assert launch.grid[0] == problem.programs(launch)
            assert all(came == wanted for came, wanted in problem.passed(launch)), list(problem.passed(launch))
            if problem.memory > MEMORY and kind is not Attention:
                continue
            assert 1 <= launch.grid[0] <= GRID_LIMIT
            for program in {0, launch.grid[0] - 1, random.randrange(launch.grid[0])}:
                corners = problem.written(launch, program)
                assert corners and all(problem.is_corner(launch, corner) for corner in corners)
                assert max(corners) < problem.out.numel()
            seen += 1
    assert seen > PROBLEMS / 4


@pytest.mark.parametrize("kind", PROBLEM_KINDS, ids=lambda kind: kind.__name__)
def test_every_tile_is_written_once(kind):
    """All programs of small problems: tiles begin where they must, none twice, none missing."""
    launched = 0
    for _ in range(PROBLEMS // 20):
        with recording(random.choice((80, 90, 100)), random.choice((1, 4, 132))) as launches:
            problem = kind.random(random.randint(0, 3), random.choice((1, 2, 17, 50, 197, 300)))
        for launch in launches:
            if launch.grid[0] > 300:
                continue
            corners = [problem.written(launch, program) for program in range(launch.grid[0])]
            assert all(corners), "a program without a tile"
            times = collections.Counter(itertools.chain(*corners))
            assert len(times) == problem.tiles(launch) and set(times.values()) == {launch.arguments.get("SPLIT_K", 1)}
            assert all(problem.is_corner(launch, corner) for corner in times)
            launched += 1
    assert launched > PROBLEMS / 80


@pytest.mark.parametrize("arch,processors", ((80, 1), (90, 1), (90, 132)))
def test_tiles_in_reverse_are_the_tiles(arch, processors):
    """In reverse order the first programs write what the last ones write in the other order; split-K slots stay."""
    x, weight, residual = meta(5, 197, 768), meta(392, 768), meta(5, 197, 392)
    corners = {}
    for reverse in (False, True):
        with recording(arch, processors) as launches:
            linear.linear_with_partials(x, weight, None, residual, reverse_tiles=reverse)
        (launch,) = launches
        assert launch.REVERSED is reverse
        corners[reverse] = [min(s.first for s in launch.run(p).out_ptr.stores) for p in range(launch.grid[0])]
        if launch.SPLIT_K > 1:
            counted = [launch.run(p).split_k.semaphore_ptr.stores[0].first for p in range(launch.grid[0])]
            assert counted == [p // launch.SPLIT_K for p in range(launch.grid[0])]
    assert corners[True] == corners[False][::-1] and len(set(corners[True])) * launch.SPLIT_K == launch.grid[0]
    assert (launch.SPLIT_K > 1) is (processors > 1)


@pytest.mark.parametrize("rows,reverse", ((197, False), (8192, False), (8193, True), (2**20, True)))
def test_products_that_end_a_branch_run_in_reverse(rows, reverse):
    """proj and fc2 of a prepared stack, where activations outgrow L2."""
    with recording(90) as launches:
        prepared_blocks.prepared_blocks(
            meta(rows, 1, 768), prepared_weights(2, 768, 3072), 12, 0.125, "gelu", 1e-6, 1e-5
        )
    found = [launch.REVERSED for launch in launches if "REVERSED" in launch.arguments]
    assert found == [False, reverse, False, reverse] * 2


def test_attention_cuts_the_batch():
    """Launches of as many images as a grid holds, in order, over all images once."""
    cases = (
        (2**31 - 1, 1, 1, 1),
        (2**31, 1, 1, 1),
        (2**31, 1, 197, 12),
        (2**31, 197, 197, 16),
        (2**27, 16384, 64, 6),
        (178_956_970, 17, 17, 12),
        (178_956_971, 17, 17, 12),
    )
    for (batch, queries, keys, heads), arch in itertools.product(cases, (80, 90)):
        width = 16 * heads
        q, kv = meta(batch, queries, width), meta(batch, keys, 2 * width)
        with recording(arch) as launches:
            out, _ = attention.attention_fwd(q, heads, 0.25, k=kv[..., :width], v=kv[..., width:])
        assert out.shape == q.shape
        per_image = [launch.grid[0] // launch.out_ptr.shape[0] for launch in launches]
        assert all(launch.grid[0] == n * launch.out_ptr.shape[0] for launch, n in zip(launches, per_image))
        most = GRID_LIMIT // (heads * ceiling(queries, launches[0].BLOCK_M))
        images = [launch.out_ptr.shape[0] for launch in launches]
        assert images == [most] * (batch // most) + [batch % most] * (batch % most > 0)
        assert all(launch.grid[0] <= GRID_LIMIT for launch in launches)


def test_layernorm_mlp_launches_its_parts():
    for batch, activation in itertools.product((0, 1, 2**15), ("gelu", "swiglu")):
        hidden = 2048 if activation == "swiglu" else 4096
        x, norm = meta(batch, 197, 768), meta(768)
        with recording() as launches:
            layernorm_mlp.layernorm_mlp(
                x, norm, norm, 1e-6, meta(4096, 768), meta(4096), meta(768, hidden), norm, activation, norm
            )
        names = [launch.kernel.fn.__name__ for launch in launches]
        assert names == (["_layer_norm_fwd_kernel", "_linear_fwd_kernel", "_linear_fwd_kernel"] if batch else [])
        assert [launch.out_features for launch in launches[1:]] == ([hidden, 768] if batch else [])


def prepared_weights(depth, width, hidden):
    shapes = ((3 * width, width), (width, width), (hidden, width), (width, hidden))
    qkv, proj, fc1, fc2 = ((meta(*shape), *[meta(shape[0], dtype=torch.float32)] * 2) for shape in shapes)
    return [*qkv, *proj[:2], *fc1, *fc2[:2]] * depth


def test_prepared_blocks_hand_the_partials_on():
    """Each folded LayerNorm reads the partials of its own x, which the launch that wrote this x has left."""
    with recording() as launches:
        prepared_blocks.prepared_blocks(
            meta(2**10, 197, 768), prepared_weights(3, 768, 3072), 12, 0.125, "gelu", 1e-6, 1e-5
        )
    names = [launch.kernel.fn.__name__ for launch in launches]
    five = ["_linear_fwd_kernel", "_attention_fwd_streaming_kernel", *["_linear_fwd_kernel"] * 3]
    assert names == ["_row_partials_kernel", *five * 3]
    left = [(launches[0].x_ptr, launches[0].partials_ptr, launches[0].BLOCK)]
    for i in range(1, len(launches), 5):
        qkv, _, proj, fc1, fc2 = launches[i : i + 5]
        for reader, eps, writer in ((qkv, 1e-6, proj), (fc1, 1e-5, fc2)):
            x, partials, width = left.pop()
            assert reader.x_src is x and reader.norm.statistics_ptr is partials
            assert (reader.PARTIAL_WIDTH, reader.norm.eps) == (width, eps)
            assert reader.partials_out_ptr is None and writer.norm is None and writer.residual.residual_ptr is x
            left.append((writer.out_ptr, writer.partials_out_ptr, writer.BLOCK_N))
        assert fc2.x_src is fc1.out_ptr and proj.residual.residual_ptr is qkv.x_src and fc1.x_src is proj.out_ptr


def test_prepared_blocks_hand_finalised_statistics_on(monkeypatch):
    """Each folded LayerNorm reads the statistics of its own x, merged with its own eps by the launch in front of it."""
    monkeypatch.setattr(configs, "pick_stack_config", lambda *args: configs.StackConfig("finalised"))
    with recording() as launches:
        prepared_blocks.prepared_blocks(
            meta(2**10, 197, 768), prepared_weights(3, 768, 3072), 12, 0.125, "gelu", 1e-6, 1e-5
        )
    names = [launch.kernel.fn.__name__ for launch in launches]
    seven = ["_row_statistics_kernel", "_linear_fwd_kernel", "_attention_fwd_streaming_kernel", "_linear_fwd_kernel"]
    assert names == ["_row_partials_kernel", *[*seven, *seven[:2], "_linear_fwd_kernel"] * 3]
    left = [(launches[0].partials_ptr, launches[0].BLOCK)]
    for i in range(1, len(launches), 7):
        merge1, qkv, _, proj, merge2, fc1, fc2 = launches[i : i + 7]
        for merge, eps, reader, writer in ((merge1, 1e-6, qkv, proj), (merge2, 1e-5, fc1, fc2)):
            partials, width = left.pop()
            assert merge.partials_ptr is partials
            assert (merge.PARTIAL_WIDTH, merge.width, merge.eps) == (width, 768, eps)
            assert reader.norm.statistics_ptr is merge.statistics_ptr and reader.PARTIAL_WIDTH == 0
            left.append((writer.partials_out_ptr, writer.BLOCK_N))


def fp8_weights(depth, width, hidden):
    shapes = ((3 * width, width), (width, width), (hidden, width), (width, hidden))

    def linear(rows, columns):
        return meta(rows, columns, dtype=torch.float8_e4m3fn), *[meta(rows, dtype=torch.float32)] * 2

    qkv, proj, fc1, fc2 = (linear(*shape) for shape in shapes)
    scale = meta(width, dtype=torch.float32)
    return [scale, *qkv, *proj, *fc1, meta(hidden, dtype=torch.float32), *fc2] * depth


@pytest.mark.parametrize("arch,rows,pdl", ((80, 197, False), (90, 197, True), (90, 2**20, False)))
@pytest.mark.parametrize("stack", ("prepared_blocks", "fp8_blocks"))
def test_stacks_of_short_kernels_are_launched_early(stack, arch, rows, pdl):
    """All kernels of a stack or none: one that does not wait would let the next one overtake it."""
    module = {"prepared_blocks": prepared_blocks, "fp8_blocks": fp8_blocks_kernels}[stack]
    weights = {"prepared_blocks": prepared_weights, "fp8_blocks": fp8_weights}[stack](2, 768, 3072)
    with recording(arch) as launches:
        getattr(module, stack)(meta(rows // 197, 197, 768), weights, 12, 0.125, "gelu", 1e-6, 1e-5)
    assert len(launches) == {"prepared_blocks": 11, "fp8_blocks": 14}[stack]
    assert [launch.PDL for launch in launches] == [pdl] * len(launches)
    assert [launch.arguments.get("launch_pdl", False) for launch in launches] == [pdl] * len(launches)


def one_linear(operation, batch):
    weight = [meta(3072, 768)]
    if operation is prepared_linear.fp8_linear:
        weight = [meta(3072, 768, dtype=torch.float8_e4m3fn), meta(3072, dtype=torch.float32)]
    layer = PreparedLayer(weight, meta(3072), 3072, meta(768), meta(768), 1e-6, activation="gelu")
    return operation(meta(batch, 197, 768), layer)


@pytest.mark.parametrize("arch,batch,pdl", ((80, 1, False), (90, 1, True), (90, 2**13, False)))
@pytest.mark.parametrize("operation", ("prepared_linear", "fp8_linear"))
def test_one_linear_layer_is_two_launches(operation, arch, batch, pdl):
    with recording(arch) as launches:
        one_linear(getattr(prepared_linear, operation), batch)
    assert [launch.PDL for launch in launches] == [pdl, pdl]


EMPTY = {
    "layer_norm": lambda: layer_norm.layer_norm(meta(0, 197, 768), None, None, 1e-6),
    "layer_norm no tokens": lambda: layer_norm.layer_norm(meta(8, 0, 768), None, None, 1e-6),
    "row_partials": lambda: layer_norm.row_partials(meta(0, 197, 768)).values,
    "row_statistics": lambda: (
        layer_norm.row_statistics(layer_norm.RowPartials(meta(2, 6, 0, dtype=torch.float32), 128), 768, 1e-6).values
    ),
    "linear": lambda: linear.linear(meta(0, 197, 768), meta(768, 768), None),
    "linear no tokens": lambda: linear.linear(meta(8, 0, 768), meta(768, 768), None),
    "linear_with_partials": lambda: (
        linear.linear_with_partials(meta(8, 0, 768), meta(768, 768), None, meta(8, 0, 768))[1].values
    ),
    "prepared_blocks": lambda: prepared_blocks.prepared_blocks(
        meta(0, 197, 768), prepared_weights(2, 768, 3072), 12, 0.125, "gelu", 1e-6, 1e-6
    ),
    "fp8_blocks": lambda: fp8_blocks_kernels.fp8_blocks(
        meta(0, 197, 768), fp8_weights(2, 768, 3072), 12, 0.125, "gelu", 1e-6, 1e-6
    ),
    "prepared_linear": lambda: one_linear(prepared_linear.prepared_linear, 0),
    "fp8_linear": lambda: one_linear(prepared_linear.fp8_linear, 0),
    "patch_embed": lambda: patch_embed.patch_embed(
        meta(0, 3, 224, 224), meta(768, 3, 16, 16), None, None, None, (16, 16)
    ),
    "attention": lambda: attention.attention(meta(0, 197, 3 * 768), 12, 0.125),
    "attention no queries": lambda: attention.attention(
        meta(8, 0, 768), 12, 0.125, k=meta(8, 197, 768), v=meta(8, 197, 768)
    ),
}


@pytest.mark.parametrize("call", EMPTY.values(), ids=EMPTY.keys())
def test_empty_problems_launch_nothing(call):
    with recording() as launches:
        out = call()
    assert out.numel() == 0 and not launches


ROWS_BEYOND = {
    "layer_norm": lambda rows: layer_norm.layer_norm(meta(rows, 16), None, None, 1e-6),
    "linear": lambda rows: linear.linear(meta(rows, 16), meta(16, 16), None),
    "patch_embed": lambda rows: patch_embed.patch_embed(
        meta(rows, 1, 4, 4), meta(16, 1, 4, 4), None, None, None, (4, 4)
    ),
}


@pytest.mark.parametrize("rows", (2**31, 2**31 + 5, 2**32 + 1))
def test_rows_beyond_int32(rows):
    """Sixteen columns: as many rows as a large GPU holds, more than an int32 counts. Sizes then come as int64."""
    with recording() as launches:
        out = ROWS_BEYOND["layer_norm"](rows)
        layer_norm.row_partials(meta(rows, 16))
    normal, partials = launches
    for program in (0, normal.grid[0] // 2, normal.grid[0] - 1):
        stores = normal.run(program).y_ptr.stores
        assert min(store.first for store in stores) == program * normal.ROWS * 16 < out.numel()
        stores = [store.first for store in partials.run(program).partials_ptr.stores]
        assert stores == [program * partials.ROWS, rows + program * partials.ROWS]


@pytest.mark.parametrize("operation", ("linear", "patch_embed"))
def test_rows_that_an_int32_cannot_count_with_a_tile_more(operation):
    """tl.cdiv adds the divisor before it divides, and descriptors have int32 coordinates."""
    for arch in (80, 90):
        with recording(arch) as launches:
            ROWS_BEYOND[operation](MAX_ROWS)
        launches[0].run(launches[0].grid[0] - 1)
        message = f"vit_fast.{operation}: {MAX_ROWS + 1} rows, expected at most {MAX_ROWS} in one call; split the batch"
        with recording(arch) as launches, pytest.raises(UnsupportedError, match=re.escape(message)):
            ROWS_BEYOND[operation](MAX_ROWS + 1)
        assert not launches
