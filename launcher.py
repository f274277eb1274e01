"""The ranks of a run, as the environment of this process tells them. Imports nothing of ours.

launch()            # Launch(rank, world_size, local_rank, launched)
check_launch()      # the same, or ValueError: half a launcher, or copies that know of no other
"""

import os
from typing import NamedTuple


class Launch(NamedTuple):
    """This process among those that were started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launched: bool = False  # by torchrun, or by whoever sets the same variables


LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what ranks meet by: all of them
# what starts many copies of a command that know nothing of each other, and counts them here
COPIES = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}


def launch() -> Launch:
    """What the environment says; a process alone where it says only a part (see check_launch)."""
    given = [os.environ.get(name) for name in (*LAUNCHERS, "LOCAL_RANK")]
    try:
        rank, world_size, local_rank = int(given[0] or 0), int(given[1] or 1), int(given[-1] or 0)
    except ValueError:
        return Launch()
    if not all(given[:-1]) or not 0 <= rank < world_size:
        return Launch()
    return Launch(rank, world_size, local_rank, True)


def check_launch() -> Launch:
    """`launch()`. ValueError where a part of a launcher's variables is set, or where many copies of
    a process were started that would all do the same work and write the same files."""
    found, alone = launch(), {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if found.launched:
        return found
    odd = [name for name in alone if os.environ.get(name, "") not in ("", alone[name])]
    if odd:
        missing = [name for name in LAUNCHERS if not os.environ.get(name)]
        lacks = f"without {', '.join(missing)}" if missing else "which is no rank of a run"
        raise ValueError(
            f"{' and '.join(f'{name}={os.environ[name]}' for name in odd)} in the environment, "
            f"{lacks}: start all ranks with torchrun, or unset {' and '.join(odd)} to run as one "
            "process"
        )
    for name, launcher in COPIES.items():
        if os.environ.get(name, "1") not in ("1", ""):
            raise ValueError(
                f"{launcher} started {os.environ[name]} copies of this ({name}), each of which "
                "would do all of the work: let it start torchrun, once on every host"
            )
    return found


def rank() -> int:
    return launch().rank
