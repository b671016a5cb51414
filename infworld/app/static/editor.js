// The action editor: what the person does here is what Python receives. `editor.py` gives `initial` (settings,
// vocabulary, motion, limits). There is one state, a list of segments: timeline, text, map and Gradio's value are all
// drawn from it. Action i leads from frame i to frame i + 1, so a film of n frames takes n - 1 actions.

import { Edits } from "./edits.js";
import { HeldKeys, isTyping } from "./keys.js";
import { PathMap } from "./map.js";
import { buildPads } from "./pads.js";
import { walk } from "./path.js";
import { Recording } from "./recorder.js";
import { Vocabulary, clamp, count, equal, fromValue, isWait, toValue, total } from "./script.js";
import { TextForm } from "./text.js";
import { Timeline } from "./timeline.js";

const FRAMES_STEP = "frames";
const SHOWN_EVERY = 3; // frames of a recording

export function start({ element, props, trigger, watch }, initial) {
  const root = element.querySelector(".action-editor");
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const setting = (name) => props[name] ?? initial[name];
  const seconds = (frames) => (frames / setting("fps")).toFixed(1).replace(/\.0$/, "");
  const vocabulary = new Vocabulary(initial);

  // ---------------------------------------------------------------- state

  let frame = setting("frame"); // the current moment of the film
  let recording = null; // { taken, before, base, published }: the segments before it, and those that it follows
  const edits = new Edits(vocabulary.maxFrames, { drawn: draw, published: publish, refused: (m) => text.showError(m) });
  edits.segments = fromValue(props.value);
  const text = new TextForm(edits, vocabulary, part);
  const map = new PathMap(part("map"), initial.motion);
  const timeline = new Timeline(edits, vocabulary, {
    part,
    setting,
    locked: () => recording !== null,
    scrubbed: setFrame,
    selected: drawInspector,
  });

  function publish() {
    props.value = toValue(edits.segments);
    trigger("input");
  }

  function adopt() {
    const next = fromValue(props.value);
    if (equal(next, edits.segments)) return;
    endRecording();
    edits.adopt(next);
  }

  function setFrame(next) {
    frame = Math.max(0, Math.round(next) || 0);
    timeline.drawPlayhead(frame);
    map.drawNow(frame);
  }

  // ---------------------------------------------------------------- drawing

  function draw() {
    timeline.draw(frame);
    drawNotes();
    drawInspector();
    text.draw();
    drawMap();
  }

  function drawMap() {
    map.draw(walk(edits.segments, initial.motion), setting("chunk_frames"), frame);
  }

  function drawNotes() {
    const have = total(edits.segments);
    const film = setting("num_frames");
    const chunks = Math.ceil(have / setting("chunk_frames"));
    const facts = [count(have, "frame"), `${seconds(have)} s`, count(chunks, "chunk")];
    part("facts").textContent = facts.join(" · ") + (film ? ` — the film has ${film} frames` : "");
    const items = notes(have, film ? film - 1 : 0, setting("horizon_frames"));
    const list = part("notes");
    if (list.dataset.text === items.join("\n")) return; // a status region speaks whenever it is touched
    list.dataset.text = items.join("\n");
    list.replaceChildren(...items.map((item) => Object.assign(document.createElement("li"), { textContent: item })));
  }

  function notes(have, film, horizon) {
    const found = [];
    if (film > have) found.push(`The film is ${count(film - have, "frame")} longer than the actions: it waits there.`);
    if (film && have > film) found.push(`The film ends before the last ${count(have - film, "frame")} of the actions.`);
    if (horizon && Math.max(film, have) >= horizon) {
      found.push(`Past ${horizon} frames (${seconds(horizon)} s) the model is beyond what it was trained for.`);
    }
    return found;
  }

  function drawInspector() {
    const { chosen } = edits;
    part("inspector").classList.toggle("idle", !chosen);
    for (const control of part("inspector").querySelectorAll("button, select, input")) control.disabled = !chosen;
    if (chosen) {
      part("move").value = chosen.move;
      part("view").value = chosen.view;
      if (edits.lastStep !== FRAMES_STEP) part("frames").value = chosen.frames;
    }
    const able = { undo: edits.canUndo, redo: edits.canRedo };
    able.export = able.clear = edits.segments.length > 0;
    for (const [name, on] of Object.entries(able)) root.querySelector(`[data-do="${name}"]`).disabled = !on;
  }

  // ---------------------------------------------------------------- recording keys in real time

  const keys = new HeldKeys({
    keys: initial.keys,
    buttons: part("pads"),
    active: () => recording !== null,
    changed: (time, pressed) => {
      recording.taken.sample(time, keys.words);
      if (pressed) recording.taken.start(time); // the clock starts with the first key
    },
    drawn: drawRecorder,
    escape: stopRecording,
  });

  function startRecording() {
    const base = part("replace").checked ? [] : edits.segments;
    const taken = new Recording(vocabulary, setting("fps"), vocabulary.maxFrames - total(base));
    recording = { taken, before: edits.segments, base, published: total(base) };
    edits.lastStep = null;
    edits.show(base, -1);
    drawRecorder();
    requestAnimationFrame(whileRecording);
  }

  function stopRecording() {
    if (!recording) return;
    const { taken, before, base } = recording;
    taken.sample(performance.now(), keys.words);
    endRecording();
    const done = taken.tidy();
    while (done.length && isWait(done.at(-1))) done.pop();
    edits.segments = before; // one recording is one step to undo
    edits.change(done.length ? [...base, ...done] : before, { select: -1 });
  }

  function endRecording() {
    recording = null;
    keys.release();
  }

  function whileRecording(time) {
    if (!recording) return;
    if (!root.isConnected) return endRecording();
    const { taken } = recording;
    const before = Math.floor(taken.frames / SHOWN_EVERY);
    taken.sample(time, keys.words);
    if (Math.floor(taken.frames / SHOWN_EVERY) > before) showRecording();
    requestAnimationFrame(whileRecording);
  }

  // Gradio hears of a recording at each chunk border, not thirty times a second.
  function showRecording() {
    edits.show([...recording.base, ...recording.taken.tidy()], -1);
    part("scroller").scrollLeft = part("scroller").scrollWidth;
    drawRecorder();
    const chunks = (frames) => Math.floor(frames / setting("chunk_frames"));
    const have = total(edits.segments);
    if (chunks(have) > chunks(recording.published)) publish();
    recording.published = have;
  }

  function drawRecorder() {
    root.classList.toggle("recording", recording !== null);
    part("record").setAttribute("aria-pressed", recording !== null);
    part("record-label").textContent = recording ? "Stop" : "Record keys";
    const running = recording && recording.taken.since !== null;
    part("keys-status").ariaLive = running ? "off" : "polite"; // a running clock is not read out
    part("keys-status").textContent = keysStatus(running);
  }

  function keysStatus(running) {
    const chunk = count(setting("chunk_frames"), "frame");
    if (!recording) return `An arrow adds ${chunk} after the selected segment, or at the end.`;
    if (!running) return "Hold W A S D to walk, arrow keys to look. Time starts with the first key.";
    return `${seconds(recording.taken.frames)} s · ${[...keys.words].join(" + ") || vocabulary.wait}`;
  }

  // ---------------------------------------------------------------- the film

  // The current moment follows a playing video; events of media do not bubble, so they are caught on their way down.
  let followed = null;

  function onVideo({ target }) {
    if (!root.isConnected) return document.removeEventListener("timeupdate", onVideo, true);
    if (!setting("follow") || !target.matches?.(setting("follow"))) return;
    setFrame(target.currentTime * setting("fps"));
    if (followed !== target) track(target);
  }

  function track(video) {
    followed = video.paused || !root.isConnected ? null : video;
    if (!followed) return;
    setFrame(video.currentTime * setting("fps"));
    requestAnimationFrame(() => track(video));
  }

  // ---------------------------------------------------------------- buttons

  const DO = {
    undo: () => edits.undo(),
    redo: () => edits.redo(),
    import: () => part("file").click(),
    export: () => text.export(),
    clear: () => edits.change([], { select: -1 }),
    "zoom-in": () => timeline.zoomTo(timeline.zoom * 1.5),
    "zoom-out": () => timeline.zoomTo(timeline.zoom / 1.5),
    earlier: () => edits.moveTo(edits.selected, edits.selected - 1),
    later: () => edits.moveTo(edits.selected, edits.selected + 1),
    split: () => edits.split(frame),
    copy: () => edits.copy(),
    delete: () => edits.remove(),
    record: startRecording,
  };

  function onClick({ target }) {
    const button = target.closest("[data-do], [data-template]");
    if (!button) return;
    const { do: name, template } = button.dataset;
    const stops = name === "record" && recording !== null;
    stopRecording();
    if (template) edits.change(fromValue({ segments: initial.templates[template][1] }), { select: -1 });
    else if (!stops) DO[name]();
  }

  function onPad({ target }) {
    const word = target.closest("[data-word]")?.dataset.word;
    if (!word || recording) return;
    edits.add({ ...vocabulary.actionOf(new Set([word])), frames: setting("chunk_frames") });
    timeline.focus();
  }

  function onUndoKey(event) {
    const key = event.key.toLowerCase();
    if (!(event.ctrlKey || event.metaKey) || isTyping(event.target) || recording || !"zy".includes(key)) return;
    event.preventDefault();
    if (key === "y" || event.shiftKey) edits.redo();
    else edits.undo();
  }

  function onFrames() {
    const frames = Math.floor(Number(part("frames").value));
    if (frames >= 1) edits.edit({ frames }, FRAMES_STEP);
  }

  function leaveFrames() {
    edits.lastStep = null;
    drawInspector();
  }

  function buildChoices() {
    const chips = initial.templates.map(([name], i) => `<button type="button" data-template="${i}">${name}</button>`);
    part("templates").innerHTML = `<span class="hint">Start from</span>${chips.join("")}`;
    for (const [kind, names] of Object.entries(vocabulary.kinds)) {
      const options = names.map((_, i) => `<option value="${i}">${vocabulary.label(kind, i)}</option>`);
      part(kind).innerHTML = options.join("");
      part(kind).addEventListener("change", () => edits.edit({ [kind]: Number(part(kind).value) }));
    }
  }

  function exposeFrames() {
    root.addEventListener("infworld-frame", ({ detail }) => setFrame(detail));
    window.infworldSetFrame = (id, next) => {
      const editor = document.getElementById(id)?.querySelector(".action-editor");
      editor?.dispatchEvent(new CustomEvent("infworld-frame", { detail: next }));
    };
  }

  function listen() {
    root.addEventListener("click", onClick);
    root.addEventListener("keydown", onUndoKey);
    part("pads").addEventListener("click", onPad);
    part("frames").addEventListener("input", onFrames);
    part("frames").addEventListener("blur", leaveFrames);
    document.addEventListener("timeupdate", onVideo, true);
    document.addEventListener("visibilitychange", () => document.hidden && stopRecording());
    new ResizeObserver(drawMap).observe(part("map"));
    watch("value", adopt);
    watch(["num_frames", "horizon_frames", "chunk_frames", "fps"], draw);
    watch("frame", () => setFrame(setting("frame")));
  }

  buildChoices();
  buildPads(part("pads"), vocabulary, initial.keys);
  exposeFrames();
  drawRecorder();
  listen();
  draw();
}
