"""Small models of our own, and functions that fill and compare them."""

import torch._dynamo.testing


def perturb(model, seed=0, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def images_for(model, batch=2, seed=1):
    size = (batch, model.in_chans, *model.patch_embed.img_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6 * (1 + theirs.abs().max().item()))


SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=7)
