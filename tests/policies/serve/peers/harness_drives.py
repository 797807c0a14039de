"""vla-evaluation-harness's own runner and connection against a server: python harness_drives.py URL; prints what it saw as JSON."""

import json
import sys
from typing import Any

import anyio
import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.connection import Connection
from vla_eval.runners.sync_runner import SyncEpisodeRunner
from vla_eval.specs import GRIPPER_CLOSE_POS, IMAGE_RGB, LANGUAGE, POSITION_DELTA, RAW, ROTATION_AA, DimSpec, check_specs

STEPS = 30


class Counting(StepBenchmark):
    """A world that shows its step and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[list[float]] = []

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": "lift"}]

    def reset(self, task: dict[str, Any]) -> Any:
        self.told = []
        return 0

    def step(self, action: dict[str, Any]) -> StepResult:
        self.told.append(action["actions"].tolist())
        return StepResult(len(self.told), 0.0, len(self.told) == STEPS, {})

    def make_obs(self, raw_obs: int, task: dict[str, Any]) -> dict[str, Any]:
        image = np.full((32, 32, 3), raw_obs, np.uint8)
        return {
            "images": {"agentview": image, "wrist": 255 - image},
            "task_description": task["name"],
            "states": np.full(8, raw_obs / 10, np.float32),
        }

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": True}

    def get_action_spec(self) -> dict[str, DimSpec]:
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return {"agentview": IMAGE_RGB, "wrist": IMAGE_RGB, "language": LANGUAGE, "state": RAW}


async def main() -> None:
    benchmark, runner = Counting(), SyncEpisodeRunner()
    episodes = []
    async with Connection(sys.argv[1], timeout=20, max_retries=2) as connection:
        info = connection.server_info
        try:
            await connection.act({})
            error = ""
        except RuntimeError as caught:
            error = str(caught)
        for _ in range(2):
            result = await runner.run_episode(benchmark, {"name": "lift"}, connection, max_steps=STEPS + 5)
            episodes.append({"steps": result["steps"], "told": benchmark.told})
    specs = [{key: DimSpec.from_dict(raw) for key, raw in info.get(kind, {}).items()} for kind in ("action_spec", "observation_spec")]
    warnings = check_specs(specs[0], benchmark.get_action_spec(), specs[1], benchmark.get_observation_spec())
    print(json.dumps({"info": info, "error": error, "episodes": episodes, "warnings": warnings}))


if __name__ == "__main__":
    anyio.run(main)
