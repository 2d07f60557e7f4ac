"""Where compiled libraries are kept, by which key they are found, and the record beside each.

The builder and the loader share this file, which imports the standard library alone. A cache folder holds

    <key>/<toolchain>/vit_fast_cpu.so     the library
    <key>/<toolchain>/vit_fast_cpu.json   its record: SHA-256, key, what built it
    <key>.lock                            held with flock while a process builds
    <key>.tmp-<toolchain>-*               a build that is going on, or that ended early: the next one goes on from it

The key is made of the library's name, the ABI target, the machine and a hash of the sources and of the builder's flags:
all that decides whether a library fits, none of which needs a compiler to be known. The torch version is no part of it,
since PyTorch's stable ABI lets one library load in every torch from the target on. The toolchain (compilers with their
versions) names the folder inside.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

NAMES = ("cpu", "cuda", "cutlass")
ABI_TARGET = (2, 11)  # the oldest torch whose stable ABI the libraries use
SOURCES = Path(__file__).parent


class Record(NamedTuple):
    """What is known of a library file: ``sha256`` of its bytes, its ``key``, and what built it (``toolchain``)."""

    sha256: str
    key: str
    toolchain: str


class DamagedError(Exception):
    """A library file that must not be loaded; the text says why."""


def folder() -> Path:
    """The cache folder: ``VIT_FAST_EXT_DIR``, else ``vit_fast/ext`` in ``XDG_CACHE_HOME``, else in ``~/.cache``.

    Raises:
        RuntimeError: there is no home folder to be found.
    """
    if own := os.environ.get("VIT_FAST_EXT_DIR"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    return base / "vit_fast" / "ext"


def file_name(name: str) -> str:
    """The file name of a library, one of ``NAMES``."""
    return f"vit_fast_{name}.so"


def source_files(name: str, sources: Path = SOURCES) -> list[Path]:
    """The files that a library is compiled from, headers included, in a fixed order."""
    inside = [path for path in (sources / name).rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".cuh")]
    shared = (sources / "cuda").glob("*.h") if name == "cutlass" else ()
    return sorted([*inside, *shared, *sources.glob("*.h")])


def key(name: str, sources: Path = SOURCES) -> str:
    """The key of a library that fits this machine and these sources."""
    digest = hashlib.sha256()
    for path in [*source_files(name, sources), SOURCES / "build.py"]:  # build.py holds the flags
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    target = "torch" + ".".join(map(str, ABI_TARGET))
    return f"{name}-{target}-{sys.platform}-{platform.machine()}-{digest.hexdigest()[:16]}"


def entries(name: str, wanted: str) -> list[Path]:
    """The library files of a key in the cache folder, the one that was built or asked for last in front."""
    found = []
    for path in (folder() / wanted).glob(f"*/{file_name(name)}"):
        with contextlib.suppress(FileNotFoundError):  # a builder is replacing it
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def write_record(library: Path, wanted: str, toolchain: str) -> None:
    """Writes the record beside a library file."""
    record = Record(_sha256(library), wanted, toolchain)
    library.with_suffix(".json").write_text(json.dumps(record._asdict(), indent=1) + "\n")


def check(library: Path, wanted: str) -> Record:
    """The record of a library file whose key and bytes are as they should be.

    Must come before ``dlopen``, which crashes the process on a file that was cut short or changed.

    Raises:
        DamagedError: there is no record, or it tells of another library.
    """
    path = library.with_suffix(".json")
    try:
        record = Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise DamagedError(f"its checksum is missing ({path.name})") from None
    except (OSError, ValueError, TypeError) as error:
        raise DamagedError(f"its checksum cannot be read ({path.name}: {error})") from None
    if record.key != wanted:
        raise DamagedError(f"it was built for {record.key}, wanted {wanted}")
    try:
        found = _sha256(library)
    except OSError as error:
        raise DamagedError(f"it cannot be read ({error.strerror})") from None
    if found != record.sha256:
        raise DamagedError("its checksum is wrong: the file was cut short or changed")
    return record


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
