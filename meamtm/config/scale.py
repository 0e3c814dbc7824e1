"""Section `scale`: where a run happens, which is no part of what it is."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from meamtm.config.section import Section

NumWorkers = Annotated[int, Field(ge=0, le=4096)]
JOB_HOLDS = {"CPU": "MEAMTM_JOB_CPUS", "GPU": "MEAMTM_JOB_GPUS"}
"""Variables that say what a job's own process holds of its node as long as it lasts."""


class ScaleConfig(Section):
    """Where a run happens, which is no part of its identity.

    What is drawn at random, and which clips are mixed with each other, differ with the number of workers."""

    workers: NumWorkers | tuple[NumWorkers, NumWorkers] = Field(
        default=0, description="Ray Train workers, or [least, most] for as many as there is room for; 0: this process"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where there is a device")
    cpus_per_worker: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for a worker or a trial")
    gpus_per_worker: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of a GPU that Ray reserves for one, on CUDA; of memory it is no limit",
    )
    max_failures: int = Field(default=1, ge=-1, description="restarts of a failed Ray Train run; -1: no limit")
    resize_s: float = Field(
        default=60.0, ge=1, description="seconds between looks for room to grow; growing goes back to a checkpoint"
    )
    threads: int | None = Field(
        default=None, ge=1, description="threads of a process; null: one per core it may use, on Ray `cpus_per_worker`"
    )
    address: str | None = Field(
        default=None,
        description="Ray cluster: HOST:6379, ray://HOST:10001, or auto for this machine's; null: RAY_ADDRESS, or one "
        "that is started here and ended",
    )

    @property
    def worker_threads(self) -> int:
        """Threads of a worker or trial on Ray."""
        return self.threads or max(1, int(self.cpus_per_worker))

    @property
    def least_workers(self) -> int:
        """Workers without which a run waits."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """Workers that a run takes if it can."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _check(self) -> "ScaleConfig":
        if not isinstance(self.workers, int) and not 1 <= self.least_workers <= self.most_workers:
            raise ValueError(
                f"scale.workers={list(self.workers)} is not [least, most] with 1 <= least <= most; write for example "
                f"scale.workers=[1, 4]"
            )
        return self
