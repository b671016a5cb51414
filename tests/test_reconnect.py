"""A page that is cut off, loaded again, or outlives its server finds its film again: real servers, a real Chromium."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time

import pytest
from servers import PATIENCE, free_port, page_server, proxy

from infworld.app.environment import UPLOADS
from infworld.app.page import Page, plainly
from infworld.app.studio import Studio
from infworld.session import Session

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1300, "height": 900}, ignore_https_errors=True)
    context.set_default_timeout(PATIENCE)
    yield context.new_page()
    context.close()


@pytest.fixture
def slow(world, monkeypatch):
    """Makes each chunk of the server in this process take some seconds more."""

    def make_slow(seconds: float) -> None:
        iterate_chunk = world.iterate_chunk

        def slowly(*arguments, **options):
            time.sleep(seconds)
            yield from iterate_chunk(*arguments, **options)

        monkeypatch.setattr(world, "iterate_chunk", slowly)

    return make_slow


def visit(page, address, picture, actions="right 80, left 80", frames=161):
    page.goto(address)
    page.wait_for_function("window.hasFoundFilm && !document.body.inert", timeout=PATIENCE)
    page.click("#film-tab-button", timeout=PATIENCE)
    expect(page.locator("#generate")).to_be_visible(timeout=PATIENCE)
    page.set_input_files("#picture input[type=file]", str(picture))
    expect(page.locator("#picture img")).to_be_visible(timeout=PATIENCE)
    page.locator("#actions textarea").fill(actions)
    page.locator("#actions textarea").press("Tab")
    page.locator("#frames input[type=number]").fill(str(frames))
    page.locator("#frames input[type=number]").press("Tab")


def status(page, words):
    expect(page.locator("#status")).to_contain_text(words, timeout=PATIENCE)


def expect_film(page, frames, actions="right 80, left 80"):
    """Film, picture, plan and downloads are on the page."""
    expect(page.locator("#actions textarea")).to_have_value(actions, timeout=PATIENCE)
    expect(page.locator("#picture img")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#downloads a")).to_have_count(3, timeout=PATIENCE)
    length = f"() => Math.abs(document.querySelector('#film video').duration - {frames / 30}) < 0.05"
    page.wait_for_function(length, timeout=PATIENCE)


def session_of(page, tmp_path) -> Session:
    with page.expect_download() as loading:
        page.click("#downloads a:has-text('session')")
    path = tmp_path / "session.safetensors"
    loading.value.save_as(path)
    return Session.load(path)


def test_a_reload_finds_the_finished_film_and_continues_it(page, address, picture, world, tmp_path):
    visit(page, address, picture)
    page.click("#generate")
    status(page, "Done")
    before = session_of(page, tmp_path)
    expected = world.next_chunk(world.next_chunk(before).session).session
    page.reload()
    expect_film(page, 161)
    expect(page.locator("#memory .pair")).to_have_count(6, timeout=PATIENCE)
    page.click("#more")
    status(page, "321 frames")
    after = session_of(page, tmp_path)
    assert after.settings == expected.settings and after.history.equal(expected.history)


def test_a_reload_finds_the_film_in_the_making_and_its_picture_makes_another(page, address, picture, slow, films):
    slow(1.0)
    visit(page, address, picture, frames=321)
    page.click("#generate")
    status(page, "Chunk 2 of 4")
    page.reload()
    status(page, re.compile("Chunk [234] of 4"))
    expect(page.locator("#generate")).to_be_disabled()
    expect(page.locator("#stop")).to_be_enabled()
    status(page, "Done")
    expect_film(page, 321)
    there = len(list(films.iterdir()))
    page.locator("#frames input[type=number]").fill("81")
    page.locator("#frames input[type=number]").press("Tab")
    page.click("#generate")
    status(page, "81 frames")
    assert len(list(films.iterdir())) == there + 1


def test_a_film_found_again_can_be_stopped(page, address, picture, slow):
    slow(1.0)
    visit(page, address, picture, frames=1281)
    page.click("#generate")
    status(page, "Chunk 2 of 16")
    page.reload()
    status(page, re.compile(r"Chunk \d of 16"))
    page.click("#stop")
    status(page, "Stopped")
    expect(page.locator("#more")).to_be_enabled()


def test_a_connection_cut_while_filming_costs_nothing(page, address, picture, slow):
    slow(1.5)
    with proxy("cutting_proxy.py", address) as (cutter, port):
        visit(page, f"http://127.0.0.1:{port}/", picture, frames=401)
        page.click("#generate")
        status(page, "Chunk 2 of 5")
        cutter.send_signal(signal.SIGUSR1)  # for three seconds
        status(page, re.compile("Chunk [345] of 5"))
        status(page, "Done")
        expect_film(page, 401)


def test_continue_during_a_cut_leaves_the_film_on_the_page(page, address, picture):
    with proxy("cutting_proxy.py", address) as (cutter, port):
        visit(page, f"http://127.0.0.1:{port}/", picture)
        page.click("#generate")
        status(page, "Done")
        expect_film(page, 161)
        page.evaluate("window.before = true")
        cutter.send_signal(signal.SIGUSR1)
        page.wait_for_timeout(300)
        page.click("#more")
        page.wait_for_function("!window.before", timeout=PATIENCE)  # Gradio loads the page again
        expect_film(page, 161)
        page.click("#more")
        status(page, "321 frames")


def test_a_restart_of_the_server_loses_neither_film_nor_picture(page, small_model, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    films, port = tmp_path / "films", free_port()
    with page_server(small_model, films, port):
        visit(page, f"http://127.0.0.1:{port}/", picture)
        page.click("#generate")
        status(page, "Done")
        expect_film(page, 161)
    (uploads,) = (tmp_path / UPLOADS).iterdir()
    assert list(uploads.rglob("picture.png"))
    page.evaluate("window.before = true")
    with page_server(small_model, films, port):
        page.wait_for_function("!window.before", timeout=PATIENCE)  # the page is loaded again by itself
        expect_film(page, 161)
        page.click("#more")
        status(page, "321 frames")
        page.click("#generate")  # with the picture of before
        status(page, re.compile("Done The film has 161 frames"))
        assert not uploads.exists()  # those of the server that was killed


def test_each_tab_finds_its_own_film(page, address, picture):
    tabs = [page, page.context.new_page()]
    plans = [("right 80", 81), ("left 80", 161)]
    for tab, (plan, frames) in zip(tabs, plans, strict=True):
        tab.bring_to_front()  # the browser draws no other, and nobody types there
        visit(tab, address, picture, plan, frames)
        tab.click("#generate")
        status(tab, f"{frames} frames")
    for tab, (plan, frames) in zip(tabs, plans, strict=True):
        tab.bring_to_front()
        tab.reload()
        expect_film(tab, frames, plan)


def test_a_page_waits_for_the_film_that_it_looks_for(page, address, picture, monkeypatch):
    visit(page, address, picture, frames=81)
    page.click("#generate")
    status(page, "Done")
    asked, answered = threading.Event(), threading.Event()
    found = Page._found

    def late(*arguments):
        asked.set()
        assert answered.wait(PATIENCE / 1000)
        return found(*arguments)

    monkeypatch.setattr(Page, "_found", late)
    page.reload()
    assert asked.wait(PATIENCE / 1000)
    expect(page.locator("#film-tab-button")).to_be_visible(timeout=PATIENCE)
    with pytest.raises(sync_api.TimeoutError):
        page.click("#generate", timeout=1000)
    answered.set()
    expect_film(page, 81)
    page.locator("#actions textarea").fill("left 80")
    page.locator("#actions textarea").press("Tab")
    page.click("#generate")
    status(page, "161 frames")
    page.reload()
    expect_film(page, 161, "left 80")


def test_a_page_works_although_its_film_cannot_be_found(page, address, picture, monkeypatch):
    visit(page, address, picture, frames=81)
    page.click("#generate")
    status(page, "Done")

    @plainly()
    def fail(*_):
        raise ValueError("the film is broken")

    monkeypatch.setattr(Page, "_found", fail)
    page.reload()
    expect(page.get_by_text("the film is broken").first).to_be_visible(timeout=PATIENCE)
    monkeypatch.undo()
    visit(page, address, picture, frames=161)
    page.click("#generate")
    status(page, "161 frames")


def test_another_browser_finds_nothing_and_a_forged_name_neither(browser, address, picture, films):
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    page.click("#film-tab-button", timeout=PATIENCE)
    expect(page.locator("#generate")).to_be_visible(timeout=PATIENCE)
    page.wait_for_timeout(1000)
    status(page, "Ready")
    expect(page.locator("#downloads a")).to_have_count(0)
    context.close()


NAMES = [None, 3, "", "film-", "../film-" + "a" * 24, "film-" + "a" * 23 + "/", "film-" + "é" * 24]


@pytest.mark.parametrize("name", NAMES)
def test_only_a_films_own_name_finds_it(tmp_path, name):
    from infworld.app.films import FilmStore

    store = FilmStore(tmp_path / "films", 60, 30)
    film = store.new()
    assert store.find(film.folder.name) == film
    assert store.find(name) is None


def test_a_double_click_makes_one_film(page, address, picture, slow, films):
    slow(0.5)
    visit(page, address, picture)
    there = len(list(films.iterdir()))
    page.locator("#generate").click(click_count=2, delay=10)
    page.evaluate("for (let i = 0; i < 5; i++) document.querySelector('#generate').click()")
    status(page, "Done")
    expect_film(page, 161)
    assert len(list(films.iterdir())) == there + 1
    expect(page.locator(".toast-body.error")).to_have_count(0)


def refuse(*arguments):
    raise ValueError("no more films")


def test_a_button_is_off_from_the_click_on_and_on_again_after_an_error(page, address, picture, monkeypatch):
    go, begin = threading.Event(), Studio.begin
    monkeypatch.setattr(Studio, "begin", lambda *arguments: go.wait(PATIENCE / 1000) and begin(*arguments))
    visit(page, address, picture)
    page.click("#generate")
    expect(page.locator("#generate")).to_be_disabled()  # long before the server has answered
    go.set()
    status(page, "Done")
    expect(page.locator("#generate")).to_be_enabled()
    monkeypatch.setattr(Studio, "begin", refuse)
    page.click("#generate")
    expect(page.locator(".toast-body.error")).to_have_count(1)
    expect(page.locator("#generate")).to_be_enabled()


def test_the_film_plays_behind_tls_that_the_server_does_not_know_of(page, address, picture, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with proxy("tls_proxy.py", address, certificate, key) as (_, port):
        visit(page, f"https://127.0.0.1:{port}/", picture)
        page.click("#generate")
        status(page, "Done")
        expect_film(page, 161)
        assert page.evaluate("document.querySelector('#film video').videoWidth") == 48
