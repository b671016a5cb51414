"""The action editor in a real browser: what a person does there is what Python receives."""

import base64
import json
import re
import tempfile

import numpy as np
import pytest
from servers import BROKEN_OFF, collect_errors, free_port

gr = pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

from infworld.actions import ActionScript  # noqa: E402
from infworld.app.editor import ActionEditor, script_of  # noqa: E402
from infworld.app.templates import walk_templates  # noqa: E402

EXAMPLE = ActionScript.parse("back 12, up+strafe left 34")


def silent_film() -> str:
    """A data address of one second of film, 30 frames."""
    imageio = pytest.importorskip("imageio.v2")
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        imageio.mimwrite(file.name, np.zeros((30, 32, 32, 3), np.uint8), fps=30, macro_block_size=None)
        return "data:video/mp4;base64," + base64.b64encode(file.read()).decode()


@pytest.fixture(scope="module")
def address():
    with gr.Blocks() as page:
        editor = ActionEditor(num_frames=161, horizon_frames=401, follow="#film video", elem_id="editor")
        received = gr.JSON(elem_id="received")
        text = gr.Textbox(elem_id="received-text", label="received")
        example = gr.Button("Example")
        longer = gr.Button("Longer film")
        gr.HTML(f'<video src="{silent_film()}" muted></video>', elem_id="film")
        editor.change(lambda value: (value, script_of(value).text()), editor, [received, text], show_progress="hidden")
        example.click(lambda: gr.update(value=EXAMPLE, frame=12), None, editor, show_progress="hidden")
        longer.click(lambda: gr.update(num_frames=481), None, editor, show_progress="hidden")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_RUN_HISTORY", "False")  # keeping a hundred runs makes a browser slow
        options = {"server_name": "127.0.0.1", "quiet": True, "ssr_mode": False}
        _, address, _ = page.launch(server_port=free_port(), prevent_thread_lock=True, **options)
    yield address
    page.close()


@pytest.fixture(scope="module")
def complaints():
    """What the browser's console said."""
    return []


@pytest.fixture(scope="module")
def tab(browser, complaints):
    """One tab for all tests: opening one takes longer than most of them."""
    tab = browser.new_page(viewport={"width": 1100, "height": 1000}, accept_downloads=True)
    collect_errors(tab, complaints, kinds=("error", "warning"))
    return tab


@pytest.fixture
def fresh(tab, address, complaints):
    """The page as it is first seen."""
    complaints.clear()
    tab.goto(address)
    tab.locator(".action-editor .pad").first.wait_for()
    yield tab
    assert not complaints


@pytest.fixture
def page(tab, address, complaints):
    """The page with an empty script, whatever was done before."""
    complaints.clear()
    if tab.url == "about:blank":
        tab.goto(address)
        tab.locator(".action-editor .pad").first.wait_for()
    part(tab, "replace").uncheck()
    write(tab, "")
    yield tab
    if button(tab, "Stop").is_visible():
        button(tab, "Stop").click()
    assert not complaints


def part(page, name):
    return page.locator(f'.action-editor [data-part="{name}"]')


def button(page, name):
    return page.locator(".action-editor").get_by_role("button", name=name, exact=True)


def segment(page, index):
    return page.locator(".segment").nth(index)


def expect_text(page, text):
    """The text form on the page and in Python."""
    sync_api.expect(part(page, "text")).to_have_value(text)
    sync_api.expect(page.locator("#received-text textarea")).to_have_value(text)


def write(page, text):
    part(page, "text").fill(text)
    part(page, "text").blur()
    expect_text(page, text)


def centre(locator):
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_only_as_a_page_is_left_its_broken_off_requests_are_no_errors(browser, address):
    page = browser.new_page()
    errors = []
    collect_errors(page, errors)
    for text in BROKEN_OFF:
        page.goto(address)
        page.evaluate("text => window.onbeforeunload = () => console.error(text)", text)
        page.reload()
        assert errors == []
        page.evaluate("text => console.error(text)", text)
        assert errors.pop() == text
        page.evaluate("() => window.onbeforeunload = () => console.error('another')")
        page.reload()
        assert {*errors} == {"another"}
        errors.clear()
    page.close()


# ---------------------------------------------------------------- timeline


def test_every_template_reaches_python(page):
    for name, script in walk_templates(1.125).items():
        button(page, name).click()
        expect_text(page, script.text())
        sync_api.expect(page.locator(".segment")).to_have_count(len(script.segments))


def test_pads_add_after_the_selected_segment(page):
    button(page, "Forward").click()
    button(page, "Right").click()
    segment(page, 0).click()
    button(page, "Strafe left").click()
    button(page, "Wait").click()
    expect_text(page, "forward 80, strafe left 80, wait 80, right 80")


def test_the_selected_segment_is_edited(page):
    write(page, "forward 80, right 40")
    segment(page, 1).click()
    part(page, "move").select_option("back")
    part(page, "view").select_option("up+left")
    part(page, "frames").fill("7")
    expect_text(page, "forward 80, back+up+left 7")
    button(page, "Split").click()
    expect_text(page, "forward 80, back+up+left 3, back+up+left 4")
    button(page, "Move earlier").click()
    expect_text(page, "back+up+left 3, forward 80, back+up+left 4")
    button(page, "Copy").click()
    expect_text(page, "back+up+left 3, back+up+left 3, forward 80, back+up+left 4")
    button(page, "Delete").click()
    button(page, "Delete").click()
    expect_text(page, "back+up+left 3, back+up+left 4")
    button(page, "Clear").click()
    expect_text(page, "")


def test_split_is_at_the_current_moment(page):
    write(page, "forward 80, right 40")
    page.evaluate("infworldSetFrame('editor', 90)")
    segment(page, 1).click()
    button(page, "Split").click()
    expect_text(page, "forward 80, right 10, right 30")


def test_the_keyboard_alone_is_enough(page):
    write(page, "forward 80, right 40, wait 20")
    page.locator(".segment[tabindex='0']").focus()
    for key in ("ArrowRight", "ArrowUp", "Shift+ArrowUp", "Shift+ArrowRight"):
        page.keyboard.press(key)
    expect_text(page, "forward 80, wait 20, right 51")
    for key in ("Home", "ArrowDown", "c", "End", "Delete", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    expect_text(page, "forward 70, wait 20, forward 70")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("2 of 3: wait, 20 frames")
    sync_api.expect(page.locator(".keys-hint")).to_be_visible()


def test_undo_and_redo_walk_through_every_edit(fresh):
    states = ["", "forward 80", "forward 80, left 80", "forward 90, left 80"]
    button(fresh, "Forward").click()
    button(fresh, "Left").click()
    segment(fresh, 0).click()
    fresh.keyboard.press("ArrowUp")
    for text in states[-2::-1]:
        fresh.keyboard.press("Control+z")
        expect_text(fresh, text)
    sync_api.expect(button(fresh, "Undo")).to_be_disabled()
    for text in states[1:]:
        fresh.keyboard.press("Control+Shift+z")
        expect_text(fresh, text)
    sync_api.expect(button(fresh, "Redo")).to_be_disabled()


def test_a_border_is_dragged_and_snaps_to_chunks(page):
    write(page, "forward 60, right 40")
    per_frame = segment(page, 0).bounding_box()["width"] / 60
    for frames, expected in ((-30, "forward 30, right 40"), (51, "forward 80, right 40")):
        x, y = centre(segment(page, 0).locator(".handle"))
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + frames * per_frame / 2, y)
        page.mouse.move(x + frames * per_frame, y)
        page.mouse.up()
        expect_text(page, expected)
    button(page, "Undo").click()  # a drag is one step
    expect_text(page, "forward 30, right 40")


def test_a_segment_is_dragged_to_another_place(page):
    write(page, "forward 40, right 40, back 40")
    x, y = centre(segment(page, 0))
    end, _ = centre(segment(page, 2))
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move((x + end) / 2, y)
    sync_api.expect(part(page, "drop")).to_be_visible()
    page.mouse.move(end + 10, y)
    page.mouse.up()
    expect_text(page, "right 40, back 40, forward 40")
    sync_api.expect(part(page, "drop")).to_be_hidden()


def test_lengths_are_compared_with_the_film_and_the_horizon(fresh):
    write(fresh, "forward 80")
    sync_api.expect(part(fresh, "notes")).to_contain_text("80 frames longer than the actions")
    write(fresh, "forward 160")
    sync_api.expect(part(fresh, "notes")).to_be_hidden()
    fresh.get_by_role("button", name="Longer film").click()
    sync_api.expect(part(fresh, "facts")).to_contain_text("the film has 481 frames")
    sync_api.expect(part(fresh, "notes")).to_contain_text("320 frames longer")
    sync_api.expect(part(fresh, "notes")).to_contain_text("Past 401 frames")
    button(fresh, "Full circle").click()  # what the update left out still holds
    expect_text(fresh, "right 320")


def test_python_shows_a_script_and_a_moment_and_the_script_can_be_undone(fresh):
    write(fresh, "forward 80")
    fresh.get_by_role("button", name="Example").click()
    expect_text(fresh, EXAMPLE.text())
    assert part(fresh, "playhead").evaluate("n => parseFloat(n.style.left)") == 100 * 12 / 240  # 3 chunks in sight
    button(fresh, "Undo").click()
    expect_text(fresh, "forward 80")


# ---------------------------------------------------------------- text and files

TEXTS = [
    "forward 80, right 40; forward+left 60\nwait 5",
    "  Strafe-Left + UP 3 ,, strafe  right+down+back 4",
    "wait+forward 2, wait+wait 1",
    "forward",
    "80 forward",
    "forward 0",
    "forward 1.5",
    "forward -3",
    "fly 10",
    "forward+back 10",
    "left+right 10",
    "strafe left+strafe left 10",
    "forward+ 10",
    "constructor 4",
    "forward 999999",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_page_and_python_read_one_grammar(page, text):
    write(page, "back 11")
    part(page, "text").fill(text)
    try:
        expected = ActionScript.parse(text)
    except ValueError as error:
        message = str(error).replace('"', "'")
        shown = part(page, "error").inner_text()
        assert shown[1:] == message[1:] and shown[0] == message[0].upper()
        assert page.locator(".segment").count() == 1  # the last good script stays
    else:
        sync_api.expect(page.locator("#received-text textarea")).to_have_value(expected.text())
        assert part(page, "error").inner_text() == ""
        part(page, "text").blur()
        expect_text(page, expected.text())


def test_typing_is_not_disturbed_and_is_one_step_to_undo(page):
    write(page, "back 11")
    part(page, "text").fill("")
    part(page, "text").press_sequentially("forward 80 ,  left 7")
    sync_api.expect(page.locator("#received-text textarea")).to_have_value("forward 80, left 7")
    sync_api.expect(part(page, "text")).to_have_value("forward 80 ,  left 7")
    button(page, "Undo").click()
    expect_text(page, "back 11")


def test_too_long_a_script_is_refused(page):
    write(page, "back 11")
    part(page, "text").fill("forward 20000, back 1")
    sync_api.expect(part(page, "error")).to_have_text("The actions may last at most 20000 frames")
    sync_api.expect(part(page, "text")).to_have_value("forward 20000, back 1")
    assert page.locator("#received-text textarea").input_value() == "back 11"


def test_export_is_the_exchange_format_and_import_reads_it(page, tmp_path):
    script = ActionScript.parse("forward+left 3, wait 2, strafe right+down 4")
    write(page, script.text())
    with page.expect_download() as download:
        button(page, "Export").click()
    assert download.value.suggested_filename == "actions.json"
    path = tmp_path / "actions.json"
    download.value.save_as(path)
    assert path.read_text(encoding="utf-8") == script.to_json()
    button(page, "Clear").click()
    expect_text(page, "")
    part(page, "file").set_input_files(path)
    expect_text(page, script.text())


def test_import_keeps_what_has_no_words(page, tmp_path):
    path = tmp_path / "uncertain.json"
    path.write_text(json.dumps([{"move": "uncertain", "view": "turn up"}] * 3), encoding="utf-8")
    part(page, "file").set_input_files(path)
    expect_text(page, "up 3")
    assert "9" in page.locator("#received").inner_text()


@pytest.mark.parametrize("content", ["not json", "{}", '[{"move": "fly", "view": "no-op"}]', "[null]"])
def test_a_bad_file_is_named_and_changes_nothing(page, tmp_path, content):
    write(page, "back 11")
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    part(page, "file").set_input_files(path)
    sync_api.expect(part(page, "error")).to_contain_text("Bad.json:", ignore_case=True)
    expect_text(page, "back 11")


# ---------------------------------------------------------------- keys

CLOCK = """() => {
  window.keyTimes = [];
  for (const type of ["keydown", "keyup"])
    document.addEventListener(type, (e) => e.repeat || keyTimes.push(e.timeStamp), true);
}"""


def frames_between(page, *events):
    """Frames that lay between numbered key events, by the browser's own clock."""
    times = page.evaluate("window.keyTimes")
    return [int((times[b] - times[a]) * 30 / 1000) for a, b in zip(events, events[1:], strict=False)]


def received(page):
    return ActionScript.parse(page.locator("#received-text textarea").input_value())


def stop(page):
    """Ends the recording and waits until Python has what the page shows."""
    button(page, "Stop").click()
    expect_text(page, part(page, "text").input_value())


def test_held_keys_become_segments_of_their_length(page):
    page.evaluate(CLOCK)
    button(page, "Record keys").click()
    page.wait_for_timeout(300)  # time starts with the first key
    page.keyboard.down("w")
    page.wait_for_timeout(400)
    page.keyboard.down("ArrowRight")
    sync_api.expect(page.locator(".pads .held")).to_have_count(2)
    page.wait_for_timeout(300)
    page.keyboard.up("w")
    page.wait_for_timeout(200)
    page.keyboard.up("ArrowRight")
    page.wait_for_timeout(200)
    stop(page)
    segments = received(page).segments
    assert [(s.move, s.view) for s in segments] == [(1, 0), (1, 4), (0, 4)]  # and no wait at the end
    for got, expected in zip(segments, frames_between(page, 0, 1, 2, 3), strict=True):
        assert abs(got.frames - expected) <= 1


def test_a_recording_is_appended_and_undone_as_one(page):
    write(page, "forward 80")
    button(page, "Record keys").click()
    for key in ("a", "s"):
        page.keyboard.down(key)
        page.wait_for_timeout(200)
        page.keyboard.up(key)
    stop(page)
    assert [s.move for s in received(page).segments][:2] == [1, 3]
    button(page, "Undo").click()
    expect_text(page, "forward 80")


def test_a_recording_can_replace_what_is_there(page):
    write(page, "forward 80")
    part(page, "replace").check()
    button(page, "Record keys").click()
    page.keyboard.down("ArrowUp")
    page.wait_for_timeout(200)
    page.keyboard.press("Escape")
    page.keyboard.up("ArrowUp")
    sync_api.expect(button(page, "Record keys")).to_be_visible()
    sync_api.expect(page.locator(".segment")).to_have_count(1)
    assert page.locator(".segment").get_attribute("title").startswith("up,")


def test_an_empty_recording_changes_nothing(page):
    write(page, "forward 80")
    part(page, "replace").check()
    button(page, "Record keys").click()
    page.wait_for_timeout(100)
    button(page, "Stop").click()
    expect_text(page, "forward 80")


def test_fingers_that_are_not_quite_together_leave_no_crumbs(page):
    """Synthetic key events with exact times: gaps and overlaps below three frames join their neighbours."""
    button(page, "Record keys").click()
    page.evaluate("""() => {
      const start = performance.now();
      const send = (type, code, at) => {
        const event = new KeyboardEvent(type, { code, bubbles: true, cancelable: true });
        Object.defineProperty(event, "timeStamp", { value: start + at });
        document.body.dispatchEvent(event);
      };
      send("keydown", "KeyW", 0);
      send("keydown", "ArrowLeft", 50);
      send("keyup", "ArrowLeft", 1000);
      send("keyup", "KeyW", 1050);
      send("keydown", "KeyD", 1100);
      send("keyup", "KeyD", 2000);
    }""")
    page.wait_for_timeout(2100)
    stop(page)
    words = [part.rsplit(" ", 1)[0] for part in received(page).text().split(", ")]
    assert words == ["forward+left", "strafe right"]
    assert len(received(page)) in (60, 61)


def test_keys_are_let_go_when_the_window_loses_focus(page):
    button(page, "Record keys").click()
    page.keyboard.down("w")
    page.wait_for_timeout(300)
    page.evaluate("window.dispatchEvent(new Event('blur'))")
    sync_api.expect(page.locator(".pads .held")).to_have_count(0)
    page.wait_for_timeout(400)
    stop(page)
    assert len(received(page)) < 20


def test_typing_is_not_recorded(page):
    write(page, "back 11")
    page.keyboard.press("w")  # not recording: nothing happens
    button(page, "Record keys").click()
    part(page, "text").focus()
    page.keyboard.press("w")
    sync_api.expect(page.locator(".pads .held")).to_have_count(0)
    sync_api.expect(part(page, "text")).to_have_value("back 11w")


def test_shortcuts_are_not_recorded(page):
    button(page, "Record keys").click()
    page.keyboard.down("Control")
    page.keyboard.press("s")
    page.keyboard.up("Control")
    sync_api.expect(part(page, "keys-status")).to_contain_text("Time starts")


def test_the_pad_is_held_by_pointer(page):
    button(page, "Record keys").click()
    page.mouse.move(*centre(button(page, "Back")))
    page.mouse.down()
    page.wait_for_timeout(300)
    sync_api.expect(page.locator(".pads .held")).to_have_count(1)
    page.mouse.move(5, 5)  # still held outside
    page.wait_for_timeout(100)
    page.mouse.up()
    sync_api.expect(page.locator(".pads .held")).to_have_count(0)
    stop(page)
    (only,) = received(page).segments
    assert only.move == 2 and only.frames >= 9


def test_python_hears_of_a_long_recording_while_it_runs(page):
    button(page, "Record keys").click()
    page.keyboard.down("d")
    sync_api.expect(page.locator("#received-text textarea")).not_to_have_value("", timeout=10_000)
    assert len(received(page)) >= 80
    sync_api.expect(button(page, "Stop")).to_be_visible()
    page.keyboard.up("d")


# ---------------------------------------------------------------- map and film


def test_the_map_shows_borders_and_places_visited_twice(page):
    write(page, "forward 240")
    assert page.locator(".map svg .again").count() == page.locator(".map svg .same").count() == 0
    assert page.locator(".map circle.border").count() == 4
    write(page, "forward 80, right 160, forward 80")  # there and back, looking the other way
    assert page.locator(".map svg .again").count() == 1
    assert page.locator(".map svg .same").count() == 0
    write(page, "right 320")  # on the spot: the same view, nothing walked
    assert page.locator(".map svg .again").count() == 0
    assert page.locator(".map svg .same").count() == 1
    assert "turned 0 degrees" in part(page, "map").get_attribute("aria-label")


def test_the_map_knows_where_a_walk_ends(page):
    write(page, "forward 80, right 80, forward 80")
    assert "ends 4.5 units from the start, turned 90 degrees" in part(page, "map").get_attribute("aria-label")
    write(page, "forward+strafe right 100")  # a diagonal is no faster
    assert "ends 4.0 units" in part(page, "map").get_attribute("aria-label")


def test_the_current_moment_is_set_by_script(page):
    write(page, "forward 80, right 80")
    page.evaluate("infworldSetFrame('editor', 0)")
    before = part(page, "now").get_attribute("transform")
    page.evaluate("infworldSetFrame('editor', 160)")
    after = part(page, "now").get_attribute("transform")
    assert before != after and "rotate(90.0)" in after
    page.evaluate("infworldSetFrame('editor', NaN); infworldSetFrame('none', 3)")
    assert part(page, "now").get_attribute("transform") == before


def test_the_current_moment_follows_the_film(fresh):
    write(fresh, "right 80")
    fresh.evaluate("document.querySelector('#film video').play()")
    sync_api.expect(part(fresh, "now")).to_have_attribute("transform", turned_by(29, 31), timeout=10_000)


def turned_by(low, high):
    """The marker turned by this many frames."""
    degrees = "|".join(re.escape(f"{1.125 * n:.1f}") for n in range(low, high + 1))
    return re.compile(rf"rotate\(({degrees})\)")


# ---------------------------------------------------------------- looks


@pytest.mark.parametrize("width", [390, 1100])  # back to the width of the other tests at the end
def test_nothing_sticks_out_and_everything_has_a_name(page, width):
    page.set_viewport_size({"width": width, "height": 1000})
    button(page, "Campus walk").click()
    segment(page, 3).click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    inside = """() => {
      const right = document.querySelector('.action-editor').getBoundingClientRect().right;
      return [...document.querySelectorAll('.action-editor :is(button, select, textarea, svg, p)')]
        .filter((n) => n.getBoundingClientRect().right > right + 1 && !n.closest('.scroller')).length;
    }"""
    assert page.evaluate(inside) == 0
    nameless = """() => [...document.querySelectorAll('.action-editor :is(button, select, textarea, input, .segment)')]
      .filter((n) => !(n.ariaLabel || n.innerText.trim() || n.labels?.[0]?.innerText.trim())).length"""
    assert page.evaluate(nameless) == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_on_colours_can_be_read(page, address, theme):
    page.goto(f"{address}?__theme={theme}")
    page.locator(".action-editor .pad").first.wait_for()
    write(page, "forward 80, strafe left+down 80, strafe right+left 80, back+right 80")
    contrasts = page.evaluate("""() => {
      const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
      const context = canvas.getContext("2d", { willReadFrequently: true });
      const light = (colour) => {
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        const part = (x) => (x <= 10 ? x / 3294 : ((x / 255 + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
        return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
      };
      return [...document.querySelectorAll(".lane")].map((lane) => {
        const style = getComputedStyle(lane);
        const [a, b] = [light(style.color), light(style.backgroundColor)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      });
    }""")
    assert min(contrasts) >= 4.5
