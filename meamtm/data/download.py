"""A published data set on the network -> a folder of audio files and a CSV that `pack` reads.

What was fetched stays beside the folder until the whole archive is there, so the same call goes on where an earlier one
was cut off. The folder appears when every clip in it was read."""

import json
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout

from meamtm import __version__
from meamtm.data.audio import read_audio
from meamtm.data.sources import find_clips
from meamtm.errors import FULL_DISK, DataError, ServiceError
from meamtm.files import whole_folder

ESC50_URL = "https://github.com/karolpiczak/ESC-50/archive/master.zip"
ESC50_CLIPS = 2_000
TABLE = "meta/esc50.csv"
ANSWER_S, ATTEMPTS, PAUSE_S, CHUNK_BYTES = 30.0, 5, 2.0, 1 << 18
LARGEST_BYTES = 4 << 30
"""ESC-50 unpacked takes a fifth of that."""

Progress = Callable[[str, int, int | None], None]
"""Takes what is being done, how far it is and, where that is known, how far it goes."""


def download_esc50(out: Path, source: str = ESC50_URL, progress: Progress = lambda *_: None) -> int:
    """Makes `out` the folder of ESC-50 (Piczak 2015) and returns the number of its clips; all of them were read.

    `source` is a URL or a file of the archive. A folder that is complete already is left alone. ServiceError when the
    network gives up, DataError when what it gave is not ESC-50, or `out` is taken by something else.
    """
    if out.exists():
        try:
            return _check(out, progress)
        except DataError as error:
            raise DataError(
                f"OUT={out}: exists and is not ESC-50 ({error}); name another folder, or remove it"
            ) from error
    if urlsplit(source).scheme not in ("http", "https"):
        return _unpack(_local(source), out, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.zip.part")
    try:
        with FileLock(f"{part}.lock", timeout=0):
            _fetch(source, part, progress)
            num_clips = _unpack(part, out, progress)
    except Timeout as error:
        raise DataError(f"OUT={out}: another process downloads it; wait for it, or name another folder") from error
    except DataError:
        _forget(part)  # whole, and not what was wanted; the next call fetches it anew
        raise
    _forget(part)
    Path(f"{part}.lock").unlink(missing_ok=True)
    return num_clips


def _local(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"--from={source}: no such file, and no http(s) URL; name the archive, or leave --from out")
    return path


def _fetch(url: str, part: Path, progress: Progress) -> None:
    """Fetches a file, and where a connection breaks goes on from there; gives up when that brings nothing any more."""
    in_vain, most_bytes = 0, _size(part)
    while True:
        goes_on, reason = _tag_of(part, url) is not None, "the connection was cut off"
        before = _size(part) if goes_on else most_bytes  # without a tag each attempt begins anew
        try:
            if _fetch_rest(url, part, progress):
                return
        except HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code not in (408, 429) and error.code < 500:
                raise ServiceError(f"{url}: {reason}; name another source with --from") from error
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                raise
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        in_vain = 0 if _size(part) > before else in_vain + 1
        most_bytes = max(most_bytes, _size(part))
        if in_vain == ATTEMPTS:
            rest = "goes on from there" if _tag_of(part, url) is not None else "begins anew, since it tells no version"
            raise ServiceError(
                f"{url}: {reason}; {_size(part) / 1e6:.1f} MB are here, and the same command {rest}; "
                f"--from names another source"
            )
        time.sleep(in_vain * PAUSE_S)


def _fetch_rest(url: str, part: Path, progress: Progress) -> bool:
    """Fetches what is missing of a file, and tells whether it is whole now."""
    headers = {"User-Agent": f"meamtm/{__version__}"}
    tag = _tag_of(part, url)
    if tag is not None:
        headers |= {"Range": f"bytes={_size(part)}-", "If-Range": tag}
    else:
        _forget(part)
    try:
        response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=ANSWER_S)  # noqa: S310 - http(s) only
    except HTTPError as error:
        if error.code == 416 and tag is not None:  # nothing is missing, or all of it is another file's
            whole = error.headers.get("Content-Range", "").endswith(f"/{_size(part)}")
            if not whole:
                _forget(part)
            return whole
        raise
    with closing(response), part.open("ab" if response.status == 206 else "wb") as file:
        done = file.tell()
        length = response.headers.get("Content-Length")
        total = done + int(length) if length is not None else None
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if validator and not validator.startswith("W/"):
            _note(part).write_text(json.dumps({"url": url, "tag": validator}), encoding="utf-8")
        while chunk := response.read1(CHUNK_BYTES):
            file.write(chunk)
            done += len(chunk)
            progress("downloading", done, total)
    return total is None or done == total


def _tag_of(part: Path, url: str) -> str | None:
    """Gives the mark of the very file that a part is of, if the server gave one."""
    try:
        note = json.loads(_note(part).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return note["tag"] if note.get("url") == url and _size(part) > 0 else None


def _note(part: Path) -> Path:
    return Path(f"{part}.json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _unpack(archive: Path, out: Path, progress: Progress) -> int:
    """Unpacks audio and tables of an archive, and reads every clip before the folder gets its name."""
    try:
        with zipfile.ZipFile(archive) as packed, whole_folder(out) as folder:
            members = _members(packed, archive)
            for number, (name, info) in enumerate(members.items(), start=1):
                path = folder / name
                path.parent.mkdir(exist_ok=True)
                with packed.open(info) as inside, path.open("wb") as file:
                    shutil.copyfileobj(inside, file)
                progress("unpacking", number, len(members))
            return _check(folder, progress)
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        EOFError,
    ) as error:  # the third is for ways of packing unknown here
        raise DataError(f"{archive}: not a whole zip archive ({error}); download it again") from error


def _members(packed: zipfile.ZipFile, archive: Path) -> dict[str, zipfile.ZipInfo]:
    """Gives the files of ESC-50's folder by their names within it; DataError if one lies outside."""
    infos = [info for info in packed.infolist() if not info.is_dir()]
    for info in infos:
        path = PurePosixPath(info.filename)
        is_link = stat.S_ISLNK(info.external_attr >> 16)
        if path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename or is_link:
            raise DataError(
                f"{archive}: holds {info.filename!r}, which reaches out of its folder; nothing was unpacked"
            )
    if sum(info.file_size for info in infos) > LARGEST_BYTES:
        raise DataError(f"{archive}: unpacks to more than {LARGEST_BYTES >> 30} GiB, so it is not ESC-50")
    tables = [PurePosixPath(info.filename) for info in infos if info.filename.endswith(TABLE)]
    if len(tables) != 1:
        raise DataError(f"{archive}: holds {len(tables)} files {TABLE}, so it is not ESC-50")
    root = tables[0].parents[1]
    inside = {info: PurePosixPath(info.filename) for info in infos}
    wanted = {
        str(path.relative_to(root)): info
        for info, path in inside.items()
        if path.parent in (root, root / "audio", root / "meta") and path.suffix in (".wav", ".csv", ".md", "")
    }
    return dict(sorted(wanted.items()))


def _check(folder: Path, progress: Progress) -> int:
    """Reads every clip that the table names; DataError unless all 2,000 are there and sound."""
    clips = find_clips(folder).entries
    if len(clips) != ESC50_CLIPS:
        raise DataError(f"{TABLE} names {len(clips):,} clips instead of {ESC50_CLIPS:,}")
    for number, clip in enumerate(clips, start=1):
        try:
            read_audio(clip.path)
        except (DataError, OSError) as error:
            raise DataError(f"{clip.path.name}: {error}") from error
        progress("reading every clip", number, len(clips))
    return len(clips)
