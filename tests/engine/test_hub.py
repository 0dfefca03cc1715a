"""Where models are found, and the download against a small hub on the loopback. Nothing leaves the machine."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from sparsevila.engine import hub
from sparsevila.errors import CorruptCheckpoint, ModelNotFound
from sparsevila.models.checkpoint import Checkpoint

REPO = "user/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = {"a": torch.arange(300_000, dtype=torch.float32)}
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "tokenizer.model": b"pieces",
    "tokenizer_config.json": b"{}",
    "model.safetensors": save(WEIGHTS),
}
UNWANTED = {
    "pytorch_model.bin": b"\x80\x04 pickle",
    "modeling_tiny.py": b"raise SystemExit",
    "README.md": b"text",
    "consolidated.safetensors": b"twice the same",
    "sub/config.json": b"{}",
    "../escape.json": b"{}",
    ".hidden.json": b"{}",
}


class TinyHub:
    """The parts of the hub's protocol that a download uses. Faults are set as attributes."""

    def __init__(self) -> None:
        self.files = {**FILES, **UNWANTED}
        self.commit = COMMIT
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: list[tuple[str, str | None]] = []  # Host, Authorization
        self.status: int | None = None  # of every answer
        self.error_code: str | None = None
        self.cut_after: int | None = None  # bytes of the next large body; then the connection is closed
        self.cut_always = False
        self.ignore_ranges = False
        self.redirect_host: str | None = None
        self.stated_sizes: dict[str, int | None] = {}
        self.stated_content: dict[str, bytes] = {}  # whose checksum is told
        hub_state = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub_state.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub_state.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)

    def fetched(self, name: str) -> list[str | None]:
        """The Range of every GET of a file."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(f"/{name}")]

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = request.path.split("?")[0]
        self.requests.append((request.command, path, request.headers.get("Range")))
        self.tokens.append((request.headers["Host"], request.headers.get("Authorization")))
        if self.status is not None:
            headers = {"X-Error-Code": self.error_code} if self.error_code else {}
            return self.send(request, self.status, b"{}", headers, body=body)
        if path.startswith(f"/api/models/{REPO}/revision/"):
            return self.send(request, 200, json.dumps(self.listing()).encode(), {}, body=body)
        name = path.removeprefix(f"/{REPO}/resolve/{self.commit}/").removeprefix("/store/")
        if name not in self.files:
            code = "RepoNotFound" if path.startswith("/api") else "EntryNotFound"
            return self.send(request, 404, b"{}", {"X-Error-Code": code}, body=body)
        headers = {"X-Repo-Commit": self.commit, "ETag": '"etag"', "Accept-Ranges": "bytes"}
        if self.redirect_host and not path.startswith("/store/"):
            headers["Location"] = f"http://{self.redirect_host}:{self.port}/store/{name}"
            headers["X-Linked-Size"] = str(len(self.files[name]))
            return self.send(request, 302, b"", headers, body=body)
        return self.send_file(request, self.files[name], headers, body=body)

    def listing(self) -> dict:
        siblings = []
        for name, data in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            sibling = {"rfilename": name, "size": self.stated_sizes.get(name, len(data)), "blobId": git}
            if name.endswith((".safetensors", ".bin", ".model")):
                sha256 = hashlib.sha256(self.stated_content.get(name, data)).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 100}
            siblings.append(sibling)
        return {"id": REPO, "sha": self.commit, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    def send_file(self, request: BaseHTTPRequestHandler, data: bytes, headers: dict, *, body: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        start = int(asked[1]) if asked and not self.ignore_ranges else 0
        if asked and not self.ignore_ranges:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        if body and self.cut_after is not None and len(rest) > self.cut_after:
            request.send_response(206 if start else 200)
            for key, value in {**headers, "Content-Length": str(len(rest))}.items():
                request.send_header(key, value)
            request.end_headers()
            request.wfile.write(rest[: self.cut_after])
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
            self.cut_after = self.cut_after if self.cut_always else None
            return
        self.send(request, 206 if start else 200, rest, headers, body=body)

    def send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict, *, body: bool) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(data)


@pytest.fixture
def tiny_hub(monkeypatch):
    """A hub on the loopback; connections to anywhere else fail the test."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    connect = socket.socket.connect

    def only_loopback(self, address):
        assert not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1"), f"a connection to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_loopback)
    server = TinyHub()
    yield server
    server.close()


@pytest.fixture
def no_network(monkeypatch):
    """Every use of a socket is counted and refused."""
    calls: list[object] = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise AssertionError("the network was touched")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield calls
    assert not calls


def make_model(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def make_cache(cache: Path, repository: str, commit: str = COMMIT, *, ref: str | None = "main") -> Path:
    """A snapshot as `huggingface_hub` lays it out."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for name, data in FILES.items():
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def places(tmp_path):
    """Empty `home` and `hf_cache`, as arguments."""
    return {"home": tmp_path / "home", "hf_cache": tmp_path / "cache"}


ALIAS = "llava-next-7b"
ALIAS_REPO = hub.ALIASES[ALIAS].repository


# Finding ------------------------------------------------------------------------------------------------------------


def test_the_order_of_places(tmp_path, places, no_network, monkeypatch):
    cached = make_cache(places["hf_cache"], ALIAS_REPO)
    assert hub.resolve(ALIAS, **places) == hub.ModelFolder(cached, "Hugging Face cache")
    by_repository = make_model(places["home"] / "models" / ALIAS_REPO.replace("/", "--"))
    assert hub.resolve(ALIAS, **places).path == by_repository
    by_alias = make_model(places["home"] / "models" / ALIAS)
    assert hub.resolve(ALIAS, **places) == hub.ModelFolder(by_alias, "SPARSEVILA_HOME")
    assert hub.resolve(f"hf:{ALIAS_REPO}", **places).path == by_repository
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / ALIAS)
    assert hub.resolve(ALIAS, **places) == hub.ModelFolder(Path(ALIAS), "folder")


def test_a_copy_quantised_here_is_taken_where_it_is_wanted(tmp_path, places, no_network):
    original = make_model(places["home"] / "models" / ALIAS)
    copy = hub.quantised_folder(ALIAS, places["home"])
    assert copy == places["home"] / "models" / f"{ALIAS}-w8a8-w4a16"
    assert hub.resolve(ALIAS, quantised=True, **places).path == original
    make_model(copy)
    assert hub.resolve(ALIAS, quantised=True, **places) == hub.ModelFolder(copy, "quantised here")
    assert hub.resolve(f"hf:{ALIAS_REPO}", quantised=True, **places).path == copy
    assert hub.resolve(ALIAS, **places).path == original
    assert {row.alias: row.found for row in hub.list_models(**places)}[ALIAS] == copy
    # The copy alone is a model, and no download of the original.
    shutil.rmtree(original)
    assert hub.resolve(ALIAS, quantised=True, **places).path == copy
    with pytest.raises(ModelNotFound):
        hub.resolve(ALIAS, **places)
    (copy / "config.json").unlink()
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(ALIAS, quantised=True, **places)
    assert f"incomplete: {copy}" in caught.value.hint
    assert hub.quantised_folder("demo") is None
    assert hub.quantised_folder("some/folder") is None


def test_an_explicit_folder(tmp_path, places, no_network):
    folder = make_model(tmp_path / "mine")
    assert hub.resolve(folder, **places) == hub.resolve(str(folder), **places) == hub.ModelFolder(folder, "folder")
    (tmp_path / "empty").mkdir()
    found = hub.resolve(tmp_path / "empty", **places)
    with pytest.raises(ModelNotFound, match=r"config\.json.*model\.safetensors"):
        Checkpoint.open(found.path)  # which lists everything that is missing
    with pytest.raises(ModelNotFound, match="is a file"):
        hub.resolve(folder / "config.json", **places)
    with pytest.raises(ModelNotFound, match="no folder"):
        hub.resolve(tmp_path / "nowhere", **places)


def test_a_folder_of_an_aliass_name_without_a_model_does_not_shadow_it(tmp_path, places, no_network, monkeypatch):
    (tmp_path / ALIAS).mkdir()
    monkeypatch.chdir(tmp_path)
    cached = make_cache(places["hf_cache"], ALIAS_REPO)
    assert hub.resolve(ALIAS, **places).path == cached


def test_a_repository_by_name(places, no_network):
    cached = make_cache(places["hf_cache"], REPO)
    assert hub.resolve(f"hf:{REPO}", **places).path == cached
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(REPO, **places)
    assert f"hf:{REPO}" in caught.value.hint


def test_which_snapshot_of_the_cache(places, no_network):
    older = make_cache(places["hf_cache"], REPO, "a" * 40, ref=None)
    assert hub.resolve(f"hf:{REPO}", **places).path == older  # fetched by commit, so without a ref
    newer = make_cache(places["hf_cache"], REPO, "b" * 40)
    os.utime(older, (2e9, 2e9))
    assert hub.resolve(f"hf:{REPO}", **places).path == newer  # the one that main stands for
    blob = newer.parent.parent / "blobs" / "only-of-newer"
    blob.write_bytes(FILES["model.safetensors"])
    (newer / "model.safetensors").unlink()
    (newer / "model.safetensors").symlink_to(blob)
    blob.unlink()
    assert hub.resolve(f"hf:{REPO}", **places).path == older  # an unfinished download does not count


def test_a_ref_that_leads_elsewhere_is_ignored(places, tmp_path, no_network):
    make_model(tmp_path / "outside")
    snapshot = make_cache(places["hf_cache"], REPO)
    (snapshot.parent.parent / "refs" / "main").write_text("../../../outside")
    assert hub.resolve(f"hf:{REPO}", **places).path == snapshot


def test_an_unfinished_folder_is_told_but_not_taken(places, no_network):
    make_model(places["home"] / "models" / ALIAS, {"config.json": b"{}", "tokenizer.model": b"x"})
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(ALIAS, **places)
    assert "incomplete" in caught.value.hint
    assert "model.safetensors" in caught.value.hint
    cached = make_cache(places["hf_cache"], ALIAS_REPO)
    assert hub.resolve(ALIAS, **places).path == cached


def test_the_three_ways_to_get_weights(places, no_network):
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(ALIAS, **places)
    assert ALIAS in str(caught.value)
    hint = caught.value.hint
    for word in (
        "--model FOLDER",
        str(places["hf_cache"]),
        str(places["home"] / "models" / ALIAS),
        f"python chat.py models --get {ALIAS}",
        ALIAS_REPO,
        "revision main",
        "14.1 GB",
    ):
        assert word in hint
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(ALIAS, offline=True, **places)
    assert "online" in caught.value.hint


def test_unknown_names_get_the_nearest_and_the_list(places, no_network):
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve("lava-next-7b", **places)
    assert "did you mean llava-next-7b" in caught.value.hint
    assert all(alias in caught.value.hint for alias in hub.ALIASES)


ODD = ["", "  ", "a\0b", "x" * 100_000, "hf:", "hf:a", "hf:../../etc", "hf:a/../b", "hf:a/b/c", "~nobody-here/x"]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_odd_names_are_plain_errors(name, places, no_network, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(name, **places)
    assert len(str(caught.value)) < 200


def test_the_demo_is_found_beside_the_package(places, no_network):
    expected = Path(hub.__file__).resolve().parent.parent / "assets" / "demo"
    assert hub.resolve("demo", **places) == hub.ModelFolder(expected, "bundled")
    assert hub.download("demo", **places).path == expected


def test_the_list_of_models(places, no_network):
    cached = make_cache(places["hf_cache"], ALIAS_REPO)
    rows = {row.alias: row for row in hub.list_models(**places)}
    assert rows.keys() == hub.ALIASES.keys()
    assert rows[ALIAS].found == cached
    assert rows[ALIAS].repository == ALIAS_REPO
    assert rows["llava-next-13b"].found is None
    assert all(row.size_bytes > 0 for row in rows.values())


def test_folders_come_from_the_environment_when_asked_and_not_at_import(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("SPARSEVILA_HOME", str(tmp_path / "one"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))
    folder = make_model(tmp_path / "one" / "models" / ALIAS)
    assert hub.resolve(ALIAS).path == folder
    monkeypatch.delenv("SPARSEVILA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "two"))
    folder = make_model(tmp_path / "two" / ".sparsevila" / "models" / ALIAS)
    assert hub.resolve(ALIAS).path == folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "{home}/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, "/h/hub"),
        ({"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}, "/c"),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
    ],
)
def test_the_cache_folder_is_that_of_the_package(variables, expected, tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(hub._hf_cache_folder(None)) == expected.format(home=tmp_path)
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout.strip() == expected.format(home=tmp_path)


def test_finding_does_not_import_the_hub_package_or_change_the_environment(places):
    make_cache(places["hf_cache"], ALIAS_REPO)
    code = (
        "import os, sys; from pathlib import Path; from sparsevila.engine import hub\n"
        "before = dict(os.environ)\n"
        "home, cache = map(Path, sys.argv[1:])\n"
        f"hub.resolve({ALIAS!r}, home=home, hf_cache=cache); hub.list_models(home, cache)\n"
        "assert 'huggingface_hub' not in sys.modules and dict(os.environ) == before\n"
    )
    subprocess.run([sys.executable, "-c", code, str(places["home"]), str(places["hf_cache"])], check=True)


def test_aliases_are_sound():
    repositories = [alias.repository for alias in hub.ALIASES.values() if alias.repository]
    assert len(set(repositories)) == len(repositories)
    assert all(hub._REPOSITORY.fullmatch(repository) for repository in repositories)


# Download -----------------------------------------------------------------------------------------------------------


def get(tiny_hub, places, **options) -> hub.ModelFolder:
    return hub.download(f"hf:{REPO}", endpoint=tiny_hub.endpoint, **places, **options)


def test_a_download_brings_the_wanted_files_and_no_others(tiny_hub, places):
    seen = []
    found = get(tiny_hub, places, progress=seen.append)
    assert found == hub.ModelFolder(places["home"] / "models" / "user--tiny", "SPARSEVILA_HOME")
    assert {p.name for p in found.path.iterdir()} == {*FILES, hub.SOURCE_FILE}
    assert all((found.path / name).read_bytes() == data for name, data in FILES.items())
    assert not list(places["home"].rglob("escape.json"))
    assert json.loads((found.path / hub.SOURCE_FILE).read_text())["commit"] == COMMIT
    assert Checkpoint.open(found.path).tensors.keys() == WEIGHTS.keys()
    for stage in ("download", "verify"):
        steps = [p for p in seen if p.stage == stage]
        assert [p.done for p in steps] == sorted(p.done for p in steps)
        assert steps[-1].done == steps[-1].total == sum(map(len, FILES.values()))
        assert {p.unit for p in steps} == {"bytes"}
    fetched = {path.rsplit("/", 1)[1] for method, path, _ in tiny_hub.requests if "/resolve/" in path}
    assert fetched == FILES.keys()


def test_a_folder_of_sub_models_comes_with_its_folders(tiny_hub, places):
    part = {"config.json": b"{}", "model.safetensors": FILES["model.safetensors"]}
    wanted = {"config.json": b'{"model_type": "llava_llama"}', "llm/tokenizer_config.json": b"{}"}
    wanted |= {f"llm/{name}": data for name, data in {**part, "vocab.json": b"{}", "merges.txt": b""}.items()}
    wanted |= {f"{folder}/{name}": data for folder in ("vision_tower", "mm_projector") for name, data in part.items()}
    unwanted = {"llm/pytorch_model.bin": b"", "llm/inner/config.json": b"{}", "trainer/state.json": b"{}"}
    tiny_hub.files = wanted | unwanted
    found = get(tiny_hub, places)
    files = {str(path.relative_to(found.path)) for path in found.path.rglob("*") if path.is_file()}
    assert files == {*wanted, hub.SOURCE_FILE}
    assert all((found.path / name).read_bytes() == data for name, data in wanted.items())


def test_what_is_here_is_not_fetched_again(tiny_hub, places):
    first = get(tiny_hub, places)
    tiny_hub.requests.clear()
    assert get(tiny_hub, places) == first
    assert hub.resolve(f"hf:{REPO}", **places) == first
    assert tiny_hub.requests == []


def test_an_alias_downloads_under_its_own_name(tiny_hub, places, monkeypatch):
    monkeypatch.setitem(hub.ALIASES, "tiny", hub.Alias(REPO, "main", 1, "none"))
    found = hub.download("tiny", endpoint=tiny_hub.endpoint, **places)
    assert found.path == places["home"] / "models" / "tiny"
    assert hub.resolve("tiny", **places) == hub.resolve(f"hf:{REPO}", **places) == found


BIG = save({"a": torch.arange(3_500_000)})  # 28 MB: the package moves blocks of 10 MB
BLOCK = 10 << 20


def test_a_cut_connection_goes_on_from_the_last_block(tiny_hub, places):
    tiny_hub.files["model.safetensors"] = BIG
    tiny_hub.cut_after = BLOCK + 500_000
    found = get(tiny_hub, places)
    assert (found.path / "model.safetensors").read_bytes() == BIG
    assert tiny_hub.fetched("model.safetensors") == [None, f"bytes={BLOCK}-"]


def test_a_connection_that_brings_nothing_ends(tiny_hub, places, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    tiny_hub.cut_after, tiny_hub.cut_always = 1000, True
    with pytest.raises(ModelNotFound, match="no connection"):
        get(tiny_hub, places)
    assert len(tiny_hub.fetched("model.safetensors")) < 30


@pytest.mark.parametrize("ignore_ranges", [False, True], ids=["ranges", "no_ranges"])
def test_a_stopped_download_leaves_no_model_and_goes_on_later(tiny_hub, places, ignore_ranges):
    tiny_hub.files["model.safetensors"] = BIG

    class Stop(Exception):
        pass

    def stop_in_the_middle(progress):
        if progress.done > len(BIG) // 2:
            raise Stop

    with pytest.raises(Stop):
        get(tiny_hub, places, progress=stop_in_the_middle)
    with pytest.raises(ModelNotFound):
        hub.resolve(f"hf:{REPO}", **places)
    assert [row.alias for row in hub.list_models(**places) if row.found and row.repository != hub.BUNDLED] == []
    part = next(places["home"].rglob("model.safetensors.part")).stat().st_size
    assert 0 < part < len(BIG)
    tiny_hub.requests.clear()
    tiny_hub.ignore_ranges = ignore_ranges
    found = get(tiny_hub, places)
    assert (found.path / "model.safetensors").read_bytes() == BIG
    assert tiny_hub.fetched("model.safetensors")[0] == f"bytes={part}-"
    assert ignore_ranges or len(tiny_hub.fetched("model.safetensors")) == 1
    assert tiny_hub.fetched("config.json") == []  # it had come before
    assert not list(places["home"].rglob("*.part"))


def test_a_process_that_is_killed_leaves_no_model(tiny_hub, places):
    tiny_hub.files["model.safetensors"] = BIG
    code = (
        "import sys, os; from pathlib import Path; from sparsevila.engine import hub\n"
        "def progress(p):\n"
        "    if p.done > 15_000_000: os._exit(9)\n"
        "home, cache = map(Path, sys.argv[1:3])\n"
        f"hub.download('hf:{REPO}', home=home, hf_cache=cache, endpoint=sys.argv[3], progress=progress)\n"
    )
    arguments = [str(places["home"]), str(places["hf_cache"]), tiny_hub.endpoint]
    environment = os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_ENDPOINT": tiny_hub.endpoint}
    run = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True)
    assert run.returncode == 9, run.stderr
    with pytest.raises(ModelNotFound):
        hub.resolve(f"hf:{REPO}", **places)
    assert Checkpoint.open(get(tiny_hub, places).path).tensors


def test_a_new_commit_begins_anew(tiny_hub, places):
    def stop(progress):
        if progress.done == progress.total:
            raise KeyError

    with pytest.raises(KeyError):
        get(tiny_hub, places, progress=stop)
    tiny_hub.commit = "f" * 40
    tiny_hub.files["config.json"] = b'{"model_type": "other"}'
    found = get(tiny_hub, places)
    assert Checkpoint.open(found.path).config == {"model_type": "other"}
    assert not list((places["home"] / "models" / ".partial").iterdir())


def test_damage_on_the_way_is_found_and_fetched_anew(tiny_hub, places):
    good = tiny_hub.stated_content["model.safetensors"] = tiny_hub.files["model.safetensors"]
    tiny_hub.files["model.safetensors"] = good[:-1] + b"\xff"
    with pytest.raises(ModelNotFound, match=r"model\.safetensors arrived damaged"):
        get(tiny_hub, places)
    tiny_hub.files["model.safetensors"] = good
    assert get(tiny_hub, places).path.is_dir()


def test_a_repository_that_is_no_complete_model(tiny_hub, places):
    del tiny_hub.files["config.json"]
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        get(tiny_hub, places)
    with pytest.raises(ModelNotFound):
        hub.resolve(f"hf:{REPO}", **places)
    del tiny_hub.files["model.safetensors"], tiny_hub.files["consolidated.safetensors"]
    with pytest.raises(CorruptCheckpoint, match="only pickled weights"):
        get(tiny_hub, places)
    assert not tiny_hub.fetched("pytorch_model.bin")


@pytest.mark.parametrize(
    ("status", "code", "match"),
    [
        (404, "RepoNotFound", "no repository"),
        (404, "RevisionNotFound", "no revision main"),
        (401, "GatedRepo", "is gated"),
        (403, "GatedRepo", "is gated"),
        (401, None, "no repository|needs a login"),
        (403, None, "needs a login"),
        (500, None, "status 500"),
        (418, None, "status 418"),
    ],
)
def test_what_the_server_refuses(tiny_hub, places, status, code, match):
    tiny_hub.status, tiny_hub.error_code = status, code
    with pytest.raises(ModelNotFound, match=match) as caught:
        get(tiny_hub, places)
    text = f"{caught.value} {caught.value.hint}"
    assert caught.value.hint
    assert "http" not in text
    assert "127.0.0.1" not in text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_no_server(tiny_hub, places):
    tiny_hub.close()
    with pytest.raises(ModelNotFound, match="no connection"):
        get(tiny_hub, places)


def test_more_than_the_disk_holds(tiny_hub, places):
    tiny_hub.stated_sizes["model.safetensors"] = 10**18
    with pytest.raises(ModelNotFound, match="GB of disk"):
        get(tiny_hub, places)
    assert tiny_hub.fetched("config.json") == []


def test_a_server_without_sizes_or_commit(tiny_hub, places):
    tiny_hub.stated_sizes["model.safetensors"] = None
    with pytest.raises(ModelNotFound, match="no size"):
        get(tiny_hub, places)
    tiny_hub.stated_sizes.clear()
    tiny_hub.commit = "../../x"
    with pytest.raises(ModelNotFound, match="no commit"):
        get(tiny_hub, places)


def test_the_token_goes_to_the_hub_and_not_to_the_store(tiny_hub, places):
    tiny_hub.redirect_host = "localhost"
    found = get(tiny_hub, places)
    assert Checkpoint.open(found.path).tensors
    by_host = {host.split(":")[0]: token for host, token in tiny_hub.tokens}
    assert by_host == {"127.0.0.1": "Bearer hf_secret", "localhost": None}


def test_an_unwritable_home(tiny_hub, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelNotFound):
        hub.download(f"hf:{REPO}", home=tmp_path / "file", hf_cache=tmp_path / "c", endpoint=tiny_hub.endpoint)


def test_a_folder_in_the_way_is_not_overwritten(tiny_hub, places):
    mine = make_model(places["home"] / "models" / "user--tiny", {"config.json": b"{}"})
    with pytest.raises(ModelNotFound, match="missing") as caught:
        get(tiny_hub, places)
    assert "move it away" in caught.value.hint
    assert (mine / "config.json").read_bytes() == b"{}"


def test_another_revision_is_not_taken_for_the_one_asked(tiny_hub, places):
    found = get(tiny_hub, places, revision="v1")
    assert f"/api/models/{REPO}/revision/v1" in [path for _, path, _ in tiny_hub.requests]
    assert get(tiny_hub, places, revision="v1") == get(tiny_hub, places, revision=COMMIT) == found
    with pytest.raises(ModelNotFound, match="holds revision 'v1', not v2"):
        get(tiny_hub, places, revision="v2")


def test_offline_by_the_environment(tiny_hub, places, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        get(tiny_hub, places)
    assert tiny_hub.requests == []


def test_unknown_names_are_not_fetched(tiny_hub, places):
    for name in ("lava", "hf:../x", "a/b/c", ""):
        with pytest.raises(ModelNotFound):
            hub.download(name, endpoint=tiny_hub.endpoint, **places)
    assert tiny_hub.requests == []


def test_a_download_prints_nothing_and_leaves_the_environment(tiny_hub, places, capfd):
    before = dict(os.environ)
    get(tiny_hub, places)
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before


def test_the_counted_file_follows_a_rewind():
    seen = []
    file = hub._CountedFile(io.BytesIO(), 100, 1000, hub._Meter(lambda p: seen.append(p.done)))
    file.write(b"12345")
    file.seek(0)
    file.truncate()
    file.write(b"123")
    assert seen == [105, 103]
    assert file.tell() == 3
