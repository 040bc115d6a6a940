"""Names of the Hugging Face hub: found in the cache without the network, and fetched without code and pickles."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import treadle as t
from tests.hf_models import save
from tests.test_huggingface_folder import REVISION, links, write_cache, write_model
from treadle.frontends.text import TextTokenizer
from treadle.hub_models import IGNORED, cached_hub_model, fetch_hub_model, is_hub_name
from treadle.ir.errors import CheckpointError, FrontendError, TreadleError, UsageError
from treadle.program.places import find_place

pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).resolve().parent.parent
NAME = "some-lab/Tiny_1.0"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's library."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(cache: Path) -> Path:
    return write_cache(cache / "models--some-lab--Tiny_1.0", write_model(cache.parent / "source"))


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["some-lab/Tiny_1.0", "hf:some-lab/Tiny", "hf:gpt2", "a/b"])
def test_names_of_the_hub(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "/a/b", "../b", "./b", "a/..", "a//b", "a/", "a b/c", "-a/b", ""])
def test_other_names(name: str) -> None:
    assert not is_hub_name(name)


@pytest.mark.parametrize("name", ["hf:", "hf:../b", "hf:a/../b", "a/b..c", "a--b/c", "hf:a/b/c", "hf:/etc", "hf:a/b\n"])
def test_a_malformed_name_is_refused_before_any_file_is_touched(name: str, cache: Path) -> None:
    (cache.parent / "b").mkdir()
    for find in (find_place, fetch_hub_model):
        with pytest.raises(UsageError, match="not a name of the Hugging Face hub"):
            find(name)


def test_a_path_and_a_declaration_count_over_the_hub(cache: Path) -> None:
    cached(cache)
    folder = write_model(Path("some-lab", "Tiny_1.0"))
    assert find_place(NAME) == folder


# -- the cache -------------------------------------------------------------------------------------------------------


@links
def test_a_name_is_the_cached_snapshot(cache: Path) -> None:
    root = cached(cache)
    for name in (NAME, f"hf:{NAME}"):
        assert find_place(name) == (root / "snapshots" / REVISION).resolve()
    assert t.ModelSource.open(NAME).config["model_type"] == "gpt2"


@links
def test_a_name_whose_tokenizer_is_opened(cache: Path) -> None:
    """`TextTokenizer` reads folders. Its hint opens the tokenizer of a model that has a name or is a file."""
    tokenizers = pytest.importorskip("tokenizers")
    source = write_model(cache.parent / "source")
    sizes = {"vocab_size": 4, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1, "activation_function": "relu"}
    (source / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 3}, "a")).save(str(source / "tokenizer.json"))
    write_cache(cache / "models--some-lab--Tiny_1.0", source)
    Path("source.gguf").touch()
    for name in (NAME, "smollm2", "source.gguf"):
        with pytest.raises(CheckpointError) as caught:
            TextTokenizer.open(name)
        assert str(caught.value.hint).startswith(f"treadle.ModelSource.open('{name}').tokenizer(), if ")
    assert eval(f"treadle.ModelSource.open('{NAME}').tokenizer()", {"treadle": t}).ids(["a"]) == [[3]]


def test_a_model_that_is_not_in_the_cache_names_the_command_that_fetches_it(cache: Path) -> None:
    with pytest.raises(UsageError, match="no model of that name in the Hugging Face cache") as caught:
        t.compile(NAME)
    assert str(caught.value.hint) == f't.fetch_model("hf:{NAME}"), which needs the network'
    assert caught.value.hint.command == f"treadle fetch hf:{NAME}, which needs the network"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gpt2-medium", "hf:gpt2-medium"),
        ("all-MiniLM-L6-v2", "hf:all-MiniLM-L6-v2"),
        ("https://huggingface.co/gpt2", "hf:gpt2"),
        ("https://huggingface.co/some-lab/Tiny/tree/main", "hf:some-lab/Tiny"),
        ("http://hf.co/some-lab/Tiny?library=transformers", "hf:some-lab/Tiny"),
        ("https://example.org/some-lab/Tiny", None),
        ("./gpt2-medium", None),
        ("a..b", None),
    ],
)
def test_another_form_of_a_name_of_the_hub(name: str, meant: str | None, cache: Path) -> None:
    """The hint has the name that a command takes, and the command then names the way to download the model."""
    with pytest.raises(UsageError, match="there is no model") as caught:
        find_place(name)
    found = re.findall(r"hf:[^,]*", str(caught.value.hint))
    assert found == ([] if meant is None else [meant])
    if meant is not None:
        with pytest.raises(UsageError, match="no model of that name in the Hugging Face cache"):
            find_place(meant)


def test_without_the_library_the_package_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FrontendError, match="needs the package huggingface_hub") as caught:
        cached_hub_model(NAME)
    assert "[text]" in str(caught.value.hint)


@links
@pytest.mark.parametrize("spoil", ["file", "snapshot", "reference", "blobs"])
def test_a_snapshot_that_leads_out_of_its_folder_is_refused(spoil: str, cache: Path) -> None:
    outside = write_model(cache.parent / "outside")
    root = cached(cache)
    snapshot = root / "snapshots" / REVISION
    if spoil == "file":
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(outside / "config.json")
    elif spoil == "snapshot":
        snapshot.rename(root / "moved")
        snapshot.symlink_to(outside)
    elif spoil == "reference":
        (root / "refs" / "main").write_text("../../../outside")
    else:
        (root / "blobs").rename(cache / "blobs")
        (root / "blobs").symlink_to(cache / "blobs")
    with pytest.raises(CheckpointError, match=r"leads out of the model's folder|not the name of a revision"):
        t.compile(NAME)


# -- downloads -------------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """A server with one repository, and the paths that were asked for."""

    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a path."""
        path = path.partition("?")[0]
        self.asked.append(path)
        name = path.removeprefix(f"/{NAME}/resolve/{REVISION}/")
        facts: Any = [
            {"type": "file", "path": each, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for each, data in self.files.items()
        ]
        if path == f"/api/models/{NAME}/revision/main":
            facts = {"id": NAME, "sha": REVISION, "siblings": [{"rfilename": each} for each in self.files]}
        elif path != f"/api/models/{NAME}/tree/{REVISION}":
            if name not in self.files:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            etag = hashlib.sha1(self.files[name]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION}, self.files[name]
        return 200, {"Content-Type": "application/json"}, json.dumps(facts).encode()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "served"
    save("gpt2", folder)
    served = Hub(
        {each.name: each.read_bytes() for each in folder.iterdir() if each.suffix in (".json", ".safetensors")}
    )
    served.files |= {"pytorch_model.bin": b"a pickle", "modeling.py": b"raise SystemExit", "README.md": b"# Tiny"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = served.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()


def treadle(home: Path, endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command with a cache and a hub of its own: the library reads both from the environment once."""
    own = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    environment = {**os.environ, **own, "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy", "https_proxy"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "treadle", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=home.parent, env=environment)


@links
def test_a_model_is_fetched_once_and_then_found_without_the_network(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = treadle(home, hub.address, "run", NAME, "--json")
    hint = json.loads(done.stdout)["error"]["try"]
    assert (done.returncode, hub.asked) == (2, [])
    command = re.match(r"treadle (fetch \S+), ", hint)
    assert command is not None, hint
    done = treadle(home, hub.address, *command[1].split(), "--json")
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["path"])
    assert {each.name for each in folder.iterdir()} == {*hub.files} - {"pytorch_model.bin", "modeling.py"}
    assert not [path for path in hub.asked if path.endswith((".bin", ".py"))]
    count = len(hub.asked)
    done = treadle(home, "http://127.0.0.1:9", "run", NAME, "--input", "tokens=1,2,3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weights"] == "read from the checkpoint"
    assert len(hub.asked) == count


def test_what_cannot_be_fetched_says_why(hub: Hub, tmp_path: Path) -> None:
    done = treadle(tmp_path / "home", hub.address, "fetch", "hf:some-lab/other", "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["what"] == "hf:some-lab/other cannot be fetched from the Hugging Face hub"
    assert error["received"].startswith("RepositoryNotFoundError: ")


def test_code_and_pickles_are_among_the_ignored_files() -> None:
    assert {"*.bin", "*.py", "*.pt", "*.pkl"} <= set(IGNORED)
    assert not {"*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.gguf", "*.onnx"} & set(IGNORED)


def test_errors_of_the_library_are_of_the_house(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("No space left\non the device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(TreadleError, match="cannot be fetched") as caught:
        fetch_hub_model(NAME)
    assert caught.value.received == "OSError: No space left"
