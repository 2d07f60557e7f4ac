"""The transformer blocks of a model, found by their sub-modules and not by their class.

A block is a child of an ``nn.Sequential`` or ``nn.ModuleList`` that holds a normalisation and mixes tokens: by
attention, or, as in MLP-Mixer, by a linear layer beside the two of an MLP. Where such children are nested (the stages
of a hierarchical model hold blocks), the innermost are the blocks. Blocks of text towers are left out.
"""

from torch import nn

_STACKS = (nn.Sequential, nn.ModuleList)
_NORMS = ("norm", "affine")  # ResMLP has Affine in the place of a norm
_HEADS = ("num_heads", "n_heads", "heads", "nhead", "num_head", "num_attention_heads")
_MIXER_LINEARS = 3
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module of every transformer block of a model that does not read text, in the order of the model."""
    found: dict[str, nn.Module] = {}
    text: dict[str, bool] = {}
    _search(model, "", False, found)
    for name in found:
        stack = name.rpartition(".")[0]
        if stack not in text:
            text[stack] = _reads_text(model, stack, found)
    return {name: block for name, block in found.items() if not text[name.rpartition(".")[0]]}


def _search(module, name, in_stack, found):
    """Adds the blocks inside a module, or the module itself where it is a block that contains no other."""
    known, is_stack = len(found), isinstance(module, _STACKS)
    for key, child in module.named_children():
        _search(child, f"{name}.{key}".removeprefix("."), is_stack, found)
    if in_stack and not is_stack and len(found) == known and _is_block(module):
        found[name] = module


def _is_block(module):
    parts = list(module.modules())
    if not any(word in type(part).__name__.lower() for part in parts for word in _NORMS):
        return False
    if any(isinstance(getattr(part, word, None), int) for part in parts for word in _HEADS):
        return True
    return sum(isinstance(part, nn.Linear) for part in _outside_stacks(module)) >= _MIXER_LINEARS


def _outside_stacks(module):
    """The modules inside a module, except inside nested stacks, such as those of a convolutional stage."""
    for child in module.children():
        if not isinstance(child, _STACKS):
            yield child
            yield from _outside_stacks(child)


def _reads_text(model, stack, blocks):
    """Whether the nearest input layer around a stack embeds words: a convolution embeds patches, and an
    ``nn.Embedding`` that is not named for positions embeds words."""
    while True:
        owner = model.get_submodule(stack)
        beside = [
            (name, part)
            for key, child in owner.named_children()
            if not any(block.startswith(f"{stack}.{key}.".removeprefix(".")) for block in blocks)
            for name, part in child.named_modules(prefix=key)
        ]
        if any(isinstance(part, _CONVOLUTIONS) for _, part in beside):
            return False
        if any(isinstance(part, nn.Embedding) and "pos" not in name for name, part in beside):
            return True
        if not stack:
            return False
        stack = stack.rpartition(".")[0]
