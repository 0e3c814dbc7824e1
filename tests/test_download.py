"""ESC-50 from a server that breaks off, does not know ranges, changes its file or gives something else."""

import io
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command import meamtm_command

import meamtm.data.download as module
from meamtm.data.download import download_esc50
from meamtm.errors import DataError, ServiceError

TABLE = "ESC-50-master/meta/esc50.csv"


def wav(seed: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(seed).uniform(-0.5, 0.5, 80), 8_000, format="WAV", subtype="PCM_16")
    return out.getvalue()


def archive_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return out.getvalue()


def official(num_clips: int) -> dict[str, bytes]:
    """What lies in the official archive, with shorter sounds."""
    names = [f"{i % 5 + 1}-{100_000 + i}-A-{i % 50}.wav" for i in range(num_clips)]
    rows = [f"{name},{name[0]},{i % 50},class{i % 50},False,{100_000 + i},A" for i, name in enumerate(names)]
    table = "\n".join(["filename,fold,target,category,esc10,src_file,take", *rows])
    sound = [wav(seed) for seed in range(20)]
    audio = {f"ESC-50-master/audio/{name}": sound[i % 20] for i, name in enumerate(names)}
    return {"ESC-50-master/README.md": b"ESC-50", TABLE: table.encode(), **audio}


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The archive's files, were it of 100 clips, so that a fault takes no minute to test."""
    monkeypatch.setattr(module, "ESC50_CLIPS", 100)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 10)
    return official(100)


@pytest.fixture
def archive(files: dict[str, bytes]) -> bytes:
    return archive_of(files)


@dataclass
class Server:
    """A local server of one file, with the faults of real ones."""

    data: bytes
    tag: str = '"first"'
    knows_ranges: bool = True
    tells_length: bool = True
    breaks_after: list[int] = field(default_factory=list)
    """Bytes after which it breaks each of the next answers off."""
    refuses_with: list[int] = field(default_factory=list)
    """Status of each of the next answers."""
    pause_s: float = 0.0
    asked: list[str] = field(default_factory=list)
    """The range that each request asked for, or an empty text."""
    url: str = ""


@pytest.fixture
def server(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server(archive)
    monkeypatch.setattr(module, "PAUSE_S", 0.01)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            state.asked.append(wanted)
            if state.refuses_with:
                self.send_error(state.refuses_with.pop(0))
                return
            first = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", wanted)) and state.knows_ranges else 0
            if self.headers.get("If-Range") != state.tag:
                first = 0
            if first >= len(state.data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.data)}")
                self.end_headers()
                return
            rest = state.data[first:]
            self.send_response(206 if first else 200)
            self.send_header("ETag", state.tag)
            if state.tells_length:
                self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            end = state.breaks_after.pop(0) if state.breaks_after else len(rest)
            try:
                for start in range(0, end, 1 << 14):
                    self.wfile.write(rest[start : min(start + (1 << 14), end)])
                    time.sleep(state.pause_s)
            except ConnectionError:  # a client that was killed
                return

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Keeps quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}/master.zip"
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield state
        http.shutdown()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_holds_every_clip_and_can_be_packed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ESC50_CLIPS", 2_000)
    server.data = archive_of(official(2_000))
    steps: list[tuple[str, int, int | None]] = []
    out = tmp_path / "raw" / "esc50"
    assert download_esc50(out, server.url, lambda *step: steps.append(step)) == 2_000
    assert left(tmp_path / "raw") == ["esc50"]
    assert left(out) == ["README.md", "audio", "meta"]
    last = {what: (done, total) for what, done, total in steps}
    assert last["downloading"] == (len(server.data), len(server.data))
    assert last["reading every clip"] == (2_000, 2_000)
    assert meamtm_command("pack", out, tmp_path / "packed").out.startswith("2000 clips, 50 classes, 5 folds")

    asked = len(server.asked)
    assert download_esc50(out, server.url) == 2_000
    assert len(server.asked) == asked, "what is complete is not fetched again"


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.breaks_after = [10_000, 0, 5_000]
    assert download_esc50(tmp_path / "esc50", server.url) == 100
    assert server.asked == ["", "bytes=10000-", "bytes=10000-", "bytes=15000-"]


def test_a_server_that_is_busy_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.refuses_with = [503, 429]
    assert download_esc50(tmp_path / "esc50", server.url) == 100


def test_a_server_without_ranges_begins_anew(server: Server, tmp_path: Path) -> None:
    server.knows_ranges, server.breaks_after = False, [10_000]
    assert download_esc50(tmp_path / "esc50", server.url) == 100


def test_a_server_that_always_breaks_off_before_its_end_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept of a file that tells no version: an attempt longer than the last one is no progress."""
    monkeypatch.setattr(module, "ATTEMPTS", 3)
    server.tag, server.breaks_after = "W/weak", [10_000, 20_000, *(1_000, 2_000) * 20]
    with pytest.raises(ServiceError, match=r"cut off; .* and the same command begins anew, since it tells no version"):
        download_esc50(tmp_path / "esc50", server.url)
    assert server.asked == [""] * 5, "the second brought more than the first"


def test_a_file_that_changed_meanwhile_is_fetched_whole(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    server.breaks_after = [10_000, 0]
    with pytest.raises(ServiceError, match=r"cut off; 0.0 MB are here, and the same command goes on from there"):
        download_esc50(tmp_path / "esc50", server.url)
    server.tag = '"second"'
    assert download_esc50(tmp_path / "esc50", server.url) == 100
    assert server.asked[-1] == "bytes=10000-"


def test_a_server_that_tells_no_length_is_believed_once_the_archive_is_whole(server: Server, tmp_path: Path) -> None:
    server.tells_length = False
    assert download_esc50(tmp_path / "esc50", server.url) == 100


def test_a_file_that_is_not_there_is_told_at_once(server: Server, tmp_path: Path) -> None:
    server.refuses_with = [404]
    with pytest.raises(ServiceError, match=r"HTTP 404 Not Found; name another source with --from"):
        download_esc50(tmp_path / "esc50", server.url)
    assert len(server.asked) == 1


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    shown = meamtm_command("download", "esc50", tmp_path / "esc50", "--from", "http://127.0.0.1:9/x.zip")
    assert shown.code == 2
    assert "Connection refused" in shown.err
    assert shown.err.count("\n") == 1


def test_a_killed_download_goes_on(server: Server, tmp_path: Path) -> None:
    server.pause_s = 1.0
    words = [sys.executable, "-m", "meamtm.cli", "download", "esc50", str(tmp_path / "esc50"), "--from", server.url]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part, deadline_s = tmp_path / ".esc50.zip.part", time.monotonic() + 60
    while not part.exists() or part.stat().st_size < 10_000:
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "esc50").exists()
    there, server.pause_s = part.stat().st_size, 0.0
    shown = meamtm_command("download", "esc50", tmp_path / "esc50", "--from", server.url)
    assert shown.code == 0, shown.err
    assert shown.out.startswith("100 clips, all of them readable")
    assert server.asked[-1] == f"bytes={there}-"


def test_a_local_archive_needs_no_network(archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.zip").write_bytes(archive)
    assert download_esc50(tmp_path / "esc50", str(tmp_path / "mine.zip")) == 100
    assert left(tmp_path) == ["esc50", "mine.zip"]
    with pytest.raises(DataError, match="--from=ftp://x/y: no such file"):
        download_esc50(tmp_path / "other", "ftp://x/y")


def with_a_link(files: dict[str, bytes]) -> bytes:
    info = zipfile.ZipInfo("ESC-50-master/audio/link.wav")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    out = io.BytesIO(archive_of(files))
    with zipfile.ZipFile(out, "a") as packed:
        packed.writestr(info, "/etc/passwd")
    return out.getvalue()


def with_a_flipped_bit(files: dict[str, bytes]) -> bytes:
    data = bytearray(archive_of(files))
    data[data.index(b"data") + 20] ^= 0xFF
    return bytes(data)


def with_a_broken_stream(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    broken = bytearray(out.getvalue())
    broken[30 + len(next(iter(files)))] = 0x07  # the first byte of the first file: a kind of block that there is not
    return bytes(broken)


CLIP = "ESC-50-master/audio/1-100000-A-0.wav"
DAMAGES: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "not a zip": (lambda _: b"<html>Please log in</html>" * 100, "not a whole zip archive"),
    "torn": (lambda files: archive_of(files)[:-5_000], "not a whole zip archive"),
    "its stream is broken": (with_a_broken_stream, "not a whole zip archive"),
    "a bit is flipped": (with_a_flipped_bit, "not a whole zip archive"),
    "a clip is missing": (
        lambda files: archive_of({name: data for name, data in files.items() if name != CLIP}),
        r"1-100000-A-0.wav: .*",
    ),
    "a clip is text": (lambda files: archive_of({**files, CLIP: b"not a sound"}), r"1-100000-A-0.wav: .*"),
    "a row is missing": (
        lambda files: archive_of({**files, TABLE: files[TABLE].rpartition(b"\n")[0]}),
        "names 99 clips instead of 100",
    ),
    "another archive": (
        lambda _: archive_of({"x/y.txt": b"z"}),
        "holds 0 files meta/esc50.csv, so it is not ESC-50",
    ),
    "it climbs": (
        lambda files: archive_of({**files, "ESC-50-master/audio/../../../../climbed.wav": b"x"}),
        r"climbed.wav', which reaches out of its folder; nothing was unpacked",
    ),
    "it is absolute": (
        lambda files: archive_of({**files, "/tmp/climbed.wav": b"x"}),
        r"'/tmp/climbed.wav', which reaches out of its folder; nothing was unpacked",
    ),
    "it links": (with_a_link, r"link.wav', which reaches out of its folder; nothing was unpacked"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_esc50_leaves_nothing_behind(
    server: Server,
    files: dict[str, bytes],
    tmp_path: Path,
    damage: Callable[[dict[str, bytes]], bytes],
    reason: str,
) -> None:
    server.data = damage(files)
    with pytest.raises(DataError, match=reason):
        download_esc50(tmp_path / "in" / "esc50", server.url)
    assert [name for name in left(tmp_path / "in") if not name.endswith(".lock")] == []
    assert left(tmp_path) == ["in"]


def test_a_folder_that_is_something_else_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "esc50").mkdir()
    (tmp_path / "esc50" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match=r"OUT=.*esc50: exists and is not ESC-50 \(.*\); name another folder"):
        download_esc50(tmp_path / "esc50", server.url)
    assert left(tmp_path / "esc50") == ["mine.txt"]
    assert server.asked == []
