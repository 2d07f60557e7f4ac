"""Which module may import which: the graph of all imports between our modules, those inside functions included.

There is no circle, and no module imports one of a later layer.
"""

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.imports import imports

ROOT = Path(__file__).parents[2]
FOLDERS = {"vit_fast": ROOT / "vit_fast", "vit_fast.kernels": ROOT / "kernels", "vit_fast.csrc": ROOT / "csrc"}
# A name stands for a module and for all modules of a package; "vit_fast" is the public interface alone.
LAYERS = (
    ("vit_fast.kernels", "vit_fast.csrc"),
    ("vit_fast.block_params", "vit_fast.parity", "vit_fast.extension"),
    ("vit_fast.precisions",),
    ("vit_fast.backends",),
    ("vit_fast.ops",),
    ("vit_fast.pos_embed", "vit_fast.patch_resize", "vit_fast.input_size", "vit_fast.pretrained_cfg"),
    (
        "vit_fast.heap",
        "vit_fast.remembered",
        "vit_fast.plain",
        "vit_fast.key_masks",
        "vit_fast.layer_args",
        "vit_fast.block",
        "vit_fast.snapshot",
        "vit_fast.structure",
        "vit_fast.twin",
    ),
    ("vit_fast.checkpoints",),
    ("vit_fast.layers", "vit_fast.vit", "vit_fast.features", "vit_fast.presets"),
    ("vit_fast.systems",),
    ("vit_fast.integrations",),
    (
        "vit_fast.prepared",
        "vit_fast.class_swap",
        "vit_fast.fake_tensors",
        "vit_fast.explanation",
        "vit_fast.cuda_graphs",
        "vit_fast.certificate",
    ),
    ("vit_fast.timm_models", "vit_fast.registry", "vit_fast.warming"),
    ("vit_fast.diagnosis", "vit_fast.fused_share", "vit_fast.library_models"),
    ("vit_fast.library_coverage",),
    ("vit_fast",),
    ("vit_fast.bench",),
    ("vit_fast.training",),
    ("vit_fast.cli", "vit_fast.__main__"),
)


def our_modules():
    """{name: path}; a package has the name of its folder."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(name, path, known):
    """The modules of ours that a file imports: an attribute of a module stands for the module."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for target, _ in imports(path, package):
        yield from [one for one in (target, target.rpartition(".")[0]) if one in known][:1]


def graph():
    known = our_modules()
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def layer(name):
    """The index of the layer of a module, by its own name or that of the nearest package around it; None without."""
    places = {name: index for index, names in enumerate(LAYERS) for name in names}
    own = name
    while own not in places:
        own = own.rpartition(".")[0]
    return None if own == "vit_fast" != name else places[own]


def upward(edges):
    return sorted(
        f"{name} → {other}" for name, others in edges.items() for other in others if layer(other) > layer(name)
    )


def test_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_no_import_goes_up():
    assert not upward(graph())


def test_every_module_has_a_layer():
    assert [name for name in our_modules() if layer(name) is None] == []


def test_no_public_function_hides_its_module():
    """``import vit_fast.explain`` would otherwise be a function or a module by what was imported before."""
    import vit_fast

    files = {name.rpartition(".")[2] for name in our_modules() if name.rpartition(".")[0] == "vit_fast"}
    assert files & set(vit_fast.__all__) <= {"ops", "systems"}  # modules that are public as such


def test_the_graph_is_read():
    """Relative, absolute and late imports are seen, and what goes up is named."""
    edges = graph()
    assert (
        "vit_fast.ops" in edges["vit_fast.block"] and "vit_fast.kernels.attention" in edges["vit_fast.backends.triton"]
    )
    assert edges["vit_fast.kernels.configs"] == {"vit_fast.kernels.tuned"} and not edges["vit_fast.kernels.tuned"]
    assert upward({"vit_fast.ops": {"vit_fast.vit"}}) == ["vit_fast.ops → vit_fast.vit"]
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
