"""What launched this process, as its environment tells: ``torchrun``, ``accelerate launch``, ``mpirun``, or nothing."""

import os

from ...errors import UserError

NAMES = {
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
"""torch's variables, and those of MPICH and Intel MPI, Open MPI, and MVAPICH."""
PORT = "29500"


def told(name: str, otherwise: int) -> int:
    """A variable of torch's (``NAMES``), in whoever's words."""
    return int(next((os.environ[key] for key in (name, *NAMES[name]) if key in os.environ), otherwise))


def processes() -> int:
    """How many processes the launcher started."""
    return told("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process among them."""
    return told("RANK", 0)


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return told("LOCAL_RANK", 0)


def flag(name: str) -> bool:
    """What ``accelerate launch`` says yes or no to: ``ACCELERATE_USE_CPU``, ``ACCELERATE_USE_FSDP``."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def wants_cpu() -> bool:
    """Whether ``accelerate launch --cpu`` started this process."""
    return flag("ACCELERATE_USE_CPU")


def fewer_than_asked() -> bool:
    """Whether ``accelerate launch --cpu`` was asked for several processes and started one, as it does without a hostfile of MPI: it
    gives them an address to meet at, and no numbers."""
    return wants_cpu() and "MASTER_ADDR" in os.environ and processes() == 1


def meet() -> None:
    """Give torch its variables where MPI started the processes.

    Raises:
        UserError: they are on several machines, and nothing says at which they meet.
    """
    if "WORLD_SIZE" in os.environ:
        return
    here = told("LOCAL_WORLD_SIZE", 1)
    if "MASTER_ADDR" not in os.environ and here != processes():
        raise UserError(
            f"{here} of {processes()} processes run on this machine and nothing says where they meet; "
            "set MASTER_ADDR in all of them to the name of the machine that runs the first, such as mpirun -x MASTER_ADDR=node0"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", PORT)
    os.environ |= {name: str(told(name, 1 if name.endswith("SIZE") else 0)) for name in NAMES}
