"""Arrays under the names of Google's .npz files."""

import numpy as np

STEM = "transformer.embeddings.hybrid_model"


def google_arrays(model, heads=3, linen=False, stacked=False, table="Transformer/posembed_input/pos_embedding"):
    """The arrays that JAX would have written, from a model in this library's names."""
    state = {key: value.detach().numpy().astype(np.float32) for key, value in model.state_dict().items()}
    attention, norm2, mlp = (
        ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
        if linen
        else ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
    )
    arrays = {
        "embedding/kernel": state["transformer.embeddings.patch_embeddings.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["transformer.embeddings.patch_embeddings.bias"],
        table: state["transformer.embeddings.position_embeddings"],
        "Transformer/encoder_norm/scale": state["transformer.encoder.encoder_norm.weight"],
        "Transformer/encoder_norm/bias": state["transformer.encoder.encoder_norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    if "transformer.embeddings.cls_token" in state:
        arrays["cls"] = state["transformer.embeddings.cls_token"]
    if "pre_logits.fc.weight" in state:
        arrays |= {"pre_logits/kernel": state["pre_logits.fc.weight"].T, "pre_logits/bias": state["pre_logits.fc.bias"]}
    blocks = []
    for i in range(len(model.transformer.encoder.layer)):
        name, block = f"transformer.encoder.layer.{i}", {}
        width = state[f"{name}.attn.out.weight"].shape[0]
        for word in ("query", "key", "value"):
            weight, bias = state[f"{name}.attn.{word}.weight"], state[f"{name}.attn.{word}.bias"]
            block[f"{attention}/{word}/kernel"] = weight.T.reshape(width, heads, width // heads)
            block[f"{attention}/{word}/bias"] = bias.reshape(heads, width // heads)
        out = state[f"{name}.attn.out.weight"].T.reshape(heads, width // heads, width)
        block |= {f"{attention}/out/kernel": out, f"{attention}/out/bias": state[f"{name}.attn.out.bias"]}
        for theirs, ours in (("LayerNorm_0", "attention_norm"), (norm2, "ffn_norm")):
            block[f"{theirs}/scale"] = state[f"{name}.{ours}.weight"]
            block[f"{theirs}/bias"] = state[f"{name}.{ours}.bias"]
        for theirs, ours in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            block[f"{mlp}/{theirs}/kernel"] = state[f"{name}.ffn.{ours}.weight"].T
            block[f"{mlp}/{theirs}/bias"] = state[f"{name}.ffn.{ours}.bias"]
        blocks.append(block)
    if stacked:
        arrays |= {f"Transformer/encoderblock/{k}": np.stack([block[k] for block in blocks]) for k in blocks[0]}
    else:
        for i, block in enumerate(blocks):
            arrays |= {f"Transformer/encoderblock_{i}/{key}": value for key, value in block.items()}
    for key, value in state.items():
        if key.startswith(STEM):
            key = key.removeprefix(f"{STEM}.").removeprefix("body.").replace("root.conv", "conv_root")
            key = key.replace("root.gn", "gn_root").replace("downsample", "conv_proj").replace(".", "/")
            if value.ndim == 4:
                arrays[key.replace("weight", "kernel")] = value.transpose(2, 3, 1, 0)
            else:
                arrays[key.replace("weight", "scale")] = value.reshape(1, 1, 1, -1) if "gn2" in key else value
    return arrays
