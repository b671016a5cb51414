"""The arena as voters meet it: a real server and two real browsers."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
from servers import CHROMIUM_FLAGS, PATIENCE, collect_errors, free_port

from infworld.app.arena_page import launch, open_hall
from infworld.arena.votes import QUESTIONS
from infworld.evaluation.run import FILMS_INDEX, write_text
from infworld.video import write_mp4

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

CONTESTANTS, CASES = ("secret-alpha", "secret-beta"), ("secret-hall", "secret-yard")
FRAMES, REVISIT = 61, (5, 50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Films of 2 seconds that brighten from frame to frame, in a colour of its own for every contestant."""
    folder = tmp_path_factory.mktemp("secret-films")
    for number, contestant in enumerate(CONTESTANTS):
        (folder / contestant).mkdir()
        entries = []
        for case in CASES:
            frames = np.zeros((FRAMES, 64, 96, 3), np.uint8)
            frames[..., number] = (4 * np.arange(FRAMES))[:, None, None]
            write_mp4(folder / contestant / f"{case}.mp4", frames)
            film = f'{{"case": "{case}", "film": "{case}.mp4", "actions": "right 30, left 30", "fps": 30, '
            entries.append(f'{film}"revisit": [{REVISIT[0]}, {REVISIT[1]}]}}')
        write_text(folder / contestant / FILMS_INDEX, f"[{', '.join(entries)}]")
    return folder


@pytest.fixture
def served(folder, tmp_path):
    """A new arena on the films: its address and its votes."""
    port = free_port()
    with open_hall(folder, tmp_path / "votes.sqlite") as hall:
        page = launch(hall, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", server_port=port)
        yield page.local_url, hall.votes
        page.close()


@pytest.fixture(scope="module")
def browser(chromium):
    """One in which films play without being clicked on."""
    flags = [*CHROMIUM_FLAGS, "--autoplay-policy=no-user-gesture-required"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def voter(browser, served):
    """Opens the arena in a browser profile of its own, with everything that reaches it kept as text."""
    contexts = []

    def open_arena():
        context = browser.new_context(viewport={"width": 1000, "height": 900})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.errors = []
        collect_errors(page, page.errors)
        page.addresses = []
        page.on("request", lambda request: page.addresses.append(request.url))
        page.goto(served[0])
        expect(page.locator("#duel .question")).to_be_visible(timeout=PATIENCE)
        return page

    yield open_arena
    for context in contexts:
        context.close()


def answer(page, key: str, following: str | None) -> None:
    """Votes by a key and waits until the next question is there."""
    page.keyboard.press(key)
    if following:
        expect(page.locator("#duel .ask")).to_have_attribute("data-question", following, timeout=PATIENCE)


def vote_on_pair(page, key: str = "1", last: bool = False) -> None:
    for following in (*QUESTIONS[1:], None if last else QUESTIONS[0]):
        answer(page, key, following)


def test_two_voters_in_two_browsers_vote_at_once_and_each_pair_once(voter, served):
    _, votes = served
    one, two = voter(), voter()
    for last in (False, True):
        vote_on_pair(one, "1", last)
        vote_on_pair(two, "3", last)
    for page in (one, two):
        expect(page.locator("#duel .note")).to_have_text("You have seen every pair. Thank you.", timeout=PATIENCE)
    every = votes.all()
    assert len({vote.voter for vote in every}) == 2
    assert len(every) == 2 * len(CASES) * len(QUESTIONS)
    one.reload()  # the voter is known again
    expect(one.locator("#duel .note")).to_have_text("You have seen every pair. Thank you.", timeout=PATIENCE)
    assert one.errors == two.errors == []


def test_nothing_of_a_films_name_or_path_reaches_the_page(voter, folder):
    page = voter()
    texts = []
    page.on("response", lambda response: texts.append(response))
    vote_on_pair(page)
    page.wait_for_timeout(500)
    content = page.content() + "\n".join(page.addresses)
    content += page.evaluate("JSON.stringify(window.gradio_config)")
    for response in texts:
        if "video" not in (response.headers.get("content-type") or ""):
            try:
                content += response.text()
            except sync_api.Error:  # the body has gone, or is a stream that still runs
                continue
    for word in (*CONTESTANTS, *CASES, folder.name):
        assert word not in content
    assert any(".mp4" in address for address in page.addresses)


def test_the_films_play_in_step_and_pause_at_the_return(voter):
    page = voter()
    page.wait_for_function("document.querySelector('#duel canvas') && !document.querySelector('#duel canvas').hidden")
    state = page.evaluate(
        """() => [...document.querySelectorAll("#duel video")].map((video) => [video.currentTime, video.paused])"""
    )
    page.wait_for_timeout(300)
    times = page.evaluate("() => [...document.querySelectorAll('#duel video')].map((video) => video.currentTime)")
    assert all(abs(time - (REVISIT[1] + 0.5) / 30) < 0.02 for time in times), (state, times)
    brightness = page.evaluate(
        """() => [...document.querySelectorAll("#duel canvas")].map((canvas) =>
            Math.max(...canvas.getContext("2d").getImageData(40, 30, 1, 1).data.slice(0, 3)))"""
    )
    assert all(abs(value - 4 * REVISIT[0]) < 14 for value in brightness)  # what was seen first, not the return
    answer(page, "2", "fidelity")
    expect(page.locator("#duel canvas").first).to_be_hidden()
    page.locator("#duel .play").click()
    page.wait_for_function("document.querySelector('#duel video').currentTime > 1.8")
    assert page.errors == []


def test_the_results_are_there_when_asked_for_and_follow_new_votes(voter, served):
    _, votes = served
    page, other = voter(), voter()
    vote_on_pair(page, "2")
    page.locator("#results-panel button").first.click()
    expect(page.locator("#results")).to_contain_text("4 answers of 1 voter.", timeout=PATIENCE)
    expect(page.locator("#results table").first.locator("tbody tr")).to_have_count(2)
    vote_on_pair(other, "1")
    expect(page.locator("#results")).to_contain_text("8 answers of 2 voters.", timeout=PATIENCE)
    with page.expect_download() as download:
        page.locator("#results a[download='votes.csv']").click()
    lines = download.value.path().read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(votes.all())


def test_a_vote_on_a_page_of_a_server_that_has_gone_is_answered_by_the_next_pair(voter, served):
    """What the hall has forgotten (a restart) is no error for the voter."""
    page = voter()
    duel = page.locator("#duel")
    page.evaluate("() => localStorage.setItem('infworld-voter', 'somebody-else-now')")
    page.keyboard.press("1")
    expect(duel.locator(".note")).to_have_text("The last pair had expired; here is another.", timeout=PATIENCE)
    answer(page, "1", "fidelity")
    assert [vote.voter for vote in served[1].all()] == ["somebody-else-now"]


def test_pages_of_other_sites_cannot_vote(served):
    address, votes = served
    join = f"{address}gradio_api/queue/join"
    body = {"data": [], "fn_index": 1, "session_hash": "x", "event_data": {"voter": "a-voter-elsewhere"}}
    refused = httpx.post(join, json=body, headers={"Origin": "https://elsewhere.example"})
    assert refused.status_code == 403
    assert httpx.get(address, headers={"Host": "elsewhere.example"}).status_code in (400, 403, 421)
    assert votes.all() == []


def test_the_app_has_the_arena_as_another_page(browser, serve_models, world, folder, tmp_path):
    with open_hall(folder, tmp_path / "votes.sqlite") as hall:
        address = serve_models(world, tmp_path / "films", hall)
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#play .begin")).to_be_visible(timeout=PATIENCE)
        page.get_by_role("link", name="Arena").click()
        expect(page.locator("#duel .question")).to_be_visible(timeout=PATIENCE)
        answer(page, "1", "fidelity")
        page.close()
        assert len(hall.votes.all()) == 1
