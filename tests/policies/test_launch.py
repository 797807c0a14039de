"""What a launcher tells the processes that it starts, in whose words ever."""

import os

import pytest
import torch

from triune.errors import UserError
from triune.policies.train import launch
from triune.policies.train.optim import resolve_device

LAUNCHERS = {
    "torchrun": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "MPICH": {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
}
ALL = {*launch.NAMES, *(name for names in launch.NAMES.values() for name in names), "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment of which no launcher has said anything; what is put there ends with the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ALL:
        os.environ.pop(name, None)
    return monkeypatch


@pytest.mark.parametrize("by", LAUNCHERS)
def test_whose_words_ever(by: str, started: pytest.MonkeyPatch) -> None:
    assert (launch.processes(), launch.rank(), launch.local_rank(), launch.is_main()) == (1, 0, 0, True)
    os.environ |= {**LAUNCHERS[by], "MASTER_ADDR": "node0"}
    assert (launch.processes(), launch.rank(), launch.local_rank(), launch.is_main()) == (4, 3, 1, False)
    launch.meet()
    assert {name: os.environ[name] for name in launch.NAMES} == LAUNCHERS["torchrun"] and os.environ["MASTER_ADDR"] == "node0"


def test_several_machines_must_know_where_they_meet(started: pytest.MonkeyPatch) -> None:
    os.environ |= LAUNCHERS["Open MPI"]
    with pytest.raises(UserError, match="2 of 4 processes run on this machine.*MASTER_ADDR"):
        launch.meet()
    os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] = "4"
    launch.meet()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", launch.PORT)


def test_accelerate_on_the_cpu(started: pytest.MonkeyPatch) -> None:
    """A GPU is left alone, and one process where several were asked for is not passed over."""
    started.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda" and not launch.fewer_than_asked()
    os.environ |= {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    assert resolve_device("auto").type == "cpu" and launch.fewer_than_asked()
    with pytest.raises(UserError, match="accelerate launch was told to use the CPU"):
        resolve_device("cuda")
    os.environ |= LAUNCHERS["Open MPI"]
    assert not launch.fewer_than_asked()
