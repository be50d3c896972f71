import pytest
import torch

from clipmap_hf.ternary.packing import ENCODINGS, check_packed, pack, packed_columns, unpack


each_encoding = pytest.mark.parametrize("encoding", ENCODINGS)


def trits_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(columns))


@each_encoding
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2, 5), (5, 7), (4, 21), (0, 3), (2, 192)])
def test_trits_of_any_shape_come_back(encoding, shape):
    trits = trits_of(*shape)
    packed = pack(trits, encoding)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], packed_columns(shape[1], encoding))
    assert torch.equal(unpack(packed, shape[1], encoding), trits)
    check_packed(packed, shape[1], encoding)


@pytest.mark.parametrize("value", [-1, 0, 1])
@each_encoding
def test_rows_of_one_value_come_back(encoding, value):
    trits = torch.full((2, 13), value, dtype=torch.int8)
    assert torch.equal(unpack(pack(trits, encoding), 13, encoding), trits)


@pytest.mark.parametrize(("encoding", "bytes_of_row"), [("planar", 48), ("base3", 39)])
def test_four_or_five_trits_are_a_byte(encoding, bytes_of_row):
    assert packed_columns(192, encoding) == bytes_of_row


@each_encoding
def test_rows_are_packed_by_themselves(encoding):
    trits = trits_of(6, 11)
    assert torch.equal(pack(trits, encoding)[2:4], pack(trits[2:4], encoding))


@pytest.mark.parametrize(
    ("encoding", "byte"), [("planar", 0b11), ("planar", 0b11000000), ("base3", 243), ("base3", 255)]
)
def test_bytes_that_hold_no_trits_are_refused(encoding, byte):
    packed = pack(trits_of(2, 20), encoding)
    packed[1, 2] = byte
    with pytest.raises(ValueError, match="corrupt"):
        check_packed(packed, 20, encoding)


@each_encoding
def test_every_row_is_checked(encoding):
    packed = pack(torch.zeros(2500, 1, dtype=torch.int8), encoding)
    check_packed(packed, 1, encoding)
    packed[-1] = 255
    with pytest.raises(ValueError, match="corrupt"):
        check_packed(packed, 1, encoding)


@each_encoding
def test_digits_beyond_the_row_must_be_those_of_zeros(encoding):
    packed = pack(torch.zeros(1, 1, dtype=torch.int8), encoding)
    with pytest.raises(ValueError, match="corrupt"):
        check_packed(packed - 1 - ENCODINGS[encoding][1], 1, encoding)
