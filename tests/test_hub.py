"""Pushes and downloads over HTTP, against the Hub of hub_server.py."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from hostile_repos import HOSTILE
from hub_endpoints import OTHER_TOKEN, TOKEN, Handler
from hub_server import Fault, HubServer, running_hub
from huggingface_hub import ModelCard, constants, file_download
from huggingface_hub.utils import _http
from test_card import write_results
from test_recipe_configs import load_recipe
from transformers import CLIPModel

import clipmap_hf
from clipmap_hf import ClipMapCompressor, ClipMapConfig, TowerConfig
from clipmap_hf.hub.folder import write_label_folder
from clipmap_hf.hub.push import push_folder
from clipmap_hf.hub.results import SetResults
from clipmap_hf.models.fingerprints import model_fingerprint
from clipmap_hf.models.label_model import is_label_folder, load_label_model
from clipmap_hf.models.loading import load_model, load_processor
from clipmap_hf.models.vision_tower import vision_tower


STUDENT = ClipMapConfig(vision=TowerConfig(hidden_size=32), text=TowerConfig(hidden_size=32), initializer="diagonal")
ROOT = Path(clipmap_hf.__file__).parents[1]
COMMIT = r"POST /api/models/me/clip/commit/"


@pytest.fixture
def hub(request, monkeypatch, tmp_path) -> HubServer:
    """The Hub that `huggingface_hub` finds; a parameter is the size of the parts in which it wants uploads."""
    with running_hub(getattr(request, "param", None)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made anew, with this endpoint
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        monkeypatch.setattr(_http, "time", impatient)  # waits before trying again
        monkeypatch.setattr(file_download, "time", impatient)
        yield server
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def compressor(teacher_folder) -> ClipMapCompressor:
    return ClipMapCompressor.from_pretrained(teacher_folder, student=STUDENT)


@pytest.fixture(scope="module")
def saved(compressor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "student"
    compressor.save_pretrained(folder, results=[SetResults("pairs", {"mean_recall": 0.25})])
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A student's folder, to change and push."""
    return shutil.copytree(saved, tmp_path / "student")


@pytest.fixture
def cache(tmp_path) -> str:
    return str(tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    torch.testing.assert_close(actual.state_dict(), expected.state_dict(), atol=0, rtol=0)


def changed(folder: Path) -> CLIPModel:
    """Other weights in the same folder."""
    model = CLIPModel.from_pretrained(folder)
    model.logit_scale.data += 1
    model.save_pretrained(folder)
    return model


def sent(hub: HubServer, method: str, start: str) -> list[tuple]:
    return [request for request in hub.requests if request[0] == method and request[1].startswith(start)]


def test_the_hub_of_these_tests_notes_a_request_before_it_answers(hub, monkeypatch):
    def slow_note(handler, status, note=Handler.note):
        time.sleep(0.2)
        note(handler, status)

    monkeypatch.setattr(Handler, "note", slow_note)
    content = b'{"content": "---\\nlicense: mit\\n---\\n"}'
    with urllib.request.urlopen(f"{hub.url}/api/validate-yaml", content) as answer:
        answer.read()
    assert sent(hub, "POST", "/api/") == [("POST", "/api/validate-yaml", 200, None)]


# Pushes


@pytest.mark.parametrize("hub", [None, 100_000], ids=["whole files", "in parts"], indirect=True)
def test_a_pushed_student_comes_back_bit_for_bit(hub, compressor, cache):
    commit = compressor.push_to_hub("me/clip", token=TOKEN)
    assert commit.oid == hub.repos["me/clip"].branches["main"]
    assert_same(CLIPModel.from_pretrained("me/clip", cache_dir=cache), compressor.export())
    assert_same(load_model("me/clip", cache_dir=cache), compressor.export())
    assert load_processor("me/clip", cache_dir=cache).tokenizer.get_vocab() == (
        compressor.processor.tokenizer.get_vocab()
    )
    assert len(sent(hub, "PUT", "/lfs/")) == (2 if hub.part_size is None else 6)  # weights, and tokenizer.json


def test_a_push_is_one_commit_of_what_a_user_of_the_student_needs(hub, folder):
    for name in (
        "checkpoints/step-1/optimizer.bin",
        "start/model.safetensors",
        "mapped/config.json",
        "1/config.json",
        "best/config.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"of the run")
    for name in ("arguments.yaml", "metrics.jsonl", "choice.json", "events.out.tfevents.1"):
        (folder / name).write_bytes(b"of the run")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"an export")
    push_folder(folder, "me/clip", token=TOKEN, commit_message="Smaller")
    repo = hub.repos["me/clip"]
    files = repo.commits[repo.branches["main"]]
    assert repo.messages == ["first", "Smaller"]
    assert files.keys() - {".gitattributes"} == {
        *("README.md", "config.json", "model.safetensors", "onnx/model.onnx"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert not [name for name, content in files.items() if str(folder.parent).encode() in content]
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 0.25


def test_a_second_push_makes_a_second_commit_and_the_first_stays(hub, folder, cache):
    first, before = push_folder(folder, "me/clip", token=TOKEN), CLIPModel.from_pretrained(folder)
    hub.requests.clear()
    after = changed(folder)
    second = push_folder(folder, "me/clip", token=TOKEN)
    assert first.oid != second.oid and len(hub.repos["me/clip"].commits) == 3
    assert len(sent(hub, "PUT", "/lfs/")) == 1  # the tokenizer has not changed
    assert ("POST", "/api/repos/create", 409, "me") in hub.requests
    assert_same(CLIPModel.from_pretrained("me/clip", cache_dir=cache), after)
    assert_same(CLIPModel.from_pretrained("me/clip", cache_dir=cache, revision=first.oid), before)


def test_a_folder_that_has_not_changed_makes_no_commit(hub, folder):
    first, second = (push_folder(folder, "me/clip", token=TOKEN) for _ in range(2))
    assert first.oid == second.oid and len(sent(hub, "POST", "/api/models/me/clip/commit")) == 1


def test_a_push_to_a_branch_leaves_main_alone(hub, folder, cache):
    push_folder(folder, "me/clip", token=TOKEN)
    after = changed(folder)
    for _ in range(2):  # the second finds the branch
        push_folder(folder, "me/clip", token=TOKEN, revision="v2")
    assert_same(CLIPModel.from_pretrained("me/clip", cache_dir=cache, revision="v2"), after)
    with pytest.raises(AssertionError):
        assert_same(CLIPModel.from_pretrained("me/clip", cache_dir=cache), after)


def test_a_pull_request_leaves_main_alone(hub, folder, cache):
    push_folder(folder, "me/clip", token=TOKEN)
    after = changed(folder)
    commit = push_folder(folder, "me/clip", token=TOKEN, create_pr=True)
    assert commit.pr_revision == "refs/pr/2"
    assert_same(CLIPModel.from_pretrained("me/clip", cache_dir=cache, revision="refs/pr/2"), after)
    assert hub.repos["me/clip"].branches["main"] != commit.oid


def test_a_map_goes_with_its_weights_or_not_at_all(hub, folder, cache):
    path = folder / "map" / "clipmap_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher": "openai/clip"}))
    push_folder(folder, "me/clip", token=TOKEN, include_map=True)
    assert "map/clipmap.safetensors" in hub.repos["me/clip"].commits[hub.repos["me/clip"].branches["main"]]
    changed(folder)
    push_folder(folder, "me/clip", token=TOKEN)
    files = hub.repos["me/clip"].commits[hub.repos["me/clip"].branches["main"]]
    assert "model.safetensors" in files and not [name for name in files if name.startswith("map/")]


def test_what_belongs_to_other_weights_goes_with_them(hub, folder):
    for name in ("onnx/model.onnx", ".eval_results/set.yaml", "model-00001-of-00002.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"of the first weights")
    push_folder(folder, "me/clip", token=TOKEN)
    changed(folder)
    for name in ("onnx/model.onnx", ".eval_results/set.yaml", "model-00001-of-00002.safetensors"):
        (folder / name).unlink(missing_ok=True)
    push_folder(folder, "me/clip", token=TOKEN)
    repo = hub.repos["me/clip"]
    assert {"onnx/model.onnx", ".eval_results/set.yaml"} <= repo.commits[list(repo.commits)[-2]].keys()
    files = repo.commits[repo.branches["main"]]
    assert not [name for name in files if name.startswith(("onnx", ".eval", "model-"))]
    assert {"model.safetensors", "tokenizer.json"} <= files.keys()


def test_a_student_for_labels_is_pushed_whole_and_goes_when_another_takes_its_place(hub, folder, compressor, cache):
    whole, processor = compressor.export(), compressor.processor
    listed, embeds = folder.with_name("listed"), torch.eye(32)[:2]
    write_label_folder(listed, vision_tower(whole), processor.image_processor, ["a", "b"], embeds, torch.tensor(7.0))
    ModelCard("---\nlicense: mit\n---\n").save(listed / "README.md")
    push_folder(listed, "me/clip", token=TOKEN)
    repo = hub.repos["me/clip"]
    names = {"config.json", "model.safetensors", "labels.json", "text_embeds.safetensors"}
    assert names <= repo.commits[repo.branches["main"]].keys()
    assert is_label_folder("me/clip", cache_dir=cache)
    model, processor = load_label_model("me/clip", cache_dir=cache)
    assert_same(model.vision, vision_tower(whole))
    torch.testing.assert_close(model.text_embeds, embeds, atol=0, rtol=0)
    assert processor.tokenizer.labels == ["a", "b"] and model.logit_scale.exp().item() == pytest.approx(7)
    push_folder(folder, "me/clip", token=TOKEN)
    assert not {"labels.json", "text_embeds.safetensors"} & repo.commits[repo.branches["main"]].keys()


def test_a_private_student_is_for_its_owner(hub, folder, cache):
    push_folder(folder, "me/clip", token=TOKEN, private=True)
    assert hub.repos["me/clip"].private
    with pytest.raises(OSError, match="me/clip"):
        load_model("me/clip", cache_dir=cache)
    assert_same(load_model("me/clip", cache_dir=cache, token=TOKEN), CLIPModel.from_pretrained(folder))


def test_the_recipe_puts_scores_on_sets_into_the_card_and_pushes(hub, folder, tmp_path, monkeypatch, capsys):
    weights = model_fingerprint(load_model(str(folder)))
    student, teacher = write_results(tmp_path / "s", weights, cars=0.25), write_results(tmp_path / "t", cars=0.5)
    options = ["--folder", folder, "--repo_id", "me/clip", "--results", student, "--teacher_results", teacher]
    monkeypatch.setattr(sys, "argv", ["push.py", *map(str, options)])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load_recipe("push").main()
    repo = hub.repos["me/clip"]
    assert repo.branches["main"] in capsys.readouterr().out
    card = ModelCard(repo.commits[repo.branches["main"]]["README.md"].decode())
    assert re.search(r"\| cars: accuracy@1 +\| +50\.0 \| +25\.0 \|", card.text)
    assert [one.dataset_type for one in card.data.eval_results] == ["pairs", "me/wds_cars"]


def test_the_recipe_shows_no_teacher_without_student():
    with pytest.raises(ValueError, match="give both"):
        load_recipe("push").PushArguments("student", "me/clip", teacher_results="t")


# What goes wrong in a push


def test_a_folder_that_is_no_students_is_not_pushed(hub, tmp_path):
    with pytest.raises(ValueError, match=r"\['config.json', 'model.safetensors', 'README.md'\] missing"):
        push_folder(tmp_path, "me/clip", token=TOKEN)
    assert not hub.requests


def test_a_map_that_is_not_there_cannot_be_pushed(hub, folder):
    shutil.rmtree(folder / "map")
    with pytest.raises(ValueError, match="holds no map/; leave the map out"):
        push_folder(folder, "me/clip", token=TOKEN, include_map=True)


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [("PUT /lfs/", "cut"), (COMMIT, "cut"), (COMMIT, 500), ("POST .*/preupload/", 503), ("POST .*/batch", "cut")],
)
def test_a_push_that_was_interrupted_goes_on(hub, folder, cache, pattern, kind):
    before = contents(folder)
    fault = Fault(pattern, kind, times=1000)
    hub.faults.append(fault)
    with pytest.raises(OSError, match=r"(?s)push to 'me/clip' did not finish.*Push again with the same") as caught:
        push_folder(folder, "me/clip", token=TOKEN)
    assert TOKEN not in str(caught.value)
    assert contents(folder) == before and hub.repos["me/clip"].messages == ["first"]
    fault.times, stored = 0, len(hub.objects)
    hub.requests.clear()
    push_folder(folder, "me/clip", token=TOKEN)
    assert len(sent(hub, "PUT", "/lfs/")) == 2 - stored  # what had arrived is not sent twice
    assert_same(CLIPModel.from_pretrained("me/clip", cache_dir=cache), CLIPModel.from_pretrained(folder))


def test_a_compressor_whose_push_was_interrupted_pushes_again(hub, compressor, cache):
    hub.faults.append(Fault("POST /api/repos/create", "cut"))
    with pytest.raises(OSError, match="Push again with the same arguments"):
        compressor.push_to_hub("me/clip", token=TOKEN)
    compressor.push_to_hub("me/clip", token=TOKEN)
    assert_same(CLIPModel.from_pretrained("me/clip", cache_dir=cache), compressor.export())


@pytest.mark.parametrize("pattern", ["PUT /lfs/", "POST .*/preupload/", "POST .*/batch"])
def test_a_hub_that_is_busy_for_a_moment_is_asked_again(hub, folder, pattern):
    hub.faults.append(Fault(pattern, 503, times=2))
    push_folder(folder, "me/clip", token=TOKEN)
    assert len([one for one in hub.requests if one[2] == 503]) == 2
    assert hub.repos["me/clip"].messages == ["first", "Upload compressed CLIP"]


@pytest.mark.parametrize(("token", "status"), [(False, 401), (OTHER_TOKEN, 403)])
def test_a_push_without_the_right_says_how_to_get_it(hub, folder, token, status):
    with pytest.raises(OSError, match=r"(?s)hf auth login.*token that may write to 'me/clip'") as caught:
        push_folder(folder, "me/clip", token=token)
    assert ("POST", "/api/repos/create", status) in [request[:3] for request in hub.requests]
    assert OTHER_TOKEN not in str(caught.value) and not hub.repos


# Downloads


@pytest.fixture
def pushed(hub, folder) -> HubServer:
    push_folder(folder, "me/clip", token=TOKEN)
    hub.requests.clear()
    return hub


def test_a_download_that_is_cut_goes_on_where_it_was(pushed, folder, cache):
    pushed.faults.append(Fault("GET /cdn/", "cut", times=2))
    assert_same(load_model("me/clip", cache_dir=cache), CLIPModel.from_pretrained(folder))
    assert [status for _, _, status, _ in sent(pushed, "GET", "/cdn/")] == ["cut", "cut", 206]


def test_a_slow_download_arrives(pushed, folder, cache):
    pushed.faults.append(Fault("GET /cdn/", "slow", times=2))
    assert_same(load_model("me/clip", cache_dir=cache), CLIPModel.from_pretrained(folder))


def test_what_was_downloaded_is_read_while_the_hub_is_down(pushed, folder, cache):
    load_model("me/clip", cache_dir=cache)
    pushed.faults.append(Fault("", 500, times=1000))
    assert_same(load_model("me/clip", cache_dir=cache), CLIPModel.from_pretrained(folder))


@pytest.mark.parametrize("kind", [500, "cut"])
def test_a_hub_that_is_down_is_an_error_and_no_random_model(pushed, cache, kind):
    pushed.faults.append(Fault("", kind, times=1000))
    with pytest.raises(OSError, match="couldn't connect|Can't load"):
        load_model("me/clip", cache_dir=cache)


@pytest.mark.parametrize(("kind", "says"), [(500, "500"), ("cut", "without sending complete message")])
def test_weights_that_never_arrive_are_an_error(pushed, cache, kind, says):
    pushed.faults.append(Fault("GET /cdn/", kind, times=1000))
    with pytest.raises(OSError, match=f"(?s)me/clip.*{says}"):
        load_model("me/clip", cache_dir=cache)


def test_no_token_reaches_the_storage(hub, folder, cache):
    push_folder(folder, "me/clip", token=TOKEN, private=True)
    load_model("me/clip", cache_dir=cache, token=TOKEN)
    users = {path.split("/")[1]: set() for _, path, _, _ in hub.requests}
    for _, path, _, user in hub.requests:
        users[path.split("/")[1]].add(user)
    assert users["lfs"] == users["cdn"] == {None} and users["api"] == {"me"}


def test_a_repository_or_revision_that_is_not_there_is_named(pushed, cache):
    with pytest.raises(OSError, match="me/nothing"):
        load_model("me/nothing", cache_dir=cache)
    with pytest.raises(OSError, match="v9"):
        load_model("me/clip", revision="v9", cache_dir=cache)


def test_a_teacher_on_the_hub_becomes_the_base_model(pushed, cache, tmp_path):
    config = dataclasses.replace(STUDENT, vision=TowerConfig(num_hidden_layers=2), text=TowerConfig())
    compressor = ClipMapCompressor.from_pretrained("me/clip", student=config, cache_dir=cache)
    compressor.save_pretrained(tmp_path / "smaller")
    data = ModelCard.load(tmp_path / "smaller" / "README.md").data
    assert (data.base_model, data.base_model_relation, data.license) == ("me/clip", "finetune", "unknown")


# In processes of their own, which know the Hub only by HF_ENDPOINT


def run(script: list[str], server: HubServer, home: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python with an empty cache in `home`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        **{"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)},
        **environment,
    }
    command = [sys.executable, *script]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)


LOUD = """
import logging, runpy, sys
logging.basicConfig(level=logging.DEBUG)
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as model_logging
hub_logging.set_verbosity_debug(), model_logging.set_verbosity_debug()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DOWNLOAD = """
import sys
from transformers import CLIPModel
CLIPModel.from_pretrained("me/clip").save_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_plain_processes_push_and_download_and_the_token_stays_secret(folder, tmp_path):
    loud, script = tmp_path / "loud.py", tmp_path / "download.py"
    loud.write_text(LOUD), script.write_text(DOWNLOAD)
    secret = {"HF_TOKEN": TOKEN, "HF_DEBUG": "1", "TRANSFORMERS_VERBOSITY": "debug"}
    push = [str(loud), "recipes/push.py", "--folder", str(folder), "--repo_id", "me/clip", "--private", "true"]
    with running_hub() as server:
        server.faults.append(Fault(COMMIT, 500))
        failed = run(push, server, tmp_path / "home", **secret)
        pushed = run(push, server, tmp_path / "home", **secret)
        loaded = run([str(loud), str(script), str(tmp_path / "copy")], server, tmp_path / "other", **secret)
        foreign = run([str(script), str(tmp_path / "none")], server, tmp_path / "third")
    assert failed.returncode and "Push again with the same arguments" in failed.stderr
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"{server.url}/me/clip/commit/{server.repos['me/clip'].branches['main']}"
    assert loaded.returncode == 0, loaded.stderr
    assert foreign.returncode and "RepositoryNotFoundError" in foreign.stderr
    assert_same(CLIPModel.from_pretrained(tmp_path / "copy"), CLIPModel.from_pretrained(folder))
    assert "send_request_headers" in pushed.stderr and "curl" in pushed.stderr  # the logs were as loud as they can be
    said = [failed.stdout, failed.stderr, pushed.stdout, pushed.stderr, loaded.stdout, loaded.stderr]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in said if TOKEN in text] and not [one for one in written if TOKEN.encode() in one]
    print(*(f"{method:4} {status} {path}" for method, path, status, _ in server.requests), sep="\n")


@pytest.mark.slow
def test_hostile_repositories_are_refused_in_bounded_memory_and_time(teacher_folder, tmp_path):
    with running_hub() as server:
        server.add("evil/good", contents(teacher_folder))
        for number, (spoil, _) in enumerate(HOSTILE.values()):
            spoilt = Path(shutil.copytree(teacher_folder, tmp_path / str(number) / "repo"))
            spoil(spoilt)
            server.add(f"evil/{number}", contents(spoilt))
        names = {f"evil/{number}": name for number, name in enumerate(HOSTILE)}
        result = run([str(ROOT / "tests" / "hostile_repos.py"), "evil/good", *names], server, tmp_path / "home")
    assert result.returncode == 0, result.stderr
    said = {names[one["source"]]: one for one in map(json.loads, result.stdout.splitlines())}
    assert said.keys() == HOSTILE.keys()
    assert not {name: one for name, one in said.items() if not re.search(f"(?s){HOSTILE[name][1]}", one["error"])}
    assert max(one["grown_kb"] for one in said.values()) < 100_000
    assert not [path for _, path, _, _ in server.requests if ".." in path]
