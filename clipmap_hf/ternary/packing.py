"""Packs trits into bytes, row by row: four per byte with two bits each, or five per byte as a number in base 3."""

import torch


__all__ = ["ENCODINGS", "check_packed", "pack", "packed_columns", "unpack"]

ENCODINGS = {"planar": (4, 4), "base3": (5, 3)}  # the number of trits per byte, and the base in which they are digits
_ROWS = 1024  # rows to check at a time, since unpacked trits take many times the memory of packed trits
_BYTES = torch.arange(256, device="cpu")
_TABLES = {  # the trits of every byte, int8 (trits in a byte, 256)
    encoding: torch.stack([_BYTES // base**index % base - 1 for index in range(count)]).to(torch.int8)
    for encoding, (count, base) in ENCODINGS.items()
}


def packed_columns(columns: int, encoding: str) -> int:
    """Returns the number of bytes that a row with `columns` trits needs."""
    return -(-columns // ENCODINGS[encoding][0])


def pack(trits: torch.Tensor, encoding: str) -> torch.Tensor:
    """
    Packs trits into bytes. The lowest digits of all bytes of a row hold the first trits, the next digits hold the
    following trits, and so on. So unpacking concatenates whole planes of digits. Digits that are left over hold the
    trit 0.

    Args:
        trits: The trits -1, 0 and 1, `(rows, columns)`.
        encoding: A key of `ENCODINGS`.

    Returns:
        The bytes, uint8, `(rows, packed_columns)`.
    """
    count, base = ENCODINGS[encoding]
    width = packed_columns(trits.shape[1], encoding)
    digits = torch.ones(len(trits), count * width, dtype=torch.uint8, device=trits.device)
    digits[:, : trits.shape[1]] = (trits + 1).to(torch.uint8)
    worth = torch.tensor([base**index for index in range(count)], dtype=torch.uint8, device=trits.device)
    return (digits.unflatten(1, (count, width)) * worth[:, None]).sum(dim=1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, columns: int, encoding: str) -> torch.Tensor:
    """Unpacks the trits `(rows, columns)`, int8, that `pack` has packed."""
    table = _TABLES[encoding].to(packed.device)
    return torch.cat([plane[packed.int()] for plane in table], dim=1)[:, :columns]


def check_packed(packed: torch.Tensor, columns: int, encoding: str) -> None:
    """
    Checks that bytes can be a result of `pack`.

    Raises:
        ValueError: If they cannot, for example because a file is corrupt or in another encoding.
    """
    for rows in packed.split(_ROWS):
        trits = unpack(rows, columns, encoding)
        if (trits > 1).any() or not torch.equal(pack(trits, encoding), rows):
            raise ValueError(
                f"These bytes hold no trits in the encoding {encoding!r}; the file is corrupt or belongs to another "
                "model."
            )
