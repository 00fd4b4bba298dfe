"""Drives ``x2l serve`` from lmms-eval's ``openai`` chat model, which sends every video as a ``file:///`` URL.

    python3 -m venv /tmp/lmms && /tmp/lmms/bin/pip install 'lmms-eval==0.7.*'
    python tests/benchmarks/lmms_eval/run.py --lmms-eval /tmp/lmms/bin/python > tests/benchmarks/results/lmms_eval.txt

(Where torchvision does not match the CPU build of torch, uninstall it there: nothing here needs it.)

Makes three videos of two chunks with questions in MLVU's format, serves the bundled model, and prints what lmms-eval
prints, then the replies. The point is that the two understand each other: the bundled model has never seen a
multiple-choice question.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from live_server import MODEL, Live, serving  # noqa: E402

from server.models.tiny.make_video import make_video  # noqa: E402

SEEDS = (600, 601, 602)
TASKS = {"count": "count", "order": "order", "code": "needle"}  # the generator's types as MLVU's
NUM_FRAMES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lmms-eval", required=True, help="the Python that has lmms-eval")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="x2l-lmms-eval-") as name:
        folder = Path(name).resolve()
        (folder / "video").mkdir()
        rows = [row for seed in SEEDS for row in make_rows(folder / "video", seed)]
        (folder / "mlvu_tiny.json").write_text(json.dumps(rows))
        with serving("--allowed-local-media-path", str(folder)) as live:
            printed = evaluate(given.lmms_eval, folder, live)
            with live.client() as client:
                files = [file.to_dict() for file in client.files.list().data]
        names = {str(folder): "DATA", str(HERE): "tests/benchmarks/lmms_eval", live.url: "http://127.0.0.1:8000"}
        for found, shown in names.items():
            printed = printed.replace(found, shown)
        print(printed.strip())
        print_replies(next(folder.rglob("*_samples_*.jsonl")))
        print("\nvideos that the server prefilled")
        for file in sorted(files, key=lambda file: file["filename"]):
            print(f"{file['filename']}: {file['status']}, {file['video']['num_frames']} frames")


def make_rows(folder: Path, seed: int) -> list[dict[str, Any]]:
    """A video, and a question of each task in MLVU's format. Wrong candidates are answers of its other questions."""
    path = folder / f"seed_{seed}.mp4"
    facts = make_video(path, seed, 2)
    rows = []
    rng = random.Random(seed)
    for kind, task in TASKS.items():
        asked = [question for question in facts["questions"] if question["type"] == kind]
        if not asked:
            continue
        answer = asked[0]["answer"]
        others = sorted({question["answer"] for question in facts["questions"]} - {answer})
        candidates = [answer, *rng.sample(others, 3)]
        rng.shuffle(candidates)
        row = {"video": path.name, "duration": facts["duration_s"], "question": asked[0]["question"]}
        rows.append(row | {"candidates": candidates, "answer": answer, "question_type": task})
    return rows


def evaluate(python: str, folder: Path, live: Live) -> str:
    """What lmms-eval prints, without progress bars. Ends the run if it fails."""
    model = {
        "model_version": MODEL,
        "base_url": f"{live.url}/v1",
        "api_key": "none",
        "pass_video_url": True,
        "max_frames_num": NUM_FRAMES,
        "num_concurrent": 4,
    }
    command = [python, "-m", "lmms_eval", "--model", "openai", "--include_path", str(HERE), "--tasks", "mlvu_tiny"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in model.items())]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    env = os.environ | {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"lmms-eval failed:\n{done.stdout}")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    plain = re.sub(r"^[^\n]*(?:\d+%\|| examples/s\])[^\n]*?(?=\d{4}-\d\d-\d\d |$)", "", plain, flags=re.MULTILINE)
    shown = " ".join(["$ python -m lmms_eval", *command[3:]])
    return "\n".join([shown, *re.sub(r"\n\s*\n+", "\n", plain).splitlines()])


def print_replies(path: Path) -> None:
    """The question, the right letter and the reply of every sample."""
    print("\nreplies")
    for line in path.read_text().splitlines():
        sample = json.loads(line)
        print(json.dumps({name: sample.get(name) for name in ("input", "target", "filtered_resps")}))


if __name__ == "__main__":
    main()
