"""One hour of 1080p through the whole server: ``python tests/benchmarks/serve_hour.py [--out RESULT.json]``.

Uploads the hour that ``decode_hour.py`` makes, waits for its prefill, asks, and fetches chunks and a thumbnail. Prints
JSON: seconds, and the peak resident memory of the server and of its decoder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil
from common import circumstances, to_json, write
from decode_hour import make_hour
from live_server import Job, ask, serving


class PeakMemory(threading.Thread):
    """Watches a process and its children until ``stop`` is set."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.server_nbytes = self.decoder_nbytes = 0
        self._process = psutil.Process(pid)

    def run(self) -> None:
        while not self.stop.wait(0.1):
            self.server_nbytes = max(self.server_nbytes, self._process.memory_info().rss)
            for child in self._process.children():
                try:
                    self.decoder_nbytes = max(self.decoder_nbytes, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", type=Path, help="an hour made before")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving() as live, live.client() as client:
        path = arguments.video or Path(folder) / "hour.mp4"
        if arguments.video is None:
            # In a process of its own: the encoder's memory must not count.
            maker = multiprocessing.get_context("spawn").Process(target=make_hour, args=(path,))
            maker.start()
            maker.join()
        idle_nbytes = psutil.Process(live.pid).memory_info().rss
        memory = PeakMemory(live.pid)
        memory.start()
        begin_s = time.monotonic()
        file = client.files.create(file=path, purpose="user_data")
        upload_s = time.monotonic() - begin_s
        file = client.files.wait_for_processing(file.id, max_wait_seconds=7200)
        if file.status != "processed":
            raise SystemExit(f"the hour was not processed: {file.status_details}")
        chunks = httpx.get(f"{live.url}/v1/files/{file.id}/chunks").json()
        thumbnail = httpx.get(f"{live.url}/v1/files/{file.id}/chunks/100/thumbnail")
        thumbnail.raise_for_status()
        begin_s = time.monotonic()
        reply = ask(client, Job(file.id, "What object is shown at 30:00?"))
        answer_s = time.monotonic() - begin_s
        memory.stop.set()
        memory.join()
        result = {
            **circumstances(arguments),
            "nbytes": path.stat().st_size,
            "upload_s": round(upload_s, 1),
            "video": {name: value for name, value in file.to_dict()["video"].items() if name != "chunks"},
            "num_chunks_listed": len(chunks),
            "answer_s": round(answer_s, 3),
            "cached_tokens": reply.usage["prompt_tokens_details"]["cached_tokens"],
            "peak_rss_mb": {
                "server_idle": round(idle_nbytes / 1e6),
                "server": round(memory.server_nbytes / 1e6),
                "decoder": round(memory.decoder_nbytes / 1e6),
            },
        }
        print(to_json(result))
        write(result, arguments.out)


if __name__ == "__main__":
    main()
