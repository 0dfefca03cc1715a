"""Checkpoint folders: what is read is right, what is damaged is named, nothing outside is touched."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from sparsevila.errors import CorruptCheckpoint, ModelNotFound, SparseVILAError
from sparsevila.models.checkpoint import Checkpoint, ConfigReader, parse_json, read_header
from sparsevila.tests.attacks import safetensors_files as attacks

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor(7, dtype=torch.int64),
    "c": torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "d": torch.zeros(0, 3, dtype=torch.float16),
    "e": torch.tensor([True, False, True]),
    "f": torch.randn(7, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn),
}


def make(folder: Path, *, config: object = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "tiny"}))
    (folder / "tokenizer.model").write_bytes(b"not read here")
    save_file(TENSORS if tensors is None else tensors, folder / "model.safetensors")
    return folder


def make_sharded(folder: Path, **index: object) -> Path:
    make(folder)
    (folder / "model.safetensors").unlink()
    shards = {"model-1.safetensors": ["a", "b", "c"], "model-2.safetensors": ["d", "e", "f"]}
    for shard, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, folder / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    whole = {"metadata": {"total_size": sum(t.nbytes for t in TENSORS.values())}, "weight_map": weight_map}
    write_index(folder, whole | index)
    return folder


def write_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder: Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return (
        got.dtype == expected.dtype
        and got.shape == expected.shape
        and got.contiguous().reshape(-1).view(torch.uint8).tolist()
        == expected.contiguous().reshape(-1).view(torch.uint8).tolist()
    )


# What is right ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [make, make_sharded])
def test_reads_every_tensor_once_with_its_bits(tmp_path, maker):
    checkpoint = Checkpoint.open(maker(tmp_path))
    got = list(checkpoint.iter_tensors())
    assert sorted(name for name, _ in got) == sorted(TENSORS)
    for name, tensor in got:
        assert same(tensor, TENSORS[name]), name
        assert checkpoint.tensors[name].shape == tuple(TENSORS[name].shape)
        assert checkpoint.tensors[name].torch_dtype == TENSORS[name].dtype
    assert checkpoint.weight_bytes == sum(t.nbytes for t in TENSORS.values())
    assert checkpoint.config == {"model_type": "tiny"}
    assert checkpoint.notes == ()


def test_tensors_are_the_callers_own_memory(tmp_path):
    folder = make(tmp_path)
    checkpoint = Checkpoint.open(folder)
    first = dict(checkpoint.iter_tensors())
    first["a"].fill_(9)
    again = dict(checkpoint.iter_tensors())
    assert same(again["a"], TENSORS["a"])
    os.truncate(folder / "model.safetensors", 0)  # a mapped file would end the process here
    assert same(again["c"], TENSORS["c"])


def test_agrees_with_the_safetensors_package_on_the_demo_model():
    folder = Path(sys.modules["sparsevila"].__file__).parent / "assets" / "demo"
    expected = load_file(folder / "model.safetensors")
    got = dict(Checkpoint.open(folder).iter_tensors())
    assert got.keys() == expected.keys()
    assert all(same(got[name], expected[name]) for name in got)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__" and n.isprintable()),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.int64]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_headers_of_the_package_are_read_back(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    path.write_bytes(save({name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}))
    got = read_header(path)
    assert {n: (i.torch_dtype, list(i.shape)) for n, i in got.items()} == {n: (d, s) for n, (d, s) in tensors.items()}


# Missing parts ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ModelNotFound, match="does not exist"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelNotFound, match="is not a folder"):
        Checkpoint.open(tmp_path / "file")


def test_an_empty_folder_lists_everything_at_once(tmp_path):
    with pytest.raises(ModelNotFound) as caught:
        Checkpoint.open(tmp_path)
    for word in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer.json"):
        assert word in str(caught.value)


def test_all_missing_shards_config_and_tokenizer_in_one_message(tmp_path):
    folder = make_sharded(tmp_path)
    for name in ("config.json", "tokenizer.model", "model-1.safetensors", "model-2.safetensors"):
        (folder / name).unlink()
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpoint.open(folder)
    for word in ("config.json", "tokenizer", "model-1.safetensors", "model-2.safetensors"):
        assert word in str(caught.value)


def test_a_tower_alone_needs_no_tokenizer(tmp_path):
    folder = make(tmp_path)
    (folder / "tokenizer.model").unlink()
    assert Checkpoint.open(folder, tokenizer=False).tensors
    with pytest.raises(CorruptCheckpoint, match="tokenizer"):
        Checkpoint.open(folder)


def test_pickled_weights_are_never_loaded(tmp_path):
    folder = make(tmp_path)
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"a": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(CorruptCheckpoint, match=r"pytorch_model\.bin") as caught:
        Checkpoint.open(folder)
    assert "convert" in caught.value.hint
    assert "safetensors" in caught.value.hint
    assert not (tmp_path / "exploded").exists()


def test_code_of_a_checkpoint_is_ignored_and_noted(tmp_path):
    folder = make(tmp_path, config={"auto_map": {"AutoModel": "modeling_evil.Evil"}})
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    notes = " ".join(Checkpoint.open(folder).notes)
    assert "auto_map" in notes
    assert "Python files" in notes
    assert not (tmp_path / "exploded").exists()


# Malformed safetensors ----------------------------------------------------------------------------------------------

EVERY_KIND = attacks.REJECTED_BY_ALL | attacks.MORE | attacks.ACCEPTED_BY_THE_LIBRARY


def test_nineteen_kinds():
    assert len(attacks.REJECTED_BY_ALL) == 19


def test_the_good_file_is_good(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(attacks.good())
    assert list(read_header(tmp_path / "x.safetensors")) == ["a", "b"]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_malformed_files_are_refused_by_name_and_reason(tmp_path, kind):
    maker, reason = EVERY_KIND[kind]
    folder = make(tmp_path)
    (folder / "model.safetensors").write_bytes(maker())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpoint.open(folder)
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    assert "model.safetensors" in str(caught.value)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", attacks.REJECTED_BY_ALL)
def test_the_package_refuses_the_same_kinds(tmp_path, kind):
    """The 19 kinds are really malformed, and not a fancy of this reader."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(attacks.REJECTED_BY_ALL[kind][0]())
    with pytest.raises((SafetensorError, OSError, ValueError)):
        with safe_open(path, framework="pt") as file:
            list(file.keys())


def test_the_package_accepts_doubled_names(tmp_path):
    """The reason why the header is checked here."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(attacks.ACCEPTED_BY_THE_LIBRARY["doubled_tensor"][0]())
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("a").dtype == torch.int32


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_files_are_read_or_refused_never_worse(tmp_path_factory, data):
    good = bytearray(attacks.good())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    good = good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good
    path = tmp_path_factory.mktemp("mutant") / "model.safetensors"
    path.write_bytes(bytes(good))
    try:
        got = read_header(path)
    except CorruptCheckpoint:
        return
    expected = load_file(path)  # what we accept the package accepts, with the same shapes
    assert {n: i.shape for n, i in got.items()} == {n: tuple(t.shape) for n, t in expected.items()}


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path):
    folder = make(tmp_path)
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 4)
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors: tensor .* got"):
        list(checkpoint.iter_tensors())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match="cannot be read"):
        list(checkpoint.iter_tensors())


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """Twelve tensors of 16 MiB pass through a process that may not grow by their sum."""
    tensors = {f"t{i}": torch.full((4 << 20,), float(i)) for i in range(12)}
    folder = make(tmp_path, tensors=tensors)
    code = """
import resource, sys
from sparsevila.models.checkpoint import Checkpoint
checkpoint = Checkpoint.open(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(float(t[0]) for _, t in checkpoint.iter_tensors())
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    total, grown_kib = run.stdout.split()
    assert float(total) == sum(range(12))
    assert int(grown_kib) < 80_000


# The index ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../model-1.safetensors",
        "..",
        "/etc/passwd",
        "sub/model-1.safetensors",
        "..\\model-1.safetensors",
        "C:model-1.safetensors",
        "model-1.safetensors\0",
        "model-1.bin",
        "",
        None,
        7,
        ["model-1.safetensors"],
    ],
)
def test_the_index_names_plain_files_of_the_folder(tmp_path, name):
    folder = make_sharded(tmp_path)
    index = read_index(folder)
    index["weight_map"]["a"] = name
    write_index(folder, index)
    with pytest.raises(CorruptCheckpoint, match=r"index\.json.*plain file name"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("total", [-1, 10**30, "many", [1], True, 17])
def test_a_wrong_total_size(tmp_path, total):
    with pytest.raises(CorruptCheckpoint, match="total_size"):
        Checkpoint.open(make_sharded(tmp_path, metadata={"total_size": total}))


def test_a_total_size_that_is_a_little_off_is_noted(tmp_path):
    folder = make(tmp_path)
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.zeros(1000)}, folder / "one.safetensors")
    write_index(folder, {"metadata": {"total_size": 4004.0}, "weight_map": {"a": "one.safetensors"}})
    assert "4004" in " ".join(Checkpoint.open(folder).notes)


def test_index_and_shards_name_the_same_tensors(tmp_path):
    folder = make_sharded(tmp_path)
    index = read_index(folder)
    for change, match in (
        (lambda m: m.pop("b"), "'b' is not in the index"),
        (lambda m: m.update(ghost="model-1.safetensors"), "'ghost' is not in model-1"),
        (lambda m: m.update(b="model-2.safetensors"), "'b': expected in model-2"),
    ):
        weight_map = dict(index["weight_map"])
        change(weight_map)
        write_index(folder, index | {"weight_map": weight_map})
        with pytest.raises(CorruptCheckpoint, match=match):
            Checkpoint.open(folder)


def test_a_tensor_in_two_shards(tmp_path):
    folder = make_sharded(tmp_path)
    save_file({name: TENSORS[name] for name in "adef"}, folder / "model-2.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"'a' is also in model-1\.safetensors"):
        Checkpoint.open(folder)


def test_a_name_twice_in_the_index(tmp_path):
    folder = make_sharded(tmp_path)
    text = json.dumps(read_index(folder)).replace('"a": ', '"a": "model-2.safetensors", "a": ')
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptCheckpoint, match="twice"):
        Checkpoint.open(folder)


# Links and special files --------------------------------------------------------------------------------------------


def test_a_link_that_leads_out_is_refused(tmp_path):
    folder = make(tmp_path / "model")
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CorruptCheckpoint, match="leads out"):
        Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    outside.rename(folder / "real.safetensors")
    (folder / "model.safetensors").symlink_to("real.safetensors")  # within the folder: fine
    assert Checkpoint.open(folder).tensors


def test_the_blobs_of_a_hugging_face_cache_are_allowed_and_no_others(tmp_path):
    repository = tmp_path / "models--user--repo"
    folder = make(repository / "snapshots" / "0123abc")
    (repository / "blobs").mkdir()
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        (folder / name).rename(repository / "blobs" / f"hash-{name}")
        (folder / name).symlink_to(Path("../../blobs") / f"hash-{name}")
    assert dict(Checkpoint.open(folder).iter_tensors()).keys() == TENSORS.keys()
    link = tmp_path / "link"
    link.symlink_to(folder)  # the folder itself may be a link of the user's
    assert Checkpoint.open(link).tensors

    shared = tmp_path / "blobs" / "ab"  # newer caches keep one store for all repositories
    shared.mkdir(parents=True)
    (repository / "blobs" / "hash-model.safetensors").rename(shared / "abcd")
    (repository / "blobs" / "hash-model.safetensors").symlink_to("../../blobs/ab/abcd")
    assert dict(Checkpoint.open(folder).iter_tensors()).keys() == TENSORS.keys()

    other = tmp_path / "models--user--other" / "blobs"
    other.mkdir(parents=True)
    (shared / "abcd").rename(other / "x")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(other / "x")
    with pytest.raises(CorruptCheckpoint, match="leads out"):
        Checkpoint.open(folder)


def test_a_pipe_is_not_read(tmp_path):
    folder = make(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "aside")
        os.mkfifo(folder / name)
        with pytest.raises(CorruptCheckpoint, match="not a regular file"):
            Checkpoint.open(folder)
        (folder / "aside").rename(folder / name)
    Checkpoint.open(folder)


# JSON ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"{", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": {"b": 1, "b": 2}}', "twice"),
        (b'{"\xff": 1}', "UTF-8"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "deeper than 64"),
        (b"[" * 10_000_000, "deeper than 64"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_broken_json(tmp_path, text, match):
    folder = make(tmp_path)
    (folder / "config.json").write_bytes(text)
    start = time.monotonic()
    with pytest.raises(CorruptCheckpoint, match=rf"config\.json: .*{match}"):
        Checkpoint.open(folder)
    assert time.monotonic() - start < 1


def test_json_above_the_byte_cap_is_not_read(tmp_path):
    folder = make(tmp_path)
    with (folder / "config.json").open("wb") as file:
        file.truncate(10 << 30)  # sparse: no disk, but a reader would need 10 GiB
    start = time.monotonic()
    with pytest.raises(CorruptCheckpoint, match="at most"):
        Checkpoint.open(folder)
    assert time.monotonic() - start < 1


def test_brackets_in_strings_do_not_count_as_depth():
    assert parse_json(b'{"a": "' + b"[" * 1000 + b'"}', "x")["a"] == "[" * 1000
    assert parse_json(rb'{"a": "\\\"[[[[\\", "b": "' + b"{" * 100 + b'"}', "x")["a"] == '\\"[[[[\\'


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.text('[]{}"\\', max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[{"\\a', max_size=4), inner, max_size=3),
    max_leaves=15,
)


def depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3), st.integers(50, 70), st.booleans())
def test_the_depth_scan_counts_as_the_parser_does(value, levels, ascii_only):
    for _ in range(levels):
        value = {"k": value}
    data = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", errors="replace")
    if depth(value) > 64:
        with pytest.raises(CorruptCheckpoint, match="deeper"):
            parse_json(data, "x")
    else:
        parse_json(data, "x")


def test_messages_are_short_and_hold_no_raw_control_characters(tmp_path):
    folder = make(tmp_path, tensors={"a": torch.zeros(2)})
    name = "\x1b[31m" + "x" * 5000
    header = json.dumps({name: {"dtype": "Q", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpoint.open(folder)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


# ConfigReader -------------------------------------------------------------------------------------------------------

READER = ConfigReader(
    {
        "layers": 32,
        "eps": 1e-5,
        "whole": 1,
        "tied": False,
        "act": "silu",
        "window": None,
        "ids": [1, 2],
        "text_config": {"hidden_size": 0, "name": "x"},
        "old": 5,
        "new": 5,
        "this": 1,
        "that": 2,
        "infinite": float("inf"),
        "nan": float("nan"),
        "words": "12",
    }
)


def test_config_values_come_back_typed():
    assert READER.get_int("layers") == 32
    assert READER.get_int("absent", 7) == 7
    assert READER.get_int("absent", None) is None
    assert READER.get_float("eps") == 1e-5
    assert isinstance(READER.get_float("whole"), float)
    assert READER.get_bool("tied", True) is False
    assert READER.get_str("act", choices=("silu", "gelu")) == "silu"
    assert READER.get_ints("ids") == (1, 2)
    assert READER.get_list("absent", (3, 4)) == [3, 4]
    assert READER.sub("text_config").get_str("name") == "x"
    assert READER.sub("absent", required=False).get_int("layers", 3) == 3
    assert READER.get_int(("new", "old")) == 5
    assert READER.get_int(("absent", "old")) == 5


def test_null_overrides_the_default():
    assert READER.get_int("window", 4096, none_ok=True) is None
    with pytest.raises(CorruptCheckpoint, match=r"config\.json: window: .*got None"):
        READER.get_int("window", 4096)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda r: r.get_int("absent"), "absent: the key is missing"),
        (lambda r: r.get_int("layers", high=31), "layers: expected a whole number from 1 to 31, got 32"),
        (lambda r: r.get_int("eps"), "eps"),
        (lambda r: r.get_int("tied"), "tied"),
        (lambda r: r.get_int("words"), "words: .*'12'"),
        (lambda r: r.sub("text_config").get_int("hidden_size"), r"text_config\.hidden_size: .*got 0"),
        (lambda r: r.sub("text_config").get_int("gone"), r"text_config\.gone: the key is missing"),
        (lambda r: r.sub("layers"), "layers: expected an object"),
        (lambda r: r.sub("gone"), "gone: the key is missing"),
        (lambda r: r.get_float("infinite"), "infinite"),
        (lambda r: r.get_float("nan"), "nan"),
        (lambda r: r.get_float("tied"), "tied"),
        (lambda r: r.get_bool("layers"), "true or false"),
        (lambda r: r.get_str("act", choices=("relu",)), "one of 'relu', got 'silu'"),
        (lambda r: r.get_str("layers"), "a text"),
        (lambda r: r.get_list("act"), "a list"),
        (lambda r: r.get_list("ids", max_len=1), "at most 1"),
        (lambda r: r.get_ints("ids", high=1), "from 0 to 1"),
        (lambda r: r.get_int(("this", "that")), "the same value"),
    ],
)
def test_wrong_config_values_name_file_key_and_value(call, match):
    with pytest.raises(CorruptCheckpoint, match=match) as caught:
        call(READER)
    assert "config.json" in str(caught.value)
    assert isinstance(caught.value, SparseVILAError)


# Parts of a folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [make, make_sharded])
def test_named_tensors_are_read_and_no_others(tmp_path, maker):
    checkpoint = Checkpoint.open(maker(tmp_path))
    got = checkpoint.read_tensors(["f", "a"])
    assert set(got) == {"a", "f"}
    assert all(same(got[name], TENSORS[name]) for name in got)
    part = checkpoint.part({"c"})
    assert [name for name, _ in part.iter_tensors()] == list(part.tensors) == ["c"]
    assert part.weight_bytes == TENSORS["c"].nbytes
    assert part.config == checkpoint.config
    assert len(checkpoint.tensors) == len(TENSORS)
    assert checkpoint.read_tensors([]) == {}


def test_a_part_names_what_is_not_there(tmp_path):
    checkpoint = Checkpoint.open(make(tmp_path))
    with pytest.raises(CorruptCheckpoint, match="tensor 'zebra' is not in"):
        checkpoint.read_tensors(["a", "zebra"])


def test_a_part_of_a_file_that_was_cut_since_is_refused(tmp_path):
    checkpoint = Checkpoint.open(make(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CorruptCheckpoint, match=r"expected .* bytes, got"):
        checkpoint.read_tensors(list(TENSORS))
