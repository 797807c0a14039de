"""What a stranger records: read by lerobot and by us, and the world shows what their frames show."""

from pathlib import Path

import numpy as np
import pytest

from triune.data import open_dataset
from triune.envs import make_world
from triune.envs.view import choose, describe

from ..strangers import ACTION, CAMERAS, HEIGHT, RATE, STATE, TASK, WIDTH, WORLD, record_as_stranger


@pytest.mark.parametrize("video", [False, True])
def test_a_stranger_s_dataset_is_lerobot_s_and_ours_to_read(tmp_path: Path, video: bool) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    record_as_stranger(tmp_path / "d", 2, seed=5, video=video)
    theirs, ours = LeRobotDataset("stranger/blocks", root=tmp_path / "d"), open_dataset(tmp_path / "d")
    assert (theirs.num_episodes, theirs.fps, len(theirs)) == (2, RATE, len(ours))
    assert set(ours.cameras) == set(CAMERAS) and ours.tasks == (TASK,)
    assert {(c.height, c.width, c.flip) for c in ours.contract.cameras} == {(HEIGHT, WIDTH, None)}
    assert (ours.contract.state.names, ours.contract.action.names, ours.contract.rate) == (STATE, ACTION, RATE)
    assert not list((tmp_path / "d" / "meta").glob("triune*"))

    seen = ours.contract.model_copy(
        update={"cameras": tuple(c.model_copy(update={"name": CAMERAS[c.name]}) for c in ours.contract.cameras)}
    )
    view = choose(like=seen)
    world = make_world(WORLD, rate=RATE, size=(HEIGHT, WIDTH), cameras=view.cameras)
    try:
        assert describe(world.contract)["cameras"] == {name: [HEIGHT, WIDTH] for name in view.cameras}
        obs, _ = world.reset(seed=5)
        for step, action in enumerate(ours.vectors["action"][:4]):
            assert np.array_equal(ours.vectors["observation.state"][step], obs["agent_pos"])
            for camera, name in CAMERAS.items():
                difference = np.abs(ours.frames(camera, [step])[0].astype(int) - obs["pixels"][name]).mean()
                assert difference < (3 if video else 1e-9), camera
            obs, *_ = world.step(action)
    finally:
        world.close()
