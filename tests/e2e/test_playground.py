"""The playground in a real browser. Skipped where Playwright or Chromium is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import Live, Serve

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture
def page() -> Iterator[Any]:
    """An empty page at a phone's width. It may neither complain nor fetch anything from another place."""
    troubles: list[str] = []
    addresses: set[str] = set()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = browser.new_page(viewport={"width": 375, "height": 740})
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda line: troubles.append(line.text) if "status of 4" not in line.text else None)
        page.on("request", lambda request: addresses.add(request.url.removeprefix("blob:").split("/")[2]))
        yield page
        browser.close()
    assert troubles == []
    assert len(addresses) == 1


def upload(page: Any, path: Path) -> None:
    page.get_by_label("File to upload").set_input_files(path)
    page.get_by_role("button", name="Upload", exact=True).click()


def ask(page: Any, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Ask").click()


def test_upload_ask_and_delete(page: Any, live: Live, video: Path, tmp_path: Path) -> None:
    expect = playwright.expect
    page.goto(live.url)
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    upload(page, text)
    expect(page.locator("#video-status")).to_contain_text("not a video")

    upload(page, video)
    expect(page.locator("#video-status")).to_contain_text("Ready: 01:36", timeout=60_000)
    facts = json.loads(video.with_suffix(".json").read_text())
    for question in facts["questions"][:2]:
        ask(page, question["question"])
        expect(page.locator("#answer")).to_have_text(re.compile(r"\w"), timeout=20_000)
        expect(page.locator("#evidence img").first).to_be_visible(timeout=20_000)
        expect(page.locator("#evidence li").first).to_contain_text("chunk")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375

    before = page.locator("#files option").count()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#files option")).to_have_count(before - 1)


def test_a_file_that_nothing_is_known_of(page: Any, live: Live, file_id: str) -> None:
    expect = playwright.expect
    gone = "its KVs are not in the store"
    file = {"id": file_id, "filename": "a.mp4", "status": "processed", "status_details": None, "video": None}
    page.route("**/v1/files", lambda route: route.fulfill(json={"data": [file]}))
    shown = {**file, "status_details": gone}
    events = f"data: {json.dumps(file)}\n\ndata: {json.dumps(shown)}\n\n"
    page.route("**/events", lambda route: route.fulfill(body=events, content_type="text/event-stream"))
    page.goto(live.url)
    expect(page.locator("#video-status")).to_have_text(f"Known. {gone}")
    page.evaluate("() => { window.fetch = () => Promise.reject(new TypeError('Failed to fetch')); }")
    ask(page, "Is anything there?")
    expect(page.locator("#ask-status")).to_have_text("The server cannot be reached.")
    page.evaluate("() => { window.fetch = () => Promise.resolve({ ok: true }); }")  # what the page cannot make sense of
    ask(page, "Is anything there?")
    expect(page.locator("#ask-status")).to_contain_text("not a function")


def test_a_key_is_asked_for(page: Any, serve: Serve) -> None:
    expect = playwright.expect
    with serve(api_key=("first",)) as live:
        page.goto(live.url)
        for key, told in (("wrong", "Incorrect or missing API key"), ("first", "The key is accepted")):
            page.get_by_label("asks for a key").fill(key)
            page.keyboard.press("Enter")
            expect(page.locator("#key-status")).to_contain_text(told)
        ask(page, "Is anything there?")
        expect(page.locator("#ask-status")).to_have_text("Upload a video first.")
        page.close()  # before the server does


def test_the_interface_is_described_without_anything_from_elsewhere(page: Any, live: Live) -> None:
    page.goto(f"{live.url}/docs")
    operation = page.locator("#operations-default-create_v1_uploads_post")
    operation.get_by_role("button").first.click()
    playwright.expect(operation).to_contain_text("Announces a video that comes in parts")
