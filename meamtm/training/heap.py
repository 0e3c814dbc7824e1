"""How a process that trains keeps its memory: what a step frees for the next one, and what is there to stay."""

import ctypes
import gc


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


def settle_objects() -> None:
    """Keeps Python's garbage collector from walking again and again through what is there to stay.

    Ray, MLflow and torch leave a million objects, through which a full collection takes a quarter of a second, some
    1 % of a small model's epochs. What is garbage already is collected first, and its memory given back: in a study one
    process trains many models, and would hold what the largest of them left, in fragments, between the next one's.
    """
    gc.unfreeze()
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if malloc_trim is not None:
        malloc_trim(0)
    gc.freeze()
