"""A Hub on this machine, in memory, with faults on demand; its endpoints stand in hub_endpoints.py."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from threading import Lock, Thread

from hub_endpoints import Handler


@dataclass
class Repo:
    """Branches are names of commits; a commit is a mapping of paths to contents."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{message}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What happens instead to the next `times` requests that match `"METHOD /path"`: a status, `cut` or `slow`."""

    pattern: str
    kind: int | str
    times: int = 1


class HubServer(ThreadingHTTPServer):
    """Listens on a free port; `requests` holds `(method, path, status, user)` of all that came."""

    daemon_threads = True

    def __init__(self, part_size: int | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.part_size = part_size  # uploads go in parts of this size
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int | str, str | None]] = []
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """Where large files lie: another host name, as on the Hub, to which no token may be sent."""
        return f"http://localhost:{self.server_port}"

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repository with one commit, pushed by nobody."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", files, "first")
        return repo

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request, client_address) -> None:
        """Connections that a test cuts are no news."""


@contextmanager
def running_hub(part_size: int | None = None) -> Iterator[HubServer]:
    """A Hub that listens until the block ends."""
    with HubServer(part_size) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
