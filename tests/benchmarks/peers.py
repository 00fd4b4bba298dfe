"""What the same questions cost without this server: ``tests/benchmarks/peers.py --out RESULT.json --minutes 5 20 60``.

For videos of several lengths, on the same weights (Qwen2.5-VL, random or those of ``--model FOLDER``) and in one run:

- ``prefill``: transformers' ``generate``, to which every question is the whole video again;
- ``resident``: the whole uncompressed KVs kept on the device by ``generate``, as prefix caching keeps them;
- ``from disk``: those KVs read from a file (of the page cache, if it fits) for a question;
- ``transformers serve``: transformers' own server, asked over HTTP, which reads and prefills the file each time; once
  with the few frames that it takes by itself, once with as many as this server takes;
- ``x2l``: ``x2l serve`` with a follow-up question, its detailed chunks read from the disk store every time.

Times are to the first token, medians of ``--repeats``; transformers' ``generate`` gets the video's frames decoded
already, at the same size. The file is written anew after every length.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import to_json, write
from decode_hour import make_hour
from large_model import FPS, HEIGHT, WIDTH, ask, ask_gpu
from live_server import serving
from openai import OpenAI
from random_checkpoint import write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers_serve import TransformersServe, version, why_not

from server.bench.circumstances import circumstances
from server.models.base import Turn
from server.models.families.one_pass import OnePassModel
from server.models.registry import load_model
from server.video.frames import Frames
from server.video.reader import Sampling, VideoLimits, VideoReader

QUESTION = "What happens right after the red car has gone, and how often is it seen?"
NUM_NEW = 32
LONGEST_SERVED = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder with a Qwen2.5-VL, instead of random 7B weights")
    parser.add_argument("--minutes", type=int, nargs="+", default=[5, 20, 60])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--size", default=f"{WIDTH}x{HEIGHT}x{FPS}", help="of the video: width, height, frames a second"
    )
    parser.add_argument(
        "--serve-minutes",
        type=int,
        nargs="*",
        help=f"those of --minutes that transformers serve is asked about [up to {LONGEST_SERVED}]",
    )
    parser.add_argument("--serve-limit-s", type=float, default=120.0, help="most that one answer of it may take")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    given = parser.parse_args()
    served = given.serve_minutes
    if served is None:
        served = [minutes for minutes in given.minutes if minutes <= LONGEST_SERVED]
    if not set(served) <= set(given.minutes):
        parser.error("--serve-minutes must be among --minutes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = circumstances("python", sys.argv[0], bundled=False)
    result |= {"gpu": ask_gpu("name,driver_version,memory.total") if device == "cuda" else None, "lengths": []}
    with tempfile.TemporaryDirectory(prefix="x2l-peers-") as made:
        folder = Path(made)
        model = given.model or folder / "model"
        width, height, rate = map(int, given.size.split("x"))
        # In processes of their own: what they take of the GPU goes with them.
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as makers:
            jobs = [
                makers.submit(make_hour, folder / f"{minutes}.mp4", width, height, rate, minutes)
                for minutes in given.minutes
            ]
            if given.model is None:
                jobs.append(makers.submit(write_checkpoint, "qwen2_5_vl", model))
            for job in jobs:
                job.result()
            for minutes in given.minutes:
                video = folder / f"{minutes}.mp4"
                peer = makers.submit(transformers_alone, model, video, device, folder, given.repeats).result()
                result["lengths"].append({"minutes": minutes, "transformers": peer})
                print(to_json(result["lengths"][-1]), flush=True)
                write(result, given.out)
        # The processes above are gone: what they held of the GPU is free.
        result["transformers_serve"] = why_not() or version()
        with TransformersServe(model.resolve(), folder, given.serve_limit_s) as peer_server:
            for entry in result["lengths"]:
                if entry["minutes"] not in served or why_not():
                    continue
                video = folder / f"{entry['minutes']}.mp4"
                found = peer_server.measure(video, entry["minutes"], QUESTION, 1 + NUM_NEW, given.repeats)
                entry["transformers_serve"] = found
                print(to_json({"minutes": entry["minutes"], "transformers_serve": found}), flush=True)
                write(result, given.out)
        with serving("--model", str(model), "--gpu-low-kv-budget", "0") as live, live.client() as client:
            for entry in result["lengths"]:
                video = folder / f"{entry['minutes']}.mp4"
                entry["x2l"] = with_server(client, video, given.repeats)
                entry["ratios"] = ratios(entry)
                print(
                    to_json({"minutes": entry["minutes"], "x2l": entry["x2l"], "ratios": entry["ratios"]}), flush=True
                )
                write(result, given.out)


def transformers_alone(folder: Path, video: Path, device: str, scratch: Path, repeats: int) -> dict[str, Any]:
    """Seconds and bytes of transformers' own class on this video."""
    torch.manual_seed(0)
    with torch.inference_mode():
        given, behind = inputs(folder, video, device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        model = model.to(device).eval()
        weight_nbytes = sum(each.numel() * each.element_size() for each in model.parameters())
        end = {"do_sample": False, "use_cache": True, "return_dict_in_generate": True}
        # A question is what stands behind the video; all before it is what a prefix cache keeps.
        num_prefix = given["input_ids"].shape[1] - len(behind)

        def generate(num_new: int, cache: DynamicCache | None = None) -> Any:
            # With a cache of the video there is nothing to be seen any more.
            extra = given if cache is None else {"input_ids": given["input_ids"], "past_key_values": cache}
            return model.generate(**extra, **end, min_new_tokens=num_new, max_new_tokens=num_new)

        prefills = [measured(lambda: generate(1), device) for _ in range(repeats)]
        cache: Any = generate(1).past_key_values
        cache.crop(num_prefix - cache.get_seq_length())
        kept = {f"{kind}{index}": getattr(layer, kind).contiguous() for index, layer in enumerate(cache.layers)
                for kind in ("keys", "values")}  # fmt: skip
        cache_nbytes = sum(each.nbytes for each in kept.values())
        path = scratch / "cache.safetensors"
        save_file(kept, path)
        del kept

        def follow_up(num_new: int, cache: DynamicCache = cache) -> float:
            took_s = measured(lambda: generate(num_new, cache), device)
            cache.crop(num_prefix - cache.get_seq_length())
            return took_s

        follow_up(2)  # what comes first is slower
        first = [follow_up(1) for _ in range(repeats)]
        longer = [follow_up(1 + NUM_NEW) for _ in range(repeats)]
        del cache, follow_up
        reads = [measured(lambda: load_file(path, device=device), device) for _ in range(repeats)]
        path.unlink()
        total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
        first_s = statistics.median(first)
        return {
            "kv_tokens": num_prefix,
            "question_tokens": len(behind),
            "kv_nbytes": cache_nbytes,
            "weight_nbytes": weight_nbytes,
            "videos_that_fit": None if total is None else (total - weight_nbytes) // cache_nbytes,
            "prefill_ttft_s": round(statistics.median(prefills), 4),
            "resident_ttft_s": round(first_s, 4),
            "resident_ms_per_token": round((statistics.median(longer) - first_s) / NUM_NEW * 1000, 2),
            "read_s": round(statistics.median(reads), 4),
            "from_disk_ttft_s": round(first_s + statistics.median(reads), 4),
            "most_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None,
        }


def inputs(folder: Path, video: Path, device: str) -> tuple[dict[str, torch.Tensor], list[int]]:
    """What ``generate`` takes of a video and a question, and the tokens behind the video."""
    model: Any = load_model(str(folder), device="cpu", dtype="bfloat16" if device == "cuda" else "float32")
    assert isinstance(model, OnePassModel)
    with VideoReader(video, Sampling(1.0), VideoLimits()) as reader:
        batches = list(reader)
    frames = Frames(*(np.concatenate([getattr(each, name) for each in batches]) for name in ("pixels", "times_s")))
    patches, grid = model.vision.patches.flatten(model.preprocess(frames))
    ids = {
        word: model.tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for word in ("vision_start", "video_pad", "vision_end")
    }
    num_visual = model.num_visual_tokens(len(frames), frames.pixels.shape[2], frames.pixels.shape[1])
    behind = model.tokenize([Turn("user", QUESTION)], behind_media=True)
    around = [ids["vision_start"], *[ids["video_pad"]] * num_visual, ids["vision_end"]]
    whole = torch.tensor([[*model.prompt.prefix_ids, *around, *behind]], device=device)
    given = {
        "input_ids": whole,
        "attention_mask": torch.ones_like(whole),
        "mm_token_type_ids": torch.where(whole == ids["video_pad"], 2, 0),
        "pixel_values_videos": patches.to(device),
        "video_grid_thw": torch.tensor([grid], device=device),
        "second_per_grid_ts": torch.tensor([2.0], device=device),
    }
    return given, behind


def measured(work: Callable[[], object], device: str) -> float:
    """Seconds."""
    begin_s = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s


def with_server(client: OpenAI, video: Path, repeats: int) -> dict[str, Any]:
    """A video behind the whole server: its prefill, and follow-up questions as a client sees them."""
    with video.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="user_data")
    uploaded = client.files.wait_for_processing(uploaded.id, poll_interval=0.2, max_wait_seconds=1800)
    if uploaded.status != "processed":
        raise SystemExit(f"{video.name}: {uploaded.status_details}")
    model = client.models.list().data[0].id
    answers = [ask(client, model, uploaded.id, QUESTION, 1 + NUM_NEW) for _ in range(1 + repeats)][1:]
    speed = statistics.median(answer["decode_tokens_per_s"] for answer in answers)
    described: Any = uploaded.to_dict()["video"]
    client.files.delete(uploaded.id)
    return {
        "prefill_s": described["prefill_s"],
        "resident_nbytes": described["bytes"]["high"],
        "stored_nbytes": described["bytes"]["low"],
        "kv_tokens": answers[-1]["kv_tokens"],
        "reload_nbytes": answers[-1]["reload_bytes"],
        "ttft_s": round(statistics.median(answer["ttft_ms"] for answer in answers) / 1000, 4),
        "ms_per_token": round(1000 / speed, 2) if speed else None,  # an answer may have ended at once
    }


def ratios(entry: dict[str, Any]) -> dict[str, float | None]:
    """How many times more transformers takes than the server."""
    peer, own = entry["transformers"], entry["x2l"]
    served = {name: found.get("ttft_s") for name, found in entry.get("transformers_serve", {}).items()}
    return {
        **{
            name: round(peer[name] / own["ttft_s"], 1)
            for name in ("prefill_ttft_s", "resident_ttft_s", "from_disk_ttft_s")
        },
        **{f"serve_{name}_ttft_s": round(took_s / own["ttft_s"], 1) for name, took_s in served.items() if took_s},
        "ms_per_token": round(peer["resident_ms_per_token"] / own["ms_per_token"], 2) if own["ms_per_token"] else None,
        "resident_nbytes": round(peer["kv_nbytes"] / own["resident_nbytes"], 1),
    }


if __name__ == "__main__":
    main()
