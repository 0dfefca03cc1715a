"""Who may import whom, read from the source: kernels <- quant <- models <- engine <- entry points."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sparsevila"
LAYERS = ("kernels", "quant", "models", "engine")
FOLDERS = (*LAYERS, "benchmarks", "tests")
ENTRY_POINTS = ("chat", "quant.__main__", "engine.server", "engine.lmms_eval_plugin", "benchmarks", "setup")
HOMES = {  # heavy or optional packages, and the only files that may import them
    "llvmlite": {
        "kernels.cpu.compiled",
        "kernels.cpu.decode_attention",
        "kernels.cpu.emit",
        "kernels.cpu.int4_linear",
        "kernels.cpu.int8_linear",
        "kernels.cpu.rms_norm",
        "kernels.cpu.rope_append",
        "kernels.cpu.silu_mul",
    },
    "av": {"engine.video", "engine.doctor"},  # the second lists codecs only
    "PIL": {
        "engine.images",
        "engine.config",
        "engine.calibration_set",
        "engine.shrink",
        "models.anyres",
        "models.llava_next",
        "models.llava_onevision",
        "models.nvila",
        "models.qwen2_vl",
    },
    "sentencepiece": {"engine.tokenizer"},
    "tokenizers": {"engine.tokenizer"},
    "huggingface_hub": {"engine.hub"},
    "prompt_toolkit": {"engine.terminal", "chat"},
    "fastapi": {"engine.server"},
    "uvicorn": {"engine.server"},
    "lmms_eval": {"engine.lmms_eval_plugin"},
}
ORACLES = {"transformers", "flash_colreduce", "pexpect", "hypothesis", "pytest"}  # tests and benchmarks only
DRAWERS = {"utils", "util", "common", "misc", "helpers"}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the tree by its dotted name below the package; the root `__init__` is the empty name."""
    found = {}
    for folder in (root, *(root / name for name in FOLDERS)):
        pattern = "*.py" if folder == root else "**/*.py"
        for path in sorted(folder.glob(pattern)):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imported_names(source: str, module: str) -> Iterator[str]:
    """The absolute dotted names that `module` (below the package) imports; our own begin with `sparsevila`."""
    home = [PACKAGE, *module.split(".")][:-1] if module else [PACKAGE]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            # `from ..models import clip` names a module in its list: both readings are checked.
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def violations(source: str, module: str) -> list[str]:
    """Sentences about each import of `module` that the rules forbid."""
    bad = []
    own = module.split(".")[0]
    is_free = own in ("tests", "benchmarks")
    for name in imported_names(source, module):
        top, _, rest = name.partition(".")
        if top in ORACLES and not is_free:
            bad.append(f"{module}: {top} is for tests and benchmarks only")
        if top in HOMES and not is_free and module not in HOMES[top]:
            bad.append(f"{module}: {top} is imported in {sorted(HOMES[top])} only")
        if top in LAYERS:
            bad.append(f"{module}: {name} must be a relative import, or begin with {PACKAGE}")
        if top != PACKAGE or own == "tests":
            continue
        if any(rest == entry or rest.startswith(entry + ".") for entry in ENTRY_POINTS):
            bad.append(f"{module}: {name} is an entry point, which nothing imports")
        layer = rest.split(".")[0]
        if own in LAYERS and layer in LAYERS and module not in ENTRY_POINTS and LAYERS.index(layer) > LAYERS.index(own):
            bad.append(f"{module}: {own} may not import {layer}")
        if module == "errors":
            bad.append(f"errors: imports nothing of the package, got {name}")
    return bad


@pytest.mark.parametrize("module", sorted(modules(ROOT)))
def test_imports_point_down(module: str) -> None:
    source = modules(ROOT)[module].read_text(encoding="utf-8")
    assert violations(source, module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.rope", "from ..quant.linear import Linear"),
        ("kernels.rope", "from ..engine import config"),
        ("kernels.deep.rope", "from ...models.clip import Clip"),
        ("quant.linear", "def f():\n    from ..models import interface"),
        ("models.clip", "import sparsevila.engine.session"),
        ("engine.session", "from .. import chat"),
        ("engine.session", "from .server import app"),
        ("engine.session", "from ..quant import __main__"),
        ("engine.sparsity.fastv", "from ...chat import main"),
        ("engine.session", "import engine.config"),
        ("engine.session", "import av"),
        ("engine.session", "def f():\n    from PIL import Image"),
        ("models.clip", "import transformers"),
        ("chat", "from transformers import AutoModel"),
        ("chat", "from huggingface_hub import snapshot_download"),
        ("benchmarks.latency", "from sparsevila.chat import main"),
        ("errors", "from .engine import config"),
        ("", "import tokenizers"),
    ],
)
def test_the_rules_can_fail(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "engine.session",
            "from ..models.interface import Frames\nfrom .config import Sparsity\nfrom ..errors import Closed",
        ),
        ("quant.linear", "from ..kernels.w4a16 import w4a16"),
        ("engine.sparsity.fastv", "from ...kernels.saliency import saliency\nfrom .base import Method"),
        ("quant.__main__", "from ..models.registry import load"),
        ("chat", "from sparsevila.engine.config import Image\nfrom sparsevila import errors"),
        ("tests.test_chat", "from sparsevila.chat import main\nimport transformers"),
    ],
)
def test_the_rules_allow_what_the_design_allows(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_top_level_folders_are_namespace_portions() -> None:
    assert [name for name in FOLDERS if (ROOT / name / "__init__.py").exists()] == []


def test_no_drawer_modules() -> None:
    assert [name for name in modules(ROOT) if DRAWERS & set(name.split("."))] == []


def test_every_folder_of_code_is_packaged() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(ROOT) for path in modules(ROOT).values()}
    shipped = {f"sparsevila.{'.'.join(f.parts)}" for f in folders if f.parts and f.parts[0] in LAYERS}
    assert {name for name in shipped if f'"{name}"' not in setup} == set()
