"""The page as a person meets it: a real server, a real Chromium, the small model."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
from servers import PATIENCE, collect_errors

from infworld.actions import ActionScript
from infworld.app.gallery import find_examples
from infworld.app.page import EXAMPLES
from infworld.session import Session
from infworld.video import read_mp4

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

SESSION_INPUT = "input[type=file][accept='.safetensors']"


@pytest.fixture
def open_page(browser, address):
    """Opens the page in a browser profile of its own. Errors in the console fail the test."""
    contexts, errors = [], []

    def open_page(address: str = address, script: str = "", **options) -> sync_api.Page:
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        collect_errors(page, errors)
        page.add_init_script(script)
        page.goto(address)
        page.click("#film-tab-button")
        expect(page.locator("#generate")).to_be_visible(timeout=PATIENCE)
        return page

    yield open_page
    found = list(errors)  # closing a page breaks off its requests, which is no error of the page
    for context in contexts:
        context.close()
    assert found == []


def choose(page, picture):
    page.set_input_files("#picture input[type=file]", str(picture))
    expect(page.locator("#film .still")).to_be_visible(timeout=PATIENCE)


def set_length(page, frames):
    number = page.locator("#frames input[type=number]")
    number.fill(str(frames))
    number.press("Tab")


def set_actions(page, text):
    box = page.locator("#actions textarea")
    box.fill(text)
    box.press("Tab")


def wait_for_status(page, words):
    expect(page.locator("#status")).to_contain_text(words, timeout=PATIENCE)


def generate(page, picture, frames=161):
    choose(page, picture)
    set_length(page, frames)
    page.click("#generate")
    wait_for_status(page, "Done")


def click_and_wait(page, button):
    """Lets a button change a finished film, and waits for the change."""
    link = page.locator("#downloads a").first
    before = link.get_attribute("href")
    page.click(button)
    expect(link).not_to_have_attribute("href", before, timeout=PATIENCE)
    wait_for_status(page, "Done")


def video(page) -> dict:
    return page.evaluate(
        "() => { const v = document.querySelector('#film video');"
        " return {duration: v.duration, time: v.currentTime, paused: v.paused, ended: v.ended, width: v.videoWidth} }"
    )


def wait_until(page, condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition(state := video(page)):
        assert time.monotonic() < deadline, state
        page.wait_for_timeout(100)
    return state


def download(page, kind, folder) -> Path:
    with page.expect_download() as loading:
        page.click(f"#downloads a:has-text('{kind}')")
    path = folder / f"{len(list(folder.iterdir()))}-{loading.value.suggested_filename}"
    loading.value.save_as(path)
    return path


# ------------------------------------------------------------------------------------------------------------ the film


def test_the_film_plays_while_it_is_made_stops_goes_on_and_is_downloaded_whole(open_page, picture, tmp_path):
    page = open_page()
    choose(page, picture)
    set_length(page, 1281)
    page.click("#generate")
    first = wait_until(page, lambda v: v["width"] == 48 and v["time"] > 0.1)  # it plays ...
    assert not first["paused"] and first["duration"] < 1281 / 30
    grown = wait_until(page, lambda v: v["duration"] > first["duration"] + 2)  # ... and grows under way
    assert grown["time"] > first["time"]
    assert "time left" in page.inner_text("#status")
    page.click("#stop")
    wait_for_status(page, "Stopped")
    expect(page.locator("#more")).to_be_enabled()
    frames = int(re.search(r"has (\d+) frames", page.inner_text("#status"))[1])
    assert 161 <= frames < 1281
    assert len(read_mp4(download(page, "film", tmp_path))) == frames
    wait_until(page, lambda v: abs(v["duration"] - frames / 30) < 0.01)

    page.click("#more")
    wait_for_status(page, f"{frames + 160} frames")
    assert len(read_mp4(download(page, "film", tmp_path))) == frames + 160
    wait_until(page, lambda v: abs(v["duration"] - (frames + 160) / 30) < 0.01)


def test_playing_goes_on_by_itself_when_more_is_made(open_page, picture):
    page = open_page()
    generate(page, picture, 81)
    wait_until(page, lambda v: v["ended"])
    page.click("#more")
    wait_until(page, lambda v: v["time"] > 81 / 30 + 0.5 and not v["paused"])


def test_browsers_without_media_sources_get_the_whole_film(open_page, picture):
    page = open_page(script="delete window.MediaSource; delete window.ManagedMediaSource;")
    generate(page, picture, 161)
    wait_until(page, lambda v: abs(v["duration"] - 161 / 30) < 0.05 and v["width"] == 48)


def test_the_last_chunk_is_made_again_with_another_seed(open_page, picture, tmp_path):
    page = open_page()
    generate(page, picture, 161)
    before = Session.load(download(page, "session", tmp_path))
    click_and_wait(page, "#redo")
    after = Session.load(download(page, "session", tmp_path))
    assert before.settings.seed != after.settings.seed and after.num_frames == 161
    assert np.array_equal(before.history[:, :, :21], after.history[:, :, :21])
    assert not np.array_equal(before.history, after.history)
    wait_until(page, lambda v: abs(v["duration"] - 161 / 30) < 0.01)


def test_what_is_edited_reaches_the_model(open_page, picture, tmp_path):
    page = open_page()
    set_actions(page, "forward+left 60, right 40, wait 20")
    generate(page, picture, 161)
    assert (
        Session.load(download(page, "session", tmp_path)).settings.actions.text()
        == "forward+left 60, right 40, wait 20"
    )
    script = ActionScript.read(download(page, "actions", tmp_path))
    assert script.text() == "forward+left 60, right 40, wait 20"


def test_an_example_fills_picture_prompt_actions_and_length(open_page):
    examples = find_examples(EXAMPLES)
    page = open_page()
    buttons = page.locator("#examples button[data-index]")
    expect(buttons).to_have_count(len(examples))
    index = max(range(len(examples)), key=lambda i: len(examples[i].actions))
    buttons.nth(index).click()
    expect(page.locator("#film .still")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#prompt textarea, #prompt input")).to_have_value(examples[index].prompt)
    expect(page.locator("#actions textarea")).to_have_value(examples[index].actions.text())
    frames = int(page.input_value("#frames input[type=number]"))
    assert frames >= len(examples[index].actions) or frames == 1281
    assert page.locator("#film .still").get_attribute("src").startswith("data:image/png")


def test_the_seed_that_was_used_is_shown_and_makes_the_same_film(open_page, picture, tmp_path):
    page = open_page()
    page.click("text=Seed and quality")
    generate(page, picture, 81)
    first = Session.load(download(page, "session", tmp_path))
    assert page.locator("#seed input").input_value() == str(first.settings.seed)
    page.uncheck("#randomise input")
    click_and_wait(page, "#generate")
    second = Session.load(download(page, "session", tmp_path))
    assert second.settings.seed == first.settings.seed and np.array_equal(second.history, first.history)


def test_resuming_after_a_restart_gives_the_same_next_chunk(open_page, serve, picture, tmp_path, world):
    page = open_page()
    generate(page, picture, 161)
    path = download(page, "session", tmp_path)
    expected = world.next_chunk(Session.load(path))

    page = open_page(serve(tmp_path / "films after the restart"))
    page.set_input_files(SESSION_INPUT, str(path))
    wait_for_status(page, "161 frames")
    wait_until(page, lambda v: abs(v["duration"] - 161 / 30) < 0.01)
    number = page.locator("#extra input[type=number]")
    number.fill("1")
    number.press("Tab")
    page.click("#more")
    wait_for_status(page, "241 frames")
    after = Session.load(download(page, "session", tmp_path))
    assert np.array_equal(after.history, expected.session.history)


def test_two_people_at_once_get_their_own_films(open_page, picture, tmp_path):
    pages = [open_page(), open_page()]
    for page, actions in zip(pages, ("forward 80", "left 80"), strict=True):
        set_actions(page, actions)
        choose(page, picture)
        set_length(page, 241)
    for page in pages:
        page.click("#generate")
    for page, actions in zip(pages, ("forward 80", "left 80"), strict=True):
        wait_for_status(page, "Done")
        session = Session.load(download(page, "session", tmp_path))
        assert session.num_frames == 241 and session.settings.actions.text() == actions
    folders = [page.get_attribute("#downloads a", "href").rsplit("/", 1)[0] for page in pages]
    assert folders[0] != folders[1]


# ------------------------------------------------------------------------------------------------------- remembering


def test_returns_to_a_view_are_shown_in_pairs(open_page, picture):
    page = open_page()
    set_actions(page, "right 80, left 80")
    generate(page, picture, 161)
    expect(page.locator("#memory .pair")).to_have_count(6, timeout=PATIENCE)
    assert page.locator("#memory img").evaluate_all("images => images.every((image) => image.naturalWidth === 48)")
    expect(page.locator("#memory .strip")).to_contain_text("in one piece")


# ------------------------------------------------------------------------------------------------------ other screens


def test_a_phone_shows_the_page_without_scrolling_sideways(open_page, picture):
    page = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme="dark")
    generate(page, picture, 81)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background)[:3])) < 150  # dark


def test_a_keyboard_is_enough(open_page, picture):
    page = open_page()
    choose(page, picture)
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement?.id") == "generate":
            break
    page.keyboard.press("Enter")
    wait_for_status(page, "Done")
    page.locator("#more").focus()
    page.keyboard.press("Enter")
    wait_for_status(page, "321 frames")


def test_everything_that_can_be_used_has_a_name(open_page):
    page = open_page()
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, select, video")]
        .filter((e) => e.offsetParent !== null && e.type !== "file")
        .filter((e) => !(e.ariaLabel || e.title || e.innerText?.trim() || e.placeholder || e.labels?.length))
        .map((e) => e.outerHTML.slice(0, 200))""")
    assert nameless == []


def test_the_hint_is_for_the_first_visit(open_page, address):
    page = open_page()
    expect(page.locator("#header .welcome")).to_be_visible()
    page.click("text=Got it")
    page.goto(address)
    expect(page.locator("#generate")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#header .welcome")).to_be_hidden()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_wrong_picture_is_said_and_the_page_still_works(open_page, picture, tmp_path):
    page = open_page()
    (tmp_path / "text.png").write_text("no picture")
    page.set_input_files("#picture input[type=file]", str(tmp_path / "text.png"))
    expect(page.get_by_text("not a picture that can be read").first).to_be_visible(timeout=PATIENCE)
    page.click("#generate")
    shown = page.locator("#picture")
    shown.get_by_label("Clear").or_(shown.get_by_label("Remove Image")).first.click()
    page.click("#generate")
    expect(page.get_by_text("Choose a picture first").first).to_be_visible(timeout=PATIENCE)
    generate(page, picture, 81)


def test_a_wrong_session_file_is_said_and_the_film_stays(open_page, picture, tmp_path):
    page = open_page()
    generate(page, picture, 81)
    (tmp_path / "wrong.safetensors").write_text("no session")
    page.set_input_files(SESSION_INPUT, str(tmp_path / "wrong.safetensors"))
    expect(page.get_by_text("wrong.safetensors").first).to_be_visible(timeout=PATIENCE)
    page.click("#more")
    wait_for_status(page, "241 frames")


# --------------------------------------------------------------------------------------------------- people who vanish


def test_a_closed_page_ends_its_run(open_page, picture, world, monkeypatch):
    monkeypatch.setattr("infworld.app.page.LINGER", 0.5)
    made, iterate_chunk = [], world.iterate_chunk
    monkeypatch.setattr(world, "iterate_chunk", lambda *arguments: made.append(1) or iterate_chunk(*arguments))
    page = open_page()
    choose(page, picture)
    set_length(page, 1281)
    page.click("#generate")
    wait_until(page, lambda v: v["duration"] > 2)
    page.close()
    count = -1
    while len(made) > count:  # no chunk more in three seconds
        count = len(made)
        time.sleep(3)
    assert 0 < count < 16
