"""Recipes in processes that are forked off one which has imported everything, so that they can be killed by dozens."""

import contextlib
import importlib
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

import psutil
from distributed_processes import RECIPES, environment


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["clipmap_hf.runs", "clipmap_hf.data.tokenizer", "datasets.packaged_modules"])


class Run:
    """
    A recipe in a process of its own.

    Args:
        recipe: File name in `recipes/`.
        argv: Its options.
        log: Where its output goes, behind what is there.
        kill: Where it kills itself: a dotted name, `before`, `half` or `after`, and at the how many-th call.
        file_size: No file may grow beyond so many bytes, as if the disk were full.
    """

    def __init__(self, recipe: str, argv: list, log: Path, kill: tuple[str, str, int] | None = None, file_size=None):
        self.notes = log.with_suffix(".resumed")
        self.known_resumptions = len(self.resumptions())
        arguments = ([str(RECIPES / recipe), *map(str, argv)], log, kill, file_size)
        before, own = dict(os.environ), environment(HF_DATASETS_CACHE=str(log.parent / "datasets"))
        os.environ.update(own)  # of the server, which starts with the first process
        try:
            self.process = _CONTEXT.Process(target=_run, args=arguments)
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def wait(self, timeout: float = 300) -> int:
        """The exit code; minus nine if it was killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError("The run hangs.")
        return self.process.exitcode

    def kill_after(self, seconds: float, once_resumed: bool = False) -> int:
        """
        Kills it when it has used so many seconds of a processor, however long that takes on a busy machine.

        Args:
            seconds: After the start, or
            once_resumed: after it has taken up training.
        """
        process, counted_from, known = psutil.Process(self.process.pid), 0.0, self.known_resumptions
        try:
            while self.process.exitcode is None:
                used = sum(process.cpu_times()[:2])
                if once_resumed and len(self.resumptions()) == known:
                    counted_from = used
                elif used - counted_from >= seconds:
                    self.process.kill()
                    break
                time.sleep(0.002)
        except psutil.NoSuchProcess:
            pass  # it is finished
        return self.wait()

    def resumptions(self) -> list[tuple[int, float]]:
        """For each time that a stage was taken up, in all runs with this log: its step, processor seconds so far."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [(int(step), float(used)) for step, used in map(str.split, lines)]


def _run(argv: list[str], log: Path, kill: tuple[str, str, int] | None, file_size: int | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    _note_resumption(log.with_suffix(".resumed"))
    if kill is not None:
        _kill_at(*kill)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
    log.with_suffix(".seconds").write_text(str(time.process_time()))


def _note_resumption(file: Path) -> None:
    """Writes to `file`, for each stage that is taken up, at which step, and the processor seconds so far."""
    from clipmap_hf.training.checkpoints import Checkpoints

    resume = Checkpoints.resume

    def noting(self):
        progress = resume(self)
        with contextlib.suppress(OSError), file.open("a") as lines:
            lines.write(f"{progress.step if progress else 0} {time.process_time()}\n")
        return progress

    Checkpoints.resume = noting


def _kill_at(name: str, moment: str, number: int) -> None:
    """Replaces a function by one that, when called the `number`-th time, ends this process as SIGKILL does."""
    place, _, attribute = name.rpartition(".")
    module, _, cls = place.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, cls) if cls else holder
    function, calls = getattr(holder, attribute), 0

    def deadly(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and moment == "half":
            path, content = args
            with open(path, "wb" if isinstance(content, bytes) else "w") as file:
                file.write(content[: len(content) // 2])
        result = None if calls == number and moment != "after" else function(*args, **kwargs)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, attribute, deadly)
