"""The command as a module: `python -m clipmap_hf compress …`, `accelerate launch -m clipmap_hf compress …`."""

from clipmap_hf.cli.main import main


__all__ = ["main"]

if __name__ == "__main__":
    main()
