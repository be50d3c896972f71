import shutil
from clipmap_hf.models import *


def test_x(teacher_folder, tmp_path):
    for rm in (["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]):
        f = shutil.copytree(teacher_folder, tmp_path / str(len(rm)))
        for n in rm:
            (f / n).unlink()
        p = load_processor(str(f))
        print(
            len(p.tokenizer),
            p.tokenizer.get_vocab(),
            p.tokenizer("hello cat")["input_ids"],
            p.tokenizer("dog")["input_ids"],
            p.tokenizer.vocab_size,
        )
