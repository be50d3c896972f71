"""Keys of images and texts, which depend on nothing but their content."""

import hashlib


__all__ = ["content_key", "is_held_out"]


def content_key(content: bytes | str) -> int:
    """Returns a 64-bit key of an image file or a text, which depends on nothing but its content."""
    content = content.encode() if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def is_held_out(content: bytes | str, fraction: float) -> bool:
    """Whether an image file or a text belongs to the share that is held out for validation."""
    return content_key(content) < fraction * 2**64
