"""What clients and servers say in ``dialects.json``, name -> message; its maker and the tests read it, so it needs only numpy."""

from typing import Any

import numpy as np

CAMERAS = ("agentview", "wrist")
STATE, ACTION, CHUNK = 8, 32, 50
TIME = 1700000000.25


def picture(seed: int, size: int = 6) -> np.ndarray:
    """uint8 (size, size + 2, 3)."""
    return (np.arange(size * (size + 2) * 3) * (seed + 3) % 251).astype(np.uint8).reshape(size, size + 2, 3)


def state(size: int = STATE) -> np.ndarray:
    return np.linspace(-1, 1, size)


def chunk() -> np.ndarray:
    return np.linspace(-2, 2, CHUNK * ACTION).astype(np.float32).reshape(CHUNK, ACTION)


def openpi() -> dict[str, Any]:
    return {
        "openpi droid": {
            "observation/exterior_image_1_left": picture(0),
            "observation/wrist_image_left": picture(1),
            "observation/joint_position": state(7),
            "observation/gripper_position": np.array([0.5]),
            "prompt": "do something",
        },
        "openpi libero": {
            "observation/state": state(),
            "observation/image": picture(0),
            "observation/wrist_image": picture(1),
            "prompt": "do something",
        },
        "openpi aloha": {
            "state": np.ones((14,)),
            "images": {
                name: picture(i).transpose(2, 0, 1) for i, name in enumerate(("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"))
            },
        },
        "openpi answer": {
            "actions": chunk(),
            "policy_timing": {"infer_ms": 12.5},
            "server_timing": {"infer_ms": 13.0, "prev_total_ms": 14.25},
        },
        "starvla flat": {
            "examples": [{"image": [picture(0), picture(1)], "lang": "lift", "state": state()[None]}],
            "unnorm_key": None,
            "do_sample": False,
        },
        "starvla typed": {
            "type": "infer",
            "request_id": "r1",
            "payload": {"examples": [{"image": [picture(i), picture(i + 1)], "lang": "lift", "state": state()} for i in range(2)]},
        },
        "starvla ping": {"type": "ping", "request_id": "p1"},
        "starvla answer": {"status": "ok", "ok": True, "type": "inference_result", "request_id": "r1", "data": {"actions": chunk()[None]}},
        "starvla pong": {"status": "ok", "ok": True, "type": "ping", "request_id": "p1"},
    }


def harness() -> dict[str, tuple[str, dict[str, Any], int]]:
    """name -> (type, payload, seq)"""
    seen = {
        "images": {name: picture(i) for i, name in enumerate(CAMERAS)},
        "task_description": "lift",
        "states": state().astype(np.float32),
    }
    return {
        "harness hello": ("hello", {"harness_version": "0.8.0", "protocol_version": 1, "benchmark": "LIBEROBenchmark"}, 1),
        "harness start": ("episode_start", {"task": {"name": "lift", "suite": "libero_spatial"}}, 2),
        "harness observation": ("observation", seen, 3),
        "harness end": ("episode_end", {"metrics": {"success": True}, "steps": 1, "elapsed_sec": 0.1}, 4),
        "harness action": ("action", {"actions": chunk()[0]}, 3),
        "harness error": ("error", {"error": "no episode has begun"}, 7),
    }


def groot(batch: int = 1) -> dict[str, Any]:
    """The same observation as N1.5 and as later versions ask, and what is answered."""
    pictures = {name: np.stack([picture(i + b)[None] for b in range(batch)]) for i, name in enumerate(CAMERAS)}
    numbers = np.stack([(state() + b).astype(np.float32)[None] for b in range(batch)])
    parts = {"arm": numbers[..., :7], "grip": numbers[..., 7:]}
    nested = {"video": pictures, "state": parts, "language": {"annotation.human.task_description": [["lift"]] * batch}}
    flat = {f"video.{k}": v[0] for k, v in pictures.items()} | {f"state.{k}": v[0].astype(np.float64) for k, v in parts.items()}
    actions = {"arm": chunk()[:, :31], "grip": chunk()[:, 31:]}
    return {
        "ping": {"endpoint": "ping"},
        "reset": {"endpoint": "reset", "data": {"options": None}},
        "kill": {"endpoint": "kill"},
        "modality": {"endpoint": "get_modality_config"},
        "flat": {"endpoint": "get_action", "data": flat | {"annotation.human.task_description": ["lift"]}, "api_token": "secret"},
        "nested": {"endpoint": "get_action", "data": {"observation": nested, "options": None}},
        "flat answer": {f"action.{k}": np.ascontiguousarray(v) for k, v in actions.items()},
        "nested answer": [{k: np.ascontiguousarray(v[None]) for k, v in actions.items()}, {}],
        "pong": {"status": "ok", "message": "Server is running"},
    }
