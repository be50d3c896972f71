"""Prints what a bug report must say: versions and devices, and no paths, names or tokens."""

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import clipmap_hf


__all__ = ["environment", "main"]

_REQUIRED = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "evaluate",
    "Pillow",
    "numpy",
)
_OPTIONAL = (
    "deepspeed",
    "gguf",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "protobuf",
    "sentence-transformers",
    "sentencepiece",
    "tensorboard",
    "torchvision",
    "trackio",
    "wandb",
)


def main() -> None:
    """Prints the environment, a line for each entry."""
    argparse.ArgumentParser(
        prog=os.path.basename(sys.argv[0]), description="Prints versions and devices, for bug reports."
    ).parse_args()
    sys.stdout.write("".join(f"- {name}: {value}\n" for name, value in environment().items()))


def environment() -> dict[str, str]:
    """Returns versions and devices by name. Optional packages are left out where they are not installed."""
    optional = {name: found for name in _OPTIONAL if (found := _version(name)) is not None}
    return {
        "clipmap_hf": clipmap_hf.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) or "not installed" for name in _REQUIRED},
        **optional,
        **_devices(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    """The devices that torch sees, with their memory."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a wrong build of torch is what some reports are about
        return {"devices": f"unknown, torch cannot be imported ({type(error).__name__})"}

    devices = {"CPU": f"{os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{device.name}, {_gib(device.total_memory)}"
    if torch.cuda.is_available():
        devices["GPU runtime"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        devices["mps"] = f"{platform.machine()}, {_gib(torch.mps.recommended_max_memory())}"
    return devices


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
