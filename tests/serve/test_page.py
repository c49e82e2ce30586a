"""The page at `/`: its routes without a browser, and what a user sees in Chromium."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from browser import CHROMIUM, Browser
from command import LIMIT_SECONDS
from conftest import BATCH, Running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from qmix.engine.figures import Figures, Memory, Requests
from qmix.serve.errors import ApiError
from qmix.serve.guard import Access, Guard
from qmix.serve.page import MOST_WATCHERS, Page, policy_of, read_page

KEY = "a key of this test"
ROOT = Path(__file__).parents[2]
IN_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)")


def live(url: str, **headers: str) -> Iterator[dict]:
    """The figures that a server streams."""
    with httpx.stream("GET", f"{url}/live", headers=headers, timeout=LIMIT_SECONDS) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])


# Routes, without a browser


def test_the_page_is_one_file_that_asks_nobody_else(server: Running):
    got = httpx.get(server.url, timeout=LIMIT_SECONDS)
    assert (got.status_code, got.text) == (200, read_page())
    assert got.headers["content-type"] == "text/html; charset=utf-8"
    policy = got.headers["content-security-policy"]
    assert policy == policy_of(got.text)
    assert "unsafe" not in policy
    assert re.findall(r"(\S+)-src ('self'|'none')", policy) == [("default", "'none'"), ("connect", "'self'")]
    assert not re.findall(
        r"(?:src|href)=\"(?!data:)|url\(|@import|https?://|innerHTML|insertAdjacent|\bon\w+=", got.text
    )
    assert httpx.post(server.url, timeout=LIMIT_SECONDS).status_code == 405


def test_figures_follow_the_work(server: Running, client):
    server.wait_until_idle()
    watching = live(server.url)
    first = next(each for each in watching if each["limits"][0] == ["waiting for requests", 1.0])
    assert first["requests"] == {"running": 0, "waiting": 0, "places": BATCH}
    assert first["tiers"] == ["rrrrrrrr"] * 6
    assert first["memory"][0]["name"] == "RAM"
    assert 0 < first["memory"][0]["used"] < first["memory"][0]["budget"]
    stream = client.completions.create(
        model="tiny", prompt="The file", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    got = next(each for each in watching if each["decode"] > 0)
    assert got["requests"]["running"] == 1
    assert got["limits"][0][0] != "disk"
    assert sum(map(sum, got["use"])) > 0
    stream.close()
    watching.close()


class Fixed:
    """A watch whose figures are always the same; `taken` counts them."""

    taken = 0

    def figures(self) -> Figures:
        self.taken += 1
        rows = ((0.0,),)
        memory = (Memory("RAM", 1, 2),)
        return Figures(
            1.0, (("ram",),), rows, rows, 0, 0, 0.0, 0.0, 0, 0.0, 0, 1.0, memory, Requests(), (("disk", 1.0),)
        )


@contextmanager
def guarded(page: Page, stopping: threading.Event) -> Iterator[str]:
    """The page behind a key on a server of its own, which ends when `stopping` is set; its address."""

    async def models(request: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "tiny", "max_model_len": 2048}]})

    app = Guard(Starlette(routes=[*page.routes, Route("/v1/models", models)]), Access(KEY))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        stopping.set()
        server.should_exit = True
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive()


def test_a_key_is_wanted_for_figures_and_not_for_the_page(tmp_path):
    """And who still watches does not keep the server from its end."""
    stopping = threading.Event()
    with guarded(Page(Fixed(), stopping.is_set), stopping) as url:
        assert httpx.get(url, timeout=LIMIT_SECONDS).text == read_page()
        assert httpx.get(f"{url}/live", timeout=LIMIT_SECONDS).status_code == 401
        if CHROMIUM is not None:
            with Browser(tmp_path / "profile") as browser:
                a_user_types_the_key(browser, url)
        watching = live(url, Authorization=f"Bearer {KEY}")
        assert next(watching)["requests"]["places"] == 1
    assert all(each["seconds"] == 1 for each in watching)  # it ends


def a_user_types_the_key(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.wait("!document.getElementById('door').hidden")
    assert browser.ask("document.getElementById('figures').hidden")
    for typed in ("wrong", KEY):
        browser.wait("!document.getElementById('door').hidden")
        browser.ask(f"document.getElementById('key').value = {json.dumps(typed)}")
        browser.ask("document.getElementById('door').requestSubmit()")
        if typed == "wrong":
            browser.wait("document.getElementById('refused').textContent", "the API key is missing or wrong".__eq__)
    browser.wait("!document.getElementById('figures').hidden")
    kept = browser.ask("[sessionStorage.getItem('qmix-api-key'), localStorage.length, document.cookie]")
    assert kept == [KEY, 0, ""]


def test_watchers_are_bounded_and_share_their_events():
    watch = Fixed()
    page = Page(watch, lambda: False)

    async def crowd() -> None:
        streams = [await page.live(None) for _ in range(MOST_WATCHERS)]
        with pytest.raises(ApiError, match=f"{MOST_WATCHERS} watch already") as refused:
            await page.live(None)
        assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "10")
        events = [await anext(stream._content) for stream in streams]
        assert watch.taken == 1
        assert all(event is events[0] for event in events)
        streams[0]._on_end()
        await page.live(None)

    asyncio.run(crowd())


def test_a_watcher_that_does_not_read_queues_nothing_and_is_dropped(monkeypatch):
    monkeypatch.setattr("qmix.serve.page.STUCK_SECONDS", 0.05)
    watch, sent = Fixed(), []
    page = Page(watch, lambda: False)

    async def send(message: dict) -> None:
        sent.append(message)
        await asyncio.sleep(3600 if len(sent) > 1 else 0)  # it takes the headers and no event

    async def receive() -> dict:
        await asyncio.sleep(3600)
        return {}

    async def watch_without_reading() -> None:
        await (await page.live(None))({"type": "http"}, receive, send)

    asyncio.run(watch_without_reading())
    assert (len(sent), watch.taken, page._watchers) == (2, 1, 0)


@pytest.mark.slow
def test_a_wheel_has_the_page(tmp_path):
    source = tmp_path / "source"
    for name in ("qmix", "calibration"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "cli.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert zipfile.ZipFile(wheel).read("qmix/serve/page.html").decode() == read_page()


# In the browser


@pytest.fixture(scope="module")
def window(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def browser(window: Browser, server: Running) -> Browser:
    """A browser with the page just opened."""
    server.wait_until_idle()
    window.open("about:blank")
    window.see()
    window.open(server.url)
    window.wait("!document.getElementById('figures').hidden")
    window.events.clear()
    return window


def say(browser: Browser, text: str, most: int, form: str = "chat") -> None:
    """Send a turn as a user does; greedy, so that the answer is known."""
    fields = {"text": text, "most": most, "form": form, "heat": 0}
    browser.ask(
        f"for (const [id, value] of Object.entries({json.dumps(fields)})) document.getElementById(id).value = value;"
        "document.getElementById('most').removeAttribute('max'); document.getElementById('ask').requestSubmit()"
    )


def log(browser: Browser) -> list[str]:
    return browser.ask("[...document.getElementById('log').children].map((each) => each.textContent)")


def answered(browser: Browser, turns: int = 1) -> list[str]:
    """The conversation, once so many turns have ended."""
    browser.wait(
        "document.querySelectorAll('.told, .bad').length - document.querySelectorAll('#door .bad').length",
        lambda count: count >= turns,
    )
    return log(browser)


@IN_BROWSER
def test_a_conversation_is_the_servers_own_answers(browser, client):
    ask, more = "How do I install a package?", "And then?"
    messages = [{"role": "user", "content": ask}]
    say(browser, ask, 12)
    mine, first, told = answered(browser)
    wanted = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    assert (mine, first) == (ask, wanted.choices[0].message.content.strip(" "))
    assert re.fullmatch(
        r"\d+ prompt tokens, 12 new tokens, [\d.]+ tok/s, first after [\d.]+ s, cut at the most tokens", told
    )
    messages += [{"role": "assistant", "content": wanted.choices[0].message.content}, {"role": "user", "content": more}]
    say(browser, more, 12)
    second = answered(browser, 2)[4]
    wanted = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    assert second == wanted.choices[0].message.content.strip(" ")
    say(browser, "The file", 8, "text")
    wanted = client.completions.create(model="tiny", prompt="The file", max_tokens=8, temperature=0)
    assert answered(browser, 3)[7] == wanted.choices[0].text
    browser.wait("!document.getElementById('send').disabled")
    assert browser.complaints() == []


@IN_BROWSER
def test_stop_ends_the_request_on_the_server(browser, server):
    before = server.figure("qmix_new_tokens_total")
    say(browser, "The file", 1900, "text")
    browser.wait("document.getElementById('log').children[1].textContent.length > 5")
    browser.wait("document.getElementById('requests').textContent", f"1 of {BATCH}".__eq__)
    browser.wait("parseFloat(document.getElementById('decode').textContent) > 0")
    browser.ask("document.getElementById('stop').click()")
    assert answered(browser)[-1] == "stopped"
    server.wait_until_idle()
    assert server.figure("qmix_new_tokens_total") - before < 1900
    assert browser.ask("document.getElementById('stop').disabled")


@IN_BROWSER
def test_errors_of_the_server_are_shown_as_they_are(browser, server):
    say(browser, "Too long", 99999)
    said = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Too long"}], "max_tokens": 99999},
        timeout=LIMIT_SECONDS,
    )
    assert answered(browser)[-1] == f"400: {said.json()['error']['message']}"
    assert browser.ask("document.querySelector('#log .bad').getAttribute('role')") == "alert"
    assert browser.ask("document.getElementById('text').value") == "Too long"


@IN_BROWSER
def test_text_of_a_model_is_never_markup(browser):
    """A typed turn, an answer and an error are put into the page as text, whatever they hold."""
    evil = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script><b>x</b>"
    event = json.dumps({"choices": [{"delta": {"content": evil}, "finish_reason": None}]})
    for stream in (f"data: {event}\n\ndata: [DONE]\n\n", f"data: {json.dumps({'error': {'message': evil}})}\n\n"):
        browser.ask(
            f"window.realFetch ??= window.fetch; window.fetch = (path, options) => path === '/v1/chat/completions'"
            f" ? Promise.resolve(new Response({json.dumps(stream)})) : realFetch(path, options)"
        )
        say(browser, evil, 5)
    shown = answered(browser, 2)
    assert shown[:2] == [evil, evil]
    assert shown[-1].endswith(evil)
    assert browser.ask("document.querySelectorAll('#log img, #log script, #log b').length") == 0
    assert browser.ask("document.title") == "tiny – qmix"
    assert browser.complaints() == []


@IN_BROWSER
def test_the_policy_stops_scripts_that_are_not_the_pages(browser):
    browser.ask("document.body.insertAdjacentHTML('beforeend', '<img src=\"x\" onerror=\"document.title = 1\">')")
    browser.ask(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}))"
    )
    assert browser.ask("document.title") == "tiny – qmix"
    assert browser.ask("fetch('http://127.0.0.1:9/').catch((error) => error.name)") == "TypeError"
    assert any("Content Security Policy" in each for each in browser.complaints())


@IN_BROWSER
def test_the_page_fits_a_phone_and_has_a_dark_side(browser):
    for width in (360, 800, 1280):
        browser.see(width)
        assert browser.wait("innerWidth", width.__eq__)
        assert browser.ask("document.documentElement.scrollWidth") <= width
    light = pixel(browser.picture())
    browser.see(dark=True)
    assert sum(light) > 3 * 230
    assert sum(pixel(browser.picture())) < 3 * 40


@IN_BROWSER
def test_controls_have_names_and_text_has_contrast(browser):
    """Every control has a label; the map says in words what it shows; text has 4.5 to 1 in light and dark."""
    say(browser, "Too long", 99999)
    answered(browser)
    names = browser.call("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "textbox", "combobox", "spinbutton", "log", "image"}
    found = {
        node["role"]["value"]: node["name"]["value"] for node in names if node.get("role", {}).get("value") in controls
    }
    assert set(found) == controls
    assert all(found.values()), found
    assert found["image"] == "Map of 6 layers with 8 experts each: RAM 48. Arrow keys choose one."
    for dark in (False, True):
        browser.see(dark=dark)
        for selector in (
            "#model",
            "label",
            "dt",
            "dd",
            "#parts",
            "#axes",
            ".bad:not(:empty)",
            ".mine",
            "#stop",
            "#clear",
        ):
            ratio = browser.ask(CONTRAST % json.dumps(selector))
            assert ratio >= 4.5 or selector == "#stop", (selector, dark, ratio)
    browser.ask("document.getElementById('map').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
    assert browser.ask("document.getElementById('cell').textContent").startswith("Layer 1, expert 1: RAM;")


CONTRAST = """(() => {
  const part = (text) => text.match(/[\\d.]+/g).map(Number), element = document.querySelector(%s);
  const light = (rgb) => rgb.slice(0, 3).map((v) => (v /= 255, v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  let behind = element;
  while (part(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const ink = light(part(getComputedStyle(element).color));
  const paper = light(part(getComputedStyle(behind).backgroundColor));
  return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
})()"""


def pixel(png: bytes) -> tuple[int, int, int]:
    """The first pixel of a PNG of 8 bits a channel."""
    data, place = b"", 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + size]
        place += 12 + size
    return tuple(zlib.decompress(data)[1:4])
