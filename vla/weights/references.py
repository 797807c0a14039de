"""Pretrained weights are named by reference, and the name is checked by hash.

``embedded:v1``             shipped with the package: ``vla/assets/embedded_vlm/v1``, ``vla/assets/autoencoder/v1``
``path:<folder>``           a local folder
``hf:<id>@<revision>``      a snapshot from the Hugging Face hub: from the local cache, or downloaded
``config:<name>``           a published architecture without weights: ``vla/assets/architectures/<name>``, only as ``random:config:<name>``
"""

import hashlib
from pathlib import Path
from typing import Literal

from ...config import Strict
from ...errors import UserError

Kind = Literal["vlm", "autoencoder"]
ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED: dict[Kind, str] = {"vlm": "embedded_vlm", "autoencoder": "autoencoder"}
PUBLISHED = {"Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl_2b", "google/paligemma-3b-pt-224": "paligemma_3b_224"}
"""Hub id -> its architecture in ``assets/architectures``."""
NOTES = ("*.md", "training.json")
"""Files that tell of weights and do not change them."""
PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack"]  # never downloaded: safetensors only


class Reference(Strict):
    """Weights that a checkpoint stands on but does not hold.

    Attributes:
        kind: what they are, which says where ``embedded:`` looks.
        ref: ``embedded:v1``, ``path:<folder>`` or ``hf:<id>@<revision>``.
        sha256: ``digest`` of the folder when the reference was made.
    """

    kind: Kind
    ref: str
    sha256: str


def anchor(ref: str, folder: Path) -> str:
    """``ref`` (or ``random:ref``) with a relative ``path:`` counted from ``folder``. In a checkpoint that is its own folder."""
    before, path, name = ref.partition("path:")
    return f"{before}path:{folder / Path(name).expanduser()}" if path and before in ("", "random:") else ref


def make_reference(ref: str, kind: Kind) -> Reference:
    """The reference to the weights that ``ref`` names now."""
    return Reference(kind=kind, ref=ref, sha256=digest(resolve_weights(ref, kind)))


def resolve_reference(reference: Reference, base: Path, download: bool = True) -> Path:
    """The folder of a reference, its content checked; a relative ``path:`` is inside ``base``.

    Raises:
        UserError: the folder is not there, or holds other weights than when the reference was made.
    """
    folder = resolve_weights(anchor(reference.ref, base), reference.kind, download)
    found = digest(folder)
    if found != reference.sha256:
        raise UserError(
            f"the weights in {folder} ({reference.ref}) are not those that were trained with: sha256 {found[:12]}... instead of "
            f"{reference.sha256[:12]}...; put the original folder back, or train anew on the present one"
        )
    return folder


def resolve_weights(ref: str, kind: Kind, download: bool = True) -> Path:
    """The folder that ``ref`` names. Only ``hf:`` ever touches the network, and only to ``download`` a snapshot that is not cached.

    Raises:
        UserError: the reference has no known form, or there is nothing where it points.
    """
    scheme, _, name = ref.partition(":")
    if scheme == "embedded" and name:
        return _embedded(name, kind)
    if scheme == "config" and name:
        return _architecture(name)
    if scheme == "path" and name:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder} for the {kind} weights '{ref}'; correct the path")
        return folder
    repository, _, revision = name.partition("@")
    if scheme == "hf" and repository and revision:
        return _hub(repository, revision, ref, download)
    raise UserError(f"'{ref}' does not name {kind} weights; write embedded:<version>, path:<folder> or hf:<id>@<revision>")


def resolve_architecture(ref: str) -> Path:
    """A folder with the ``config.json`` of VLM weights, from the package where a hub id is known: sizes need no download.

    Raises:
        UserError: as ``resolve_weights``.
    """
    repository = ref.removeprefix("hf:").partition("@")[0]
    return _architecture(PUBLISHED[repository]) if repository in PUBLISHED else resolve_weights(ref, "vlm")


def digest(folder: Path) -> str:
    """The sha256 of a folder of weights: over name and content of every file in order of name, but for hidden ones and ``NOTES``."""
    whole = hashlib.sha256()
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = (n for n in names if not any(n.match(note) for note in NOTES) and not any(part.startswith(".") for part in n.parts))
    for name in sorted(n.as_posix() for n in kept):
        with (folder / name).open("rb") as file:
            whole.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
    return whole.hexdigest()


def _embedded(version: str, kind: Kind) -> Path:
    root = ASSETS / EMBEDDED[kind]
    folder = root / version
    if not folder.is_dir() or folder.parent != root:
        known = ", ".join(sorted(f"embedded:{path.name}" for path in root.glob("v*"))) or "none"
        raise UserError(f"no {kind} weights 'embedded:{version}' are installed (there are: {known}); use one of them, or update triune-vla")
    return folder


def _architecture(name: str) -> Path:
    folder = ASSETS / "architectures" / name
    if not (folder / "config.json").is_file() or folder.parent.name != "architectures":
        known = ", ".join(sorted(path.name for path in (ASSETS / "architectures").iterdir()))
        raise UserError(f"there is no architecture 'config:{name}' (there are: {known}); use one of them, or path:<folder>")
    return folder


def _hub(repository: str, revision: str, ref: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True, ignore_patterns=PICKLES))
    except LocalEntryNotFoundError:
        if not download:
            raise UserError(
                f"'{ref}' is not in the hub's cache; fetch it (hf download {repository}), or name a local copy as path:<folder>"
            ) from None
    except HFValidationError as error:
        raise UserError(f"'{ref}' is not a hub reference: {error}; write hf:<owner>/<name>@<revision>") from None
    try:
        return Path(snapshot_download(repository, revision=revision, ignore_patterns=PICKLES))
    except OSError as error:  # every hub and network error is one
        reason = str(error).strip().splitlines()[0]
        way_out = "check name, revision and network, or give a local copy as path:<folder>"
        raise UserError(f"'{ref}' could not be downloaded ({reason}); {way_out}") from None
