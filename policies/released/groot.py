"""A folder of NVIDIA's Isaac GR00T N1.5, N1.6 or N1.7, for one of its robots.

``config.json``, ``model*.safetensors``  of ``gr00t/model/gr00t_n1d7/gr00t_n1d7.py``, ``gr00t_n1d6/gr00t_n1d6.py`` or ``gr00t_n1.py``

What the three do differently is in ``groot_lines.py``; what a robot has and does, in ``groot_processor.py`` (N1.6, N1.7) and
``groot_transforms.py`` (N1.5).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...config import find, load_tree, merge, parse
from ...errors import UserError
from ...vla import Spec
from ...vla.weights.groot import groot_weights
from ...vla.weights.references import resolve_weights
from ...vla.weights.released import Shapes
from ..inputs import Settings, Words
from .base import VLM, Release, load_tokenizer, read_json, read_origin, read_weights
from .groot_lines import LINES, Line, Network, Stack
from .groot_robot import Asked, plain

WORDS = 128  # tokens of an instruction; GR00T has no limit
WAY_OUT = "give a folder that Isaac-GR00T N1.5, N1.6 or N1.7 saved"
REGISTERS = "action_head.future_tokens.weight"


def wrote(source: Path) -> bool:
    """Whether the folder ``source`` is of a GR00T."""
    told = read_json(source / "config.json", WAY_OUT) if (source / "config.json").is_file() else {}
    return "gr00t" in f"{told.get('model_type')} {told.get('architectures')}".lower()


def read(source: Path, tokenizer: Path | None, asked: Asked) -> Release:
    """The policy in ``source`` for one robot.

    Args:
        tokenizer: a folder with the VLM's tokenizer and chat template, where the local hub cache does not hold them.

    Raises:
        UserError: a GR00T of another line; no such robot; a file is missing or damaged; a robot's state or actions are treated in a way
            that a checkpoint has no words for.
    """
    file = source / "config.json"
    tree = read_json(file, WAY_OUT)
    line = LINES.get(str(tree.get("model_type")))
    if line is None:
        known = ", ".join(sorted(line.name for line in LINES.values()))
        raise UserError(f"{source} holds a '{tree.get('model_type')}'; of GR00T only {known} can be converted")
    network = parse(line.network, plain(line.told(tree), file), file)
    robot = line.robot(source, asked, network.action_horizon)
    if 1000 % network.num_inference_timesteps:
        raise UserError(f"{network.num_inference_timesteps} steps do not divide the 1000 flow times of the network; set a number that does")
    if not network.diffusion_model_cfg.interleave_self_attention:
        raise UserError(f"{file} has no layers that read state and actions; only networks that have them can be converted")
    felt = robot.contract.state.size + (robot.angles.added if robot.angles else 0)
    for part, size, room in (("state", felt, network.max_state_dim), ("action", robot.contract.action.size, network.max_action_dim)):
        if size > room:
            raise UserError(f"{robot.tag} has {size} numbers of {part}, the network {room}; correct the one")
    words = load_tokenizer(network.model_name, file, tokenizer)
    weights, tensors = read_weights(source)
    vlm = _vlm(line, network, tensors, weights)
    views = robot.contract.camera_names
    image = str(words.convert_ids_to_tokens(vlm.get("image_token_id", vlm.get("image_token_index"))))
    prompt = line.prompt(words, len(views), image)
    shown = prompt.replace(image, image * _cells(source, line, vlm, (robot.resize.height, robot.resize.width)))
    length = len(words(shown.replace("{instruction}", ""))["input_ids"]) + WORDS
    try:
        renamed = groot_weights({n: t if n.startswith("backbone.") else t.float() for n, t in tensors.items()}, robot.number, robot.horizon)
    except KeyError as error:
        raise UserError(f"{weights}: the tensor '{error.args[0]}' is missing or too many for a GR00T {line.name}; {WAY_OUT}") from None
    shapes = Shapes({n: tuple(t.shape) for n, t in tensors.items()}, weights)
    return Release(
        spec=_spec(line, network.model_copy(update={"action_horizon": robot.horizon}), shapes, length, views),
        vlm=vlm,
        weights=renamed,
        contract=robot.contract.model_copy(update={"prompt": prompt}),
        state=robot.state,
        action=robot.action,
        settings=Settings(
            resize=robot.resize,
            words=Words(lower=robot.lower, edits=robot.edits, image=image),
            relative=robot.relative,
            poses=robot.poses,
            angles=robot.angles,
        ),
        tokenizer=words,
        origin=read_origin(source, format="Isaac-GR00T", type=line.name, embodiment=robot.tag, **robot.facts),
        file=weights,
        way_out=WAY_OUT,
    )


def _cells(source: Path, line: Line, vlm: Mapping[str, Any], size: tuple[int, int]) -> int:
    """Image tokens of a picture of ``size`` (Y, X)."""
    cell, side = line.patch(vlm), vlm["vision_config"].get("image_size")
    if side is not None and size != (side, side):
        wanted = f"its vision tower takes {side}x{side}; set side={side}"
        raise UserError(f"{source}: pictures would become {size[0]}x{size[1]}, {wanted}")
    if size[0] % cell or size[1] % cell:
        raise UserError(f"{source}: pictures of {size[0]}x{size[1]} are no whole number of cells of {cell}; correct its processor")
    return size[0] // cell * (size[1] // cell)


def _vlm(line: Line, network: Network, tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """The transformers config of the layers that there are."""
    if network.model_name not in line.vlms:
        raise UserError(f"{file.parent} stands on '{network.model_name}'; known VLMs are {', '.join(line.vlms)}")
    config = json.loads((resolve_weights(f"config:{line.vlms[network.model_name]}", "vlm") / "config.json").read_text())
    shapes = Shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, file)
    return merge(config, {"text_config": {"num_hidden_layers": shapes.layers(line.layers)}})


def _spec(line: Line, network: Network, shapes: Shapes, length: int, views: tuple[str, ...]) -> Spec:
    head, refine = network.diffusion_model_cfg, network.vl_self_attention_cfg
    turns = ["words", *["images"] * (network.attend_text_every_n_blocks - 1)] if network.use_alternate_vl_dit else ["all"]

    def stack(part: Stack, name: str) -> dict[str, Any]:
        width = part.num_attention_heads * part.attention_head_dim
        ffn = shapes[f"action_head.{name}.transformer_blocks.0.ff.net.0.proj.weight"][0]
        return {"width": width, "depth": part.num_layers, "ffn": ffn, "space": part.space}

    refined = {} if refine is None else {"vl": stack(refine, "vl_self_attention")}
    changes = {
        "space": head.space,
        "experts": {
            "vlm": {"weights": f"path:{VLM}", "layers": None},
            **refined,
            "act": stack(head, "model") | {"cross": {"turns": turns}},
        },
        "streams": {
            "obs": {"length": length},
            **({"seen": {"length": length}} if refined else {}),
            **({"registers": {"length": shapes[REGISTERS][0]}} if REGISTERS in shapes else {}),
            "state": {"inner": network.hidden_size},
            "action": {"length": network.action_horizon},
        },
        "heads": {"action": {"action_dim": network.max_action_dim, "inner": network.hidden_size}},
        "schedule": {"act": {"steps": network.num_inference_timesteps}},
    }
    path = find(line.spec, "model")
    return parse(Spec, merge(load_tree(path), changes) | {"state_dim": network.max_state_dim, "cameras": views}, path)
