"""Packaging. The repository root is the package `sparsevila`: no `models` or `engine` is dropped into site-packages.

The top-level folders have no `__init__.py`, on purpose: a distribution named `kernels` exists and
`transformers` probes for it. With a `kernels/__init__.py` first on `sys.path` several of its versions
fail to import their Llama and LLaVA-NeXT classes; a namespace portion lets a real `kernels` win.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

setup(
    name="sparsevila",
    version=re.search(r'^__version__ = "(.+)"', (ROOT / "__init__.py").read_text(), re.M).group(1),
    description="Sparse, quantised, streaming chat with images and videos on one ordinary GPU, or none",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"sparsevila": "."},
    packages=[
        "sparsevila",
        "sparsevila.engine",
        "sparsevila.engine.sparsity",
        "sparsevila.kernels",
        "sparsevila.kernels.cpu",
        "sparsevila.kernels.gpu",
        "sparsevila.quant",
        "sparsevila.models",
    ],
    package_data={"sparsevila": ["py.typed", "assets/demo/*", "assets/demo-quantised/*", "assets/calibration/*"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "llvmlite>=0.46; platform_machine in 'x86_64 AMD64 aarch64 arm64'",
        "numpy>=1.26",
        "safetensors>=0.5",
        "sentencepiece>=0.2.1",
        "tokenizers>=0.22",
        "pillow>=12.1.1",
        "av>=14,<20",
        "huggingface_hub>=0.36",
        "prompt_toolkit>=3.0.40",
    ],
    extras_require={
        "decord": ["decord2>=3"],
        "eval": ["matplotlib>=3.10", "pyarrow>=20"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2",
            "hypothesis>=6",
            "transformers>=5.17",
            "flash-colreduce>=0.2.2",
            "pexpect>=4.9",
            "decord2>=3",
            "matplotlib>=3.10",
            "pyarrow>=20",
            "ruff>=0.14",
            "mypy>=1.18",
        ],
    },
    entry_points={
        "console_scripts": ["sparsevila = sparsevila.chat:main"],
        "lmms_eval.models": ["sparsevila = sparsevila.engine.lmms_eval_plugin:MANIFEST"],
    },
)
