"""hf:// paths with a cache laid out as huggingface_hub's, and pushing to a stand-in; no network."""

import functools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.files import hub
from paligemma_jax.loading import load
from paligemma_jax.weights import save_hugging_face
from train_jax.core import param_tree
from train_jax.core.errors import UserError

COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def cached(tmp_path, hugging_face_model):
    """A cache that holds one model: refs/main names the commit, snapshots/<commit> has the files."""
    repository = tmp_path / "hub/models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    save_hugging_face(hugging_face_model, repository / "snapshots" / COMMIT)
    return tmp_path / "hub"


class StandIn(ModuleType):
    """The part of huggingface_hub that this package uses, on a local cache."""

    def __init__(self, cache: Path):
        super().__init__("huggingface_hub")
        self.cache, self.calls = cache, []

    def snapshot_download(self, name, *, revision, allow_patterns):
        self.calls.append((name, revision, allow_patterns))
        repository = self.cache / f"models--{name.replace('/', '--')}"
        if not repository.is_dir():
            raise RuntimeError("404 Client Error\nmore lines")
        return str(repository / "snapshots" / (revision or (repository / "refs/main").read_text()))

    def api(self):
        def create_repo(name, private, exist_ok):
            self.calls.append(("create", name, private, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(repo_id, folder_path):
            self.calls.append(("folder", repo_id, Path(folder_path).name))

        def upload_file(repo_id, path_or_fileobj, path_in_repo):
            if repo_id.startswith("stranger"):
                raise RuntimeError("403 Forbidden")
            self.calls.append(("file", repo_id, path_in_repo))

        return SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder, upload_file=upload_file)

    HfApi = api


@pytest.fixture
def stand_in(cached, monkeypatch):
    library = StandIn(cached)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    return library


def refused(match, call, *arguments):
    with pytest.raises(UserError, match=match) as info:
        call(*arguments)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("path, revision", [("hf://owner/name", None), (f"hf://owner/name@{COMMIT}", COMMIT)])
def test_load_reads_a_repository(stand_in, hugging_face_model, path, revision):
    model = load(path)
    for name, array in param_tree.flatten(hugging_face_model).items():
        np.testing.assert_array_equal(param_tree.flatten(model)[name], array)
    ((name, asked, patterns),) = stand_in.calls
    assert (name, asked) == ("owner/name", revision)
    assert not any(pattern in ("*", "*.bin", "*.py", "*.pt") for pattern in patterns)


def test_the_tokenizer_comes_from_the_same_repository(stand_in):
    file = stand_in.cache / "models--owner--name/snapshots" / COMMIT / "tokenizer.model"
    file.write_bytes(load_tokenizer("tiny").model_bytes)
    assert load_tokenizer("hf://owner/name").encode("a red cube") == load_tokenizer("tiny").encode("a red cube")


def test_the_real_library_finds_the_same_cache(cached, monkeypatch):
    library = pytest.importorskip("huggingface_hub", reason="needs the extra [hub]")
    offline = functools.partial(library.snapshot_download, cache_dir=cached, local_files_only=True)
    monkeypatch.setattr(library, "snapshot_download", offline)
    assert hub.download("hf://owner/name") == cached / "models--owner--name/snapshots" / COMMIT


def test_download_failures_are_one_sentence(stand_in):
    refused("hf://owner/other cannot be downloaded .404 Client Error.: check the name", load, "hf://owner/other")
    for path in ("hf://owner", "hf://", "hf://../name", "hf://owner/na me", "hf://owner/a/b"):
        refused("is no repository, expected owner/name", load, path)
    refused("cannot be pushed to stranger/name .403 Forbidden.", hub.push, "file.npz", "stranger/name")


def test_push_uploads_a_folder_or_a_file_to_a_private_repository(stand_in, tmp_path):
    assert hub.push(tmp_path, "me/model") == "https://hub/me/model"
    assert stand_in.calls == [("create", "me/model", True, True), ("folder", "me/model", tmp_path.name)]
    stand_in.calls.clear()
    hub.push(tmp_path / "x.npz", "hf://me/model")
    assert stand_in.calls[-1] == ("file", "me/model", "x.npz")


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(r"pip install 'paligemma-jax\[hub\]', or download the files yourself", load, "hf://owner/name")
    refused("pip install", hub.push, "folder", "me/model")
