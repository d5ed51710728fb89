"""A hub on this machine: the part of the Hugging Face API that `huggingface_hub` uses to make a repository, commit
files to it (large ones by Git LFS) and read them back. Only for tests; what it does not know is 404.
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_of_this_machine"


class Hub(ThreadingHTTPServer):
    """repos: {"owner/name": {path: bytes}}. private: those that were made so. commits: their messages."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.private, self.commits, self.large = {}, set(), [], {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        data = self.body()
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.answer(200)

    def do_POST(self):
        data = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
            return
        if self.path == "/api/repos/create":
            self.create(json.loads(data))
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            rows = [(f["path"], f["path"].endswith(".safetensors")) for f in json.loads(data)["files"]]
            modes = [
                {"path": p, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} for p, large in rows
            ]
            self.answer(200, {"files": modes})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self.answer(200, {"transfer": "basic", "objects": [self.upload(o) for o in json.loads(data)["objects"]]})
        elif self.path.endswith("/commit/main"):
            self.commit(self.path.removeprefix("/api/models/").removesuffix("/commit/main"), data)
        else:
            self.answer(404, {"error": self.path})

    def create(self, wanted):
        repo = f"{wanted['organization']}/{wanted['name']}"
        if repo in self.server.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"})
            return
        self.server.repos[repo] = {}
        self.server.private |= {repo} if wanted.get("visibility") == "private" or wanted.get("private") else set()
        self.answer(200, {"url": f"{self.server.url}/{repo}"})

    def upload(self, wanted):
        href = {"upload": {"href": f"{self.server.url}/large/{wanted['oid']}"}}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": href}

    def commit(self, repo, data):
        files = self.server.repos[repo]
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.large[value["oid"]]
        oid = f"{len(self.server.commits):040x}"
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        repo, found, file = unquote(self.path).lstrip("/").partition("/resolve/main/")
        data = self.server.repos.get(repo, {}).get(file)
        if not found or data is None:
            self.answer(404, {"error": "Not Found"}, [("X-Error-Code", "EntryNotFound")])
            return
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(200, data, [("ETag", etag), ("X-Repo-Commit", f"{len(self.server.commits):040x}")])


@contextlib.contextmanager
def running():
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
