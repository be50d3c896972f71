import json
import shutil
from pathlib import Path

import pytest
import torch
from hostile_repos import HOSTILE
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil
from transformers.utils import is_torchvision_available

from clipmap_hf.models.loading import load_config, load_model, load_processor


@pytest.fixture
def folder(teacher_folder, tmp_path) -> Path:
    """A copy of the teacher's folder that a test may damage."""
    return Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))


@pytest.fixture
def tensors(folder):
    """The folder's tensors; `tensors.write()` after changing them."""

    class Tensors(dict):
        def write(self) -> None:
            save_file(dict(self), folder / "model.safetensors", {"format": "pt"})

    return Tensors(load_file(folder / "model.safetensors"))


def test_the_saved_model_comes_back_bit_for_bit_in_eval_mode(folder, tiny_teacher):
    model = load_model(str(folder))
    assert not model.training
    torch.testing.assert_close(model.state_dict(), tiny_teacher.state_dict(), atol=0, rtol=0)


def test_half_precision_checkpoints_load_in_fp32_unless_told(folder, tiny_teacher):
    tiny_teacher.half().save_pretrained(folder)
    assert load_model(str(folder)).dtype == torch.float32
    assert load_model(str(folder), dtype=torch.float16).dtype == torch.float16


def test_a_missing_tensor_is_an_error(folder, tensors):
    del tensors["text_model.encoder.layers.1.mlp.fc1.bias"]
    tensors.write()
    with pytest.raises(ValueError, match=r"do not fit.*missing: \['text_model\.encoder\.layers\.1\.mlp\.fc1\.bias'\]"):
        load_model(str(folder))


def test_an_extra_tensor_is_an_error(folder, tensors):
    tensors["text_model.encoder.layers.3.mlp.fc1.bias"] = torch.zeros(192)
    tensors.write()
    with pytest.raises(
        ValueError, match=r"not part of the model: \['text_model\.encoder\.layers\.3\.mlp\.fc1\.bias'\]"
    ):
        load_model(str(folder))


def test_a_tensor_of_another_shape_is_an_error(folder, tensors):
    tensors["visual_projection.weight"] = torch.zeros(32, 60)
    tensors.write()
    with pytest.raises(ValueError, match=r"of another shape: .*visual_projection\.weight.*32, 60.*32, 64"):
        load_model(str(folder))


def test_a_config_of_another_size_is_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing: .*vision_model\.encoder\.layers\.4"):
        load_model(str(folder))


def test_all_problems_are_reported_at_once(folder, tensors):
    del tensors["logit_scale"]
    tensors["more"] = torch.zeros(1)
    tensors.write()
    with pytest.raises(ValueError, match=r"missing: \['logit_scale'\]; not part of the model: \['more'\]"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(folder, tensors, value, dtype):
    tensors["text_model.encoder.layers.1.mlp.fc1.bias"][3] = value
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(dtype)
    tensors.write()
    with pytest.raises(ValueError, match=r"not finite.*'text_model\.encoder\.layers\.1\.mlp\.fc1\.bias'"):
        load_model(str(folder))


def test_weights_too_large_for_the_dtype_asked_for_are_refused(folder, tensors):
    tensors["visual_projection.weight"][0, 0] = 1e6
    tensors.write()
    assert load_model(str(folder)).visual_projection.weight[0, 0] == 1e6
    with pytest.raises(ValueError, match=r"'visual_projection\.weight'.*torch\.float16.*torch\.float32"):
        load_model(str(folder), dtype=torch.float16)


def test_position_ids_of_old_checkpoints_are_no_extra_tensor(folder, tensors, tiny_teacher):
    tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    tensors.write()
    torch.testing.assert_close(load_model(str(folder)).state_dict(), tiny_teacher.state_dict(), atol=0, rtol=0)


def test_missing_weights_are_an_error(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_model(str(folder))


def test_pickled_weights_are_not_read(folder, tensors):
    torch.save(dict(tensors), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_model(str(folder))


def test_half_a_weights_file_is_an_error(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(Exception, match="incomplete metadata"):  # SafetensorError has no public base class
        load_model(str(folder))


@pytest.mark.parametrize("load", [load_model, load_config])
def test_a_missing_config_is_an_error(folder, load):
    (folder / "config.json").unlink()
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        load(str(folder))


@pytest.mark.parametrize("load", [load_model, load_config, load_processor])
def test_a_missing_folder_is_named(tmp_path, load):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        load(str(tmp_path / "nowhere"))


def test_config_is_the_models(folder, tiny_teacher):
    assert load_config(str(folder)).to_dict()["text_config"] == tiny_teacher.config.to_dict()["text_config"]


def test_processor_reads_pairs_as_before_with_the_pil_backend(folder, tiny_processor, tiny_pairs):
    processor = load_processor(str(folder))
    assert isinstance(processor.image_processor, CLIPImageProcessorPil)
    inputs = {"text": [tiny_pairs[0]["caption"]], "images": [tiny_pairs[0]["image"]], "return_tensors": "pt"}
    torch.testing.assert_close(dict(processor(**inputs)), dict(tiny_processor(**inputs)), atol=0, rtol=0)


def test_a_backend_that_is_not_installed_is_an_error_instead_of_another_backend(folder):
    if is_torchvision_available():
        assert load_processor(str(folder), backend="torchvision").image_processor.backend == "torchvision"
    else:
        with pytest.raises(
            ValueError, match="backend='torchvision' is not available, only 'pil'; install torchvision"
        ):
            load_processor(str(folder), backend="torchvision")


def test_a_missing_tokenizer_is_an_error_instead_of_an_empty_one(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"holds no tokenizer; add its `tokenizer\.json`"):
        load_processor(str(folder))


def test_a_missing_image_processor_is_an_error(folder):
    (folder / "processor_config.json").unlink()
    with pytest.raises(OSError, match="image processor"):
        load_processor(str(folder))


# Folders that nobody should load


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused(folder, name):
    spoil, says = HOSTILE[name]
    spoil(folder)
    with pytest.raises(Exception, match=f"(?s){says}") as caught:
        load_model(str(folder))
    assert isinstance(caught.value, (OSError, ValueError)) or "SafetensorError" in type(caught.value).__name__


def test_code_beside_a_tokenizer_is_not_run(folder, tiny_tokenizer):
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "New", "auto_map": {"AutoTokenizer": ["tokenizing.New", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (folder / "tokenizing.py").write_text("raise SystemExit('this code must not run')\n")
    assert load_processor(str(folder)).tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
