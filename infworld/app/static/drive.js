// Driving: while the film's last chunk plays, the keys held in each of its frames are written down; at its end they go
// to Python as script text, which makes the next chunk of them. `settings`: keys, frames per chunk, frames a second.

const { keys, chunk, fps, film } = settings;
const OPPOSITES = [["forward", "back"], ["strafe left", "strafe right"], ["up", "down"], ["left", "right"]];
const toggle = element.querySelector(".toggle");
const says = element.querySelector(".says");
const buttons = new Map([...element.querySelectorAll("[data-word]")].map((button) => [button.dataset.word, button]));

let state = "off"; // off, beginning (no film yet), recording, making
let from = 0; // the frame at which the chunk that plays begins
let record = []; // what was held, per frame of that chunk
let sent = 0; // when the last record went to Python
let presses = []; // key presses not yet seen in the picture: {at: ms, time: seconds of film}
const held = new Set();

const player = () => document.querySelector(film);
const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
const write = (name, text) => { element.querySelector(`.${name}`).textContent = text; };
const framesThere = () => Math.round((player().duration || 0) * fps);

function action() {
  const words = [...held].filter((word) => {
    const pair = OPPOSITES.find((words) => words.includes(word));
    return !pair.every((other) => held.has(other));
  });
  return words.join("+") || "wait";
}

function hold(word, on) {
  if (on === held.has(word)) return;
  if (on) held.add(word);
  else held.delete(word);
  buttons.get(word).classList.toggle("held", on);
  if (on && state === "recording") presses.push({ at: performance.now(), time: (from + chunk + record.length) / fps });
}

function release() {
  for (const word of [...held]) hold(word, false);
}

function start() {
  toggle.setAttribute("aria-pressed", "true");
  toggle.textContent = "Stop driving";
  presses = [];
  const there = framesThere();
  if (!there) {
    state = "beginning";
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
  release();
  toggle.setAttribute("aria-pressed", "false");
  toggle.textContent = "Start driving";
  says.textContent = text;
}

function play(frame) {
  from = Math.max(0, frame);
  record = [];
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
  if (shown.length) write("delay", seconds(now - shown[shown.length - 1].at));
  if (state === "recording") {
    while (record.length < Math.min(frame - from, chunk)) record.push(action());
    if (video.ended || frame >= from + chunk - 0.5) finish();
  } else if (framesThere() >= next() && frame >= from + chunk) {
    const took = now - sent;
    write("took", seconds(took));
    const slower = (took * fps) / 1000 / chunk;
    write("speed", slower > 1 ? `${slower.toFixed(1)} × slower than real time` : `${(1 / slower).toFixed(1)} × real time`);
    play(from + chunk);
  }
}

// Frames that the film has when the chunk that is being made is there.
const next = () => from + 2 * chunk;

function finish() {
  while (record.length < chunk) record.push(action());
  state = "making";
  says.textContent = "Your chunk is being made …";
  const runs = [];
  for (const words of record) {
    if (runs.length && runs[runs.length - 1][0] === words) runs[runs.length - 1][1] += 1;
    else runs.push([words, 1]);
  }
  send(runs.map((run) => run.join(" ")).join(", "));
}

function send(script) {
  sent = performance.now();
  if (state === "beginning") from = -chunk; // so that the film's first frame is where driving begins
  props.value = { script, number: (props.value?.number ?? 0) + 1 };
  trigger("drive");
}

function typing(target) {
  return target.matches?.("input:not([type=range]), textarea, select, [contenteditable=true]");
}

function key(event) {
  const word = keys[event.code];
  if (state === "off" || !word || event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
  event.preventDefault();
  event.stopPropagation();
  if (!event.repeat) hold(word, event.type === "keydown");
}

document.addEventListener("keydown", key, true);
document.addEventListener("keyup", key, true);
window.addEventListener("blur", release);
toggle.addEventListener("click", () => (state === "off" ? start() : stop("You have stopped driving.")));
for (const [word, button] of buttons) {
  button.addEventListener("pointerdown", (event) => { button.setPointerCapture(event.pointerId); hold(word, true); });
  for (const name of ["pointerup", "pointercancel"]) button.addEventListener(name, () => hold(word, false));
}
watch("value", () => { if (!props.value && state !== "off") stop("Driving has ended: see above."); });
