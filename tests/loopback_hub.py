"""A small Hugging Face Hub on 127.0.0.1: enough of its HTTP interface to create, fill and read model repositories.

    with LoopbackHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})
        hub.repositories["tester/student"].branches["main"]["config.json"]

`WRITE_TOKEN` may write, `READ_TOKEN` may only read, `LIMITED_TOKEN` too but does not say so, and any other token is
unknown. `hub.fail("/commit/", 500, times=1)` makes the next request whose path holds that text fail, and
`hub.hold("/commit/")` gives an event that is set when such a request has come, which then gets no answer.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

USER = "tester"
# Where the user may write, and an organization of which they may only read.
OWN, READ_ONLY_ORGANIZATION = ("tester", "team"), "library"
WRITE_TOKEN = "hf_loopback_write"
READ_TOKEN = "hf_loopback_read"
LIMITED_TOKEN = "hf_loopback_limited"
ROLES = {WRITE_TOKEN: "write", READ_TOKEN: "read", LIMITED_TOKEN: "fineGrained"}


@dataclass
class Repository:
    """Files of each branch, every commit's files by its id, and what was asked for at creation."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.branches.get(revision, self.commits.get(revision))

    def head(self, revision: str) -> str:
        """Commit id of a branch: a hash of its content, so that equal content has an equal id."""
        if revision in self.commits:
            return revision
        digest = hashlib.sha1()
        for path, content in sorted(self.branches[revision].items()):
            digest.update(path.encode() + b"\0" + content)
        self.commits[digest.hexdigest()] = dict(self.branches[revision])
        return digest.hexdigest()


class RefusedError(Exception):
    """An HTTP error that the handler answers with, `more` being further fields of its body."""

    def __init__(self, status: int, message: str, code: str = "", **more: str):
        self.status, self.message, self.code, self.more = status, message, code, more


class LoopbackHub(ThreadingHTTPServer):
    """The server, running in a thread while its `with` block is open."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[list] = []
        self.holds: list[tuple[str, threading.Event]] = []
        self.closing = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def fail(self, path_part: str, status: int, times: int = 1) -> None:
        """Answer the next `times` requests whose path holds `path_part` with `status`."""
        self.failures.append([path_part, status, times])

    def hold(self, path_part: str) -> threading.Event:
        """Never answer requests whose path holds `path_part`, until `hub.holds` is cleared; set when one has come."""
        self.holds.append((path_part, threading.Event()))
        return self.holds[-1][1]

    def environment(self, home: str | Path, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """Variables that point `huggingface_hub` of a new process at this server, with its cache in `home`."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": token or ""}
        return {
            **variables,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }


class Handler(BaseHTTPRequestHandler):
    """One request. The routes are tried in order; the first whose pattern is the whole path answers."""

    protocol_version = "HTTP/1.1"
    server: LoopbackHub
    body: bytes

    def log_message(self, *arguments):
        """Keep the test output free of the request log."""

    def answer(self):
        self.body = self.read_body()
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for part, arrived in self.server.holds:
            if part in path:
                arrived.set()
                self.server.closing.wait()
        try:
            for failure in self.server.failures:
                if failure[0] in path and failure[2] > 0:
                    failure[2] -= 1
                    raise RefusedError(failure[1], f"made to fail with {failure[1]}")
            for methods, pattern, route in ROUTES:
                match = re.fullmatch(pattern, path)
                if self.command in methods.split() and match:
                    return self.reply(200, *route(self, *match.groups()))
            raise RefusedError(404, f"no route for {self.command} {path}")
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code, "Retry-After": "0"}
            content = {"error": refused.message, **refused.more}
            self.reply(refused.status, content, {k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - the names that http.server calls

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, status: int, content, headers: dict[str, str] | None = None):
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def may_write(self, namespace: str | None = None):
        if self.token() not in ROLES:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        if self.token() != WRITE_TOKEN:
            raise RefusedError(403, "you must use a write token")
        if namespace is not None and namespace not in OWN:
            raise RefusedError(403, f"no rights to write under {namespace}")

    def readable(self, repo_id: str) -> Repository:
        repository = self.server.repositories.get(repo_id)
        known = self.token() in ROLES
        if repository is None or (repository.private and not known):
            raise RefusedError(404 if known else 401, "Repository not found", "RepoNotFound")
        return repository

    def files(self, repo_id: str, revision: str) -> dict[str, bytes]:
        files = self.readable(repo_id).files(revision)
        if files is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return files

    def whoami(self):
        if self.token() not in ROLES:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        role = ROLES[self.token()]
        roles = {"team": "write", READ_ONLY_ORGANIZATION: "read"}
        orgs = [{"name": name, "roleInOrg": may} for name, may in roles.items()]
        return ({"type": "user", "name": USER, "orgs": orgs, "auth": {"accessToken": {"role": role}}},)

    def create(self):
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        self.may_write(repo_id.split("/")[0])
        private = request.get("visibility") == "private" or bool(request.get("private"))
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repositories:
            # The client reads the repository's address from this refusal too.
            raise RefusedError(409, "You already created this model repo", **answer)
        self.server.repositories[repo_id] = Repository(private)
        return (answer,)

    def branch(self, repo_id: str, name: str):
        self.may_write(repo_id.split("/")[0])
        branches = self.readable(repo_id).branches
        if name in branches:
            raise RefusedError(409, "Reference already exists")
        branches[name] = dict(branches["main"])
        return ({},)

    def validate_yaml(self):
        header = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        if header is None:
            return ({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]},)
        base_model = re.search(r"^base_model: (.*)$", header.group(1), re.MULTILINE)
        if base_model and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model.group(1)):
            raise RefusedError(400, '"base_model" is not a valid model id')
        return ({"errors": [], "warnings": []},)

    def preupload(self, repo_id: str, revision: str):
        self.may_write(repo_id.split("/")[0])
        self.files(repo_id, revision)
        modes = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        return ({"files": modes},)

    def lfs_batch(self, repo_id: str):
        self.may_write(repo_id.split("/")[0])
        self.readable(repo_id)
        objects = []
        for item in json.loads(self.body)["objects"]:
            if item["oid"] not in self.server.objects:
                links = {
                    name: {"href": f"{self.server.url}/lfs/{name}/{item['oid']}"} for name in ("upload", "verify")
                }
                item = {**item, "actions": links}
            objects.append(item)
        return ({"transfer": "basic", "objects": objects},)

    def lfs_upload(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "the content does not have this sha256")
        self.server.objects[oid] = self.body
        return ({},)

    def lfs_verify(self, oid: str):
        if len(self.server.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise RefusedError(404, "object not found")
        return ({},)

    def commit(self, repo_id: str, revision: str):
        self.may_write(repo_id.split("/")[0])
        self.files(repo_id, revision)
        repository = self.server.repositories[repo_id]
        files = dict(repository.branches[revision])
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                repository.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise RefusedError(400, f"unknown operation {key}")
        repository.branches[revision] = files
        oid = repository.head(revision)
        return ({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"},)

    def model_info(self, repo_id: str, revision: str | None):
        files = self.files(repo_id, revision or "main")
        repository = self.server.repositories[repo_id]
        info = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "private": repository.private, "tags": []}
        siblings = [{"rfilename": path} for path in sorted(files)]
        return ({**info, "sha": repository.head(revision or "main"), "siblings": siblings},)

    def tree(self, repo_id: str, revision: str, folder: str | None):
        prefix = f"{folder}/" if folder else ""
        paths = [path for path in sorted(self.files(repo_id, revision)) if path.startswith(prefix)]
        if folder and not paths:
            raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        files = self.files(repo_id, revision)
        return ([{"type": "file", "path": p, "size": len(files[p]), "oid": _etag(files[p])} for p in paths],)

    def resolve(self, repo_id: str, revision: str, path: str):
        files = self.files(repo_id, revision)
        if path not in files:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        commit = self.server.repositories[repo_id].head(revision)
        return files[path], {"ETag": f'"{_etag(files[path])}"', "X-Repo-Commit": commit}


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


REPO = r"([^/]+/[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{REPO}/branch/(.+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/(.+)", Handler.preupload),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/upload/(.+)", Handler.lfs_upload),
    ("POST", "/lfs/verify/(.+)", Handler.lfs_verify),
    ("POST", f"/api/models/{REPO}/commit/(.+)", Handler.commit),
    ("GET", f"/api/models/{REPO}(?:/revision/(.+))?", Handler.model_info),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("GET HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
)
