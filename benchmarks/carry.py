"""Prepares what a GPU machine without network needs beside the checkout, and checks that all of it fits.

    python -P benchmarks/carry.py [--libraries cpu,cuda,cutlass] [--wheel NAME==VERSION ...] [--limit-mib 64]

Into out/carry (ignored by git): ``ext``, the compiled libraries that `vit-fast build` has made here and that fit these
sources, with their checksums; ``wheels``, downloaded for the Python and the platform of that machine; manifest.json,
with the commit. What travels is the checkout (tracked files, and untracked ones that git does not ignore) and that
folder: together they may take --limit-mib. Prints what to run there first. Exit status 1: too large, or a wheel that
cannot be had; a library that is not built is said and left out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from vit_fast.csrc import cache

from vit_fast import extension
from vit_fast.bench import machine

sys.path.insert(0, str(Path(__file__).resolve().parent))

import child

MIB = 2**20
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 5))


def libraries(names: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Copies libraries into ``folder``, as the cache has them; {name: "carried", or why not}."""
    said = {}
    for name in names:
        key = cache.key(name)
        found = cache.entries(name, key)
        if not found:
            said[name] = f"not built for these sources: {extension.command(name)}"
            continue
        try:
            cache.check(found[0], key)
        except cache.DamagedError as error:
            said[name] = f"not carried: {error}"
            continue
        target = folder / key / found[0].parent.name
        target.mkdir(parents=True)
        for path in (found[0], found[0].with_suffix(".json")):
            shutil.copy2(path, target)
        said[name] = "carried"
    return said


def wheels(wanted: list[str], python: str, folder: Path) -> str | None:
    """Downloads wheels into ``folder``, without what they depend on; returns why that failed, or None."""
    if not wanted:
        return None
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    words += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    for platform in PLATFORMS:
        words += ["--platform", platform]
    done = subprocess.run([*words, *wanted], capture_output=True, text=True)
    return None if done.returncode == 0 else " ".join(done.stderr.split())[-600:]


def travelling(root: Path) -> dict[Path, int]:
    """{file: bytes} of the checkout as it travels: tracked, or untracked and not ignored.

    Raises:
        ValueError: ``root`` is no checkout.
    """
    words = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{root} is no checkout: {done.stderr.strip()}")
    paths = (root / name for name in done.stdout.split("\0") if name)
    return {path: path.lstat().st_size for path in paths if path.is_file()}


def main(
    names: Annotated[
        str, typer.Option("--libraries", help="Those of cpu, cuda, cutlass that are built.")
    ] = "cpu,cuda,cutlass",
    wheel: Annotated[list[str] | None, typer.Option(help="A package, NAME==VERSION; may be given again.")] = None,
    python: Annotated[str, typer.Option(help="Python of the other machine.")] = "3.12",
    limit_mib: Annotated[float, typer.Option(min=0, help="What may travel.")] = 64.0,
    out: Annotated[Path, typer.Option(help="Folder, made anew.")] = child.ROOT / "out" / "carry",
) -> None:
    """Prepare what a GPU machine without network needs; see the head of benchmarks/carry.py."""
    chosen = tuple(names.split(",")) if names else ()
    if unknown := [name for name in chosen if name not in cache.NAMES]:
        raise typer.BadParameter(
            f"got {unknown[0]!r}, wanted any of {', '.join(cache.NAMES)}", param_hint="--libraries"
        )
    if out.exists() and not (out / "manifest.json").exists() and any(out.iterdir()):
        raise typer.BadParameter(f"got {str(out)!r}, wanted a folder that this script made", param_hint="--out")
    shutil.rmtree(out, ignore_errors=True)
    if reason := child.why_not_writable(out):
        raise typer.BadParameter(
            f"got {str(out)!r}, wanted a folder that can be written ({reason})", param_hint="--out"
        )
    child.save(out / "manifest.json", {})
    said = libraries(chosen, out / "ext")
    for name, text in said.items():
        print(f"{name} library: {text}")
    fault = wheels(wheel or [], python, out / "wheels")
    if fault:
        print(f"wheels: {fault}")
    try:
        sizes = travelling(child.ROOT)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="checkout") from error
    sizes |= {path: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    total = sum(sizes.values()) / MIB
    facts = {"commit": machine.commit(), "libraries": said, "wheels": wheel or [], "python": python, "mib": total}
    child.save(out / "manifest.json", facts)
    print(f"{total:.1f} MiB travel in {len(sizes)} files, {limit_mib:g} MiB may")
    place = os.path.relpath(out, child.ROOT)
    if total > limit_mib:
        for path in sorted(sizes, key=lambda path: -sizes[path])[:10]:
            print(f"  {sizes[path] / MIB:.1f} MiB  {os.path.relpath(path, child.ROOT)}")
    print(f"there, first: export VIT_FAST_COMMIT={facts['commit']} VIT_FAST_EXT_DIR=$PWD/{place}/ext")
    if wheel:
        print(f"              python3 -m pip install --no-index --no-deps --target {place}/site {place}/wheels/*.whl")
        print(f"              export PYTHONPATH=$PWD/{place}/site")
    raise typer.Exit(int(bool(fault) or total > limit_mib))


if __name__ == "__main__":
    typer.run(main)
