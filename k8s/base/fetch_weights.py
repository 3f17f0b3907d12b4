"""Fills a directory with one commit of a checkpoint and checks every file: what the job `weights` runs.

    fetch_weights.py /models        REPOSITORY and REVISION from the environment

A commit names the digest of each of its files, so nothing that differs from it is ever served. Interrupted, it goes on;
a file that is wrong is fetched again. /models/.verified says that all is there, and the pods wait for it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

WANTED = ["*.json", "*.model", "model*.safetensors"]  # and not the same weights once more in another layout
CHUNK = 8 << 20


@dataclass(frozen=True)
class Expected:
    name: str
    size: int
    sha256: str | None  # of what is stored beside git; None: git's own digest of the blob counts
    blob: str

    def holds(self, path: Path) -> bool:
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(f"blob {self.size}\0".encode())  # noqa: S324  git's
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest() == (self.sha256 or self.blob)


def expected(repository: str, revision: str) -> Iterator[Expected]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    if info.sha != revision:
        raise SystemExit(f"REVISION must be a commit, which {revision} is not; it is at {info.sha} now")
    for file in info.siblings or []:
        if any(fnmatch(file.rfilename, pattern) for pattern in WANTED):
            assert file.size is not None, "asked for with files_metadata"
            assert file.blob_id is not None, "asked for with files_metadata"
            yield Expected(file.rfilename, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)


def fill(directory: Path, files: list[Expected], fetch: Callable[[str], object]) -> None:
    """Every file, fetched where it is missing, and again where what came is not what was expected."""
    for number, file in enumerate(files, 1):
        path = directory / file.name
        if not file.holds(path):
            path.unlink(missing_ok=True)
            fetch(file.name)
            if not file.holds(path):
                path.unlink()
                raise SystemExit(f"{file.name} is not what the commit says; start the job again to fetch it again")
        print(f"{number}/{len(files)} {file.name}: {file.size:,} bytes, verified", flush=True)


def main(target: Path, repository: str, revision: str) -> None:
    from huggingface_hub import hf_hub_download

    verified = target / ".verified"
    complete = f"{repository} {revision}\n"
    if verified.is_file() and verified.read_text() == complete:
        print("all of it is there already")
        return
    directory = target / repository.rpartition("/")[2]
    directory.mkdir(exist_ok=True)
    verified.unlink(missing_ok=True)
    files = list(expected(repository, revision))
    if not any(file.name.endswith(".safetensors") for file in files):
        raise SystemExit(f"{repository} at {revision} has no safetensors")
    fill(directory, files, lambda name: hf_hub_download(repository, name, revision=revision, local_dir=directory))
    verified.write_text(complete)


if __name__ == "__main__":
    main(Path(sys.argv[1]), os.environ["REPOSITORY"], os.environ["REVISION"])
