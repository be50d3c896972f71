"""How tests start processes of their own: alone, or several under torchrun, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import clipmap_hf


REPOSITORY = Path(clipmap_hf.__file__).parents[1]
RECIPES = REPOSITORY / "recipes"


def environment(**values: str) -> dict[str, str]:
    """This process's environment, for one that is to be small, offline and without GPUs."""
    own = {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return os.environ | own | values


def command(script: Path | str, *argv, processes: int = 1) -> list[str]:
    """What starts a script in this Python: alone, or `processes` of it under torchrun, on a port of their own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    return list(map(str, [sys.executable, *launcher, script, *argv]))


def finish(script: Path | str, *argv, processes: int = 1, timeout: float = 240, **values: str) -> str:
    """Runs a script to its end and returns what it printed; if it fails, shows why."""
    result = subprocess.run(
        command(script, *argv, processes=processes),
        env=environment(**values),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return result.stdout
