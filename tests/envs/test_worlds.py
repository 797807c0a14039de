"""The worlds themselves: names, instructions, what is seen, what counts as success."""

from collections.abc import Iterator

import numpy as np
import pytest

from triune.envs import make_expert, make_world, world_names
from triune.envs.base import World
from triune.envs.robosuite import RobosuiteWorld
from triune.errors import UserError


@pytest.fixture(scope="module")
def cubes() -> Iterator[RobosuiteWorld]:
    world = make_world("cubes/lift-red")
    assert isinstance(world, RobosuiteWorld)
    yield world
    world.close()


@pytest.fixture(scope="module")
def drawer() -> Iterator[World]:
    world = make_world("metaworld/drawer-open-v3", size=64)
    yield world
    world.close()


def test_names() -> None:
    names = world_names()
    assert len(set(names)) == len(names) == 57
    assert sum(name.startswith("metaworld/") for name in names) == 50


def test_an_unknown_world_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'cubes/lift-red'"):
        make_world("cubes/lift-rad")
    with pytest.raises(UserError, match="known: robosuite/lift"):
        make_expert("xyz")
    with pytest.raises(UserError, match="render must be one of fast, default"):
        make_world("cubes/lift-red", render="nice")


def test_only_the_words_of_the_cube_worlds_differ(cubes: RobosuiteWorld) -> None:
    green = make_world("cubes/lift-green")
    try:
        (here, _), (there, _) = cubes.reset(seed=4), green.reset(seed=4)
        assert cubes.task_description != green.task_description
        assert cubes.contract == green.contract
        assert all(np.array_equal(here["pixels"][camera], there["pixels"][camera]) for camera in cubes.contract.camera_names)
        assert np.array_equal(here["agent_pos"], there["agent_pos"])
        assert not green.become("heldout/lift-green") and not green.become("metaworld/reach-v3")
        assert green.task_description == "lift the green cube"
        for name in ("cubes/stack", "cubes/lift-red"):  # what it has been before shows in nothing
            assert green.become(name) and green.name == name
            there, _ = green.reset(seed=4)
            assert all(np.array_equal(here["pixels"][camera], there["pixels"][camera]) for camera in cubes.contract.camera_names)
            assert green.privileged()["kind"] == name.split("/")[1].split("-")[0]
        assert (green.task_description, green.max_steps) == (cubes.task_description, cubes.max_steps)
    finally:
        green.close()


def test_the_colours_swap_places(cubes: RobosuiteWorld) -> None:
    left = []
    for seed in range(20):
        cubes.reset(seed=seed)
        objects = cubes.privileged()["objects"]
        red, green = (np.array(objects[f"{colour} cube"]["position"]) for colour in ("red", "green"))
        assert np.linalg.norm(red[:2] - green[:2]) > 0.095
        left.append(red[1] > green[1])
    assert 4 <= sum(left) <= 16


def test_success_needs_the_right_cube(cubes: RobosuiteWorld) -> None:
    still = np.array([0, 0, 0, 0, 0, 0, -1.0])
    for name, success in (("green cube", False), ("red cube", True)):
        cubes.reset(seed=1)
        table = cubes._env
        table.place({"red cube": (0, 0.1, 0), "green cube": (0, -0.1, 0)} | {name: (0.05, 0, 0, 0.2)})
        table.forward()
        assert cubes.step(still)[-1]["is_success"] is success


def test_a_stack_counts_when_it_is_let_go() -> None:
    world = make_world("cubes/stack")
    assert isinstance(world, RobosuiteWorld)
    still = np.array([0, 0, 0, 0, 0, 0, -1.0])
    try:
        for top, below, success in (("red cube", "green cube", True), ("green cube", "red cube", False)):
            world.reset(seed=1)
            world._env.place({below: (0, 0.1, 0), top: (0, 0.1, 0, 0.043)})
            world._env.forward()
            done = [world.step(still)[-1]["is_success"] for _ in range(5)]
            assert done[-1] is success
    finally:
        world.close()


def test_what_is_invisible_to_a_robot_is_not_in_its_state(cubes: RobosuiteWorld) -> None:
    obs, _ = cubes.reset(seed=2)
    cubes._env.forward()
    before = cubes._state()
    cubes._env.place({"red cube": (0.05, 0.11, 0.2), "green cube": (-0.05, -0.11, 0)})
    cubes._env.forward()
    assert np.array_equal(cubes._state(), before)
    assert not np.array_equal(cubes.render(), obs["pixels"]["agentview"])


def test_images_are_upright_and_projection_hits(cubes: RobosuiteWorld) -> None:
    cubes.reset(seed=3)
    cubes._env.place({"red cube": (0.05, 0.1, 0), "green cube": (-0.05, -0.1, 0)})
    cubes._env.forward()
    for camera, image in cubes._images().items():
        (x, y), depth = (value[0] for value in cubes._env.pixels(cubes._env.position("red cube"), camera))
        assert depth > 0
        red, green, blue = image[int(y * 96), int(x * 96)].astype(int)
        assert red > 80 and green < red / 2 and blue < red / 2
        facts = cubes.privileged()["cameras"][camera]
        seen = np.array(facts["intrinsics"]) @ (np.array(facts["extrinsics"]) @ [*cubes._env.position("red cube"), 1])[:3]
        assert np.allclose(seen[:2] / seen[2] / 96, [x, y], atol=1e-6)
    red, green = (cubes._env.pixels(cubes._env.position(f"{colour} cube"), "agentview")[0][0] for colour in ("red", "green"))
    assert red[1] > green[1] and red[0] > green[0]  # x > 0 is nearer to this camera, y > 0 on its right


def test_the_arm_reaches_where_it_is_sent(cubes: RobosuiteWorld) -> None:
    cubes.reset(seed=0)
    table = cubes._env
    for position, yaw in (((0.05, 0.1, 0.9), 0.3), ((-0.1, -0.15, 0.83), -0.5)):
        assert table.reach(position, yaw, width=0.06)
        table.forward()
        assert np.allclose(table.eef, position, atol=2e-3)
    assert not table.reach((2.0, 0, 1.0))


def test_numpy_s_global_generator_is_left_alone(cubes: RobosuiteWorld) -> None:
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    cubes.reset(seed=9)
    assert np.random.rand() == expected  # noqa: NPY002


def test_an_episode_ends_after_max_steps_and_says_so(drawer: World) -> None:
    drawer.reset(seed=0)
    _, info, _ = drawer.step_chunk(np.zeros((drawer.max_steps + 5, 4)))
    assert info == {"is_success": False, "truncated": True, "steps": drawer.max_steps}
    with pytest.raises(UserError, match="ended after 500 steps"):
        drawer.step(np.zeros(4))


@pytest.mark.parametrize("action", [np.zeros(3), np.full(4, np.nan)])
def test_a_wrong_action_is_refused(drawer: World, action: np.ndarray) -> None:
    drawer.reset(seed=0)
    with pytest.raises(UserError, match="takes finite actions of shape"):
        drawer.step(action)
    with pytest.raises(UserError, match="no action"):
        drawer.step_chunk(np.zeros((0, 4)))


def test_a_closed_world_can_begin_again(drawer: World) -> None:
    first, _ = drawer.reset(seed=1)
    drawer.close()
    with pytest.raises(UserError, match="call reset first"):
        drawer.step(np.zeros(4))
    again, _ = drawer.reset(seed=1)
    assert np.array_equal(first["pixels"]["agentview"], again["pixels"]["agentview"])


def test_render_profiles_differ_and_are_part_of_the_contract() -> None:
    worlds = [make_world("metaworld/reach-v3", render=profile, size=48) for profile in ("fast", "default")]
    try:
        fast, default = (world.reset(seed=0)[0] for world in worlds)
        assert not np.array_equal(fast["pixels"]["agentview"], default["pixels"]["agentview"])
        assert np.array_equal(fast["agent_pos"], default["agent_pos"])
        assert worlds[0].contract.conflicts(worlds[1].contract) == ["contract: render is fast here and default there"]
    finally:
        for world in worlds:
            world.close()


def test_meta_world_s_wrist_and_agentview_have_poses(drawer: World) -> None:
    drawer.reset(seed=0)
    for camera, facts in drawer.privileged()["cameras"].items():
        position = np.array(facts["extrinsics"]) @ [*drawer.privileged()["gripper"]["position"], 1]
        pixel = np.array(facts["intrinsics"]) @ position[:3] / position[2]
        assert position[2] > 0
        assert camera == "wrist" or ((pixel[:2] > 0).all() and (pixel[:2] < 64).all())


def test_meta_world_draws_the_goal_of_this_episode_from_the_first_frame() -> None:
    """push-v3 moves the goal's mark after everything else, so the mark of an earlier episode was drawn."""
    world = make_world("metaworld/push-v3", size=48)
    try:
        first, _ = world.reset(seed=3)
        world.reset(seed=4)
        world.step(np.zeros(4, np.float32))
        again, _ = world.reset(seed=3)
        for camera, image in first["pixels"].items():
            assert np.array_equal(image, again["pixels"][camera])
        env = world._env
        assert np.allclose(env.data.site("goal").xpos, env._target_pos)
    finally:
        world.close()
