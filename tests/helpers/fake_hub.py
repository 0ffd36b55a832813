"""A stand-in of the Hub's HTTP API: repositories, commits, LFS uploads, and files with ranges and redirects.

It holds to what huggingface_hub sends and reads; see https://huggingface.co/docs/hub/api.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".png", ".bin")
WRITER, READER = (
    "hf_" + "w" * 34,
    "hf_" + "r" * 34,
)  # tokens of one who may write, and one who may not


@dataclass
class Repository:
    """One repository.

    Attributes:
        commits: the files of every commit by its id, the oldest first.
        branches: the id of the last commit of each branch; pull requests are branches too.
        messages: of the commits.
    """

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """Add a commit that holds these files and no others."""
        text = repr((len(self.commits), sorted(files))).encode()
        name = hashlib.sha1(text).hexdigest()
        self.commits[name], self.branches[branch] = dict(files), name
        self.messages.append(message)
        return name

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        """The files of a branch or a commit."""
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Hub:
    """The stand-in.

    Attributes:
        url: where it listens.
        repositories: by name.
        objects: what was uploaded to LFS, by SHA-256.
        requests: method and path of every request so far.
        fails: paths, as regular expressions, and the status that they are answered with.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fails: dict[str, int] = field(default_factory=dict)

    def fetched(self) -> list[str]:
        """The files that were downloaded so far."""
        return [
            r.split("/", 5)[5] for r in self.requests if re.match(r"GET /[^/]+/[^/]+/resolve/", r)
        ]


class _Error(Exception):
    def __init__(self, status: int, code: str = "", text: str = "") -> None:
        self.status, self.code, self.text = status, code, text


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - http.server calls them so

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for pattern, status in self.hub.fails.items():
                if re.search(pattern, f"{self.command} {path}"):
                    raise _Error(status, text="as the test asks")
            self._route(path, body)
        except _Error as error:
            self._send(
                error.status,
                json.dumps({"error": error.text}).encode(),
                {"X-Error-Code": error.code, "X-Error-Message": error.text},
            )

    def _route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.startswith("/lfs/"):
            self.hub.objects[path.removeprefix("/lfs/")] = body
            self._send(200, b"")
        elif match := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
            self._writable(match[1])
            self._lfs(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)(?:/(.+))?)?", path):
            self._api(match[1], match[2] or "revision", match[3] or "main", body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        else:
            raise _Error(404, "RepoNotFound", f"no such place: {path}")

    def _api(self, name: str, verb: str, revision: str, body: bytes) -> None:
        if verb == "preupload":
            self._writable(name)
            files = json.loads(body)["files"]
            modes = ["lfs" if f["path"].endswith(LFS) else "regular" for f in files]
            self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": m, "shouldIgnore": False, "oid": None}
                        for f, m in zip(files, modes, strict=True)
                    ]
                }
            )
        elif verb == "commit":
            self._commit(self._writable(name), name, revision, body)
        elif verb == "branch":
            repository = self._writable(name)
            if revision in repository.branches:
                raise _Error(409, text="there is such a branch")
            repository.branches[revision] = repository.branches["main"]
            self._json({})
        elif verb == "tree":
            files = self._files(name, revision.split("/")[0])
            self._json([self._entry(p, c) for p, c in sorted(files.items())])
        elif verb == "revision":
            files = self._files(name, revision)
            sha = self.hub.repositories[name].branches.get(revision, revision)
            self._json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": sha,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [self._sibling(p, c) for p, c in sorted(files.items())],
                }
            )
        else:
            raise _Error(404, text=verb)

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        if path.endswith(LFS):
            entry["lfs"] = {
                "oid": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 100,
            }
        return entry

    def _sibling(self, path: str, content: bytes) -> dict[str, Any]:
        if "blobs=true" not in self.path.lower():
            return {"rfilename": path}
        entry = self._entry(path, content)
        lfs = entry.get("lfs")
        if lfs is not None:
            lfs["sha256"] = lfs.pop("oid")
        return {"rfilename": path, "size": entry["size"], "blobId": entry["oid"], "lfs": lfs}

    def _create(self, request: dict[str, Any]) -> None:
        if self._token() != WRITER:
            raise _Error(
                401 if self._token() is None else 403,
                text="You don't have the rights to create a model",
            )
        name = f"{request['organization']}/{request['name']}"
        if name in self.hub.repositories:
            self._json(
                {"url": f"{self.hub.url}/{name}", "error": "You already created this repo"}, 409
            )
            return
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.repositories[name] = Repository(private=private)
        self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.url}/{name}"})

    def _lfs(self, request: dict[str, Any]) -> None:
        objects = []
        for entry in request["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            objects.append(
                {**entry, **({} if entry["oid"] in self.hub.objects else {"actions": upload})}
            )
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repository: Repository, name: str, revision: str, body: bytes) -> None:
        files, header = dict(repository.files(revision) or {}), {}
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Error(400, text="an LFS file was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        branch = "refs/pr/1" if "create_pr=1" in self.path else revision
        parent = header.get("parentCommit")
        if parent and parent != repository.branches[revision]:
            raise _Error(412, text="A commit has happened since")
        oid = repository.commit(files, branch, header["summary"])
        answer = {
            "commitOid": oid,
            "commitUrl": f"{self.hub.url}/{name}/commit/{oid}",
            "hookOutput": "",
        }
        if branch != revision:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1"
        self._json(answer)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        files = self._files(name, revision)
        if path not in files:
            raise _Error(404, "EntryNotFound", f"{path} is not there")
        content, sha = files[path], self.hub.repositories[name].branches.get(revision, revision)
        lfs = path.endswith(LFS)
        etag = (hashlib.sha256 if lfs else hashlib.sha1)(content).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        status, span = 200, self.headers.get("Range")
        if span and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", span)):
            start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        self._send(status, content, headers)

    def _files(self, name: str, revision: str) -> dict[str, bytes]:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token() is None):
            raise _Error(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        if repository.gated and self._token() != WRITER:
            raise _Error(403, "GatedRepo", f"Access to model {name} is restricted")
        files = repository.files(revision)
        if files is None:
            raise _Error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    def _writable(self, name: str) -> Repository:
        self._files(name, "main")
        if self._token() != WRITER:
            raise _Error(403, text="Forbidden: pass a token with the right to write")
        return self.hub.repositories[name]

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A stand-in that listens on this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
