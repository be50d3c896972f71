"""Checks the options that are passed on to downloads, so that a misspelt argument is not taken for an option."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from inspect import signature


__all__ = ["DOWNLOAD_OPTIONS", "check_download_options"]

DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")


def check_download_options(function: Callable, given: Iterable[str]) -> None:
    """
    Checks the names of further arguments.

    Args:
        function: What they were given to.
        given: Their names.

    Raises:
        TypeError: If a name is no download option; it names the nearest argument of the function.
    """
    known = [*signature(function).parameters, *DOWNLOAD_OPTIONS]
    for name in given:
        if name not in DOWNLOAD_OPTIONS:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Downloads take {list(DOWNLOAD_OPTIONS)}."
            raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}.{hint}")
