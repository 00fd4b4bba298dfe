"""``x2l ask``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import httpx
import typer
from rich.console import Console
from rich.table import Table

from server.cli.files import clock
from server.cli.text import printable
from server.client import DEFAULT_BASE_URL, ApiKey, BaseUrl, check, connect, event_stream


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(ask)


def ask(
    words: Annotated[
        list[str],
        typer.Argument(metavar="FILE_ID QUESTION", help="Ids that x2l upload printed, then the question in quotes."),
    ],
    reload: Annotated[int | None, typer.Option(min=0, help="Chunks to re-load.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(min=1, help="Bound of the whole mixed cache.")] = None,
    chunks: Annotated[str | None, typer.Option(help="Exactly these chunks, like 3,7.")] = None,
    mode: Annotated[Literal["auto", "low", "high"] | None, typer.Option(help="All chunks at one level.")] = None,
    start_s: Annotated[float | None, typer.Option(min=0, help="Look from here ...")] = None,
    end_s: Annotated[float | None, typer.Option(min=0, help="... to here only.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the whole reply as JSON.")] = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = "",
) -> None:
    """Asks a question about one uploaded video, or about several together.

    Prints the answer as it comes, then the evidence.
    """
    *file_ids, question = _with_all_said(words)
    dials = {
        "reload": reload,
        "budget_tokens": budget_tokens,
        "chunks": _indices(chunks),
        "mode": mode,
        "start_s": start_s,
        "end_s": end_s,
    }
    options = {
        "x2l": {name: value for name, value in dials.items() if value is not None},
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    options = {name: value for name, value in options.items() if value not in (None, {})}
    with connect(base_url, api_key) as client:
        if json_output:
            reply = check(client.post("/v1/chat/completions", json=chat_body(client, file_ids, question, options)))
            print(json.dumps(reply.json(), indent=2, ensure_ascii=False))
            return
        _, evidence = stream_answer(client, file_ids, question, options)
    print_evidence(evidence, Console(stderr=True))


def stream_answer(
    client: httpx.Client, file_ids: Sequence[str], question: str, options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Prints the answer as it comes, and on stderr if it was cut off; the whole text and the reply's ``x2l`` object.
    Raises ServerError."""
    body = chat_body(client, file_ids, question, options) | {"stream": True}
    text, ended = "", ""
    evidence: dict[str, Any] = {}
    try:
        with event_stream(client, "POST", "/v1/chat/completions", json=body) as chunks:
            for chunk in chunks:
                [choice] = chunk["choices"]
                piece = choice["delta"].get("content") or ""
                ended = choice["finish_reason"] or ended
                print(printable(piece, keep="\n\t"), end="", flush=True)
                text += piece
                evidence = chunk.get("x2l", evidence)
    finally:
        if text:  # also of an answer that breaks off
            print(flush=True)
    if ended == "length":
        print("the answer was cut off: it may not be longer (see --max-tokens, here and of x2l serve)", file=sys.stderr)
    return text, evidence


def chat_body(client: httpx.Client, file_ids: Sequence[str], question: str, options: dict[str, Any]) -> dict[str, Any]:
    """The request's body for one question about these files."""
    files: list[dict[str, Any]] = [{"type": "file", "file": {"file_id": file_id}} for file_id in file_ids]
    content = [*files, {"type": "text", "text": question}]
    model = check(client.get("/v1/models")).json()["data"][0]["id"]
    return {"model": model, "messages": [{"role": "user", "content": content}]} | options


def print_evidence(x2l: dict[str, Any], console: Console) -> None:
    """The re-loaded chunks as a table, and what the answer cost."""
    if x2l["evidence"]:
        several = "files" in x2l
        columns = ["evidence", "from", "to", "score", *(["file"] if several else [])]
        table = Table(*columns, box=None, header_style="bold")
        for item in x2l["evidence"]:
            times = clock(item["start_s"]), clock(item["end_s"])
            of = [item["file_id"]] if several else []
            table.add_row(f"chunk {item['chunk']}", *times, f"{item['score']:.3f}", *of)
        console.print(table)
    tokens, timings = x2l["kv_tokens"], x2l["timings_ms"]
    degraded = ", degraded" if x2l["degraded"] else ""
    spent = ", ".join(f"{name} {value:.0f} ms" for name, value in timings.items())
    console.print(f"{tokens['mixed']} KV tokens of {tokens['low']}{degraded}; {spent}", highlight=False)


def _with_all_said(words: list[str]) -> list[str]:
    """``words``, once they are known to hold ids and a question."""
    missing = ""
    if words[-1].startswith("file-") and len(words[-1].split()) == 1:
        missing = "the question is missing"
    elif len(words) == 1:
        missing = "the file's id is missing (x2l upload prints it, x2l files lists it)"
    elif not words[-1].strip():
        missing = "the question is empty"
    if missing:
        raise typer.BadParameter(f'{missing}: x2l ask FILE_ID "QUESTION"', param_hint="FILE_ID QUESTION")
    return words


def _indices(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter("a comma-separated list of chunk numbers, like 3,7", param_hint="--chunks") from None
