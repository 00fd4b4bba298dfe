"""A decoder process that hangs, crashes or lies, and a reader that is closed early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from clips import Clips

from server.video.errors import DecoderCrashed, VideoCancelled, VideoError, VideoTimeout
from server.video.process import DECODER_COMMAND
from server.video.reader import Sampling, VideoLimits, VideoReader

REPO = Path(__file__).parents[3]

# The real decoder process, which misbehaves at its frame number `at`.
MISBEHAVE = """
import ctypes, importlib.util, os, subprocess, sys, time
spec = importlib.util.spec_from_file_location("worker", sys.argv.pop(1))
worker = sys.modules["worker"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
real, count = worker.Decoder.decode, 0
def decode(self, *arguments):
    global count
    count += 1
    if count > {at}:
        {deed}
    return real(self, *arguments)
worker.Decoder.decode = decode
worker.main()
"""
SLEEP = "time.sleep(600)"
SPIN = "\n        while True: pass"
SEGFAULT = "ctypes.string_at(0)"
EXIT = "os._exit(0)"


def misbehaving(deed: str, at: int) -> list[str]:
    return [sys.executable, "-c", MISBEHAVE.format(deed=deed, at=at), DECODER_COMMAND[-1]]


def lying(messages: str) -> list[str]:
    """A decoder that sends these messages (Python source of bytes) and then waits."""
    send = (
        "import sys, time, struct; m = lambda k, p=b'', n=None: struct.pack('>cI', k, len(p) if n is None else n) + p; "
    )
    return [sys.executable, "-c", f"{send}sys.stdout.buffer.write({messages}); sys.stdout.flush(); time.sleep(600)"]


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    process = psutil.Process()
    before, others = (process.num_fds(), threading.active_count()), process.children(recursive=True)
    yield
    assert [child for child in process.children(recursive=True) if child not in others] == []
    assert (process.num_fds(), threading.active_count()) == before


def read_all(clips: Clips, command: list[str], **limits: float) -> int:
    limits = {"stall_s": 1.5, **limits}
    with VideoReader(clips("mp4").path, Sampling(2.0), VideoLimits(**limits), command=command) as reader:
        return sum(len(frames) for frames in reader)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("deed", [SLEEP, SPIN])
def test_a_hanging_decoder_is_killed(clips: Clips, deed: str, at: int) -> None:
    with pytest.raises(VideoTimeout, match="no progress") as refusal:
        read_all(clips, misbehaving(deed, at))
    assert refusal.value.code == "video_timeout"


def test_a_decoder_that_never_speaks_is_killed(clips: Clips) -> None:
    with pytest.raises(VideoTimeout):
        read_all(clips, [sys.executable, "-c", "import time; time.sleep(600)"])


def test_children_of_a_hanging_decoder_are_killed_too(clips: Clips) -> None:
    with pytest.raises(VideoTimeout):
        read_all(clips, misbehaving(f"subprocess.Popen(['sleep', '600']); {SLEEP}", 2))


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("deed", [SEGFAULT, EXIT, "os.abort()", "os._exit(3)", "raise ZeroDivisionError"])
def test_a_crashing_decoder_is_an_error(clips: Clips, deed: str, at: int) -> None:
    with pytest.raises(DecoderCrashed, match="crashed") as refusal:
        read_all(clips, misbehaving(deed, at), stall_s=20.0)
    assert refusal.value.code == "video_decoder_crashed"


def test_the_wall_clock_is_limited_though_frames_come(clips: Clips) -> None:
    with pytest.raises(VideoTimeout, match="longer than 1 s"):
        read_all(clips, misbehaving("time.sleep(0.4)", 0), wall_clock_s=1.0)


def test_a_slow_consumer_is_no_timeout(clips: Clips) -> None:
    clip = clips("mp4")
    limits = VideoLimits(stall_s=1.5, wall_clock_s=3.0)
    with VideoReader(clip.path, Sampling(4.0), limits, batch_nbytes=8 * 320 * 180 * 3) as reader:
        number = 0
        for frames in reader:
            time.sleep(1.7)
            number += len(frames)
    assert number == 16


@pytest.mark.parametrize(
    "messages",
    [
        "b'garbage, no message at all'",
        "m(b'I', b'no json')",
        "m(b'I', b'[1, 2]')",
        "m(b'I', b'{}')",
        """m(b'I', b'{"duration_s": NaN, "width": 320, "height": 180}')""",
        """m(b'I', b'{"duration_s": 4, "width": -320, "height": 180}')""",
        "m(b'I', b'x' * 5000, 2**32 - 1)",
        "m(b'F', b'x', 1)",
        """m(b'I', b'{"duration_s":4,"width":8,"height":8}') + m(b'O', b'{"width":8,"height":8}') + m(b'F', n=2**31)""",
        """m(b'I', b'{"duration_s":4,"width":8,"height":8}') + m(b'O', b'{"width":8,"height":8}') + m(b'E')""",
        """m(b'X', b'{"error": "Path", "message": "x"}')""",
        """m(b'X', b'{"error": "DECODER_COMMAND"}')""",
    ],
)
def test_nothing_a_decoder_says_is_trusted(clips: Clips, messages: str) -> None:
    with pytest.raises(DecoderCrashed):
        read_all(clips, lying(messages), stall_s=20.0)


def test_a_command_that_cannot_start(clips: Clips) -> None:
    with pytest.raises(DecoderCrashed, match="could not be started"):
        read_all(clips, ["/nonexistent/decoder"])


def test_leaving_early_ends_the_decoder(clips: Clips) -> None:
    others = psutil.Process().children()
    with VideoReader(clips("mp4").path, Sampling(10.0), VideoLimits(), batch_nbytes=1) as reader:
        frames = iter(reader)
        next(frames)
        children = [child for child in psutil.Process().children() if child not in others]
    assert len(children) == 1
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_close_from_another_thread_wakes_a_waiting_reader(clips: Clips) -> None:
    command = misbehaving(SLEEP, 2)
    with VideoReader(clips("mp4").path, Sampling(1.0), VideoLimits(), command=command, batch_nbytes=1) as reader:
        frames = iter(reader)
        next(frames)
        next(frames)
        timer = threading.Timer(0.3, reader.close)
        timer.start()
        with pytest.raises(VideoCancelled) as refusal:
            next(frames)
        timer.join()
    assert refusal.value.code == "video_cancelled"


def test_a_closed_reader_gives_no_frames(clips: Clips) -> None:
    reader = VideoReader(clips("mp4").path, Sampling(1.0), VideoLimits())
    reader.close()
    reader.close()
    with pytest.raises(VideoError, match="cancelled"):
        list(reader)


def test_the_decoder_ends_when_the_server_is_killed(clips: Clips) -> None:
    server = """
import os, sys
import psutil
from server.video.reader import Sampling, VideoLimits, VideoReader
reader = VideoReader(sys.argv[1], Sampling(40.0), VideoLimits())
print(psutil.Process().children()[0].pid, flush=True)
os.kill(os.getpid(), 9)
"""
    clip = clips("mp4", width=1280, height=720)
    run = subprocess.run([sys.executable, "-c", server, str(clip.path)], capture_output=True, text=True, cwd=REPO)
    assert run.returncode == -9
    decoder_pid = int(run.stdout)
    deadline_s = time.monotonic() + 10
    while psutil.pid_exists(decoder_pid) and psutil.Process(decoder_pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_the_decoder_inherits_no_environment_and_no_open_files(clips: Clips, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("X2L_API_KEY", "secret")
    seen = tmp_path / "seen"
    spy = (
        "import json, os, sys; fds = [os.readlink(f'/proc/self/fd/{fd}') for fd in (0, 1, 2, *range(3, 64)) if {test}]"
    )
    spy = spy.replace("{test}", "os.path.exists(f'/proc/self/fd/{fd}')")
    spy += f"; open({str(seen)!r}, 'w').write(json.dumps([dict(os.environ), fds]))"
    with (tmp_path / "open").open("wb") as file:
        os.set_inheritable(file.fileno(), True)
        with pytest.raises(DecoderCrashed):
            read_all(clips, [sys.executable, "-c", spy], stall_s=20.0)
    environment, files = json.loads(seen.read_text())
    assert "X2L_API_KEY" not in environment
    assert str(tmp_path / "open") not in files
