"""Package metadata; the version stands in `clipmap_hf/__init__.py` and is read without importing the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent


def read_version() -> str:
    """The `__version__` of the package."""
    source = ROOT / "clipmap_hf" / "__init__.py"
    match = re.search(r'^__version__ = "([^"]+)"$', source.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise RuntimeError(f'{source} has no line of the form `__version__ = "1.2.3"`; add one.')
    return match.group(1)


# torchvision is left out on purpose: images go through PIL, and its default wheel would fix the build of torch.
INSTALL_REQUIRES = [
    "accelerate>=1.15",
    "datasets>=5.2",
    "evaluate>=0.4.6",
    "huggingface_hub>=2.4,<3",
    "Jinja2>=3.1",  # huggingface_hub renders model cards with it, but declares it as an extra only
    "numpy>=2.0",
    "Pillow>=11.0",
    "PyYAML>=6.0",
    "safetensors>=0.8",
    "tokenizers>=0.23.1",
    "torch>=2.6",
    "transformers>=5.23,<6",
]

EXTRAS = {
    "onnx": ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7.2"],
    "sentence-transformers": ["sentence-transformers>=6.2"],
    "quality": ["build>=1.3", "ruff>=0.17,<0.18"],  # the formatter's output changes between minor versions
    "gguf": ["gguf>=0.19"],
    "siglip": ["protobuf>=5.0", "sentencepiece>=0.2"],  # what SiglipTokenizer reads its vocabulary with
    "words": ["wonderwords>=3.0"],
    "plots": ["matplotlib>=3.10"],
    "notebook": ["ipykernel>=7.0", "nbclient>=0.10"],  # for docs/quickstart.ipynb
    # The site. mkdocs 2 has neither plugins nor hooks.
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings-python>=2.0"],
    "trackers": ["tensorboard>=2.20", "trackio>=0.40"],
    # What recipes/benchmarks/data.py compares with, and packaged_sets.py finds images in.
    "benchmarks": ["webdataset>=1.0", "QtAwesome>=1.4", "scikit-learn>=1.6"],
}
EXTRAS["test"] = [
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    *EXTRAS["onnx"],
    *EXTRAS["plots"],
    *EXTRAS["sentence-transformers"],
    *EXTRAS["gguf"],
    *EXTRAS["siglip"],
    *EXTRAS["notebook"],
    *EXTRAS["words"],
]
# trackio is left out, which wants an older Pillow than others; `.[trackers]` has it. `.[docs]` is for the site alone.
_DEV = (extra for name, extra in EXTRAS.items() if name not in ("docs", "trackers"))
EXTRAS["dev"] = sorted({requirement for extra in _DEV for requirement in extra})


setup(
    name="clipmap_hf",
    version=read_version(),
    description="Compress Hugging Face CLIP models by a learned mapping of their weights, followed by distillation.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The clipmap_hf authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords="CLIP compression distillation mapping transformers vision-language",
    packages=[*find_packages(include=["clipmap_hf", "clipmap_hf.*"]), "clipmap_hf.recipes"],
    package_dir={"clipmap_hf.recipes": "recipes"},
    package_data={
        "clipmap_hf.recipes": ["configs/**/*.yaml", "accelerate_configs/*.yaml"],
        "clipmap_hf": [
            "py.typed",
            "hub/templates/*.md",
            *(f"demo/**/*.{suffix}" for suffix in ("parquet", "safetensors", "json", "jinja", "txt", "md")),
        ],
    },
    entry_points={"console_scripts": ["clipmap-hf = clipmap_hf.cli.main:main"]},
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
