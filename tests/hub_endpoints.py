"""What the Hub in hub_server.py answers: the endpoints that huggingface_hub calls."""

import base64
import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml


TOKEN, OTHER_TOKEN = "hf_aTokenThatMayWrite", "hf_aTokenOfSomeoneElse"
USERS = {TOKEN: "me", OTHER_TOKEN: "someone"}
LARGE = 4096  # bytes from which a file goes through LFS, as *.safetensors always does


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_request(self) -> None:
        self.path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        self.fault = self.server.fault(f"{self.command} {self.path}")
        self.user = USERS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if self.fault is not None and self.fault.kind == "cut" and self.command in ("PUT", "POST"):
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self.hang_up()
        body = self.body()
        if self.fault is not None and isinstance(self.fault.kind, int):
            return self.reply(self.fault.kind, {"error": "asked for by a test"})
        for pattern, methods, answer in ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, self.path)):
                return answer(self, body, *(unquote(group or "") for group in match.groups()))
        return self.reply(404, {"error": f"no such endpoint: {self.command} {self.path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_request

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def note(self, status: int | str) -> None:
        """Before the answer, so that whoever has read it finds the request noted."""
        self.server.requests.append((self.command, self.path, status, self.user))

    def hang_up(self) -> None:
        self.note("cut")
        self.close_connection = True

    def reply(self, status: int, content: Any = b"", **headers: Any) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        kind = self.fault.kind if self.fault is not None and self.command != "HEAD" else None
        if kind == "cut":
            self.hang_up()
        else:
            self.note(status)
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = content[: len(content) // 2] if kind == "cut" else content
        pieces = 8 if kind == "slow" else 1
        for start in range(0, len(sent), size := max(1, -(-len(sent) // pieces))):
            self.wfile.write(sent[start : start + size])
            self.wfile.flush()
            time.sleep(0.02 if kind == "slow" else 0)

    def missing(self, what: str) -> None:
        """404, and 401 for who is not logged in and asks for a repository, as the Hub answers."""
        hidden = what == "Repo" and self.user is None
        self.reply(401 if hidden else 404, {"error": f"{what} not found"}, X_Error_Code=f"{what}NotFound")

    def readable(self, repo_id: str, revision: str = "main") -> tuple[Any, str] | None:
        """The repository and the commit, or `None` after an answer that says why not."""
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo_id.split("/")[0]):
            return self.missing("Repo")
        if (commit := repo.find(revision)) is None:
            return self.missing("Revision")
        return repo, commit

    def writable(self, repo_id: str) -> Any:
        if self.user is None:
            return self.reply(401, {"error": "Invalid username or password."})
        if self.user != repo_id.split("/")[0]:
            return self.reply(403, {"error": "no right to write"}, X_Error_Message=f"{repo_id} is not yours")
        repo = self.server.repos.get(repo_id)
        return self.missing("Repo") if repo is None else repo

    # Repositories

    def create(self, body: bytes) -> None:
        content = json.loads(body)
        repo_id = f"{content['organization'] or self.user}/{content['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if self.user is None or self.user != repo_id.split("/")[0]:
            return self.reply(403 if self.user else 401, {"error": "no right to create"})
        if repo_id in self.server.repos:
            return self.reply(409, answer)
        self.server.add(repo_id, {".gitattributes": b""}, content.get("visibility") == "private")
        return self.reply(200, answer)

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        if (repo := self.writable(repo_id)) is None:
            return None
        if name in repo.branches:
            return self.reply(409, {"error": "exists"})
        repo.branches[name] = repo.branches["main"]
        return self.reply(200, {})

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        if (found := self.readable(repo_id, revision)) is None:
            return None
        repo, commit = found
        siblings = [{"rfilename": name} for name in repo.commits[commit]]
        return self.reply(200, {"id": repo_id, "sha": commit, "siblings": siblings, "private": repo.private})

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str) -> None:
        if (found := self.readable(repo_id, revision)) is None:
            return None
        repo, commit = found
        files = {n: c for n, c in repo.commits[commit].items() if f"/{n}".startswith(folder)}
        if not files:
            return self.missing("Entry")
        entries = [{"type": "file", "path": n, "size": len(c), "oid": git_oid(n, c)} for n, c in files.items()]
        return self.reply(200, entries)

    def validate(self, body: bytes) -> None:
        head = json.loads(body)["content"].split("---\n")[1]
        errors = [] if isinstance(yaml.safe_load(head), dict) else [{"message": "no metadata"}]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    # Uploads

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if (repo := self.writable(repo_id)) is None:
            return None
        if (commit := repo.find(revision)) is None:
            return self.missing("Revision")
        answers = []
        for file in json.loads(body)["files"]:
            there = repo.commits[commit].get(file["path"])
            oid = None if there is None else git_oid(file["path"], there)
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.reply(200, {"files": answers})

    def batch(self, body: bytes, repo_id: str) -> None:
        if self.writable(repo_id) is None:
            return None
        objects = []
        for one in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.storage}/lfs/{one['oid']}?X-Signature=secret"}
            if (size := self.server.part_size) is not None:
                urls = {f"{part + 1:05d}": f"{upload['href']}&part={part}" for part in range(-(-one["size"] // size))}
                upload["header"] = {"chunk_size": str(size), **urls}
            actions = {} if one["oid"] in self.server.objects else {"actions": {"upload": upload}}
            objects.append({**one, **actions})
        return self.reply(200, {"objects": objects, "transfer": "multipart" if self.server.part_size else "basic"})

    def store(self, body: bytes, oid: str) -> None:
        parts = self.server.parts.setdefault(oid, {})
        if self.command == "PUT" and "part" in self.query:
            parts[int(self.query["part"][0])] = body
            return self.reply(200, ETag=hashlib.md5(body).hexdigest())
        content = body if self.command == "PUT" else b"".join(parts[part] for part in sorted(parts))
        if hashlib.sha256(content).hexdigest() != oid:
            return self.reply(400, {"error": "not the bytes that were announced"})
        self.server.objects[oid] = content
        return self.reply(200)

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        if (repo := self.writable(repo_id)) is None:
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repo.commits[repo.find(revision)])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        is_pr = "create_pr" in self.query
        branch = f"refs/pr/{len(repo.commits)}" if is_pr else revision
        sha = repo.commit(branch, files, lines[0]["value"]["summary"])
        pull = {"pullRequestUrl": f"{self.server.url}/{repo_id}/discussions/{branch[8:]}"} if is_pr else {}
        return self.reply(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha, **pull})

    # Downloads

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        if (found := self.readable(repo_id, revision)) is None:
            return None
        repo, commit = found
        content = repo.commits[commit].get(path)
        if content is None:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{git_oid(path, content)}"'}
        if not is_large(path, len(content)):
            return self.reply(200, content, **headers)
        oid = hashlib.sha256(content).hexdigest()
        self.server.objects[oid] = content
        linked = {"X_Linked_ETag": f'"{oid}"', "X_Linked_Size": len(content)}
        return self.reply(302, Location=f"{self.server.storage}/cdn/{oid}", **headers, **linked)

    def download(self, body: bytes, oid: str) -> None:
        content = self.server.objects[oid]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.reply(200, content)
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        return self.reply(206, content[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(content)}")


def is_large(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size >= LARGE


def git_oid(path: str, content: bytes) -> str:
    """What the client compares its own files with."""
    if is_large(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ID = "([^/]+/[^/]+)"
ROUTES = (
    ("/api/repos/create", ("POST",), Handler.create),
    ("/api/validate-yaml", ("POST",), Handler.validate),
    (f"/api/models/{_ID}/branch/(.+)", ("POST",), Handler.branch),
    (f"/api/models/{_ID}/preupload/(.+)", ("POST",), Handler.preupload),
    (f"/api/models/{_ID}/commit/(.+)", ("POST",), Handler.commit),
    (f"/api/models/{_ID}/tree/([^/]+)(/.+)?", ("GET",), Handler.tree),
    (f"/api/models/{_ID}", ("GET",), Handler.info),
    (f"/api/models/{_ID}/revision/(.+)", ("GET",), Handler.info),
    (f"/{_ID}.git/info/lfs/objects/batch", ("POST",), Handler.batch),
    ("/lfs/([0-9a-f]+)", ("PUT", "POST"), Handler.store),
    (f"/{_ID}/resolve/([^/]+)/(.+)", ("GET", "HEAD"), Handler.resolve),
    ("/cdn/([0-9a-f]+)", ("GET", "HEAD"), Handler.download),
)
