"""Writes vit_fast/pretrained_cfgs.json from the installed timm: python tests/support/pretrained_cfgs.py"""

import dataclasses
import json
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg

from vit_fast.presets import PRESETS

# timm's modules whose models are transformers with one width and one grid of tokens throughout.
MODULES = (
    "beit", "cait", "deepseek_vit", "deit", "eva", "gemma4_vit", "naflexvit", "qwen3_vit", "vision_transformer",
    "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "vitamin",
)  # fmt: skip
FILE = Path(__file__).parents[2] / "vit_fast" / "pretrained_cfgs.json"


def cfgs_of_timm(name) -> dict[str, dict]:
    """tag → timm's pretrained_cfg of a name, the default tag first."""
    cfgs = {cfg.tag or "": cfg.to_dict() for cfg in get_arch_pretrained_cfgs(name).values()}
    if cfgs:
        default = get_pretrained_cfg(name).tag or ""
        return {default: cfgs.pop(default), **cfgs}
    # A deprecated name maps to another name and tag.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore", UserWarning)
        cfg = timm.create_model(name).pretrained_cfg
    return {cfg["tag"]: cfg}


def table() -> dict:
    """The contents of the file."""
    modules = {module: sorted(timm.list_models(module=module)) for module in MODULES}
    names = {name for names in modules.values() for name in names} | {name for name in PRESETS if timm.is_model(name)}
    models = {name: cfgs_of_timm(name) for name in sorted(names)}
    defaults = PretrainedCfg().to_dict()
    rows = [cfg for cfgs in models.values() for cfg in cfgs.values()]
    common = {}
    for field in rows[0]:
        value, count = Counter(json.dumps(row.get(field)) for row in rows).most_common(1)[0]
        if count > len(rows) // 2 and json.loads(value) != defaults.get(field):
            common[field] = json.loads(value)
    given = {**defaults, **common}
    for name, cfgs in models.items():
        for tag, cfg in cfgs.items():
            implied = {**given, "architecture": name, "tag": tag}
            row = {field: value for field, value in cfg.items() if value != implied.get(field)}
            row |= {field: None for field in given.keys() - cfg.keys()}
            if row.get("hf_hub_id") == f"timm/{cfg['architecture']}.{tag}":
                row["hf_hub_id"] = "timm/"
            cfgs[tag] = row
    fields = [field.name for field in dataclasses.fields(PretrainedCfg)]
    head = {"timm": timm.__version__, "fields": fields, "defaults": defaults, "common": common, "modules": modules}
    return head | {"models": models}


def text(contents) -> str:
    """JSON with one line for each tag."""
    models = ",\n".join(
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f" {json.dumps(tag)}: {json.dumps(row)}" for tag, row in cfgs.items())
        + "\n}"
        for name, cfgs in contents["models"].items()
    )
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in contents.items() if key != "models")
    return f'{{\n{head},\n"models": {{\n{models}\n}}\n}}\n'


if __name__ == "__main__":
    FILE.write_text(text(table()), encoding="utf-8")
