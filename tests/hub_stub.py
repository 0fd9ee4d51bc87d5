"""A stand-in for the Hub's HTTP API, in memory: enough to create, push, list, branch and download model repositories.

`python tests/hub_stub.py --port 0` prints its address as one line and serves until it is killed. Files always travel
in the commit itself (`uploadMode: regular`), so neither LFS nor xet is needed. Writing asks for a bearer token, as the
Hub does. Every commit keeps all its files, so any `revision` can be downloaded.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

CREATED = "2024-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Commit:
    """One state of a repository: all its files, by path."""

    title: str
    files: dict[str, bytes]
    parents: tuple[Commit, ...] = ()

    @property
    def sha(self) -> str:
        digest = hashlib.sha1(self.title.encode())
        for part in [*(p.sha for p in self.parents), *(f"{k} {git_oid(v)}" for k, v in sorted(self.files.items()))]:
            digest.update(part.encode())
        return digest.hexdigest()

    def history(self) -> list[Commit]:
        """This commit and those before it, newest first."""
        return [self, *(older for parent in self.parents for older in parent.history())]


@dataclass
class Repository:
    """A model repository: the last commit of each branch."""

    name: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit a branch points to, or the one with that sha on any branch."""
        if revision in self.branches:
            return self.branches[revision]
        commits = (commit for head in self.branches.values() for commit in head.history())
        return next((commit for commit in commits if commit.sha == revision), None)


class Failure(Exception):
    """An answer other than 200: status, the value of X-Error-Code, message."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


def git_oid(content: bytes) -> str:
    """The name git gives a file's content; the client compares it with its own to leave out unchanged files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server and its state: repositories by name."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.repositories: dict[str, Repository] = {}
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Failure(404, "RepoNotFound", f"no repository {name}")
        return self.repositories[name]

    def commit(self, name: str, revision: str) -> Commit:
        commit = self.repository(name).find(revision)
        if commit is None:
            raise Failure(404, "RevisionNotFound", f"no revision {revision} in {name}")
        return commit


# Each handler takes the server, the groups of its pattern and the body, and returns what is sent back as JSON.


def create(hub: Hub, body: bytes) -> Any:
    wanted = json.loads(body)
    name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
    url = {"url": f"{hub.url}/{name}"}
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))  # new and older clients
    with hub.lock:
        if name in hub.repositories:
            raise Failure(409, "", json.dumps({"error": f"{name} already exists", **url}))
        start = Commit("initial commit", {".gitattributes": b""})
        hub.repositories[name] = Repository(name, private, {"main": start})
    return url


def validate_yaml(hub: Hub, body: bytes) -> Any:
    front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
    try:
        data = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError as error:
        raise Failure(400, "", json.dumps({"errors": [{"message": str(error)}]})) from error
    warning = [] if isinstance(data, dict) else [{"message": "empty or missing yaml metadata in repo card"}]
    return {"errors": [], "warnings": warning}


def preupload(hub: Hub, body: bytes, name: str, revision: str) -> Any:
    known = hub.commit(name, revision).files
    files = [entry["path"] for entry in json.loads(body)["files"]]
    oids = {path: git_oid(known[path]) if path in known else None for path in files}
    return {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": oids[p]} for p in files]}


def commit(hub: Hub, body: bytes, name: str, revision: str) -> Any:
    lines = [json.loads(line) for line in body.splitlines() if line]
    with hub.lock:
        head = hub.commit(name, revision)
        files, title = dict(head.files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Failure(400, "", f"this stub takes no {line['key']}")
        new = Commit(title, files, (head,))
        hub.repository(name).branches[revision] = new
    return {"success": True, "commitOid": new.sha, "commitUrl": f"{hub.url}/{name}/commit/{new.sha}", "hookOutput": ""}


def branch(hub: Hub, body: bytes, name: str, revision: str) -> Any:
    with hub.lock:
        branches = hub.repository(name).branches
        if revision in branches:
            raise Failure(409, "", f"branch {revision} already exists")
        branches[revision] = hub.commit(name, json.loads(body or b"{}").get("startingPoint", "main"))
    return {}


def model_info(hub: Hub, body: bytes, name: str, revision: str = "main") -> Any:
    found, repository = hub.commit(name, revision), hub.repository(name)
    siblings = [{"rfilename": path} for path in sorted(found.files)]
    return {
        "id": name,
        "modelId": name,
        "sha": found.sha,
        "private": repository.private,
        "siblings": siblings,
        "tags": [],
    }


def tree(hub: Hub, body: bytes, name: str, revision: str, folder: str = "") -> Any:
    files = hub.commit(name, revision).files
    inside = {path: data for path, data in files.items() if not folder or path.startswith(f"{folder}/")}
    if folder and not inside:
        raise Failure(404, "EntryNotFound", f"no folder {folder} in {name}")
    return [{"type": "file", "path": p, "size": len(d), "oid": git_oid(d)} for p, d in sorted(inside.items())]


def history(hub: Hub, body: bytes, name: str, revision: str) -> Any:
    about = {"message": "", "date": CREATED, "authors": []}
    return [{"id": commit.sha, "title": commit.title, **about} for commit in hub.commit(name, revision).history()]


REPO = r"/api/models/([^/]+/[^/]+)"
ROUTES: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "POST": [
        ("/api/repos/create", create),
        ("/api/validate-yaml", validate_yaml),
        (REPO + "/preupload/([^/]+)", preupload),
        (REPO + "/commit/([^/]+)", commit),
        (REPO + "/branch/([^/]+)", branch),
    ],
    "GET": [
        (REPO, model_info),
        (REPO + "/revision/([^/]+)", model_info),
        (REPO + "/tree/([^/]+)", tree),
        (REPO + "/tree/([^/]+)/(.+)", tree),
        (REPO + "/commits/([^/]+)", history),
    ],
}
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Handler(BaseHTTPRequestHandler):
    """Finds the route, sends JSON, a file, or a failure with the headers the client reads."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        else:
            self._route("POST", body)

    def do_GET(self) -> None:
        self._route("GET", b"")

    def do_HEAD(self) -> None:
        self._route("GET", b"")

    def _route(self, method: str, body: bytes) -> None:
        path = urlsplit(self.path).path
        try:
            if method == "GET" and (match := FILE.fullmatch(path)):
                return self._file(*map(unquote, match.groups()))
            for pattern, handle in ROUTES[method]:
                if match := re.fullmatch(pattern, path):
                    answer = json.dumps(handle(self.server, body, *map(unquote, match.groups()))).encode()
                    return self._send(200, answer, {"Content-Type": "application/json"})
            raise Failure(404, "", f"this stub knows no {method} {path}")
        except Failure as failure:
            text = str(failure)
            headers = {"X-Error-Code": failure.code} if failure.code else {}
            self._send(failure.status, text.encode(), {**headers, "X-Error-Message": text.splitlines()[0]})

    def _file(self, name: str, revision: str, path: str) -> None:
        commit = self.server.commit(name, revision)
        if path not in commit.files:
            raise Failure(404, "EntryNotFound", f"no file {path} in {name} at {revision}")
        content = commit.files[path]
        self._send(200, content, {"X-Repo-Commit": commit.sha, "ETag": f'"{git_oid(content)}"'})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the only line this program prints is its address."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes any free port")
    hub = Hub(parser.parse_args().port)
    print(hub.url, flush=True)
    hub.serve_forever()


if __name__ == "__main__":
    main()
