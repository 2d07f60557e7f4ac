"""Checkpoints: files of timm, Google, OpenAI, Hugging Face and others, loaded into models and converted.

files       the state_dict in a file              loading       strict loading into a model, each family's loader
fitting     tables and convolutions of other      conversion    one program's keys in another's
            sizes                                 report        what became of every key
base        ``Format``: one program's keys        registry      the list of all formats
key_rules   rules that rename keys                hub           timm's downloads
errors      ``WeightsError``

One file for each format: timm (also DeiT, T2T-ViT), canonical, clip (OpenAI, open_clip, CLIP-ReID), huggingface,
dinov2, mae, jeonsworld (with its hybrids), google_npz, lanl, torch_layers (stacks of torch's TransformerEncoderLayer).

Nothing here imports a model: a family declares its loader with ``loading.loads``.
"""

from .conversion import convert_file, convert_state_dict
from .errors import WeightsError
from .files import read_state_dict
from .loading import load_checkpoint, load_state_dict

__all__ = [
    "WeightsError",
    "convert_file",
    "convert_state_dict",
    "load_checkpoint",
    "load_state_dict",
    "read_state_dict",
]
