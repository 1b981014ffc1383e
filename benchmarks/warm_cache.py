"""A cache of Triton's, packed where it was filled and unpacked where the card is; `benchmarks.rehearsal` fills it.

    python -m benchmarks.warm_cache ARCHIVE FOLDER

An entry of the cache is named by a digest in which the build of Triton has a part: the archive holds the rest, and
`unpack` asks the Triton that is there for its own. Only the release must be the same. What Triton compiles as C for its
own interpreter is in the archive as source, and built while it is unpacked.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WARM = ROOT / "build" / "warm"
KEPT = (".cubin", ".json")
"""The files of a kernel that are loaded."""


def entry_name(triton_key: str, rest: str) -> str:
    """The name of a kernel's entry in Triton's cache."""
    return base64.b32encode(hashlib.sha256(f"{triton_key}-{rest}".encode()).digest()).decode().rstrip("=")


def record(folder: Path) -> None:
    """From now on, what this process has Triton compile is noted in a file of the folder, for `pack`."""
    from triton.compiler import compiler
    from triton.runtime import build, cache

    folder.mkdir(parents=True, exist_ok=True)
    path, key_of, compiles = folder / f"{os.getpid()}.jsonl", compiler.get_cache_key, build._build

    def note(**line: str) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def get_cache_key(*args: Any, **options: Any) -> str:
        key = str(key_of(*args, **options))
        note(kind="kernel", rest=key.removeprefix(f"{cache.triton_key()}-"))
        return key

    def _build(name: str, source: str, *args: Any, **options: Any) -> str:
        note(kind="module", name=name, source=Path(source).read_text())
        return str(compiles(name, source, *args, **options))

    compiler.get_cache_key, build._build = get_cache_key, _build


def pack(cache: Path, recorded: Path, archive: Path) -> tuple[int, int]:
    """Pack what was recorded and lies in a cache; the numbers of kernels and of modules.

    Raises:
        RuntimeError: nothing was recorded, or this Triton names the entries of its cache in another way.
    """
    from triton.runtime.cache import triton_key

    lines = [json.loads(line) for path in sorted(recorded.glob("*.jsonl")) for line in path.read_text().splitlines()]
    kernels = list(dict.fromkeys(line["rest"] for line in lines if line["kind"] == "kernel"))
    modules = list(dict.fromkeys((line["name"], line["source"]) for line in lines if line["kind"] == "module"))
    found = [rest for rest in kernels if (cache / entry_name(triton_key(), rest)).is_dir()]
    if not found:
        raise RuntimeError(f"none of {len(kernels)} recorded kernels is in {cache} under the name that is expected")
    manifest: dict[str, Any] = {"triton": importlib.metadata.version("triton"), "kernels": found, "modules": modules}
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as tar:
        _add(tar, "manifest.json", json.dumps(manifest).encode())
        for i, rest in enumerate(found):
            for path in sorted((cache / entry_name(triton_key(), rest)).iterdir()):
                if path.suffix in KEPT and not path.name.startswith("__grp__"):
                    _add(tar, f"{i}/{path.name}", path.read_bytes())
    return len(found), len(modules)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def unpack(archive: Path, cache: Path) -> tuple[int, int]:
    """Put the kernels of an archive into a cache, and build its modules there; the numbers of both.

    Raises:
        ValueError: the archive was made with another release of Triton.
    """
    from triton.runtime.cache import triton_key

    with tarfile.open(archive, "r:xz") as tar:
        files = {member.name: _read(tar, member) for member in tar if member.isfile()}
    manifest = json.loads(files.pop("manifest.json"))
    if manifest["triton"] != (here := importlib.metadata.version("triton")):
        raise ValueError(f"{archive.name} was made with Triton {manifest['triton']}, and here is {here}")
    groups: dict[Path, dict[str, str]] = {}
    for name, data in files.items():
        number, _, file = name.partition("/")
        if not number.isdecimal() or "/" in file:
            raise ValueError(f"{archive.name} holds {name!r}, which is no file of a kernel")
        folder = cache / entry_name(triton_key(), manifest["kernels"][int(number)])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
        groups.setdefault(folder, {})[file] = str((folder / file).absolute())
    for folder, paths in groups.items():
        (which,) = (name for name in paths if name.endswith(".json"))
        (folder / f"__grp__{which}").write_text(json.dumps({"child_paths": paths}))
    _build_modules(manifest["modules"], cache)
    return len(groups), len(manifest["modules"])


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _build_modules(modules: Iterable[tuple[str, str]], cache: Path) -> None:
    """Compile them as Triton's driver compiles its own."""
    from triton import knobs
    from triton.backends.nvidia import driver

    where = {"library_dirs": driver.library_dirs(), "include_dirs": driver.include_dirs, "libraries": driver.libraries}

    def compiled(module: tuple[str, str]) -> None:
        name, source = module
        driver.compile_module_from_src(src=source, name=name, **where)

    with knobs.cache.scope(), ThreadPoolExecutor() as threads:
        knobs.cache.dir = str(cache.absolute())
        driver.CudaUtils()  # which it builds first of all
        list(threads.map(compiled, modules))


def archive_of(folder: Path) -> Path:
    """The archive for the Triton of this Python."""
    return folder / f"triton-{importlib.metadata.version('triton')}.tar.xz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        kernels, modules = unpack(args.archive, args.folder)
    except (ValueError, OSError) as error:
        print(f"warm_cache: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{args.archive.name}: {kernels} kernels and {modules} modules are in {args.folder}")


if __name__ == "__main__":
    main()
