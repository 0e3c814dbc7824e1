"""`python -m jobs submit JOB.yaml [KEY=VALUE ...] | status ID | logs ID | stop ID | list`.

Exit codes: 0 done; 2 the user's mistake, in one line; 1 anything else, such as a job that failed."""

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from meamtm.screen import end_at_once, run_commands

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from jobs.submit import Cluster

app = typer.Typer(
    help="Runs, studies and packing on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
JobId = Annotated[str, typer.Argument(metavar="ID", help="as `submit` and `list` print it")]
Address = Annotated[
    str | None, typer.Option(help="Ray's dashboard; default: RAY_API_SERVER_ADDRESS, or this machine's")
]


@app.command()
def submit(
    job: Annotated[str, typer.Argument(metavar="JOB.yaml", help="a file of configs/jobs")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE ...]", help="keys of the job change it; all others go to its run or study"),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="submit only; do not follow the log")] = False,
) -> None:
    """Copy this folder to the cluster, start the job and follow its log."""
    from jobs.config import load_job
    from jobs.spec import prepare
    from meamtm.tracking import hide_password

    submission = prepare(load_job(job, words or []))
    from jobs import submit as client

    cluster = client.connect(submission.address)
    job_id = client.submit(cluster, submission)
    _say(f"submitted {job_id} to {hide_password(submission.address)}")
    if no_wait:
        _say(f"follow it: {same_cluster('logs', job_id, submission.address)} --follow")
        typer.echo(job_id)
    else:
        _follow(cluster, job_id, submission.address)


@app.command()
def status(job_id: JobId, address: Address = None) -> None:
    """Say how a job is doing; exits with 1 if it has failed."""
    from jobs import submit as client

    _end(client.details(_cluster(address), job_id))


@app.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the job ends")] = False,
    address: Address = None,
) -> None:
    """Print a job's log."""
    from jobs import submit as client
    from jobs.spec import find_address

    cluster = _cluster(address)
    if follow:
        _follow(cluster, job_id, find_address(address))
    else:
        _write(client.log(cluster, job_id))


@app.command()
def stop(job_id: JobId, address: Address = None) -> None:
    """Stop a job as Ctrl-C would, and wait until it has ended."""
    from jobs import submit as client

    _end(client.stop(_cluster(address), job_id, _say))


@app.command("list")
def list_jobs(address: Address = None) -> None:
    """List the cluster's jobs, newest first."""
    from rich.console import Console
    from rich.table import Table

    from jobs import submit as client

    table = Table("job", "state", "started", "took", box=None)
    for info in client.submitted(_cluster(address)):
        table.add_row(info.submission_id, info.status.value, _moment(info.start_time), _took(info))
    Console().print(table if table.row_count else "no jobs yet; python -m jobs submit configs/jobs/tune-smoke.yaml")


def main() -> None:
    """Runs the command."""
    run_commands(app, "python -m jobs")


def _cluster(address: str | None) -> "Cluster":
    from jobs.spec import find_address
    from jobs.submit import connect

    return connect(find_address(address))


def _follow(cluster: "Cluster", job_id: str, address: str) -> None:
    from jobs import submit as client

    try:
        info = client.follow(cluster, job_id, _write, _say)
    except KeyboardInterrupt:
        _say(
            f"\n{job_id} goes on; {same_cluster('logs', job_id, address)} --follow shows it, "
            f"{same_cluster('stop', job_id, address)} ends it"
        )
        raise typer.Exit(1) from None
    _end(info, log_is_shown=True)


def same_cluster(verb: str, job_id: str, address: str) -> str:
    """Writes a command for a job that finds the cluster as this one did."""
    from jobs.spec import find_address
    from meamtm.tracking import hide_password

    there = "" if address == find_address() else f" --address {hide_password(address)}"
    return f"python -m jobs {verb} {job_id}{there}"


def _end(info: "JobDetails", log_is_shown: bool = False) -> None:
    """Says where a job stands, and exits with 1 if it failed."""
    from jobs import submit as client

    if info.status.value == "PENDING":
        _say(client.reason(info))
    if info.status.value == "FAILED":
        reason = client.reason(info)
        # Ray's reason repeats the last lines of the log, if it came to a log.
        _say(reason.partition(", last available logs")[0] if log_is_shown else reason)
    typer.echo(f"{info.submission_id} {info.status.value}" + (f" after {_took(info)}" if info.end_time else ""))
    if info.status.value == "FAILED" or (info.status.value == "STOPPED" and log_is_shown):
        raise typer.Exit(1)


def _moment(time_ms: int | None) -> str:
    return f"{datetime.fromtimestamp(time_ms / 1_000).astimezone():%Y-%m-%d %H:%M:%S}" if time_ms else ""


def _took(info: "JobDetails") -> str:
    if not info.start_time:
        return ""
    end_s = info.end_time / 1_000 if info.end_time else datetime.now().timestamp()
    minutes, seconds = divmod(round(end_s - info.start_time / 1_000), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    typer.echo(text, err=True)


if __name__ == "__main__":
    end_at_once(main)
