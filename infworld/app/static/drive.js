// Driving: while the film's last chunk plays, the keys held in each of its frames are written down; at its end they go
// to Python as script text, which makes the next chunk of them. `initial`: vocabulary, keys, chunk_frames, fps, film.

import { HeldKeys } from "./keys.js";
import { Recording } from "./recorder.js";
import { Vocabulary } from "./script.js";

const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;

export function start({ element, props, trigger, watch }, initial) {
  const { chunk_frames: chunk, fps } = initial;
  const vocabulary = new Vocabulary(initial);
  const toggle = element.querySelector(".toggle");
  const says = element.querySelector(".says");

  let state = "off"; // off, beginning (no film yet), recording, making
  let from = 0; // the frame at which the chunk that plays begins
  let record = null; // what was held in the frames of that chunk
  let sent = 0; // when the last record went to Python
  let presses = []; // key presses not yet seen in the picture: {at: ms, time: seconds of film}
  const keys = new HeldKeys({
    keys: initial.keys,
    buttons: element.querySelector(".pad"),
    active: () => state !== "off",
    changed: (_, pressed) => {
      if (!pressed || state !== "recording") return;
      presses.push({ at: performance.now(), time: (from + chunk + record.frames) / fps });
    },
  });

  const player = () => document.querySelector(initial.film);
  const write = (name, text) => (element.querySelector(`.${name}`).textContent = text);
  const framesThere = () => Math.round((player().duration || 0) * fps);

  function begin() {
    toggle.setAttribute("aria-pressed", "true");
    toggle.textContent = "Stop driving";
    presses = [];
    const there = framesThere();
    if (!there) {
      state = "beginning";
      from = -chunk; // so that the film's first frame is where driving begins
      says.textContent = "The first chunk is made by the plan below; then you drive.";
      send("");
    } else {
      player().currentTime = Math.max(0, there - chunk) / fps; // so that all of a chunk can be driven
      play(there - chunk);
    }
    requestAnimationFrame(tick);
  }

  function stop(text) {
    state = "off";
    keys.release();
    toggle.setAttribute("aria-pressed", "false");
    toggle.textContent = "Start driving";
    says.textContent = text;
  }

  function play(frame) {
    from = Math.max(0, frame);
    record = new Recording(vocabulary, fps, chunk);
    state = "recording";
    says.textContent = "Drive now: hold W A S D and the arrow keys.";
    const video = player();
    if (Math.floor(video.currentTime * fps) < from || video.ended) video.currentTime = from / fps;
    video.play().catch(() => {});
  }

  function tick(now) {
    if (state === "off") return;
    requestAnimationFrame(tick);
    const video = player();
    const frame = video.currentTime * fps + 0.01;
    const seen = presses.findIndex((press) => video.currentTime < press.time);
    const shown = presses.splice(0, seen < 0 ? presses.length : seen);
    if (shown.length) write("delay", seconds(now - shown.at(-1).at));
    if (state === "recording") {
      record.until(Math.ceil(frame - from), keys.words);
      if (video.ended || frame >= from + chunk - 0.5) finish();
    } else if (framesThere() >= from + 2 * chunk && frame >= from + chunk) {
      const took = now - sent; // the chunk is there
      write("took", seconds(took));
      const slower = (took * fps) / 1000 / chunk;
      const times = slower > 1 ? `${slower.toFixed(1)} × slower than` : `${(1 / slower).toFixed(1)} ×`;
      write("speed", `${times} real time`);
      play(from + chunk);
    }
  }

  function finish() {
    record.until(chunk, keys.words);
    state = "making";
    says.textContent = "Your chunk is being made …";
    send(vocabulary.toText(record.segments));
  }

  function send(script) {
    sent = performance.now();
    props.value = { script, number: (props.value?.number ?? 0) + 1 };
    trigger("drive");
  }

  write("plays", seconds((1000 * chunk) / fps));
  toggle.addEventListener("click", () => (state === "off" ? begin() : stop("You have stopped driving.")));
  watch("value", () => !props.value && state !== "off" && stop("Driving has ended: see above."));
}
