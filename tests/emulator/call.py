"""Calls one function of a library of emulated kernels, here or in a process of its own, which the sanitizers need.

As a program, without torch: ``python call.py REQUEST.json`` reads the buffers (raw files), calls, and writes them back.
"""

import ctypes
import json
import os
import sys
from typing import Any

_MODES = {"in": 0, "out": 1, "inout": 2}


def _int64s(values: list[int]) -> Any:
    return (ctypes.c_int64 * max(1, len(values)))(*values)


def call(library: str, request: dict[str, Any], buffers: list[int]) -> dict[str, Any]:
    """Runs a request on buffers (addresses): {"error", "returned", "counts"}.

    request: "function"; "arguments", each an int, a float, None (a null pointer), a list of ints (an array of int64) or
    {"buffer", "offset" in bytes, "name", "element" in bytes, "sizes", "strides", "mode": "in", "out" or "inout"}, a
    tensor; "schedule", 0 or the seed of a random one; "shared_limit", bytes of shared memory a block;
    "last_blocks", how many blocks run, from the end of the grid, 0 for all.
    """
    lib = ctypes.CDLL(library)
    lib.emulator_error.restype = ctypes.c_char_p
    begin = (ctypes.c_int64(request[name]) for name in ("schedule", "shared_limit", "last_blocks"))
    lib.emulator_begin(*begin)
    arguments: list[Any] = []
    for value in request["arguments"]:
        if isinstance(value, dict):
            address = buffers[value["buffer"]] + value["offset"]
            lib.emulator_view(
                ctypes.c_void_p(address), value["name"].encode(), ctypes.c_int64(value["element"]),
                ctypes.c_int64(len(value["sizes"])), _int64s(value["sizes"]), _int64s(value["strides"]),
                ctypes.c_int64(_MODES[value["mode"]]),
            )  # fmt: skip
            arguments.append(ctypes.c_void_p(address))
        elif isinstance(value, list):
            arguments.append(_int64s(value))
        elif isinstance(value, float):
            arguments.append(ctypes.c_double(value))
        else:
            arguments.append(ctypes.c_void_p(None) if value is None else ctypes.c_int64(value))
    returned = lib[request["function"]](*arguments)
    counts = _int64s([0] * 6)
    lib.emulator_counts(counts)
    return {"error": lib.emulator_error().decode(), "returned": returned, "counts": list(counts)}


def main(path: str) -> None:
    with open(path) as file:
        request = json.load(file)
    memory = []
    for name in request["files"]:
        with open(name, "rb") as file:
            content = file.read()
        memory.append(ctypes.create_string_buffer(content, len(content) + 16))
    # Tensors keep their alignment of 16 bytes.
    shifts = [-ctypes.addressof(block) % 16 for block in memory]
    for block, shift, name in zip(memory, shifts, request["files"]):
        size = os.path.getsize(name)
        ctypes.memmove(ctypes.addressof(block) + shift, bytes(block.raw[:size]), size)
    addresses = [ctypes.addressof(block) + shift for block, shift in zip(memory, shifts)]
    answer = call(request["library"], request, addresses)
    for block, shift, name in zip(memory, shifts, request["files"]):
        size = os.path.getsize(name)
        with open(name, "wb") as file:
            file.write(block.raw[shift : shift + size])
    with open(path + ".answer", "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(sys.argv[1])
