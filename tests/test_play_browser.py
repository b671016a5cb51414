"""Playing in a real browser: keys, touch and mouse, pause, leaving, what the film is then; two people."""

from __future__ import annotations

import re
import shutil
import time

import pytest
from servers import PATIENCE, collect_errors

from infworld.session import Session
from infworld.video import read_mp4

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")

FORWARD, RIGHT, LEFT = (1, 0), (0, 4), (0, 3)

MEASURED = """() => {
  let node = document.querySelector("#play canvas");
  while (node && !node.measured) node = node.parentNode ?? node.host;
  return node.measured();
}"""


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return tmp_path_factory.mktemp("films")


@pytest.fixture(scope="module")
def address(serve, films) -> str:
    return serve(films)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    contexts, errors = [], []

    def open_page(**options) -> sync_api.Page:
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        collect_errors(page, errors)
        page.goto(address)
        expect(page.locator("#play .begin")).to_be_visible(timeout=PATIENCE)
        return page

    yield open_page
    found = list(errors)  # closing a page breaks off its requests, which is no error of the page
    for context in contexts:
        context.close()
    assert found == []


def choose(page, picture):
    page.set_input_files("#picture input[type=file]", str(picture))
    expect(page.locator("#play .still")).to_be_visible(timeout=PATIENCE)


def shown(page) -> int:
    return page.evaluate(MEASURED)["shown"]


def wait_for_frames(page, more: int) -> None:
    """Until so many more frames have been drawn."""
    target, deadline = shown(page) + more, time.monotonic() + PATIENCE / 1000
    while shown(page) < target:
        assert time.monotonic() < deadline, page.evaluate(MEASURED)
        page.wait_for_timeout(50)


def play(page, picture) -> None:
    choose(page, picture)
    page.click("#play .begin")
    wait_for_frames(page, 10)


def leave(page, tmp_path) -> Session:
    """Ends the walk; its session, downloaded."""
    page.click("#play .leave")
    expect(page.locator("#play .go-on")).to_be_visible(timeout=PATIENCE)
    page.click("#film-tab-button")
    with page.expect_download() as download:
        page.click("#downloads a[download*=session]")
    path = tmp_path / "walk.safetensors"
    download.value.save_as(path)
    return Session.load(path)


def done(session: Session) -> list[tuple[int, int]]:
    return session.settings.actions.pairs(0, session.num_frames - 1)


def test_keys_steer_the_walk_and_the_walk_is_a_film(open_page, picture, tmp_path, films):
    page = open_page()
    play(page, picture)
    page.keyboard.down("KeyW")
    expect(page.locator("#play [data-word=forward]")).to_have_class(re.compile("held"))
    wait_for_frames(page, 60)
    page.keyboard.down("ArrowRight")
    page.keyboard.up("KeyW")
    wait_for_frames(page, 60)
    page.keyboard.up("ArrowRight")
    measured = page.evaluate(MEASURED)
    assert measured["delays"] and all(0 < delay < PATIENCE for delay in measured["delays"])
    assert re.search(r"\d s", page.inner_text("#play .delay"))
    assert page.locator("#play .map path").count() > 2
    session = leave(page, tmp_path)
    actions = done(session)
    assert actions.count(FORWARD) >= 8 and actions.count(RIGHT) >= 8 and (0, 3) not in actions
    assert actions.index(RIGHT) > actions.index(FORWARD)
    (folder,) = [path.parent for path in films.glob("*/session.safetensors")]
    (film,) = folder.glob("film-*.mp4")
    assert len(read_mp4(film)) == session.num_frames
    assert f"{session.num_frames} frames" in page.inner_text("#status")
    page.click("#more")  # Continue, in the Film tab
    expect(page.locator("#status")).to_contain_text("Done", timeout=PATIENCE)
    assert f"{session.num_frames + 160} frames" in page.inner_text("#status")


def test_pausing_stops_the_walk_and_walking_on_continues_the_film(open_page, picture, tmp_path):
    page = open_page()
    play(page, picture)
    page.keyboard.press("Space")
    expect(page.locator("#play .pause")).to_have_attribute("aria-pressed", "true")
    before = shown(page)
    page.wait_for_timeout(1500)
    assert shown(page) == before
    page.keyboard.press("Space")
    wait_for_frames(page, 10)
    page.keyboard.press("Escape")
    expect(page.locator("#play .go-on")).to_be_visible(timeout=PATIENCE)
    page.click("#film-tab-button")
    first = int(re.search(r"(\d+) frames", page.inner_text("#status")).group(1))
    page.click("#play-tab-button")
    page.click("#play .go-on")
    wait_for_frames(page, 10)
    assert leave(page, tmp_path).num_frames > first


def test_a_drag_looks_around_and_a_tap_on_the_pad_counts(open_page, picture, tmp_path):
    page = open_page()
    play(page, picture)
    box = page.locator("#play canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - box["width"] / 4, y, steps=8)  # to the right by 20 degrees
    page.mouse.up()
    wait_for_frames(page, 60)
    page.click("#play [data-word=forward]", delay=40)
    wait_for_frames(page, 60)
    actions = done(leave(page, tmp_path))
    assert 14 <= actions.count(RIGHT) <= 18 and LEFT not in actions  # 80 / 4 / 1.125 = 17.8
    assert actions.count(FORWARD) >= 2


def test_a_phone_has_picture_play_and_pad_on_its_first_screen_and_is_played_by_touch(open_page, picture, tmp_path):
    page = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.get_by_text("Got it").tap()
    choose(page, picture)
    page.evaluate("window.scrollTo(0, 0)")
    for part in ("#play .view", "#play .begin", "#play .walk", "#play .look"):
        box = page.locator(part).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 844, (part, box)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.tap("#play .begin")
    wait_for_frames(page, 10)
    box, touch = page.locator("#play [data-word=right]").bounding_box(), page.context.new_cdp_session(page)
    finger = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [finger]})
    wait_for_frames(page, 60)
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert done(leave(page, tmp_path)).count(RIGHT) >= 8


def test_a_second_person_waits_and_plays_when_the_first_has_gone(open_page, picture):
    first, second = open_page(), open_page()
    play(first, picture)
    choose(second, picture)
    second.click("#play .begin")
    expect(second.locator("#play .says")).to_contain_text("1 film is made first", timeout=PATIENCE)
    expect(first.locator("#play .turn")).to_be_visible(timeout=PATIENCE)
    first.close()  # in the middle
    wait_for_frames(second, 10)
    second.click("#play .leave")
    expect(second.locator("#play .go-on")).to_be_visible(timeout=PATIENCE)


def test_a_page_loaded_again_has_the_walk_and_goes_on_with_it(open_page, picture):
    page = open_page()
    play(page, picture)
    page.reload()
    expect(page.locator("#play .go-on")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#play .still")).to_be_visible(timeout=PATIENCE)
    page.click("#play .go-on")
    wait_for_frames(page, 10)
    page.click("#play .leave")
    expect(page.locator("#play .go-on")).to_be_visible(timeout=PATIENCE)


def test_play_without_a_picture_says_so(open_page):
    page = open_page()
    page.click("#play .begin")
    expect(page.locator("#play .says")).to_have_text("Choose a picture first: upload one, or take an example.")
    expect(page.locator("#play .begin")).to_be_enabled()
