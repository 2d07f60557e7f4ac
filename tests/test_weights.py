"""Weight files: what loads, what is resized, and that everything else is a WeightsError that lists what is wrong."""

import pytest
import torch
from safetensors.torch import save_file

import vit_fast
from vit_fast import checkpoints

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=4, num_classes=7)


class Evil:
    """Unpickling this runs code."""

    def __reduce__(self):
        return (print, ("executed",))


def _model(**words):
    torch.manual_seed(0)
    return vit_fast.VisionTransformer(**SMALL | words).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "state_dict_ema"])
def test_round_trip(tmp_path, suffix, wrapper):
    if suffix == ".safetensors" and wrapper:
        wrapper = None
    model, path = _model(), tmp_path / f"weights{suffix}"
    state = {f"module.{k}" if wrapper == "model" else k: v for k, v in model.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapper: state} if wrapper else state, path)
    torch.manual_seed(1)
    loaded = vit_fast.VisionTransformer(**SMALL).eval()
    checkpoints.load_checkpoint(loaded, path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


def test_position_embedding_of_another_grid_is_resized(tmp_path):
    save_file(_model().state_dict(), tmp_path / "small.safetensors")
    larger = _model(img_size=48)
    checkpoints.load_checkpoint(larger, tmp_path / "small.safetensors")
    expected = vit_fast.resize_pos_embed(_model().pos_embed, (4, 4), (6, 6), "R5", 1)
    assert torch.equal(larger.pos_embed, expected)


def test_create_model_with_a_file(tmp_path):
    words = dict(img_size=32, depth=1, num_classes=5)
    model = vit_fast.create_model("vit_tiny_patch16_224", **words)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    loaded = vit_fast.create_model("vit_tiny_patch16_224", checkpoint_path=tmp_path / "tiny.safetensors", **words)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_mismatches_are_listed_and_change_nothing(tmp_path):
    model = _model()
    state = model.state_dict()
    state["head.weight"] = torch.zeros(9, 48)
    del state["blocks.0.attn.qkv.bias"]
    state["extra.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "bad.safetensors")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(vit_fast.WeightsError) as error:
        checkpoints.load_checkpoint(model, tmp_path / "bad.safetensors")
    for words in (
        "missing blocks.0.attn.qkv.bias",
        "unexpected extra.weight",
        "wrong shape head.weight (9, 48) instead of (7, 48)",
    ):
        assert words in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_unreadable_files(tmp_path, capsys):
    model = _model()
    good = tmp_path / "good.safetensors"
    save_file(model.state_dict(), good)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:-100])
    torch.save(model.state_dict(), tmp_path / "good.pt")
    cut = tmp_path / "cut.pt"
    cut.write_bytes((tmp_path / "good.pt").read_bytes()[:500])
    text = tmp_path / "text.pt"
    text.write_text("not weights")
    torch.save({"weights": Evil()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    cases = {
        truncated: "cannot be read",
        cut: "cannot be read",
        text: "cannot be read",
        tmp_path / "evil.pt": "cannot be read",
        tmp_path / "list.pt": "holds no state_dict",
        tmp_path / "absent.pt": "does not exist",
    }
    for path, words in cases.items():
        with pytest.raises(vit_fast.WeightsError, match=words):
            checkpoints.load_checkpoint(model, path)
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(vit_fast.WeightsError, match=r"ends in '.h5', expected"):
        checkpoints.load_checkpoint(model, tmp_path / "weights.h5")


def test_pretrained_loads_what_timm_has(monkeypatch):
    """The hub is out of reach of tests: timm's own factory stands in for the download."""
    import timm

    shipped = timm.create_model("vit_tiny_patch16_224", num_classes=11)
    calls = []

    def create(name, pretrained, **words):
        calls.append((name, pretrained, words))
        return shipped

    monkeypatch.setattr(timm, "create_model", create)
    model = vit_fast.create_model("vit_tiny_patch16_224.augreg_in21k", pretrained=True, num_classes=11).eval()
    cfg = timm.models.get_pretrained_cfg("vit_tiny_patch16_224.augreg_in21k").to_dict()
    assert calls == [("vit_tiny_patch16_224", True, {"pretrained_cfg": cfg, "num_classes": 11})]
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(x), shipped.eval()(x))


def test_pretrained_without_network_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(vit_fast.WeightsError, match=r"pretrained weights of 'vit_tiny_patch16_224' cannot be had"):
        vit_fast.create_model("vit_tiny_patch16_224", pretrained=True)


POLICIES = {
    "R1": dict(mode="bilinear", align_corners=True),
    "R2": dict(mode="bilinear", align_corners=False),
    "R3": dict(mode="bilinear", align_corners=False),
    "R4": dict(mode="bicubic", align_corners=False),
    "R5": dict(mode="bicubic", align_corners=False, antialias=True),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_resize_pos_embed(policy, prefix):
    table = torch.randn(1, prefix + 12, 5)
    out = vit_fast.resize_pos_embed(table, (3, 4), (5, 2), policy, prefix)
    grid = table[0, prefix:].T.reshape(1, 5, 3, 4)
    expected = torch.nn.functional.interpolate(grid, size=(5, 2), **POLICIES[policy]).reshape(5, 10).T
    assert torch.equal(out[0, :prefix], table[0, :prefix])
    torch.testing.assert_close(out[0, prefix:], expected, rtol=0, atol=0)
    assert vit_fast.resize_pos_embed(table, (3, 4), (3, 4), policy, prefix) is table
    half = vit_fast.resize_pos_embed(table[0].half(), (3, 4), (4, 3), policy, prefix)
    assert half.dtype == torch.float16 and half.shape == (prefix + 12, 5)


def test_r1_is_scipys_zoom(peer):
    """R1 is what Google's program does: scipy.ndimage.zoom of order 1."""
    import numpy as np

    ndimage = peer("scipy.ndimage")
    grid = np.random.default_rng(0).standard_normal((4, 4, 3)).astype(np.float32)
    zoomed = ndimage.zoom(grid, (7 / 4, 7 / 4, 1), order=1)
    ours = vit_fast.resize_pos_embed(torch.from_numpy(grid).reshape(1, 16, 3), (4, 4), (7, 7), "R1")
    np.testing.assert_allclose(ours.reshape(7, 7, 3).numpy(), zoomed, atol=1e-5)


def test_resize_refuses():
    table = torch.randn(1, 13, 5)
    for arguments, message in (
        (((3, 4), (4, 4), "R7", 1), "policy is 'R7', expected one of R1"),
        (((4, 4), (2, 2), "R5", 1), "table has 13 rows, expected 1 prefix rows and a grid of 4×4"),
        ((None, (2, 2), "R5", 2), "table has 13 rows"),
        (((3, 4), (0, 2), "R5", 1), r"new_grid is \(0, 2\), expected positive sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            vit_fast.resize_pos_embed(table, *arguments)
    for words, message in (
        ((table, None, 2), "new_grid is 2, expected a pair of ints"),
        ((table, (3, 4), (2.0, 2)), r"new_grid is \(2.0, 2\), expected a pair of ints"),
        ((table, "34", (2, 2), "R5", 1), "old_grid is '34', expected a pair of ints"),
        ((table.numpy(), (3, 4), (2, 2)), "table is ndarray, expected a torch.Tensor"),
    ):
        with pytest.raises(TypeError, match=f"vit_fast.resize_pos_embed: {message}"):
            vit_fast.resize_pos_embed(*words)
    with pytest.raises(ValueError, match="table has 1 dimensions, expected 2 or 3"):
        vit_fast.resize_pos_embed(table[0, 0], (3, 4), (2, 2))
    with pytest.raises(ValueError, match=r"policy is \[1\], expected one of R1"):
        vit_fast.resize_pos_embed(table, (3, 4), (2, 2), [1])
