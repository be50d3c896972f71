"""Trits in bytes: four to a byte in two bits each, or five to a byte in base 3. Rows stay rows."""

import torch


__all__ = ["ENCODINGS", "check_packed", "pack", "packed_columns", "unpack"]

ENCODINGS = {"planar": (4, 4), "base3": (5, 3)}  # trits in a byte, and what one is worth more than that before it
_ROWS = 1024  # that are checked at a time, as unpacked ones take many times the memory
_BYTES = torch.arange(256, device="cpu")
_TABLES = {  # the trits of every byte, int8 (trits in a byte, 256)
    encoding: torch.stack([_BYTES // base**index % base - 1 for index in range(count)]).to(torch.int8)
    for encoding, (count, base) in ENCODINGS.items()
}


def packed_columns(columns: int, encoding: str) -> int:
    """Bytes of a row of so many trits."""
    return -(-columns // ENCODINGS[encoding][0])


def pack(trits: torch.Tensor, encoding: str) -> torch.Tensor:
    """
    Trits as bytes. The first trits of a row lie in the lowest digits of its bytes, so that unpacking cuts planes out
    of whole bytes; the digits that are left over are those of a zero.

    Args:
        trits: -1, 0 and 1, `(rows, columns)`.
        encoding: A key of `ENCODINGS`.

    Returns:
        uint8, `(rows, packed_columns)`.
    """
    count, base = ENCODINGS[encoding]
    width = packed_columns(trits.shape[1], encoding)
    digits = torch.ones(len(trits), count * width, dtype=torch.uint8, device=trits.device)
    digits[:, : trits.shape[1]] = (trits + 1).to(torch.uint8)
    worth = torch.tensor([base**index for index in range(count)], dtype=torch.uint8, device=trits.device)
    return (digits.unflatten(1, (count, width)) * worth[:, None]).sum(dim=1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, columns: int, encoding: str) -> torch.Tensor:
    """The trits `(rows, columns)`, int8, that `pack` was given."""
    table = _TABLES[encoding].to(packed.device)
    return torch.cat([plane[packed.int()] for plane in table], dim=1)[:, :columns]


def check_packed(packed: torch.Tensor, columns: int, encoding: str) -> None:
    """
    Looks whether bytes are what `pack` makes.

    Raises:
        ValueError: If they are not, as in a file that is corrupt or in another encoding.
    """
    for rows in packed.split(_ROWS):
        trits = unpack(rows, columns, encoding)
        if (trits > 1).any() or not torch.equal(pack(trits, encoding), rows):
            raise ValueError(
                f"These bytes hold no trits in the encoding {encoding!r}; the file is corrupt, or another's."
            )
