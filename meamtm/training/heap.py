"""How a process that trains keeps its memory: what a step frees for the next one, and what is there to stay."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


def set_up_heap(*, sparing: bool) -> None:
    """Lets glibc keep what a step frees for the next one, or, where memory is scarce, give it back at once.

    Activations are megabytes each, and by itself glibc gives those back that are alone at the heap's end. Kept, they
    need not be faulted in again, but the heap breaks into fragments: ESC-10's small model trains 10 % faster, and AST
    with checkpointing holds 980 MB for the 530 MB that it uses. Given back it holds 545, and takes a fifth longer. Both
    were measured on a virtual machine of two cores (docs/log.md). Elsewhere than on glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if sparing:
        mallopt(-4, 65_536)  # M_MMAP_MAX: as at first, whatever an earlier run of this process wanted
        mallopt(-3, 4 * 2**20)  # M_MMAP_THRESHOLD: blocks from 4 MB on are mapped on their own
    else:
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped on its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end is not given back


@contextmanager
def settled_objects() -> Iterator[None]:
    """While it lasts, Python's garbage collector does not walk again and again through what was there before.

    Ray, MLflow and torch leave a million objects, through which a full collection takes a quarter of a second, some
    1 % of a small model's epochs. What is garbage already is collected first, and its memory given back: in a study one
    process trains many models, and would hold what the largest of them left, in fragments, between the next one's.
    """
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if malloc_trim is not None:
        malloc_trim(0)
    if settle_for_good.cache_info().currsize > 0:  # it was called
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@cache
def settle_for_good() -> None:
    """Does so once for a process that only trains, one model after the other: each then begins a quarter of a second
    sooner. To be called where no model is there yet, for what is there now is never looked at again."""
    gc.collect()
    gc.freeze()
