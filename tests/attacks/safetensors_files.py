"""Malformed safetensors files: 19 kinds that the format forbids, and two that the usual reader accepts.

Each maker returns the bytes of one file.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable


def file_of(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this raw header; `length` overrides the stated header length."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _file_of_json(header: object, data: bytes = b"") -> bytes:
    return file_of(json.dumps(header).encode(), data)


def entry(begin: int, end: int, *, shape: object = (2,), dtype: str = "F32") -> dict[str, object]:
    """A header entry as it stands in the file."""
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def good() -> bytes:
    """Two tensors of two float32 each: what every malformed file departs from."""
    return _file_of_json({"a": entry(0, 8), "b": entry(8, 16)}, struct.pack("<4f", 1, 2, 3, 4))


def _zipped_pickle() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": [1.0]}))
    return target.getvalue()


# kind -> (bytes, a word of the reason)
REJECTED_BY_ALL: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "8 bytes"),
    "seven_bytes": (lambda: b"\0" * 7, "8 bytes"),
    "header_2_to_63": (lambda: file_of(b"{}", length=2**63), "at most"),
    "header_beyond_file": (lambda: file_of(b"{}", length=50_000_000), "header of"),
    "header_above_cap": (lambda: file_of(b"{}", length=100_000_001), "at most"),
    "truncated": (lambda: good()[:-3], "cut short"),
    "trailing_bytes": (lambda: good() + b"\0", "trailing"),
    "hole": (lambda: _file_of_json({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20), "hole"),
    "overlap": (lambda: _file_of_json({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12), "overlaps"),
    "shape_against_bytes": (lambda: _file_of_json({"a": entry(0, 8, shape=(3,))}, b"\0" * 8), "needs 12 bytes"),
    "overflowing_shape": (
        lambda: _file_of_json({"a": entry(0, 8, shape=(2**33, 2**33, 2**33))}, b"\0" * 8),
        "needs",
    ),
    "negative_shape": (lambda: _file_of_json({"a": entry(0, 8, shape=(-2,))}, b"\0" * 8), "non-negative"),
    "unknown_dtype": (lambda: _file_of_json({"a": entry(0, 8, dtype="F31")}, b"\0" * 8), "dtype"),
    "broken_json": (lambda: file_of(b'{"a": '), "JSON"),
    "array_root": (lambda: file_of(b"[1, 2, 3]"), "JSON object"),
    "bad_utf8": (lambda: file_of(b'{"\xff\xfe": 1}'), "UTF-8"),
    "nested_metadata": (
        lambda: _file_of_json({"__metadata__": {"a": {"b": "c"}}, "a": entry(0, 8)}, b"\0" * 8),
        "__metadata__",
    ),
    "deep_json": (lambda: file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "deeper"),
    "pickle": (lambda: pickle.dumps({"a": [1.0] * 100}), "pickled"),
}
MORE: dict[str, tuple[Callable[[], bytes], str]] = {
    "zipped_pickle": (_zipped_pickle, "pickled"),
    "boolean_shape": (lambda: _file_of_json({"a": entry(0, 4, shape=[True])}, b"\0" * 4), "non-negative"),
    "reversed_offsets": (lambda: _file_of_json({"a": entry(8, 0)}, b"\0" * 8), "span"),
    "text_offsets": (
        lambda: _file_of_json({"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}, b"\0" * 8),
        "offsets",
    ),
    "huge_number": (lambda: file_of(b'{"a": ' + b"9" * 10_000 + b"}"), "JSON"),
}
# The usual reader takes the last of two equal names.
ACCEPTED_BY_THE_LIBRARY: dict[str, tuple[Callable[[], bytes], str]] = {
    "doubled_tensor": (
        lambda: file_of(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
            b"\0" * 8,
        ),
        "twice",
    ),
    "doubled_field": (
        lambda: file_of(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "twice",
    ),
}
