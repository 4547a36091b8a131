"""A Hub of a few routes on 127.0.0.1, so that tests use the real client and no network.

with LocalHub() as server:
    server.connect(monkeypatch)  # this process, or others that are started with `server.environment(folder)`
    model.push_to_hub("someone/tiny")
assert server.repositories["someone/tiny"] and server.unknown == []
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants, hf_api


CREDENTIALS = {"HF_TOKEN": "hf_of_the_test", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class LocalHub(ThreadingHTTPServer):
    """Repositories of models in memory: the routes of the Hub that pushing and pulling use, served inside `with`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.unknown: list[str] = []  # requests that no route answered
        # What the Hub tells of the token, `None` for one that it does not know; and what that may not write to.
        self.user: dict | None = {"name": "someone", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        self.protected: set[str] = set()
        self.private: set[str] = set()  # repositories that only the user's own token opens
        self.branches: dict[str, set[str]] = {}  # of a repository, besides main
        self.damaged: dict[str, bytes] = {}  # file -> what is sent instead of it
        self.cut: set[str] = set()  # files of which half is sent
        self.messages: list[str] = []  # of commits
        self.sent: list[str] = []  # files that were asked for with their content

    def __enter__(self) -> "LocalHub":
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables for a new process: its Hub is this one, and its cache lies in `folder`, not in the user's home."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_CACHE": str(folder / "hf" / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        } | CREDENTIALS

    def connect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this one the Hub of the running process, whose client has read its variables long ago."""
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)  # whose methods are functions of huggingface_hub
        close_session()  # an open one would keep its proxies

    def commit_id(self, repo: str) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.repositories[repo].items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes | dict | list, status: int = 200, num_cut: int = 0, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) - num_cut])
            if num_cut:
                self.wfile.flush()
                self.connection.close()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, repositories = unquote(urlsplit(self.path).path), self.server.repositories
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request['organization']}/{request['name']}"
            status = 409 if repo in repositories else 200
            repositories.setdefault(repo, {})
            self.server.private |= {repo} if request.get("private", request.get("visibility") == "private") else set()
            self.answer({"url": f"{self.server.url}/{repo}"}, status)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/branch/" in path:
            repo, branch = path.removeprefix("/api/models/").split("/branch/")
            self.server.branches.setdefault(repo, set()).add(branch)
            self.answer({})
        elif "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").split("/commit/")[0]
            for operation in map(json.loads, body.splitlines()):
                if operation["key"] == "header":
                    self.server.messages.append(operation["value"]["summary"])
                if operation["key"] == "file":
                    value = operation["value"]
                    repositories[repo][value["path"]] = base64.b64decode(value["content"])
                if operation["key"] == "deletedFile":
                    del repositories[repo][operation["value"]["path"]]
            commit = self.server.commit_id(repo)
            url = f"{self.server.url}/{repo}/commit/{commit}"
            request = f"{self.server.url}/{repo}/discussions/1" if "create_pr=1" in self.path else None
            self.answer({"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": request})
        else:
            self.not_found(path)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # which the client asks for once a day, and can do without
            self.answer(b"", 404)
            return
        if path == "/api/whoami-v2":
            self.answer(self.server.user or {}, 401 if self.server.user is None else 200)
            return
        for repo, files in self.server.repositories.items():
            if path == f"/api/models/{repo}/auth-check/write":
                self.answer({}, 403 if repo in self.server.protected else 200)
                return
            commit = self.server.commit_id(repo)
            is_mine = path.startswith((f"/api/models/{repo}/", f"/{repo}/resolve/")) or path == f"/api/models/{repo}"
            if is_mine and self.server.user is None:
                self.answer(b"", 401, X_Error_Message="Invalid credentials in Authorization header")
                return
            if is_mine and repo in self.server.private and "Authorization" not in self.headers:
                self.answer(b"", 401, X_Error_Code="RepoNotFound")
                return
            match = re.match(rf"/(?:api/models/{repo}/(?:revision|tree)|{repo}/resolve)/([^/]+)", path)
            if match is not None and match[1] not in {"main", commit, *self.server.branches.get(repo, ())}:
                self.answer(b"", 404, X_Error_Code="RevisionNotFound")
                return
            if path == f"/api/models/{repo}" or path.startswith(f"/api/models/{repo}/revision/"):
                blobs = {n: hashlib.sha1(b"blob %d\0" % len(x) + x).hexdigest() for n, x in files.items()}
                siblings = [{"rfilename": n, "size": len(files[n]), "blobId": blob} for n, blob in blobs.items()]
                self.answer({"id": repo, "sha": commit, "siblings": siblings})
                return
            if path.startswith(f"/api/models/{repo}/tree/"):
                sizes = {name: len(content) for name, content in files.items()}
                self.answer([{"type": "file", "path": p, "size": n, "oid": commit} for p, n in sizes.items()])
                return
            if path.startswith(f"/{repo}/resolve/"):
                name = path.removeprefix(f"/{repo}/resolve/").split("/", 1)[1]
                if name in files:
                    etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                    content = self.server.damaged.get(name, files[name])
                    num_cut = len(content) // 2 if name in self.server.cut else 0
                    self.server.sent += [name] if self.command == "GET" else []
                    self.answer(content, num_cut=num_cut, X_Repo_Commit=commit, ETag=etag)
                else:
                    self.answer(b"", 404, X_Repo_Commit=commit, X_Error_Code="EntryNotFound")
                return
        self.not_found(path)

    do_HEAD = do_GET

    def not_found(self, path: str) -> None:
        if not path.endswith("/auth-check/write"):  # of a repository that is not there: not found is the answer
            self.server.unknown.append(f"{self.command} {path}")
        self.answer(b"", 404, X_Error_Code="RepoNotFound")
