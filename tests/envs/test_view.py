"""What is chosen of a world: cameras, a size for each, control rate. It shows in images and contract, and in nothing else."""

from collections.abc import Iterator

import numpy as np
import pytest

from triune.data import Camera, Contract, Vector
from triune.envs import camera_names, make_expert, make_world
from triune.envs.render import Painter
from triune.envs.robosuite import RobosuiteWorld
from triune.envs.view import DEFAULT, SIDE, Shot, View, choose
from triune.errors import UserError

SIZES = {"wrist": (48, 64), "sideview": (40, 30), "agentview": 56}


@pytest.fixture(scope="module")
def lift() -> Iterator[RobosuiteWorld]:
    """Three cameras of unequal sizes at half the usual rate."""
    world = make_world("robosuite/lift", cameras=tuple(SIZES), size=SIZES, rate=10)
    assert isinstance(world, RobosuiteWorld)
    yield world
    world.close()


def known(**fields: object) -> Contract:
    cameras = (Camera(name="top", height=120, width=160), Camera(name="side"))
    return Contract(cameras=cameras, state=Vector(names=("x",)), action=Vector(names=("y",)), **fields)  # type: ignore[arg-type]


def test_what_is_not_said_is_as_the_contract_has_it_and_else_as_by_default() -> None:
    assert choose() == DEFAULT == View((Shot("agentview", SIDE, SIDE), Shot("wrist", SIDE, SIDE)), None, "fast")
    assert choose(like=known()) == View((Shot("top", 120, 160), Shot("side", SIDE, SIDE)), None, "fast")
    assert choose(like=known(rate=10.0, render="default")) == View((Shot("top", 120, 160), Shot("side")), 10.0, "default")
    said = choose(render="fast", size={"side": (32, 48)}, cameras=("side", "top", "wrist"), rate=5, like=known(rate=10.0, render="default"))
    assert said == View((Shot("side", 32, 48), Shot("top", 120, 160), Shot("wrist")), 5, "fast")
    assert choose(size=32, like=known()).shots == (Shot("top", 32, 32), Shot("side", 32, 32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cameras": ()}, "one camera or more, each named once, got none"),
        ({"cameras": ("wrist", "wrist")}, "each named once, got wrist, wrist"),
        ({"cameras": ("wrist",), "size": {"agentview": 96}}, "size names camera agentview, but the cameras are wrist"),
        ({"size": (96, 0)}, "camera agentview need a positive height and width, got 96 x 0"),
        ({"rate": 0}, "must be a positive number of Hz, got 0"),
        ({"rate": float("nan")}, "got nan"),
        ({"render": "nice"}, "render must be one of fast, default"),
        ({"cameras": ("top_cam",)}, "world robosuite/lift has no camera 'top_cam'; it has agentview, wrist, sideview"),
        ({"rate": 501}, "runs at 500 Hz at most"),
    ],
)
def test_what_cannot_be_is_one_sentence(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_world("robosuite/lift", **wrong)  # type: ignore[arg-type]
    assert message in str(error.value) and "\n" not in str(error.value)


def test_meta_world_keeps_its_rate() -> None:
    assert make_world("metaworld/push-v3", rate=80).contract == make_world("metaworld/push-v3").contract
    with pytest.raises(UserError, match="runs at 80 Hz and at no other rate, so not at 10"):
        make_world("metaworld/push-v3", rate=10)


@pytest.mark.parametrize("name", ["robosuite/lift", "metaworld/push-v3"])
def test_every_world_offers_a_view_from_the_side(name: str) -> None:
    assert camera_names(name)[:3] == ("agentview", "wrist", "sideview")


def test_the_contract_says_what_was_asked_for(lift: RobosuiteWorld) -> None:
    assert [(c.name, c.height, c.width) for c in lift.contract.cameras] == [("wrist", 48, 64), ("sideview", 40, 30), ("agentview", 56, 56)]
    assert (lift.rate, lift.contract.rate) == (10, 10)
    obs, _ = lift.reset(seed=500_000)
    assert {name: image.shape for name, image in obs["pixels"].items()} == {
        "wrist": (48, 64, 3),
        "sideview": (40, 30, 3),
        "agentview": (56, 56, 3),
    }
    assert lift.render().shape == (48, 64, 3)


def test_a_step_is_the_same_way_at_any_rate(lift: RobosuiteWorld) -> None:
    """The contract's unit: a full command sends the arm 5 cm further, in each control step; and an episode lasts as long."""
    usual = make_world("robosuite/lift")
    assert lift.max_steps / lift.rate == usual.max_steps / usual.rate == 4
    assert lift.contract.action == usual.contract.action
    lift.reset(seed=500_000)
    arm, before = lift._env.robots[0].part_controllers["right"], lift._env.sim.data.time
    lift.step(np.zeros(7))
    assert lift._env.sim.data.time - before == pytest.approx(0.1)
    start = lift._gripper()[0]
    lift.step(np.array([0, 1.0, 0, 0, 0, 0, -1]))
    assert arm.origin_pos + arm.origin_ori @ arm.goal_pos - start == pytest.approx([0, 0.05, 0], abs=1e-3)


def test_the_expert_lifts_at_half_the_rate(lift: RobosuiteWorld) -> None:
    act = make_expert(lift.name)
    for seed in range(500_000, 500_003):
        lift.reset(seed=seed)
        assert lift.expert_chunk(act, lift.max_steps)[1]["is_success"]


def test_looking_from_elsewhere_changes_nothing_but_the_pictures(lift: RobosuiteWorld) -> None:
    usual = make_world("robosuite/lift", rate=10, size=(56, 80))
    actions = np.random.default_rng(1).uniform(-1, 1, (6, 7)).astype(np.float32)
    try:
        lift.reset(seed=7)
        usual.reset(seed=7)
        (here, _, _), (there, _, _) = lift.step_chunk(actions), usual.step_chunk(actions)
        assert np.array_equal(here["agent_pos"], there["agent_pos"])
        wide = there["pixels"]["agentview"][:, 12:-12]  # a wider image shows more at its sides
        assert np.mean(wide != here["pixels"]["agentview"]) < 0.01
    finally:
        usual.close()


def test_camera_poses_hold_for_every_size(lift: RobosuiteWorld) -> None:
    obs, _ = lift.reset(seed=500_001)
    privileged = lift.privileged()
    assert tuple(privileged["cameras"]) == lift.contract.camera_names
    for name, facts in privileged["cameras"].items():
        seen = (np.array(facts["extrinsics"]) @ [*privileged["objects"]["cube"]["position"], 1])[:3]
        x, y, depth = np.array(facts["intrinsics"]) @ seen
        red, green, blue = obs["pixels"][name][int(y / depth), int(x / depth)].astype(int)
        assert red > 80 and green < red / 1.6 and blue < red / 1.6, name


def test_one_buffer_draws_every_size() -> None:
    import mujoco

    scene = '<mujoco><worldbody><camera name="eye" pos="0 0 2"/><light pos="1 1 3"/><geom size=".5"/></worldbody></mujoco>'
    model = mujoco.MjModel.from_xml_string(scene)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    sizes = [(48, 64), (64, 24), (500, 700), (48, 64), (32, 800)]  # 480 x 640 is what MuJoCo's buffer holds by itself
    shared, own = Painter(model), []
    images = [shared.image(data, "eye", size) for size in sizes]
    shared.close()
    for size in sizes:
        painter = Painter(model, size)
        own.append(painter.image(data, "eye"))
        painter.close()
    for size, one, other in zip(sizes, images, own, strict=True):
        assert one.shape == (*size, 3)
        assert np.array_equal(one, other)


def test_meta_world_s_sideview_is_upright_and_faces_the_agentview() -> None:
    world = make_world("metaworld/push-v3", cameras=("agentview", "sideview", "topview"), size=(60, 80))
    try:
        world.reset(seed=500_000)
        known = world.privileged()
        place, above = np.array(known["gripper"]["position"]), np.array([0, 0, 0.1])
        poses = {name: np.array(facts["extrinsics"]) for name, facts in known["cameras"].items()}
        for name in ("agentview", "sideview"):
            low, high = ((poses[name] @ [*point, 1])[1] for point in (place, place + above))
            assert high < low, name  # y grows downwards
        right = {name: (pose[:3, :3] @ [0, 1.0, 0])[0] for name, pose in poses.items()}
        assert right["agentview"] * right["sideview"] < 0
    finally:
        world.close()
