"""The rows of the published table: a figure, its floor, how far apart they are, and the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_HIGHEST_TTFT_MS = {"memory": 80, "disk": 200}
_LEAST_OVER_WHOLE = {"memory": 3, "disk": 20}
_LEAST_OVER_PREFILL = 200
_LEAST_OF_FLOOR = {1: 0.75, 32: 0.65}
_WHERE = {"device": "on the device", "memory": "in host memory", "disk": "on disk"}


@dataclass(frozen=True)
class Row:
    """``figure`` and ``floor`` in ``unit``; ``of_floor`` is how near the figure comes to it, at most 1 by its idea.
    ``met`` is None where nothing is asked for."""

    name: str
    figure: float
    unit: str
    floor: float | None = None
    of_floor: float | None = None
    target: str = ""
    met: bool | None = None


def make_table(result: Mapping[str, Any]) -> list[Row]:
    """Of the JSON that a run makes. The targets of time are those of 7B shapes on an H100."""
    return [
        *(row for part in result["follow_up"] for row in _follow_up(part)),
        *(_decode(part) for part in result["decode"]),
        *_prefill(result["prefill"], result["prefill_parts"]),
        _resident(result["resident"]),
        *_load(result["load"]),
        *(_overhead(part) for part in result["decode"]),
        *_peer(result["full_kv_prefix_caching"]),
    ]


def format_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of text, of rows as the JSON holds them."""
    cells = [["", "figure", "floor", "of floor", "target", ""]]
    for row in rows:
        cells.append(
            [
                row["name"],
                f"{_number(row['figure'])} {row['unit']}".strip(),
                "-" if row["floor"] is None else _number(row["floor"]),
                "-" if row["of_floor"] is None else f"{row['of_floor']:.0%}",
                row["target"] or "-",
                {True: "met", False: "MISSED", None: ""}[row["met"]],
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _follow_up(part: Mapping[str, Any]) -> Iterator[Row]:
    tier, p50 = part["tier"], part["ttft_ms_p50"]
    where, most, least = _WHERE[tier], _HIGHEST_TTFT_MS.get(tier), _LEAST_OVER_WHOLE.get(tier)
    yield Row(
        f"follow-up TTFT p50, L-KVs {where}",
        p50,
        "ms",
        part["floor_ms"],
        round(part["floor_ms"] / p50, 3),
        f"<= {most} ms" if most else "",
        p50 <= most if most else None,
    )
    over = part["prefill_over_ttft"]
    name = f"  prefilling the video again / that ({part['prefill_s']:g} s)"
    yield Row(name, over, "x", target=f">= {_LEAST_OVER_PREFILL}x", met=over >= _LEAST_OVER_PREFILL)
    over, (done, every) = part["whole_low_over_ttft"], part["whole_low_chunks"]
    scaled = "" if done == every else f", scaled from {done} of {every} chunks"
    name = f"  re-loading the whole L cache / that ({part['whole_low_ms']:g} ms{scaled})"
    yield Row(name, over, "x", target=f">= {least}x" if least else "", met=over >= least if least else None)


def _decode(part: Mapping[str, Any]) -> Row:
    least = _LEAST_OF_FLOOR.get(part["batch"])
    filled = "" if part["full"] else f" (only {part['rows_in_a_pass']:g} rows in a pass)"
    shared = f" of {part['videos']} videos" if part.get("videos", part["batch"]) < part["batch"] else ""
    whole = f" (all of a video; {part['asked_kv_tokens']} were asked for)" if part.get("all_kv_tokens") else ""
    return Row(
        f"decode, batch {part['batch']}, {part['kv_tokens']} KV tokens each{shared}{whole}{filled}",
        part["step_ms"],
        "ms a step",
        part["floor_ms"],
        part["of_floor"],
        f">= {least:.0%} of the floor" if least else "",
        bool(part["full"] and part["of_floor"] >= least) if least else None,
    )


def _prefill(whole: Mapping[str, Any], parts: Mapping[str, Any]) -> Iterator[Row]:
    pace, floor = whole["s_per_video_minute"], whole["floor_s_per_video_minute"]
    name = f"prefill of {whole['video_minutes']:g} min, both levels, end to end ({whole['mode']})"
    yield Row(name, pace, "s a video-minute", floor, round(floor / pace, 3), "<= 1.5 s", pace <= 1.5)
    share = parts["language_share_of_matmul"]
    yield Row(
        "  language model's part",
        parts["language_gflop_s"],
        "GFLOP/s",
        round(parts["language_gflop_s"] / share, 2) if share else None,
        share,
        ">= 45% of a matrix product",
        share >= 0.45,
    )
    vision = parts["vision_frames_per_s"]
    share = parts["vision_share_of_matmul"]
    yield Row("  vision tower", vision, "frames/s", round(vision / share, 1) if share else None, share)
    decoding = parts["decode_frames_per_s"]
    both = 1 / (1 / vision + 1 / parts["language_frames_per_s"])
    target = f">= vision tower and language model ({_number(both)})"
    yield Row("  decoding", decoding, "frames/s", target=target, met=decoding >= both)
    tenths = whole["tenths_s"]
    if tenths:
        over = round(tenths[-1] / tenths[0], 2)
        yield Row("  its last tenth / its first", over, "x", target="<= 2x", met=over <= 2)


def _resident(part: Mapping[str, Any]) -> Row:
    return Row(
        f"resident KVs, against 1/{part['high_ratio']} of all",
        part["mb_per_hour"],
        "MB a video-hour",
        part["floor_mb_per_hour"],
        round(1 / part["over_floor"], 3),
        "within 10%",
        abs(part["over_floor"] - 1) <= 0.1,
    )


def _load(part: Mapping[str, Any]) -> Iterator[Row]:
    name = f"{part['questions']} questions at once, {part['videos']} videos"
    yield Row(f"{name}: failures", part["failures"], "", target="0", met=part["failures"] == 0)
    pace, floor = part["tokens_per_s"], part["floor_tokens_per_s"]
    yield Row("  tokens a second", pace, "tokens/s", floor, round(pace / floor, 3))
    over = part["over_alone"]
    yield Row(f"  that / one at a time ({part['tokens_per_s_alone']:g})", over, "x", target=">= 8x", met=over >= 8)
    over = part["p99_over_p50"]
    if over is not None:
        name = f"  TTFT p99 / p50 ({part['ttft_ms_p99']:g} / {part['ttft_ms_p50']:g} ms)"
        yield Row(name, over, "x", target="<= 10x", met=over <= 10)


def _overhead(part: Mapping[str, Any]) -> Row:
    took = part["overhead_ms_per_token"]
    name = f"scheduler + API, batch {part['batch']}, {part['kv_tokens']} KV tokens each"
    return Row(name, took, "ms a token", target="<= 1 ms", met=took <= 1)


def _peer(part: Mapping[str, Any]) -> Iterator[Row]:
    name = "full-KV prefix caching (computed from measured rates)"
    yield Row(f"{name}: KVs", part["mb_per_hour"], "MB a video-hour")
    here = part["hours_that_fit_here"]
    yield Row(f"  fit beside the weights in {part['memory_gb']:g} GB ({here:g} here)", part["hours_that_fit"], "hours")
    yield Row("  re-load of an hour from disk", part["reload_hour_s"], "s")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
