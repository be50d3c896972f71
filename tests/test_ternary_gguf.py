import pytest
import torch

from clipmap_hf.export.gguf import GGUF_TYPES, write_gguf
from clipmap_hf.ternary.config import TernaryConfig
from clipmap_hf.ternary.model import pack_model


gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
PARTS = ["layers", "token_embedding", "projections", "patch_embedding"]


@pytest.mark.parametrize("gguf_type", GGUF_TYPES)
def test_all_tensors_come_back_exactly(tiny_teacher, tmp_path, gguf_type):
    packed = pack_model(tiny_teacher, TernaryConfig(parts=PARTS))
    types = write_gguf(packed, tmp_path / "model.gguf", gguf_type)
    found = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    expected = packed.dequantize().state_dict()
    assert found.keys() == expected.keys() == types.keys()
    for name, one in found.items():
        tensor = torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy())
        torch.testing.assert_close(tensor.view(expected[name].shape), expected[name], rtol=0, atol=0)
    assert types["vision_model.encoder.layers.0.mlp.fc2.weight"] == gguf_type  # rows of 256
    assert types["vision_model.encoder.layers.0.mlp.fc1.weight"] == "F16"  # rows of 64
    assert types["vision_model.encoder.layers.0.mlp.fc1.bias"] == "F32"


def test_levels_of_blocks_are_exact_as_well(tiny_teacher, tmp_path):
    packed = pack_model(tiny_teacher, TernaryConfig(granularity="block", block_size=16))
    types = write_gguf(packed, tmp_path / "model.gguf")
    assert set(types.values()) == {"F16", "F32"}


def test_blocks_of_the_types_own_size_are_ternary(tiny_teacher, tmp_path):
    options = {"granularity": "block", "block_size": 256, "modules": ["vision_model.encoder.layers.0.mlp.fc2"]}
    types = write_gguf(pack_model(tiny_teacher, TernaryConfig(**options)), tmp_path / "model.gguf")
    assert [name for name, kind in types.items() if kind == "TQ1_0"] == [f"{options['modules'][0]}.weight"]


def test_what_cannot_be_written_is_refused(tiny_teacher, tmp_path):
    with pytest.raises(ValueError, match="nothing to write"):
        write_gguf(tiny_teacher, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="'Q4_0' is unknown"):
        write_gguf(tiny_teacher, tmp_path / "model.gguf", "Q4_0")
