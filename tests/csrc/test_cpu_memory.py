"""Memory of prepared models on the backend ``cpu``: while weights are packed, and in the calls after, no more than the
model in eager mode takes and the packed weights. Measured in a fresh process, on Linux, where the peak can be reset."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.extension, pytest.mark.usefixtures("cpu_extension")]

MIB = 2**20
DEPTH, BATCH = 5, 2  # blocks of ViT-B: 27 MiB each, packed as much, in int8 7
SLACK = 16 * MIB  # what the allocator keeps, and the temporaries of a layer
SCRIPT = """
import json, sys

import torch

import vit_fast
from vit_fast.bench.measure import resident_growth
from vit_fast.block import PREPARED

FORMS = dict(eager=None, float32={}, released=dict(release=True), int8=dict(precision="int8"))


def made(depth):
    with torch.device("meta"):
        model = vit_fast.create_model("vit_base_patch16_224", depth=depth).eval()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.1, 0.1)
    return model


def growth(form, depth, batch):
    "(bytes that the peak grew while the model was prepared and called, bytes of packed weights)"
    model, images = made(depth), torch.randn(batch, 3, 224, 224)

    def call():
        if form is not None:
            vit_fast.prepare(model, **form)
        with torch.no_grad():
            for _ in range(2):
                model(images)

    grown = resident_growth(call)
    records = vars(model.blocks).get(PREPARED)
    return grown, sum(t.nbytes for t in records.weights) if records else 0


torch.set_num_threads(2)
for form in FORMS.values():  # what is loaded once is no part of a model
    growth(form, 1, 1)
depth, batch = map(int, sys.argv[1:])
print(json.dumps({name: growth(form, depth, batch) for name, form in FORMS.items()}))
"""


@pytest.fixture(scope="module")
def growths():
    """{form: (growth of the peak, packed weights)} in bytes."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(DEPTH), str(BATCH)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if found["eager"][0] is None:
        pytest.skip("only Linux resets the peak of a process")
    return found


@pytest.mark.parametrize("form", ("float32", "int8"))
def test_the_peak_is_that_of_eager_and_the_packed_weights(form, growths):
    (eager, _), (peak, packed) = growths["eager"], growths[form]
    assert packed > 7 * DEPTH * 0.9 * MIB, "the model was not prepared"
    assert peak <= eager + packed + SLACK


def test_released_weights_make_room_for_the_packed_ones(growths):
    (eager, _), (peak, packed) = growths["eager"], growths["released"]
    assert peak <= eager + 2 * packed / DEPTH + SLACK  # a block is released when it is packed
