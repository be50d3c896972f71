"""Says which extra a missing optional package belongs to."""

from importlib.util import find_spec


__all__ = ["require"]


def require(extra: str, *packages: str) -> None:
    """
    Looks whether optional packages are installed.

    Args:
        extra: The extra of `clipmap_hf` that installs them.
        packages: Names under which they are imported.

    Raises:
        ImportError: If one of them is missing; it says how to install it.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"{' and '.join(missing)} cannot be imported; install it: pip install 'clipmap_hf[{extra}]'."
        )
