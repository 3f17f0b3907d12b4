"""The job that fetches weights: nothing that differs from the commit is ever left where it could be served."""

from __future__ import annotations

from hashlib import sha1, sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from k8s.base.fetch_weights import Expected, fill, main

LARGE, SMALL = b"weights" * 1000, b'{"model_type": "mixtral"}'


def blob(content: bytes) -> str:
    """Git's own digest of a file."""
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


FILES = [
    Expected("model.safetensors", len(LARGE), sha256(LARGE).hexdigest(), blob(b"a pointer")),
    Expected("config.json", len(SMALL), None, blob(SMALL)),
]


COMMIT, OTHER = "1" * 40, "2" * 40
LISTED = [
    SimpleNamespace(
        rfilename="model.safetensors", size=len(LARGE), lfs=SimpleNamespace(sha256=FILES[0].sha256), blob_id="p"
    ),
    SimpleNamespace(rfilename="config.json", size=len(SMALL), lfs=None, blob_id=blob(SMALL)),
    SimpleNamespace(rfilename="consolidated.00.pt", size=9, lfs=None, blob_id="c"),
]


class Hub:
    def __init__(self, directory: Path, **contents: bytes) -> None:
        self.directory = directory
        self.contents = {"model.safetensors": LARGE, "config.json": SMALL} | contents
        self.fetched: list[str] = []
        self.listed = LISTED

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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """In the place of Hugging Face's; its commits are COMMIT and OTHER."""
    hub = Hub(tmp_path / "Mixtral")

    class Api:
        def model_info(self, repository: str, *, revision: str, files_metadata: bool) -> SimpleNamespace:
            assert (repository, files_metadata) == ("someone/Mixtral", True)
            return SimpleNamespace(sha=revision if revision in (COMMIT, OTHER) else COMMIT, siblings=hub.listed)

    def download(repository: str, name: str, *, revision: str, local_dir: Path) -> None:
        assert not (tmp_path / ".verified").exists(), "pods would take what is not all there"
        assert local_dir == hub.directory
        hub(name)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return hub


def test_pods_are_told_once_all_is_there(hub: Hub, tmp_path: Path) -> None:
    main(tmp_path, "someone/Mixtral", COMMIT)
    assert hub.fetched == ["model.safetensors", "config.json"], "and not the same weights in another layout"
    assert (tmp_path / ".verified").read_text() == f"someone/Mixtral {COMMIT}\n"
    main(tmp_path, "someone/Mixtral", COMMIT)
    assert len(hub.fetched) == 2


def test_another_commit_is_checked_anew_and_not_served_before(hub: Hub, tmp_path: Path) -> None:
    main(tmp_path, "someone/Mixtral", COMMIT)
    hub.contents["config.json"] = b"not what the commit says"
    (hub.directory / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"config\.json is not what the commit says"):
        main(tmp_path, "someone/Mixtral", OTHER)
    assert not (tmp_path / ".verified").exists()


def test_a_branch_is_no_commit(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"REVISION must be a commit, which main is not; it is at {COMMIT} now"):
        main(tmp_path, "someone/Mixtral", "main")


def test_weights_that_are_pickled_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.listed = LISTED[1:]
    with pytest.raises(SystemExit, match=f"someone/Mixtral at {COMMIT} has no safetensors"):
        main(tmp_path, "someone/Mixtral", COMMIT)
    assert hub.fetched == []
