"""Image embeddings of open_clip: python examples/embed_open_clip.py [--model NAME] [--pretrained TAG]

Without --pretrained the weights are random, and nothing is downloaded.
"""

import argparse
import copy

import open_clip
import torch

import vit_fast

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="ViT-S-32")
parser.add_argument("--pretrained", help="a tag of open_clip, for example laion2b_s34b_b79k")
args = parser.parse_args()

torch.manual_seed(0)
model = open_clip.create_model(args.model, pretrained=args.pretrained).eval()
print(f"{args.model}, {'pretrained' if args.pretrained else 'random'} weights")
size = model.visual.image_size
images = torch.randn(4, 3, *(size if isinstance(size, tuple) else (size, size)))

fast = vit_fast.optimize(copy.deepcopy(model))  # the image tower
with torch.inference_mode():
    expected, embeddings = (m.encode_image(images, normalize=True) for m in (model, fast))
print(f"embeddings {list(embeddings.shape)}, cosine of the first two images: {embeddings[0] @ embeddings[1]:.4f}")
cosines = (embeddings * expected).sum(-1)
print(f"cosine with the embeddings without vit_fast, smallest of {len(cosines)}: {cosines.min():.6f}")
