"""``vit-fast profile --predict``: the model against the figures that it was made for, laws that no model may break, and
the command. Nothing here is a measurement.
"""

import csv
import functools
import itertools
import json

import pytest
import torch
from vit_fast.kernels import configs, launch

import vit_fast
from vit_fast import cli
from vit_fast.backends.triton import TRITON
from vit_fast.bench import gpus, launches, predict, resources
from vit_fast.bench import instruction_model as model
from vit_fast.bench.errors import BenchError
from vit_fast.bench.gpus import GPUS
from vit_fast.bench.launches import Launch
from vit_fast.bench.operations import Operation

VIT_B = "vit_base_patch16_224"
BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@functools.cache
def predicted(name=VIT_B, provider="prepared", batch=256, gpu="h200", precision="bfloat16", **kwargs):
    """(facts, {(operation, module): row})."""
    facts, rows = predict.run(predict.Settings(name, provider, batch, gpu, precision, kwargs))
    return facts, {(row["operation"], row["module"]): row for row in rows}


def test_the_model_keeps_to_the_launches_that_it_was_fitted_to():
    """ViT-B/16, batch 256, on an H200, as read from its machine code: microseconds a launch, and their sum a layer. In
    float16, which has the gelu of those launches; that of bfloat16 is shorter."""
    _, rows = predicted(precision="float16")
    wanted = {"attn.qkv": 284, "attn.proj": 108, "mlp.fc1": 430, "mlp.fc2": 335}
    found = {part: rows["linear", f"blocks.*.{part}"]["us_per_call"] for part in wanted}
    assert found == {part: pytest.approx(us, rel=0.03) for part, us in wanted.items()}
    assert sum(found.values()) == pytest.approx(1158, rel=0.02)
    assert 85 <= rows["attention", "blocks.*"]["us_per_call"] <= 95
    _, short = predicted()
    assert short["linear", "blocks.*.mlp.fc1"]["us_per_call"] < found["mlp.fc1"]
    _, rows = predicted(provider="vit_fast", precision="float16")
    assert sum(rows["linear", f"blocks.*.{part}"]["us_per_call"] for part in BLOCK) == pytest.approx(1074, rel=0.05)
    assert sum(rows["layer_norm", f"blocks.*.norm{i}"]["us_per_call"] for i in (1, 2)) == pytest.approx(76, rel=0.05)


def test_grids_bounds_and_resources_are_those_of_the_review():
    _, rows = predicted()
    for part, programs, gflop, megabytes, bound in (
        ("attn.qkv", 7092, 178, 310, 229),
        ("attn.proj", 2364, 60, 233, 76),
        ("mlp.fc1", 9456, 238, 387, 305),
        ("mlp.fc2", 2364, 238, 465, 305),
    ):
        row = rows["linear", f"blocks.*.{part}"]
        assert (row["calls"], row["programs"], row["programs_per_multiprocessor"]) == (12, programs, 2), part
        assert row["gflop"] / 12 == pytest.approx(gflop, rel=0.02) and row["resources"] == "ledger"
        assert row["mb"] / 12 == pytest.approx(megabytes, rel=0.02)
        assert row["roofline_us"] / 12 == pytest.approx(bound, rel=0.02)
        assert row["waves"] == pytest.approx(programs / (132 * 2)) and round(row["shared_kib"]) == 96
    row = rows["attention", "blocks.*"]
    assert (row["programs"], row["programs_per_multiprocessor"]) == (3072, 3)
    assert row["roofline_us"] / 12 == pytest.approx(72, rel=0.02)
    facts, rows = predicted(provider="vit_fast")
    assert rows["sum", ""]["gflop"] / 256 == pytest.approx(35.13, rel=1e-3)
    assert facts["step_ms"] == pytest.approx(rows["step", ""]["us"] / 1e3)
    parts = [row["us"] for key, row in rows.items() if key[0] not in ("sum", "step")]
    assert rows["step", ""]["us"] == pytest.approx(sum(parts)) and facts["launches"] == 88


def test_float8_is_faster_and_its_products_are_bound_by_the_rate_of_float8():
    facts, rows = predicted(provider="fp8")
    assert facts["images_per_second"] > 1.2 * predicted()[0]["images_per_second"]
    fc2 = rows["linear", "blocks.*.mlp.fc2"]
    assert fc2["roofline_us"] == pytest.approx(fc2["gflop"] * 1e9 / (0.66 * 1978.9e12) * 1e6)


def test_a_change_of_a_rule_changes_what_is_predicted(monkeypatch):
    before, rows = predicted()
    shipped = configs.pick_linear_config
    small = configs.LinearConfig(64, 64, 64, 8, 4, 4, True)
    monkeypatch.setattr(configs, "pick_linear_config", lambda *args: small if args[-1] == 90 else shipped(*args))
    facts, changed = predicted.__wrapped__()
    programs = [each["linear", "blocks.*.attn.qkv"]["programs"] for each in (rows, changed)]
    assert programs[1] == 4 * programs[0] and facts["step_ms"] > before["step_ms"]


def test_the_forms_of_the_row_statistics_differ_in_launches_and_in_what_a_product_takes(monkeypatch):
    """Finalised statistics cost two launches a block and spare each program of qkv and fc1 the merging; without the
    fold products are the fastest and LayerNorm is a pass over memory."""
    found = {}
    for form in configs.STATISTICS:
        monkeypatch.setattr(configs, "pick_stack_config", lambda *args, form=form: configs.StackConfig(form))
        facts, rows = predicted.__wrapped__(batch=256, depth=2)
        us = [rows["linear", f"blocks.*.{part}"]["us_per_call"] for part in ("attn.qkv", "mlp.fc1")]
        found[form] = facts["launches"], sum(us), rows.get(("_row_statistics_kernel", ""), {}).get("calls")
    launches, products, merged = zip(*(found[form] for form in ("partials", "finalised", "plain")), strict=True)
    assert (launches[1] - launches[0], launches[2] - launches[0]) == (4, 3) and merged == (None, 4, None)
    assert products[2] < products[1] <= products[0] * 1.01


def test_replaced_functions_are_put_back():
    names = ((configs, "arch_of"), (configs, "multiprocessors_of"), (launch, "device_reasons"))
    import triton

    names = (*names, (triton.JITFunction, "run"))
    shipped = [getattr(owner, name) for owner, name in names]
    with pytest.raises(BenchError, match="cannot make the model"):
        predicted(VIT_B, img_size=(7, 7))
    with pytest.raises(RuntimeError, match="odd"), launches.pretending(GPUS["h200"], []):
        raise RuntimeError("odd")
    assert [getattr(owner, name) for owner, name in names] == shipped and "unavailable" not in vars(TRITON)
    assert TRITON.unavailable(torch.device("cpu"))


# Laws.


def gemm(rows, k, n, config, arch="h200", **arguments):
    """The estimate of a plain matrix product by one config."""
    tiles = configs.cdiv(rows, config.block_m) * configs.cdiv(n, config.block_n)
    arguments = {
        "rows": rows, "in_features": k, "out_features": n, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, "SPLIT_K": config.split_k, "DESCRIPTORS": config.tma, "GATED": False,
        "num_warps": config.num_warps, "num_stages": config.num_stages, **arguments,
    }  # fmt: skip
    operation = Operation("linear", "", 2 * rows * k * n, 2 * (rows * k + n * k + rows * n))
    one, gpu = Launch("_linear_fwd_kernel", tiles * config.split_k, arguments), GPUS[arch]
    held = resources.Resources(168, (config.block_m + config.block_n) * config.block_k * 2 * config.num_stages, "")
    return model.estimate(one, operation, torch.bfloat16, gpu, held)


CONFIGS = [
    configs.LinearConfig(128, 128, 64, 8, 4, 3, True),
    configs.LinearConfig(64, 64, 64, 8, 4, 4, True),
    configs.LinearConfig(128, 64, 64, 8, 4, 4, False),
    configs.LinearConfig(64, 64, 64, 8, 4, 4, True, split_k=4),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.block_m}x{config.block_n}/{config.split_k}")
@pytest.mark.parametrize("gpu", GPUS)
def test_more_work_is_never_faster_and_twice_the_rows_never_more_than_twice_as_slow(config, gpu):
    for k, n in itertools.product((384, 768, 4096), (192, 768, 3072)):
        one = [gemm(rows, k, n, config, gpu) for rows in (1, 64, 197, 394, 788, 5000, 10000, 50432, 100864)]
        assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(one))
        assert all(each.roofline <= each.seconds for each in one)
        for rows in (1, 64, 197, 788, 12608, 50432):
            slow = gemm(2 * rows, k, n, config, gpu).seconds
            assert slow <= 2 * gemm(rows, k, n, config, gpu).seconds * (1 + 1e-9)
            assert gemm(rows, 2 * k, n, config, gpu).seconds >= gemm(rows, k, n, config, gpu).seconds
            assert gemm(rows, k, 2 * n, config, gpu).seconds >= gemm(rows, k, n, config, gpu).seconds


def test_what_an_epilogue_does_takes_time():
    sizes = (50432, 768, 3072, CONFIGS[0])
    plain = gemm(*sizes).seconds
    for extra in ({"ACTIVATION": "gelu"}, {"norm": 1}, {"residual": 1}, {"partials_out_ptr": 1}):
        assert plain < gemm(*sizes, **extra).seconds < 1.4 * plain, extra
    assert gemm(*sizes, ACTIVATION="relu").seconds < gemm(*sizes, ACTIVATION="gelu").seconds


def test_rounding_tokens_takes_the_instructions_of_its_norm():
    """Few rows take latencies alone; with many each program keeps the schedulers for its instructions."""
    gpu, held = GPUS["h200"], resources.Resources(64, 64, "")

    def seconds(rows, norm):
        arguments = {"NORM": norm, "ROWS": 4, "BLOCK": 1024, "num_warps": 4}
        one = Launch("_quantise_tokens_fwd_kernel", -(-rows // 4), arguments)
        return model.estimate(one, Operation("layer_norm", "", 0, 1), torch.bfloat16, gpu, held).seconds

    for rows in (1, 12608, 50432):
        times = [seconds(rows, norm) for norm in (None, "rms", "layer")]
        assert times == sorted(times) and times[0] < times[2]
    clocks = seconds(4 * 132 * 1000, "layer") * 1e9 * gpu.sustained_ghz
    assert clocks == pytest.approx(1000 * (7 + 16) * 32, rel=0.05)


def test_the_queue():
    """Alone a program takes both parts; with many the shared one alone sets the pace; more are never slower a piece."""
    assert model.cycle(1, 100, 40) == 140 and model.cycle(3, 0, 40) == 40
    pace = [model.cycle(n, 100, 40) / n for n in range(1, 10)]
    assert pace == sorted(pace, reverse=True) and 100 <= pace[-1] == pytest.approx(100, rel=0.01)
    assert model.busy_clocks(132, 132, 2, 100, 40, 0) == 140
    assert model.busy_clocks(133, 132, 2, 100, 40, 0) == model.cycle(2, 100, 40)
    assert model.busy_clocks(1320, 132, 2, 100, 40, 0) == pytest.approx(5 * model.cycle(2, 100, 40))
    assert model.busy_clocks(1320, 132, 2, 100, 40, 500) == 5000


@pytest.mark.parametrize(
    "gpu,provider", (("h200", "prepared"), ("h200", "vit_fast"), ("a100", "prepared"), ("b200", "fp8"))
)
def test_laws_of_whole_models(gpu, provider):
    def step(batch, name=VIT_B, **kwargs):
        facts, rows = predicted(name, provider, batch, gpu, depth=2, **kwargs)
        assert all(row["roofline_us"] is None or row["roofline_us"] <= row["us"] * (1 + 1e-9) for row in rows.values())
        return facts["step_ms"]

    times = [step(batch) for batch in (1, 8, 64, 128, 256)]
    assert times == sorted(times)
    assert times[3] <= 2 * times[2] and times[4] <= 2 * times[3] and times[1] <= 8 * times[0]
    larger = [step(64, name) for name in ("vit_small_patch16_224", VIT_B, "vit_large_patch16_224")]
    assert larger == sorted(larger) and step(64, img_size=384) > 2 * times[2]


@pytest.mark.parametrize(
    "name",
    ("vit_so400m_patch14_siglip_224", "eva02_base_patch14_224", "vit_small_patch16_dinov3", "deit3_small_patch16_224"),
)
def test_any_name_on_any_gpu(name):
    for gpu in ("h200", "rtx4090"):
        facts, rows = predicted(name, "vit_fast", 2, gpu)
        assert 0 < facts["step_ms"] < 1e3 and any("_kernel" in (row["kernel"] or "") for row in rows.values())


def test_a_model_too_large_for_this_machine_takes_no_memory():
    facts, _ = predicted("vit_7b_patch16_dinov3", "prepared", 64)
    assert facts["step_ms"] > 200


def test_float32_has_the_rates_of_float32(monkeypatch):
    ieee = predicted(provider="vit_fast", precision="float32", batch=8)[0]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    tf32 = predicted.__wrapped__(provider="vit_fast", precision="float32", batch=8)[0]
    assert ieee["step_ms"] > 2 * tf32["step_ms"] and ieee["tflops_assumed"] < 60 < tf32["tflops_assumed"]


# Facts, resources, uncertainty.


def test_facts_of_gpus_hold_together():
    for name, gpu in GPUS.items():
        assert gpu.name == name and gpu.sustained_ghz <= gpu.clock_ghz and gpu.block_kib < gpu.shared_kib
        assert {"bfloat16", "float16", "tf32", "float32"} <= set(gpu.tflops)
        assert ("float8" in gpu.tflops) == (gpu.arch >= 89)
        clocks = gpu.flop_per_clock("bfloat16")  # a power of two, within the rounding of the datasheets
        nearest = 2 ** round(torch.tensor(clocks).log2().item())
        assert clocks == pytest.approx(nearest, rel=0.01), name
    for device, name in (
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"), ("NVIDIA L4", "l4"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ):  # fmt: skip
        assert gpus.named(device).name == name
    for device in ("NVIDIA L40S", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 4090 D", "odd"):
        assert gpus.named(device) is None


def test_without_the_ledger_a_formula_stands_in(monkeypatch, tmp_path):
    resources._ledger.cache_clear()
    monkeypatch.setattr(resources, "LEDGER", tmp_path / "missing.json")
    try:
        facts, rows = predicted.__wrapped__()
    finally:
        resources._ledger.cache_clear()
    row = rows["linear", "blocks.*.attn.qkv"]
    assert row["resources"] == "formula" and row["programs_per_multiprocessor"] == 2
    assert rows["attention", "blocks.*"]["programs_per_multiprocessor"] == 3
    assert facts["step_ms"] == pytest.approx(predicted()[0]["step_ms"], rel=0.02)


def test_programs_of_a_multiprocessor():
    h200 = GPUS["h200"]
    assert resources.Resources(168, 98328, "").programs(h200, 4) == 2  # shared memory
    assert resources.Resources(255, 1024, "").programs(h200, 8) == 1  # registers
    assert resources.Resources(168, 62464, "").programs(h200, 4) == 3
    assert resources.Resources(32, 0, "").programs(GPUS["l4"], 8) == 6  # threads
    assert resources.Resources(255, 300_000, "").programs(h200, 4) == 1


def test_stated_uncertainty():
    h200 = GPUS["h200"]
    assert predict.uncertainty(1, h200) == predict.uncertainty(197, h200) == pytest.approx(0.40)
    assert predict.uncertainty(50432, h200) == predict.uncertainty(10**6, h200) == pytest.approx(0.10)
    assert predict.uncertainty(16 * 197, h200) == pytest.approx(0.25)
    assert predict.uncertainty(197, GPUS["h100"]) == 0.40 and predict.uncertainty(197, GPUS["a100"]) == 0.80
    for batch, percent in ((1, 40), (256, 10)):
        facts, _ = predicted(batch=batch)
        assert facts["uncertainty_percent"] == pytest.approx(percent)
        assert facts["images_per_second_low"] < facts["images_per_second"] < facts["images_per_second_high"]


# The command.


def run(*arguments):
    """Exit status of the command line."""
    with pytest.raises(SystemExit) as end:
        cli.main(["profile", *map(str, arguments)])
    return end.value.code or 0


WORDS = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--model-kwargs", "depth=2", "--batch-size", "4"]


@pytest.mark.parametrize("ending", ("json", "csv"))
def test_the_command(ending, tmp_path, capsys):
    file = tmp_path / f"rows.{ending}"
    assert run(*WORDS, "--predict", "h100", "--provider", "prepared", "--results-file", file) == 0
    shown = capsys.readouterr().out
    for text in ("This is a model, not a measurement: nothing ran.", "blocks.*.attn.qkv", "H100 SXM", "±", "waves"):
        assert text in shown, text
    if ending == "json":
        told = json.loads(file.read_text())
        facts, rows = told["facts"], told["rows"]
    else:
        rows = list(csv.DictReader(file.open()))
        facts = rows[0]
    assert str(facts["predicted"]) == "True" and facts["img_size"] == "32×32" and facts["precision"] == "bfloat16"
    assert [row["operation"] for row in rows[-3:]] == ["sum", "gaps between launches", "step"]
    assert float(rows[-1]["us"]) == pytest.approx(1e3 * float(facts["step_ms"]))


@pytest.mark.parametrize(
    "words,status,text",
    (
        (["--predict", "v100"], 2, "got 'v100', wanted h200, h100, a100, b200, l4 or rtx4090"),
        (["--predict", "h200", "--provider", "compile"], 2, "got 'compile', wanted vit_fast, prepared, fp8 with"),
        (["--predict", "h200", "--provider", "int8"], 2, "got 'int8', wanted vit_fast, prepared, fp8 with"),
        (["--predict", "h200", "--device", "cpu"], 2, "got 'cpu', wanted it without --predict"),
        (["--predict", "h200", "--trace", "t.json"], 2, "wanted it without --predict"),
        (["--predict", "h200", "--num-iter", "3"], 2, "got '3', wanted it without --predict"),
        (["--predict", "h200", "--batch-size", "0"], 2, "a whole number of 1 or more"),
        (["--predict", "a100", "--provider", "fp8"], 1, "A100 SXM 80 GB has no products in float8"),
        (
            ["--predict", "h200", "--provider", "prepared", "--precision", "fp32"],
            2,
            "it with --precision bfloat16 or float16",
        ),
        (["--predict", "h200", "--model", "vit_enormous"], 1, "cannot make the model 'vit_enormous'"),
        (["--predict", "h200", "--results-file", "/proc/x.json"], 2, "a file that can be written"),
    ),
)
def test_bad_words(words, status, text, capsys):
    assert run(*words) == status
    assert text in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_without_triton_nothing_is_predicted(monkeypatch, capsys):
    monkeypatch.setattr(TRITON, "load", lambda: ("triton is not installed",))
    assert run(*WORDS, "--predict", "h200") == 1
    assert "predicted from the Triton kernels, and triton is not installed" in capsys.readouterr().err


def test_interpreted_kernels_are_not_predicted(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run(*WORDS, "--predict", "h200") == 1
    assert "TRITON_INTERPRET is 1: unset it" in capsys.readouterr().err


def test_a_model_without_a_size_is_told(monkeypatch, capsys):
    monkeypatch.setattr(vit_fast, "create_model", lambda name, **words: torch.nn.Linear(3, 3))
    assert run("--predict", "h200") == 1
    assert "does not tell the size of its input" in capsys.readouterr().err
