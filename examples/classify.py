"""Classify an image with a ViT of timm: python examples/classify.py [--model NAME] [--pretrained] [--image FILE]

Without --pretrained the weights are random, and nothing is downloaded.
"""

import argparse
import copy

import timm
import torch

import vit_fast

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
parser.add_argument("--image", help="an image file, by default random pixels")
args = parser.parse_args()

torch.manual_seed(0)
model = timm.create_model(args.model, pretrained=args.pretrained).eval()
print(f"{args.model}, {'pretrained' if args.pretrained else 'random'} weights")
if args.image:
    from PIL import Image

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = transform(Image.open(args.image).convert("RGB"))[None]
else:
    images = torch.randn(1, *model.default_cfg["input_size"])

fast = vit_fast.optimize(copy.deepcopy(model))
with torch.inference_mode():
    expected, logits = model(images), fast(images)
best = logits.softmax(-1)[0].topk(3)
for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
    print(f"class {label}: {probability:.4f}")
print(f"fused share of the model: {vit_fast.coverage(fast).share:.2f}")
print(f"same class as without vit_fast: {torch.equal(logits.argmax(-1), expected.argmax(-1))}")
print(f"largest difference of the logits: {(logits - expected).abs().max():.1e}")
