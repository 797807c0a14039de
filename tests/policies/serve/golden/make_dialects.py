"""Makes ``dialects.json``: frames in the bytes of the peers' own code. Tests read that file; this one needs theirs.

With openpi-client 0.1.2, vla-eval 0.8.0, msgpack-numpy 0.4.8 (what GR00T N1.7 packs with), pyzmq and numpy < 2 installed, and checkouts of
starVLA/starVLA, Isaac-GR00T N1.5 and N1.6 (of which only the class ``MsgSerializer`` runs):

    python tests/policies/serve/golden/make_dialects.py STARVLA N1.5 N1.6
"""

import ast
import base64
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import said
from openpi_client import msgpack_numpy as openpi
from vla_eval.protocol.messages import Message, MessageType, pack_message

FILE = Path(__file__).with_name("dialects.json")


def module(file: Path) -> ModuleType:
    """A file that imports nothing of its own package."""
    spec = importlib.util.spec_from_file_location("peer", file)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def serializer(file: Path) -> Any:
    """GR00T's class ``MsgSerializer``, without the network that its module imports."""
    tree = ast.parse(file.read_text())
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "MsgSerializer")
    known = {"msgpack": msgpack, "np": np, "io": io, "json": json, "Any": Any, "ModalityConfig": SimpleNamespace}
    exec(compile(ast.Module([node], []), str(file), "exec"), known)
    return known["MsgSerializer"]


def commit(folder: Path) -> str:
    return subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    starvla, n15, n16 = (Path(argument) for argument in sys.argv[1:])
    theirs = module(starvla / "deployment/model_server/tools/msgpack_numpy.py")
    frames = {
        name: (openpi.Packer().pack if name.startswith("openpi") else theirs.packb)(message) for name, message in said.openpi().items()
    }
    for name, (kind, payload, number) in said.harness().items():
        frames[name] = pack_message(Message(MessageType(kind), payload, number, said.TIME))
    packers = {
        "n1.5": serializer(n15 / "gr00t/eval/service.py").to_bytes,
        "n1.6": serializer(n16 / "gr00t/policy/server_client.py").to_bytes,
        "n1.7": lambda message: msgpack.packb(message, default=msgpack_numpy.encode),
    }
    for version, pack in packers.items():
        other = "nested" if version == "n1.5" else "flat"
        frames |= {f"{version} {name}": pack(message) for name, message in said.groot().items() if not name.startswith(other)}
    sources = {"starVLA": commit(starvla), "GR00T N1.5": commit(n15), "GR00T N1.6": commit(n16)}
    packages = {"openpi-client": "0.1.2", "vla-eval": "0.8.0", "msgpack-numpy": "0.4.8"}
    tree = {"sources": sources | packages, "frames": {name: base64.b64encode(frame).decode() for name, frame in frames.items()}}
    FILE.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
