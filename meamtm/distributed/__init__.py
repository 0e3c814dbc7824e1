"""Where runs happen beyond this process: on Ray, which this room, `tune` and `jobs` alone import."""

from meamtm.distributed.cluster import (
    check_resources,
    connect,
    connected_for_now,
    disconnect,
    most_here,
    named_address,
    needs,
    room_for,
    room_with_memory,
)
from meamtm.distributed.side_by_side import Heard, run_all
from meamtm.distributed.workers import make_trainer, run

__all__ = [
    "Heard",
    "check_resources",
    "connect",
    "connected_for_now",
    "disconnect",
    "make_trainer",
    "most_here",
    "named_address",
    "needs",
    "room_for",
    "room_with_memory",
    "run",
    "run_all",
]
