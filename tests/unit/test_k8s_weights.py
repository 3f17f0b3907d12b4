"""The job that fetches weights: nothing that differs from the commit is ever left where it could be served."""

from __future__ import annotations

from hashlib import sha1, sha256
from pathlib import Path

import pytest

from k8s.base.fetch_weights import Expected, fill

LARGE, SMALL = b"weights" * 1000, b'{"model_type": "mixtral"}'


def blob(content: bytes) -> str:
    """Git's own digest of a file."""
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


FILES = [
    Expected("model.safetensors", len(LARGE), sha256(LARGE).hexdigest(), blob(b"a pointer")),
    Expected("config.json", len(SMALL), None, blob(SMALL)),
]


class Hub:
    def __init__(self, directory: Path, **contents: bytes) -> None:
        self.directory = directory
        self.contents = {"model.safetensors": LARGE, "config.json": SMALL} | contents
        self.fetched: list[str] = []

    def __call__(self, name: str) -> None:
        self.fetched.append(name)
        (self.directory / name).write_bytes(self.contents[name])


def test_what_is_missing_is_fetched_and_what_is_right_is_not(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    (tmp_path / "config.json").write_bytes(SMALL)
    fill(tmp_path, FILES, hub)
    assert hub.fetched == ["model.safetensors"]
    fill(tmp_path, FILES, hub)
    assert hub.fetched == ["model.safetensors"]


@pytest.mark.parametrize("damage", [LARGE[:-1], b"x" + LARGE[1:], b""], ids=["cut off", "changed", "empty"])
def test_what_was_damaged_is_fetched_again(tmp_path: Path, damage: bytes) -> None:
    hub = Hub(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(damage)
    fill(tmp_path, FILES, hub)
    assert (tmp_path / "model.safetensors").read_bytes() == LARGE


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_is_not_the_commits_is_taken_away(tmp_path: Path, name: str) -> None:
    hub = Hub(tmp_path, **{name: b"y" * len(LARGE if name.startswith("model") else SMALL)})
    with pytest.raises(SystemExit, match="not what the commit says"):
        fill(tmp_path, FILES, hub)
    assert not (tmp_path / name).exists()
