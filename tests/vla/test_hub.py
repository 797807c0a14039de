"""Weights from the hub: the real client beside a small server on this machine, then the cache alone."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from triune.config import CONFIGS
from triune.vla import build, load_spec
from triune.vla.engine import infer
from triune.vla.proofs import probe
from triune.vla.spec import PretrainedExpert
from triune.vla.weights import make_reference, resolve_weights

REVISION = "0123456789abcdef0123456789abcdef01234567"
API, FILES = "/api/models/owner/name/tree/", "/owner/name/resolve/"


@pytest.fixture
def hub(tiny_weights: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that holds the tiny VLM as ``owner/name``, with a pickle beside it, and an empty cache; gives the files that were sent."""
    files = {p.name: p.read_bytes() for p in Path(tiny_weights["vlm"].removeprefix("path:")).iterdir()} | {"pytorch_model.bin": b"pickle"}
    sent: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            data = self.answer()
            self.wfile.write(data)
            if self.path.startswith(FILES):
                sent.append(self.path.removeprefix(f"{FILES}{REVISION}/"))

        def answer(self) -> bytes:
            name = self.path.rpartition("/")[2]
            listing = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files.items()]
            listed = self.path.startswith(API + REVISION)
            data = json.dumps(listing).encode() if listed else files.get(name, b"") if self.path.startswith(FILES + REVISION) else b""
            self.send_response(200 if data else 404)
            headers = {"Content-Type": "application/json", "Content-Length": len(data), "X-Repo-Commit": REVISION}
            for key, value in (headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}).items():
                self.send_header(key, str(value))
            self.end_headers()
            return data

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    changes = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}"}
    for name, value in (changes | {"HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield sent
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "model").glob("*.yaml")))
def test_every_revision_is_pinned(name: str) -> None:
    for expert in load_spec(name).experts.values():
        if isinstance(expert, PretrainedExpert) and expert.reference.startswith("hf:"):
            assert re.fullmatch(r"hf:[\w.-]+/[\w.-]+@[0-9a-f]{40}", expert.reference), expert.reference


def test_weights_come_from_the_hub_once(
    hub: list[str], make_spec: Callable[..., Any], tiny_weights: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = f"hf:owner/name@{REVISION}"
    folder = resolve_weights(reference, "vlm")
    here = {p.name for p in Path(tiny_weights["vlm"].removeprefix("path:")).iterdir()}
    assert folder.parts[-3:] == ("models--owner--name", "snapshots", REVISION)
    assert set(hub) == here == {p.name for p in folder.iterdir()}  # and no pickle
    hub.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    models = [build(make_spec(experts={"und": {"weights": name}})).eval() for name in (reference, tiny_weights["vlm"])]
    data = probe(models[0])
    first, second = (infer(model, data.inputs, data.noise).actions for model in models)
    assert torch.equal(first, second) and hub == []
    assert make_reference(reference, "vlm").sha256 == make_reference(tiny_weights["vlm"], "vlm").sha256
