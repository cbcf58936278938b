"""The gallery in a real Chromium: keys, filters, live pictures, renders, and other pages that try to reach it.

`python -m pytest -m browser`; SHOTS=folder keeps a screenshot of each view. Skipped without Chromium or playwright.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
sync_api = pytest.importorskip("playwright.sync_api")

from gallery_server import Client, running, wait_for  # noqa: E402
from samples import make_recipe  # noqa: E402

from fluxsplit.gallery import address  # noqa: E402
from fluxsplit.metadata import ImageRecord, encode_png, png_text_chunks  # noqa: E402
from fluxsplit.picks import read_picks  # noqa: E402
from fluxsplit.recipe import WeightsStamp  # noqa: E402
from gallery_pictures import draw, write_preview  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --host-resolver-rules=MAP~*.example~127.0.0.1"
)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


def until(page: Any, condition: str) -> Any:
    """Wait for a condition in the page. The page's content policy refuses playwright's own way, which polls by eval."""
    return wait_for(lambda: page.evaluate(condition), 20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        args = [flag.replace("~", " ") for flag in FLAGS.split()]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield chromium
        chromium.close()


class Seat:
    """Somebody before the page: the page, the gallery behind it, and the folder that both are about."""

    def __init__(self, page: Any, client: Client, folder: Path) -> None:
        self.page, self.client, self.folder = page, client, folder
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def open(self) -> None:
        self.page.goto(address(self.client.gallery, self.client.gallery.keys.token))
        until(self.page, "document.querySelector('.cell img')?.naturalWidth > 0")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def current(self) -> str:
        """The name of the picture that the keys act on."""
        return str(self.page.locator(".cell.current").get_attribute("aria-label")).split(",")[0]

    def picks(self) -> dict[str, tuple[str | None, int]]:
        """What is written down, by name."""
        return {name: (pick.pick, pick.stars) for name, pick in read_picks(self.folder / "previews").items()}

    def names(self) -> list[str]:
        """The pictures in the page, in order of place."""
        cells = self.page.locator(".cell")
        place = "c => [c.getBoundingClientRect().y, c.getBoundingClientRect().x, c.ariaLabel.split(',')[0]]"
        found = cells.evaluate_all(f"cells => cells.map({place})")
        return [name for _, _, name in sorted(found)]

    def shot(self, name: str) -> None:
        if folder := os.environ.get("SHOTS"):
            self.page.wait_for_timeout(150)
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))


@contextmanager
def seated(browser: Any, folder: Path, previews: int = 9, renders: int = 1, **context: Any) -> Iterator[Seat]:
    """The page, opened; leaving it checks that no error and no refusal by the content policy was logged."""
    with running(folder, previews, renders) as client:
        window = browser.new_context(viewport={"width": 1280, "height": 800}, **context)
        window.set_default_timeout(20_000)
        seat = Seat(window.new_page(), client, folder)
        try:
            seat.open()
            yield seat
            assert not seat.errors
        finally:
            window.close()


@pytest.fixture
def seat(browser: Any, tmp_path: Path) -> Iterator[Seat]:
    with seated(browser, tmp_path) as seat:
        yield seat


def test_pictures_stand_in_groups_by_prompt_in_rows_filled_to_both_edges(seat: Seat) -> None:
    heads = seat.page.locator(".head").all_inner_texts()
    assert [head.split("\n")[0].split(",")[0] for head in heads] == [
        "a lighthouse at dusk",
        "a fox at dusk",
        "a red circle at dusk",
    ]
    assert seat.names() == [f"000{number}.png" for number in range(1, 10)]
    seat.page.set_viewport_size({"width": 700, "height": 800})
    wide = "rows => rows.map(r => [r.clientWidth, r.lastChild.offsetLeft + r.lastChild.offsetWidth])"

    def filled() -> bool:
        rows = seat.page.locator(".row").evaluate_all(wide)
        return len(rows) >= 2 and abs(rows[0][0] - rows[0][1]) <= 1

    wait_for(filled)
    seat.shot("narrow")


def test_keys_decide_and_what_they_decide_is_written_down(seat: Seat) -> None:
    assert seat.current() == "0001.png"
    seat.press("p", "ArrowRight", "x", "ArrowRight", "4", "ArrowDown")
    assert seat.current() == "0007.png" or seat.current() in ("0005.png", "0006.png", "0008.png")
    below = seat.current()
    seat.press("Shift+p")
    wait_for(lambda: below in seat.picks())
    assert seat.picks() == {
        "0001.png": ("pick", 0),
        "0002.png": ("reject", 0),
        "0003.png": (None, 4),
        below: ("pick", 0),
    }
    assert seat.current() > below
    until(seat.page, "document.getElementById('picked').textContent === '2 picked'")
    seat.shot("picked")
    seat.press("u", "u", "Control+z", "u")
    wait_for(lambda: set(seat.picks().values()) == {(None, 0)})
    assert seat.current() == "0001.png"
    seat.press("p", "p", "5", "0", "End")
    wait_for(lambda: seat.picks()["0001.png"] == (None, 0))
    assert seat.current() == "0009.png"
    seat.press("ArrowRight", "Home")
    assert seat.current() == "0001.png"


def test_decisions_of_before_and_of_other_programs_are_shown(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "previews").mkdir()
    line = {"image": "0002.png", "pick": "pick", "stars": 3, "time": "2026-11-24T10:00:00+00:00"}
    picks = tmp_path / "previews" / "picks.jsonl"
    picks.write_text(json.dumps(line) + "\n")
    with seated(browser, tmp_path, 3) as seat:
        seat.page.wait_for_selector(".cell.pick[aria-label^='0002.png, pick, 3 stars']")
        with picks.open("a") as file:
            file.write(json.dumps({**line, "image": "0003.png", "pick": "reject"}) + "\n")
        seat.page.wait_for_selector(".cell.reject[aria-label^='0003.png']")
        seat.page.reload()
        seat.page.wait_for_selector(".cell.reject[aria-label^='0003.png']")


def test_marks_are_decided_together(seat: Seat) -> None:
    seat.press("Shift+ArrowRight", "Shift+ArrowRight", "p")
    wait_for(
        lambda: (
            [name for name, mark in seat.picks().items() if mark[0] == "pick"] == ["0001.png", "0002.png", "0003.png"]
        )
    )
    seat.press("u")
    wait_for(lambda: not any(mark[0] for mark in seat.picks().values()))
    seat.press("Escape")
    assert seat.page.locator(".cell.marked").count() == 0


def test_real_size_is_one_pixel_for_one(browser: Any, tmp_path: Path) -> None:
    for scale in (1, 2):
        (tmp_path / str(scale)).mkdir()
        with seated(browser, tmp_path / str(scale), 3, 1, device_scale_factor=scale) as seat:
            seat.press("z")
            until(seat.page, "document.querySelector('.pane.real img')?.complete")
            width = seat.page.locator(".pane img").evaluate(
                "i => i.getBoundingClientRect().width * devicePixelRatio / i.naturalWidth"
            )
            assert width == pytest.approx(1)
            if scale == 1:
                seat.shot("real")
            seat.press("z")
            seat.page.wait_for_selector(".pane.fit")
            seat.press("ArrowRight", "p", "Escape")
            assert seat.page.locator("#viewer").is_hidden() and seat.current() == "0002.png"
            wait_for(lambda seat=seat: seat.picks().get("0002.png") == ("pick", 0))


def test_two_to_four_are_compared(seat: Seat) -> None:
    seat.press("c")
    assert seat.page.locator(".pane").count() == 2
    seat.press("ArrowRight", "p", "Escape")
    wait_for(lambda: seat.picks() == {"0002.png": ("pick", 0)})
    assert seat.current() == "0002.png"
    for _ in range(4):
        seat.press("Space", "ArrowRight")
    seat.press("c")
    assert seat.page.locator(".pane").count() == 4
    until(seat.page, "[...document.querySelectorAll('.pane img')].every(i => i.complete && i.naturalWidth)")
    seat.shot("compare")
    seat.press("z")
    panes = seat.page.locator(".pane")
    panes.nth(0).evaluate("p => p.scrollTo(0, 30)")  # what is compared is moved together
    wait_for(lambda: panes.nth(3).evaluate("p => p.scrollTop") == 30)
    seat.press("Escape", "Escape", "Home")
    assert seat.page.locator("#viewer").is_hidden() and seat.page.locator(".cell.marked").count() == 0
    for _ in range(5):
        seat.press("Space", "ArrowRight")
    seat.press("c")
    assert "2 to 4 pictures can be compared" in seat.page.locator("#toast").inner_text()


def test_filters(seat: Seat) -> None:
    seat.press("/")
    seat.page.keyboard.type("dusk FOX p")  # letters are typed here, and decide nothing
    wait_for(lambda: seat.names() == [])
    seat.press("Backspace", "Backspace")
    wait_for(lambda: seat.names() == ["0005.png", "0006.png", "0007.png", "0008.png"])
    seat.press("Escape", "ArrowRight", "p", "3")
    wait_for(lambda: seat.picks() == {"0006.png": ("pick", 3)})
    seat.shot("filtered")
    seat.page.fill("#prompt-filter", "")
    seat.page.fill("#seed-filter", "1007")
    wait_for(lambda: seat.names() == ["0007.png"])
    seat.page.fill("#seed-filter", "")
    for chosen, names in (("pick", ["0006.png"]), ("reject", []), ("done", ["0001.png"])):
        seat.page.select_option("#mark-filter", chosen)
        wait_for(lambda names=names: seat.names() == names)
    seat.page.select_option("#mark-filter", "all")
    seat.page.select_option("#star-filter", "3")
    wait_for(lambda: seat.names() == ["0006.png"])
    seat.page.select_option("#star-filter", "4")
    wait_for(lambda: "passes the filter" in seat.page.locator("#empty").inner_text())


def test_pictures_appear_as_they_are_made_and_go_when_they_go(seat: Seat) -> None:
    previews = seat.folder / "previews"
    write_preview(previews, 10, 2)
    wait_for(lambda: seat.names()[-1] == "0010.png")
    (previews / "0011.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    seat.page.wait_for_selector(".broken")
    (previews / "0001.png").unlink()
    wait_for(lambda: "0001.png" not in seat.names())
    assert seat.page.locator("#shown").inner_text() == "10 pictures"


def test_the_picks_are_rendered_and_the_result_laid_over_its_preview(browser: Any, tmp_path: Path) -> None:
    with seated(browser, tmp_path, 6, 0) as seat:
        seat.press("p", "ArrowRight", "p")
        until(seat.page, "document.getElementById('plan').textContent.includes('1024x1024')")
        assert "2 at 1024x1024" in seat.page.locator("#plan").inner_text()
        seat.page.click("#render")
        seat.page.wait_for_selector(".job.done")
        seat.shot("rendered")
        seat.page.wait_for_selector(".cell.current .result")
        seat.press("b")
        until(seat.page, "[...document.querySelectorAll('.slide img')].every(i => i.complete && i.naturalWidth)")
        sizes = seat.page.locator(".slide img").evaluate_all("images => images.map(i => i.naturalWidth)")
        assert sorted(sizes) == [512, 1024]
        boxes = seat.page.locator(".slide img").evaluate_all(
            "images => images.map(i => JSON.stringify(i.getBoundingClientRect()))"
        )
        assert boxes[0] == boxes[1]  # what is compared lies on the same place
        seat.press("ArrowLeft", "ArrowLeft")
        assert seat.page.locator("#before").evaluate("i => i.style.clipPath") == "inset(0px 60% 0px 0px)"
        seat.shot("slider")
        seat.press("Escape")
        assert seat.page.locator("#viewer").is_hidden()


def test_a_render_can_be_cancelled(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "30")
    with seated(browser, tmp_path, 3, 0) as seat:
        seat.press("p")
        seat.page.click("#render:enabled")
        seat.page.wait_for_selector(".job.running")
        seat.page.click(".job button")
        seat.page.wait_for_selector(".job.cancelled")
        assert not list((tmp_path / "renders").iterdir())


def test_the_command_is_copied_and_a_wrong_size_is_told(browser: Any, tmp_path: Path) -> None:
    with seated(browser, tmp_path, 3, 0, permissions=["clipboard-read", "clipboard-write"]) as seat:
        seat.press("p")
        until(seat.page, "document.getElementById('plan').textContent.includes('1024x1024')")
        seat.page.click("#copy")
        seat.page.wait_for_selector("#toast:visible")
        copied = seat.page.evaluate("navigator.clipboard.readText()")
        assert copied == f"fluxsplit rerender --from-picks {tmp_path}/previews --scale 2 --out {tmp_path}/renders"
        seat.page.select_option("#scale", "size")
        seat.page.fill("#size", "100x100")
        until(seat.page, "document.getElementById('plan').textContent.includes('multiple of 8')")
        assert seat.page.locator("#render").is_disabled()
        seat.errors.clear()  # the refused plan is logged by the browser


def test_a_prompt_is_text_whatever_it_says(browser: Any, tmp_path: Path) -> None:
    evil = (
        "<img src=x onerror='document.title=1'><script>document.title=1</script><style>*{display:none}</style>\u202ea"
    )
    (tmp_path / "previews").mkdir()
    record = ImageRecord(make_recipe(prompt=evil), "0" * 64, WeightsStamp("ae"))
    data = encode_png(draw(1, 64, 64, 1), 64, 64, png_text_chunks(record))
    (tmp_path / "previews" / "<b>&'\".png").write_bytes(data)
    with seated(browser, tmp_path, 0, 0) as seat:
        assert evil in str(seat.page.locator(".head").text_content())
        seat.press("Enter")
        assert evil in str(seat.page.locator("#caption").text_content())
        assert seat.page.locator("main img[src='x'], #viewer img[src='x'], body style").count() == 0
        assert seat.page.title() == "previews – fluxsplit gallery"
        assert seat.page.evaluate("typeof eval") == "function"
        with pytest.raises(sync_api.Error, match=r"Trusted|TrustedHTML|CSP|Content Security"):
            seat.page.evaluate("document.body.innerHTML = '<b>x</b>'")
        seat.errors.clear()


def test_the_token_opens_the_page_and_nothing_else_does(browser: Any, tmp_path: Path) -> None:
    with running(tmp_path) as client:
        window = browser.new_context()
        page = window.new_page()
        origin = client.gallery.keys.origin
        page.goto(origin)
        until(page, "document.getElementById('empty').textContent.includes('ends in a token')")
        page.goto("about:blank")
        page.goto(f"{origin}/#wrong")
        until(page, "document.getElementById('empty').textContent.includes('token is missing or of another run')")
        page.goto("about:blank")
        page.goto(address(client.gallery, client.gallery.keys.launch_code()))
        page.wait_for_selector(".cell img")
        assert page.url == f"{origin}/"
        page.reload()
        page.wait_for_selector(".cell img")
        cookies = {cookie["name"]: cookie for cookie in window.cookies()}
        assert all(cookie["httpOnly"] and cookie["sameSite"] == "Strict" for cookie in cookies.values()) and cookies
        window.close()


ATTACKER = (Path(__file__).parent / "attacker.html").read_text("utf-8")


@contextmanager
def serving(text: str) -> Iterator[int]:
    """Another site on this machine; its port."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        try:
            yield site.server_address[1]
        finally:
            site.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", "evil.example"])
def test_another_page_in_the_same_browser_can_do_nothing(seat: Seat, host: str) -> None:
    """Same-site (another port, to which the cookie is sent) and cross-site; the gallery is open beside it."""
    origin, victim = seat.client.gallery.keys.origin, seat.client.ids()[0]
    with serving(ATTACKER.replace("{origin}", origin).replace("{id}", victim)) as port:
        page = seat.page.context.new_page()
        page.goto(f"http://{host}:{port}/")
        until(page, "window.results")
        assert page.evaluate("window.results") == ["refused"] * 8
    assert not seat.picks() and not seat.client.gallery.queue.state()


def test_a_rebound_name_gets_nothing(seat: Seat) -> None:
    page = seat.page.context.new_page()
    answer = page.goto(f"http://evil.example:{seat.client.port}/")
    assert answer.status == 421 and "goes by no other name" in page.inner_text("body")


def test_only_what_is_near_the_screen_is_in_the_page(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "previews").mkdir()
    first = write_preview(tmp_path / "previews", 1, 0).read_bytes()
    for number in range(2, 400):
        (tmp_path / "previews" / f"{number:04d}.png").write_bytes(first)
    with seated(browser, tmp_path, 0, 0) as seat:
        until(seat.page, "document.getElementById('shown').textContent === '399 pictures'")
        assert seat.page.locator(".cell").count() < 100
        seat.press("End")
        seat.page.wait_for_selector(".cell.current[aria-label^='0399.png']")
        assert seat.page.locator(".cell").count() < 100
        seat.press("PageUp", "ArrowUp")
        assert seat.current() < "0399.png"


def test_the_keys_are_told(seat: Seat) -> None:
    seat.press("?")
    assert seat.page.locator("#help").is_visible()
    seat.shot("keys")
    seat.press("Escape")
    assert seat.page.locator("#help").is_hidden()
