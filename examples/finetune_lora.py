"""Fine-tune a ViT of timm with LoRA (peft): python examples/finetune_lora.py [--steps N]

The weights are random, and the task is to tell bright images from dark ones; nothing is downloaded.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

import vit_fast

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

torch.manual_seed(0)
sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
model = vit_fast.optimize(timm.create_model("vit_tiny_patch16_224", num_classes=2, **sizes))
print("a small ViT, random weights")
config = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
model = get_peft_model(model, config)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"trained parameters: {trained} of {sum(p.numel() for p in model.parameters())}")

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
losses = []
for _ in range(args.steps):
    labels = torch.randint(2, (16,))
    images = torch.randn(16, 3, 32, 32) + (2.0 * labels - 1).view(-1, 1, 1, 1)
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss fell: {losses[-1] < losses[0]}")

merged = model.merge_and_unload().eval()  # LoRA in the weights: every block runs fused again
images = torch.randn(8, 3, 32, 32)
with torch.inference_mode():
    logits = merged(images)
    expected = vit_fast.restore(merged)(images)
print(f"same classes as without vit_fast: {torch.equal(logits.argmax(-1), expected.argmax(-1))}")
print(f"largest difference of the logits: {(logits - expected).abs().max():.1e}")
