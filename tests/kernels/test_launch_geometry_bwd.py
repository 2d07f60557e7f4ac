"""Grids and index arithmetic of the backward kernels at sizes that nobody can allocate, as ``test_launch_geometry``.

Each kernel has its expectation: how many programs there are, and with which elements the tiles begin that a program
writes. Expectations come from the shapes, and from the tile sizes that the launch was given.
"""

import random
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

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
    attention_bwd,
    column_sums,
    gemm_train,
    layer_norm_bwd,
    layernorm_mlp_bwd,
    linear_bwd,
    patch_embed_bwd,
)  # fmt: skip
from vit_fast.kernels.arguments import MAX_ROWS, UnsupportedError

PROBLEMS = 300


def _column_sums(launch, rows, width):
    def begins(program):
        chunk, tile = divmod(program, ceiling(width, launch.COLUMNS))
        column = tile * launch.COLUMNS
        return {
            "partials_ptr": [chunk * width + column],
            "scaled_ptr": [
                row * width + column for row in range(chunk * launch.CHUNK, (chunk + 1) * launch.CHUNK, launch.ROWS)
            ],
        }

    return ceiling(rows, launch.CHUNK) * ceiling(width, launch.COLUMNS), begins


def _partial_sums(launch, rows, width):
    def begins(program):
        first = [program * launch.COLUMNS]
        return {"first_out_ptr": first, "second_out_ptr": first}

    return ceiling(launch.width, launch.COLUMNS), begins


def _layer_norm(launch, rows, width):
    """Programs take every P-th tile of rows; of a long walk the stand-ins take the first, second and last step."""
    tiles = ceiling(rows, launch.ROWS)
    programs = min(tiles, 512)

    def begins(program):
        steps = range(program, tiles, programs)
        steps = steps if len(steps) <= 64 else (steps[0], steps[1], steps[-1])
        sums = [program * width]
        return {"dx_ptr": [tile * launch.ROWS * width for tile in steps], "dweight_ptr": sums, "dbias_ptr": sums}

    return programs, begins


def _layer_norm_wide(launch, rows, width):
    columns = range(0, width, launch.BLOCK)
    columns = columns if len(columns) <= 64 else (columns[0], columns[1], columns[-1])
    return rows, lambda program: {"dx_ptr": [program * width + column for column in columns]}


def _layer_norm_sums(launch, rows, width):
    def begins(program):
        chunk, tile = divmod(program, ceiling(width, launch.BLOCK))
        first = [chunk * width + tile * launch.BLOCK]
        return {"dweight_ptr": first, "dbias_ptr": first}

    return ceiling(rows, launch.CHUNK) * ceiling(width, launch.BLOCK), begins


def _layer_scale(launch, rows, width):
    columns = range(0, launch.width, launch.BLOCK)

    def begins(program):
        rows = [program * launch.width + column for column in columns]
        return {"dweight_ptr": rows, "dbias_ptr": [program], "dgamma_ptr": [program]}

    return launch.product_ptr.shape[0], begins


def _linear_train(launch, rows, width):
    """``width`` columns of the result; dz and z of a gated activation are twice as wide, gate | value."""
    piece = launch.BLOCK_N // launch.SLICES
    tiles_m, tiles_n = ceiling(rows, launch.BLOCK_M), ceiling(width, launch.BLOCK_N)

    def begins(program):
        group, rest = divmod(program, launch.GROUP_M * tiles_n)
        high = min(launch.GROUP_M, tiles_m - group * launch.GROUP_M)
        row = (group * launch.GROUP_M + rest % high) * launch.BLOCK_M
        columns = [rest // high * launch.BLOCK_N + i * piece for i in range(launch.SLICES)]
        narrow = [row * width + column for column in columns]
        wide = (
            [row * 2 * width + column + half for column in columns for half in (0, width)] if launch.GATED else narrow
        )
        if launch.BACKWARD:  # the value's gradient is stored before the gate's
            wide = [wide[i ^ 1] for i in range(len(wide))] if launch.GATED else wide
            return {"out_ptr": wide, "hidden_ptr": narrow}
        return {"out_ptr": narrow, "z_ptr": wide}

    return tiles_m * tiles_n, begins


def _attention_rows(launch, name, pair, rows):
    """The first elements of rows of one head, a tile for each head-dim slice; strides are those of the tensor."""
    if launch.arguments[name] is None:
        return []
    image, head = divmod(pair, launch.num_heads)
    stride_b, stride_n, stride_c = launch.arguments[name].stride()
    size, slices = (launch.DV, launch.VALUE_SLICES) if name == "dv_ptr" else (launch.D, launch.HEAD_SLICES)
    return [
        image * stride_b + row * stride_n + (head * size + column) * stride_c for row in rows for column, _ in slices
    ]


def _attention_by_keys(launch, rows, width):
    """dk and dv of a block of keys; dq, where the program has all keys, of every block of queries."""
    blocks = ceiling(launch.num_keys, launch.BLOCK_N)
    steps = range(0, launch.num_queries, launch.BLOCK_M)
    steps = steps if len(steps) <= 64 else (steps[0], steps[1], steps[-1])

    def begins(program):
        pair, block = divmod(program, blocks)
        firsts = {"dq_ptr": steps, "dk_ptr": [block * launch.BLOCK_N], "dv_ptr": [block * launch.BLOCK_N]}
        return {name: _attention_rows(launch, name, pair, first) for name, first in firsts.items()}

    assert launch.dq_ptr is None or blocks == 1
    return launch.lse_ptr.shape[0] * launch.num_heads * blocks, begins


def _attention_by_queries(launch, rows, width):
    blocks = ceiling(launch.num_queries, launch.BLOCK_M)

    def begins(program):
        pair, block = divmod(program, blocks)
        return {"dq_ptr": _attention_rows(launch, "dq_ptr", pair, [block * launch.BLOCK_M])}

    return launch.lse_ptr.shape[0] * launch.num_heads * blocks, begins


EXPECTED = {
    "_attention_bwd_kernel": _attention_by_keys,
    "_attention_bwd_dq_kernel": _attention_by_queries,
    "_column_sums_kernel": _column_sums,
    "_partial_sums_kernel": _partial_sums,
    "_layer_norm_bwd_kernel": _layer_norm,
    "_layer_norm_wide_bwd_kernel": _layer_norm_wide,
    "_layer_norm_sums_kernel": _layer_norm_sums,
    "_layer_scale_bwd_kernel": _layer_scale,
    "_linear_train_kernel": _linear_train,
}


def rows_of(batch, tokens, width, dtype):
    """[batch, tokens, width]: contiguous, or at two row strides."""
    skip = random.choice((0, 0, 1))
    return meta(batch, tokens + skip, width, dtype=dtype)[:, skip:]


def random_sums(batch, tokens):
    width, dtype = random_width(), random.choice(DTYPES)
    grad = rows_of(batch, tokens, width, dtype)
    seed, p = meta(1, dtype=torch.int64), random.choice((0.0, 0.3))
    row_scale = meta(batch) if random.random() < 0.5 else None
    gamma = meta(width) if random.random() < 0.5 else None
    g, _ = column_sums.branch_gradient(grad, random.choice(DTYPES), row_scale, p, seed, True, gamma)
    return width, bytes_of(grad, g)


def random_layer_norm(batch, tokens):
    width = random.randint(8193, 65536) if random.random() < 0.3 else random_width()
    dtype = random.choice(DTYPES)
    grad, x, past = (rows_of(batch, tokens, width, dtype) for _ in range(3))
    statistics = (meta(batch * tokens, dtype=torch.float32) for _ in range(2))
    weight = meta(width)
    norm = random.choice(("layer", "rms"))
    dx, *_ = layer_norm_bwd.layer_norm_bwd(grad, x, weight, weight, *statistics, norm=norm, residual_grad=past)
    return width, bytes_of(grad, x, past, dx)


def random_linear_train(batch, tokens):
    dtype, activation = random.choice(DTYPES), random.choice((None, "gelu", "swiglu"))
    width, features = random_width(), random.choice((1, 3, 4)) * random_width()
    x, residual = rows_of(batch, tokens, width, dtype), None
    weight = meta(features * (1 + (activation == "swiglu")), width, dtype=dtype)
    if activation is None:
        residual = rows_of(batch, tokens, features, dtype)
    drop = dict(dropout_p=random.choice((0.0, 0.3)), seed=meta(1, dtype=torch.int64))
    out, z = gemm_train.linear_train(
        x, weight, meta(weight.shape[0]), activation, residual=residual, with_z=True, **drop
    )
    return features, bytes_of(x, weight, residual, out, z)


def random_pre_activation_gradient(batch, tokens):
    dtype, activation = random.choice(DTYPES), random.choice(("gelu", "swiglu"))
    width, hidden = random_width(), random.choice((1, 3, 4)) * random_width()
    grad, weight = rows_of(batch, tokens, width, dtype), meta(width, hidden, dtype=dtype)
    z = meta(batch, tokens, hidden * (1 + (activation == "swiglu")), dtype=dtype)
    drop = dict(dropout_p=random.choice((0.0, 0.3)), seed=meta(1, dtype=torch.int64))
    dz, h = gemm_train.pre_activation_gradient(grad, weight, z, activation, **drop)
    return hidden, bytes_of(grad, weight, z, dz, h)


def random_layer_scale(batch, tokens):
    features, width, dtype = batch or 1, random_width(), random.choice(DTYPES)
    product, weight = meta(features, width, dtype=torch.float32), meta(features, width, dtype=dtype)
    vector = meta(features, dtype=torch.float32)
    dweight, *_ = linear_bwd.layer_scale_bwd(product, weight, vector, vector, vector)
    return width, bytes_of(product, weight, vector, dweight)


def random_attention(batch, tokens):
    dtype, heads, queries = random.choice(DTYPES), random.choice((1, 3, 6, 12, 16)), random.choice((1, tokens, tokens))
    size = random.choice((16, 32, 64, 72, 80, 96, 128, 256, random.randint(1, 256)))
    value_size = random.choice((size, size, random.randint(1, 256)))
    batch = min(batch, 2**40 // (tokens * heads * max(size, value_size)))  # beyond any GPU, and still few launches
    if queries == tokens and value_size == size:
        qkv, k, v = meta(batch, tokens, 3 * heads * size, dtype=dtype), None, None
    else:
        sizes = (queries, size), (tokens, size), (tokens, value_size)
        qkv, k, v = (meta(batch, count, heads * width, dtype=dtype) for count, width in sizes)
    grad, out = (rows_of(batch, queries, heads * value_size, dtype) for _ in range(2))
    drop = random.choice(({}, dict(dropout_p=0.1, seed=meta(1, dtype=torch.int64))))
    lse = meta(batch, heads, queries, dtype=torch.float32)
    grads = attention_bwd.attention_bwd(grad, qkv, heads, 0.3, k, v, out, lse, **drop)
    return heads * size, bytes_of(grad, qkv, k, v, out, lse, *grads)


BY_GEMM = (random_linear_train, random_pre_activation_gradient)
KINDS = (random_sums, random_layer_norm, *BY_GEMM, random_layer_scale, random_attention)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.removeprefix("random_"))
def test_random_problems(kind):
    """Grid and some programs of every launch: no integer leaves its width, and tiles begin where they must."""
    seen = 0
    for _ in range(PROBLEMS):
        batch, tokens = random_batch(), random_tokens()
        with recording(random.choice((80, 86, 90, 100, 120))) as launches:
            try:
                width, memory = kind(batch, tokens)
            except UnsupportedError as error:
                assert int(re.search(r"(\d+) rows", str(error))[1]) > MAX_ROWS and not launches
                continue
        if batch == 0 and kind is not random_layer_scale:
            assert not launches
        for launch in launches:
            assert type(launch.grid) is tuple and len(launch.grid) == 1 and type(launch.grid[0]) is int
            programs, begins = EXPECTED[launch.kernel.fn.__name__](launch, batch * tokens, width)
            assert launch.grid[0] == programs
            if memory > MEMORY:
                continue
            assert 1 <= programs <= GRID_LIMIT
            for program in {0, programs - 1, random.randrange(programs)}:
                check_program(launch, program, begins(program))
                seen += 1
    assert seen > PROBLEMS / 4


def check_program(launch, program, expected):
    after = launch.run(program)
    for name, firsts in expected.items():
        if launch.arguments[name] is not None:
            stores = [store.first for store in getattr(after, name).stores]
            assert stores == list(firsts), f"{launch.kernel.fn.__name__} {program}: {name}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.removeprefix("random_"))
def test_every_tile_is_written_once(kind):
    """All programs of small problems: no two begin a tile at the same place. Of a GEMM's tile, which is cut into slices
    of columns, the first slice tells, as others may lie beyond the last column."""
    for _ in range(PROBLEMS // 20):
        batch, tokens = random.randint(1, 3), random.choice((1, 2, 17, 50, 197, 300))
        with recording(random.choice((80, 90, 100))) as launches:
            kind(batch, tokens)
        for launch in launches:
            if launch.grid[0] > 200:
                continue
            written = {}
            for program in range(launch.grid[0]):
                for name, pointer in vars(launch.run(program)).items():
                    if isinstance(launch.arguments[name], torch.Tensor) and pointer.stores:
                        stores = pointer.stores[:1] if kind in BY_GEMM else pointer.stores
                        written.setdefault(name, []).extend(store.first for store in stores)
            assert written
            for name, firsts in written.items():
                assert len(set(firsts)) == len(firsts), name


LAUNCHED = {
    "layernorm_mlp": (
        "_column_sums_kernel", "_partial_sums_kernel", "_layer_norm_fwd_kernel", "_column_sums_kernel",
        "_linear_train_kernel", "_layer_scale_bwd_kernel", "_layer_norm_bwd_kernel", "_partial_sums_kernel",
        "_column_sums_kernel", "_partial_sums_kernel",
    ),
    "layer_norm_linear": (
        "_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel", "_partial_sums_kernel", "_column_sums_kernel",
        "_partial_sums_kernel",
    ),
    "linear_residual": (
        "_column_sums_kernel", "_partial_sums_kernel", "_layer_scale_bwd_kernel", "_column_sums_kernel",
    ),
    "patch_embed": ("_column_sums_kernel", "_partial_sums_kernel", "_column_sums_kernel", "_partial_sums_kernel"),
}  # fmt: skip


def call(operation, batch):
    """The gradients of an operation at a usual size; a dict of what went in."""
    width, hidden = 192, 768
    x, grad, vector = meta(batch, 197, width), meta(batch, 197, width), meta(width)
    statistics = [meta(batch * 197, dtype=torch.float32)] * 2
    if operation == "layernorm_mlp":
        z = meta(batch, 197, hidden)
        norm = (vector, vector, 1e-6)
        fc1, fc2 = (meta(hidden, width), meta(hidden)), (meta(width, hidden), vector)
        return layernorm_mlp_bwd.layernorm_mlp_bwd(grad, x, *norm, *fc1, *fc2, "gelu", vector, None, *statistics, z)
    if operation == "layer_norm_linear":
        weight, grad = meta(3 * width, width), meta(batch, 197, 3 * width)
        return linear_bwd.layer_norm_linear_bwd(
            grad, x, vector, vector, 1e-6, weight, meta(3 * width), None, *statistics
        )
    if operation == "linear_residual":
        return linear_bwd.linear_residual_bwd(grad, x, meta(width, width), vector, vector, None)
    images = meta(batch, 3, 224, 224)
    tables = meta(1, 196, width), meta(1, 1, width)
    return patch_embed_bwd.patch_embed_bwd(
        grad, images, meta(width, 3, 16, 16), vector, *tables, (16, 16), needs=(False, True, True, True, True)
    )


@pytest.mark.parametrize("operation", LAUNCHED)
def test_what_an_operation_launches(operation):
    with recording() as launches:
        results = call(operation, 64)
    assert sorted(launch.kernel.fn.__name__ for launch in launches) == sorted(LAUNCHED[operation])
    assert sum(result is not None for result in results) >= 4


@pytest.mark.parametrize("operation", LAUNCHED)
def test_empty_batches_launch_little(operation):
    """No rows: nothing but the derivative of LayerScale, whose rows are those of the weight, and the bias of patch
    embedding, which is the sum of the position embedding's gradient."""
    with recording() as launches:
        call(operation, 0)
    names = {launch.kernel.fn.__name__ for launch in launches}
    if operation == "patch_embed":
        assert len(launches) == 2 and names == {"_column_sums_kernel", "_partial_sums_kernel"}
    else:
        assert names <= {"_layer_scale_bwd_kernel"}


@pytest.mark.parametrize("keys", (17, 300))
def test_attention_cuts_the_batch(keys):
    """Launches of as many images as a grid holds, in order, over all images once; masks go on where images do."""
    heads, queries = 12, 197
    for batch in (2**22, 2**27):
        q, kv = meta(batch, queries, 16 * heads), meta(batch, keys, 16 * heads)
        lse, drop = meta(batch, heads, queries), dict(dropout_p=0.1, seed=meta(1, dtype=torch.int64))
        with recording(90) as launches:
            dq, *_ = attention_bwd.attention_bwd(q, q, heads, 0.25, kv, kv, q, lse, **drop)
        assert dq.shape == q.shape
        for name in ("_attention_bwd_kernel", "_attention_bwd_dq_kernel"):
            cut = [launch for launch in launches if launch.kernel.fn.__name__ == name]
            images = [launch.lse_ptr.shape[0] for launch in cut]
            first = [launch.dropout.first_image for launch in cut]
            assert sum(images) == (batch if cut else 0) and first == [sum(images[:i]) for i in range(len(images))]
            assert all(launch.grid[0] <= GRID_LIMIT for launch in cut)
            assert bool(cut) == (keys == 300 or name == "_attention_bwd_kernel")


@pytest.mark.parametrize("rows", (2**31, 2**32 + 1))
def test_rows_beyond_int32(rows):
    """Sixteen columns: as many rows as a large GPU holds, more than an int32 counts."""
    statistics = [meta(rows, dtype=torch.float32)] * 2
    with recording() as launches:
        column_sums.column_sums(meta(rows, 16))
        layer_norm_bwd.layer_norm_bwd(meta(rows, 16), meta(rows, 16), meta(16), None, *statistics)
    sums, _, norm, _ = launches
    for program in (0, sums.grid[0] // 2, sums.grid[0] - 1):
        check_program(sums, program, _column_sums(sums, rows, 16)[1](program))
    for program in (0, norm.grid[0] - 1):
        check_program(norm, program, _layer_norm(norm, rows, 16)[1](program))
    with recording() as launches, pytest.raises(UnsupportedError, match=f"{rows} rows"):
        gemm_train.pre_activation_gradient(meta(rows, 16), meta(16, 16), meta(rows, 16), "gelu")
    assert not launches
