"""Dense features of DINOv3 (or DINOv2): python examples/dense_features.py [--model NAME] [--pretrained]

A map of features, a vector for each patch, from one of the middle blocks. Without --pretrained the weights are random.
"""

import argparse
import copy

import timm
import torch

import vit_fast

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="vit_small_patch16_dinov3", help="or vit_small_patch14_dinov2")
parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
parser.add_argument("--img-size", type=int, default=112)
args = parser.parse_args()

torch.manual_seed(0)
model = timm.create_model(args.model, pretrained=args.pretrained, img_size=args.img_size).eval()
print(f"{args.model}, {'pretrained' if args.pretrained else 'random'} weights")
images = torch.randn(1, 3, args.img_size, args.img_size)

fast = vit_fast.optimize(copy.deepcopy(model))
with torch.inference_mode():
    found = [m.forward_intermediates(images, indices=[5], intermediates_only=True)[0] for m in (model, fast)]
expected, features = found
print(f"features of block 5: {list(features.shape)}")
cosines = torch.cosine_similarity(features, expected, dim=1)
print(f"cosine with the features without vit_fast, smallest of {cosines.numel()} patches: {cosines.min():.6f}")
