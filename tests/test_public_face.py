"""The import contract: quick, without torch, complete, and without effects."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sparsevila

ROOT = Path(__file__).resolve().parent.parent


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)


def _fastest_s(code: str, runs: int = 5) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        assert _run(code).returncode == 0
        times.append(time.perf_counter() - start)
    return min(times)


def test_import_is_quick_and_without_torch() -> None:
    done = _run("import sparsevila, sys; print(sorted({'torch', 'numpy', 'PIL', 'av'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr
    assert _fastest_s("import sparsevila") - _fastest_s("pass") < 0.3


def _existing_names() -> list[str]:
    """The names whose home file is there; the others would fail for want of a file, not of a name."""
    return [n for n in sparsevila.__all__ if n == "__version__" or _home_file(n).exists()]


def _home_file(name: str) -> Path:
    return ROOT / (sparsevila._HOME_OF[name].replace(".", "/") + ".py")


def test_every_public_name_has_a_home() -> None:
    assert [n for n in sparsevila.__all__ if n not in _existing_names()] == []


@pytest.mark.parametrize("name", sparsevila.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(sparsevila, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__ or issubclass(value, sparsevila.SparseVILAError)


def test_type_checkers_see_the_same_names() -> None:
    source = (ROOT / "__init__.py").read_text(encoding="utf-8")
    block = source[source.index("if TYPE_CHECKING:\n") : source.index("def __getattr__")]
    assert set(re.findall(r"\b[A-Z]\w+", block)) - {"TYPE_CHECKING"} == set(sparsevila.__all__) - {"__version__"}


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Enigne'"):
        sparsevila.Enigne  # noqa: B018


def test_every_error_has_its_own_code_and_an_exit_code() -> None:
    errors = [
        getattr(sparsevila, n) for n in sparsevila.__all__ if n != "__version__" and "errors" in sparsevila._HOME_OF[n]
    ]
    assert len({e.code for e in errors}) == len(errors)
    assert {e.exit_code for e in errors} == {1, 2, 3, 4, 5}


_IMPORT_ALL = """
import importlib, logging, os, sys, threading
import torch
def state():
    return {
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "seed": torch.initial_seed(),
        "environ": dict(os.environ),
        "root handlers": len(logging.getLogger().handlers),
        "running threads": threading.active_count(),
        "hook": repr(sys.excepthook),
        "cuda": torch.cuda.is_initialized(),
        "cwd": os.getcwd(),
    }
before = state()
for name in NAMES:
    importlib.import_module(name)
after = state()
assert before == after, {k: (before[k], after[k]) for k in before if before[k] != after[k]}
"""


def test_importing_every_module_changes_nothing_and_prints_nothing() -> None:
    files = [p for folder in ("kernels", "quant", "models", "engine") for p in sorted((ROOT / folder).glob("**/*.py"))]
    names = [".".join(("sparsevila", *p.relative_to(ROOT).with_suffix("").parts)) for p in files]
    names = [n for n in names if not n.endswith((".server", ".lmms_eval_plugin", ".__main__"))] + [
        "sparsevila.errors",
        "sparsevila.chat",
    ]
    done = _run(f"NAMES = {json.dumps(names)}\n{_IMPORT_ALL}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
