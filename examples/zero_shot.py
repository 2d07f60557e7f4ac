"""Zero-shot classification with SigLIP of transformers: python examples/zero_shot.py [--model NAME]

Without --model a small SigLIP with random weights and random tokens runs, and nothing is downloaded.
"""

import argparse
import copy

import torch
from transformers import SiglipConfig, SiglipModel

import vit_fast

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a checkpoint of SigLIP or CLIP, for example google/siglip-base-patch16-224")
parser.add_argument("--image", help="an image file, with --model")
args = parser.parse_args()
if args.model and not args.image:
    parser.error("--model needs --image")

labels = ["a cat", "a dog", "a boat"]
torch.manual_seed(0)
if args.model:
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(args.model), AutoProcessor.from_pretrained(args.model)
    inputs = processor(text=labels, images=Image.open(args.image), padding="max_length", return_tensors="pt")
else:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    config = SiglipConfig(text_config=text, vision_config=sizes | {"image_size": 64})
    model = SiglipModel(config)
    inputs = {"input_ids": torch.randint(100, (3, 8)), "pixel_values": torch.randn(1, 3, 64, 64)}
print(f"{args.model or 'a small SigLIP'}, {'pretrained' if args.model else 'random'} weights")

model = model.eval()
fast = vit_fast.optimize(copy.deepcopy(model))  # the image tower; the text tower stays as it is
with torch.inference_mode():
    expected, scores = model(**inputs).logits_per_image, fast(**inputs).logits_per_image
for label, score in zip(labels, scores[0].tolist(), strict=True):
    print(f"{label}: {score:.3f}")
print(f"same label as without vit_fast: {torch.equal(scores.argmax(-1), expected.argmax(-1))}")
print(f"largest difference of the scores: {(scores - expected).abs().max():.1e}")
