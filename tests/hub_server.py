"""A local HTTP server that speaks the part of the Hub's API that huggingface_hub's own client uses here.

Repositories live in memory: every commit is a dict of path -> bytes. Files of LFS_SIZE bytes or more are "large":
listed with their sha256 and redirected when downloaded, as the Hub does. What can go wrong is switched on per path.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

LFS_SIZE = 2000
TOKEN = "hf_" + "t" * 34  # put together here so that no file of the project looks like it holds a token


@dataclass
class Repo:
    """One repository: its commits by hash, the newest last."""

    kind: str = "model"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    settings: dict = field(default_factory=dict)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, changes: dict[str, bytes], message: str = "commit") -> str:
        """Adds a commit with these files changed; returns its hash."""
        files = {**(self.files if self.commits else {}), **changes}
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        return sha


@dataclass
class Request:
    """sent: bytes of the answer."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0


class HubServer(ThreadingHTTPServer):
    """The server. Switches: `cut` (path's end -> bytes after which each of the next answers breaks off, in turn),
    `status` (part of a path -> answers to give in turn, each (status, headers)), `corrupt` (paths' ends whose bytes are
    flipped), `ranges` (whether Range is honoured), `who` (what whoami answers).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.cut: dict[str, list[int]] = defaultdict(list)
        self.status: dict[str, list[tuple[int, dict[str, str]]]] = defaultdict(list)
        self.corrupt: set[str] = set()
        self.ranges = True
        self.who = {"name": "somebody", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        """A client may hang up; whatever else goes wrong is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def repo(self, name: str, files: dict[str, bytes], kind: str = "model") -> Repo:
        """Makes a repository with one commit."""
        repo = self.repos[name] = Repo(kind)
        repo.commit(files)
        return repo

    def asked(self, end: str, method: str = "GET") -> list[Request]:
        """The requests so far whose path ends like this."""
        return [request for request in self.requests if request.method == method and request.path.endswith(end)]

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


def connect(server: HubServer, monkeypatch, home: Path) -> None:
    """Points huggingface_hub at the server, without a token, and at `home` for all that it keeps on the disk."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SPACE_ID", "INFWORLD_REVISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage speaks another protocol
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    """One line of a listing, in both spellings that the API uses."""
    sha256 = hashlib.sha256(content).hexdigest()
    large = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 134}
    oid = git_blob(content)
    known = {"rfilename": path, "path": path, "type": "file", "size": len(content), "blobId": oid, "oid": oid}
    return {**known, "lfs": large} if len(content) >= LFS_SIZE else known


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        self.route = unquote(urlsplit(self.path).path)
        # Written down before it is answered: who asks may look at the list as soon as the answer is there.
        token = self.headers.get("Authorization")
        self.request_made = Request(self.command, self.route, self.headers.get("Range"), token)
        self.server.requests.append(self.request_made)
        with self.server.lock:
            planned = next((a for part, a in self.server.status.items() if part in self.route and a), None)
            answer = planned.pop(0) if planned else None
        if answer:
            status, headers = answer
            self._answer(status, b'{"error": "as switched on"}', headers)
        else:
            self._dispatch()

    def _dispatch(self) -> None:
        routes = {
            r"/api/whoami-v2": self._whoami,
            r"/api/validate-yaml": lambda: self._json({"errors": [], "warnings": []}),
            r"/api/repos/create": self._create,
            r"/api/(?:models|spaces|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?": self._info,
            r"/api/(?:models|spaces|datasets)/([^/]+/[^/]+)/tree/([^/]+)": self._tree,
            r"/api/(?:models|spaces|datasets)/([^/]+/[^/]+)/preupload/main": self._preupload,
            r"/api/(?:models|spaces|datasets)/([^/]+/[^/]+)/commit/main": self._commit,
            r"/api/spaces/([^/]+/[^/]+)/hardware": self._hardware,
            r"/(?:spaces/|datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._lfs_batch,
            r"/lfs/([0-9a-f]{64})": self._lfs_object,
            r"/(?:spaces/|datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._resolve,
            r"/cdn/([0-9a-f]{64})/(.+)": self._cdn,
        }
        for pattern, answer in routes.items():
            if match := re.fullmatch(pattern, self.route):
                return answer(*match.groups())
        return self._answer(404, b"no such route")

    # Reading

    def _known(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        return repo

    def _at(self, repo: Repo, revision: str | None) -> str | None:
        commit = repo.head if revision in (None, "main") else revision
        if commit not in repo.commits:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return None
        return commit

    def _info(self, name: str, revision: str | None) -> None:
        if (repo := self._known(name)) and (commit := self._at(repo, revision)):
            siblings = [entry(path, content) for path, content in repo.commits[commit].items()]
            self._json({"id": name, "sha": commit, "private": False, "tags": [], "downloads": 0, "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        if (repo := self._known(name)) and (commit := self._at(repo, revision)):
            self._json([entry(path, content) for path, content in repo.commits[commit].items()])

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if not (repo := self._known(name)) or not (commit := self._at(repo, revision)):
            return
        content = repo.commits[commit].get(path)
        if content is None:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif len(content) < LFS_SIZE:
            self._content(path, content, {"ETag": f'"{git_blob(content)}"', "X-Repo-Commit": commit})
        else:
            sha256 = hashlib.sha256(content).hexdigest()
            self.server.lfs[sha256] = content
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": commit}
            storage = f"http://localhost:{self.server.server_port}"  # another host by its name, as the Hub's storage is
            self._answer(302, b"", {"Location": f"{storage}/cdn/{sha256}/{path}", **linked})

    def _cdn(self, sha256: str, path: str) -> None:
        self._content(path, self.server.lfs[sha256], {"ETag": f'"{sha256}"'})

    def _content(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        if any(path.endswith(end) for end in self.server.corrupt):
            content = bytes([content[0] ^ 1]) + content[1:]
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            start, size = int(asked.group(1)), len(content)
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}
            content = content[start:]
        cuts = next((cuts for end, cuts in self.server.cut.items() if path.endswith(end) and cuts), None)
        self._answer(status, content, headers, cuts.pop(0) if cuts else None)

    # Writing

    def _whoami(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, b'{"error": "Invalid credentials in Authorization header"}')
        else:
            self._json(self.server.who)

    def _create(self) -> None:
        wish = json.loads(self.body)
        name = f"{wish.get('organization') or self.server.who['name']}/{wish['name']}"
        kind = wish.get("type", "model")
        url = f"{self.server.url}/{'' if kind == 'model' else f'{kind}s/'}{name}"
        if name in self.server.repos:
            return self._answer(409, json.dumps({"error": "You already created this repo", "url": url}).encode())
        self.server.repo(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, kind).settings = wish
        return self._json({"url": url, "name": name, "id": "1"})

    def _hardware(self, name: str) -> None:
        self.server.repos[name].settings["hardware"] = json.loads(self.body)["flavor"]
        self._json({"stage": "BUILDING", "hardware": {"current": None, "requested": "any"}, "gcTimeout": None})

    def _preupload(self, name: str) -> None:
        if not (repo := self._known(name)):
            return
        wish = json.loads(self.body)
        rules = wish.get("gitIgnore", repo.files.get(".gitignore", b"").decode()).split()
        answers = []
        for file in wish["files"]:
            path, size = file["path"], file["size"]
            known = repo.files.get(path)
            large = size >= LFS_SIZE
            oid = None if known is None else hashlib.sha256(known).hexdigest() if large else git_blob(known)
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored(path, rules), "oid": oid})
        self._json({"files": answers})

    def _lfs_batch(self, name: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            known = wanted["oid"] in self.server.lfs
            actions = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(wanted if known else {**wanted, "actions": actions})
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_object(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.lfs[oid] = self.body
        self._answer(200, b"")

    def _commit(self, name: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        changes = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.server.lfs[value["oid"]]
        with self.server.lock:
            sha = self.server.repos[name].commit(changes, lines[0]["value"]["summary"])
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    # Answering

    def _json(self, data: object) -> None:
        self._answer(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body if cut is None else body[:cut]
        self.request_made.sent = len(body)
        self.wfile.write(body)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def ignored(path: str, rules: list[str]) -> bool:
    """The rules of .gitignore that the project uses: the last one that fits decides."""
    verdict = False
    for rule in rules:
        if not rule.startswith("#") and _fits(path, rule.removeprefix("!")):
            verdict = not rule.startswith("!")
    return verdict


def _fits(path: str, rule: str) -> bool:
    name, anchored = rule.strip("/"), rule.startswith("/")
    parts = path.split("/")
    ends = range(1, len(parts) + 1)
    whole = (("/".join(parts[:end]), fnmatch.fnmatch("/".join(parts[:end]), name)) for end in ends)
    if anchored:
        return any(fits and text.count("/") == name.count("/") for text, fits in whole)
    return any(fnmatch.fnmatch(part, name) for part in parts)
