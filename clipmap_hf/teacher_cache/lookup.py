"""Looks up teachers' embeddings of views and captions in a teacher cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipmap_hf.files.atomic import read_json
from clipmap_hf.teacher_cache.files import (
    INDEX,
    MANIFEST,
    SUMMARY,
    cache_progress,
    check_manifest,
    damaged_file,
    load_arrays,
)


__all__ = ["TeacherCache"]


class TeacherCache:
    """
    A complete cache, which `TeacherCache.open` opens. It can be sent to other processes; each process maps the files
    that it needs.

    Args:
        folder: Folder of the cache.
        manifest: The result of `cache_manifest` at the time of the build.
        summary: The contents: `blocks` (names of the files), `dims` (embedding width of each teacher), and counts.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], summary: dict[str, Any]):
        self.folder, self.manifest, self.summary = folder, manifest, summary
        self._mapped = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_mapped": {}}

    @classmethod
    def open(cls, folder: str | Path) -> "TeacherCache":
        """
        Opens the cache in `folder`.

        Raises:
            ValueError: If there is no cache, it is not complete, or one of its files is missing or truncated.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"There is no teacher cache in '{folder}', which has no {MANIFEST}; build it first.")
        if not (folder / SUMMARY).is_file():
            raise ValueError(
                f"The teacher cache in '{folder}' is not complete: {cache_progress(folder)}. Build it again with the "
                "same settings; it goes on where it stopped."
            )
        manifest, summary = (read_json(folder / name) for name in (MANIFEST, SUMMARY))
        for name, size in summary["bytes"].items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                raise damaged_file(path, f"has {found} bytes, {size} were written")
        return cls(folder, manifest["manifest"], summary)

    @property
    def views(self) -> int:
        """Number of views per image."""
        return self.manifest["views"]

    def check(self, expected: Mapping[str, Any]) -> None:
        """
        Checks that the cache holds what a run with the manifest `expected` would compute.

        Raises:
            ValueError: If it does not. The message names every difference.
        """
        check_manifest(self.manifest, expected, self.folder)

    def lookup(
        self, image_keys: Sequence[int], views: Sequence[int], text_keys: Sequence[int]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Looks up the embeddings of some views and captions.

        Args:
            image_keys: `content_key` of each image file.
            views: Number of the view of each image.
            text_keys: `content_key` of each caption.

        Returns:
            For each teacher, normalized fp16 embeddings `(images, dim)` and `(texts, dim)`, in the order of the keys.

        Raises:
            ValueError: If the cache lacks an image, a view or a caption.
        """
        beyond = sorted({view for view in views if not 0 <= view < self.views})
        if beyond:
            raise ValueError(
                f"The teacher cache in '{self.folder}' holds {self.views} views per image, so none numbered "
                f"{beyond[:5]}; give the collator views={self.views}."
            )
        return list(zip(self._gather("image", image_keys, views), self._gather("text", text_keys), strict=True))

    def _gather(self, kind: str, keys: Sequence[int], views: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Returns each teacher's embeddings of the keys, and for images of their views."""
        blocks, rows = self._find(kind, keys)
        axes = (rows,) if views is None else (rows, np.asarray(views))
        embeds = [torch.empty(len(keys), dim, dtype=torch.float16) for dim in self.summary["dims"]]
        for block in np.unique(blocks):
            chosen = np.flatnonzero(blocks == block)
            arrays = self._arrays(self.summary["blocks"][block])
            for teacher, embed in enumerate(embeds):
                embed[chosen] = arrays[f"{kind}s.{teacher}"][tuple(torch.from_numpy(axis[chosen]) for axis in axes)]
        return embeds

    def _find(self, kind: str, keys: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the number of the block of each key, and its row in that block."""
        index = {name: array.numpy() for name, array in self._arrays(INDEX).items()}
        known, wanted = index[f"{kind}_keys"], np.array(keys, dtype=np.uint64)
        places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        missing = int((known[places] != wanted).sum())
        if missing:
            other = {"image": "other images", "text": "other captions, or draws them in another way"}[kind]
            raise ValueError(
                f"{missing} of {len(keys)} {kind}s are not in the teacher cache in '{self.folder}'; it was built from "
                f"data that has {other}. Build a cache from this data in another folder."
            )
        return index[f"{kind}_blocks"][places], index[f"{kind}_rows"][places].astype(np.int64)

    def _arrays(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self._mapped:
            self._mapped[name] = load_arrays(self.folder / name)
        return self._mapped[name]
