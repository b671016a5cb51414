// Two films in step, and one question at a time about them. Nothing here knows whose films they are: their addresses
// are random, and a vote names the pair by a random token.

const QUESTIONS = {
  memory: "Memory: which one shows again what it has shown before?",
  fidelity: "Fidelity: which one looks better, sharper, more of one piece?",
  action: "Action: which one does what the actions say?",
  overall: "Overall: which one is better?",
};
const KEYS = { 1: "left", 2: "same", 3: "right" };
const DRIFT = 0.06; // seconds that the films may be apart

const find = (selector) => element.querySelector(selector);
const [left, right] = element.querySelectorAll("video");
const canvases = element.querySelectorAll("canvas");
const films = find(".films"), deck = find(".deck"), ask = find(".ask"), note = find(".note"), pairNote = find(".pair");
const play = find(".play"), range = find("input"), doing = find(".doing"), back = find(".return");
const answers = element.querySelectorAll(".answers button");

let shown = null; // the pair on the page
let paused = false; // whether the films have paused by themselves at the return
let busy = false; // whether a vote is on its way

function voter() {
  let name = localStorage.getItem("infworld-voter");
  if (!name) {
    name = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    localStorage.setItem("infworld-voter", name);
  }
  return name;
}

function address(path) {
  const root = (window.gradio_config?.root ?? "").replace(/\/$/, "");
  return `${root}/gradio_api/file=${path.split("/").map(encodeURIComponent).join("/")}`;
}

const once = (target, name) => new Promise((done) => target.addEventListener(name, done, { once: true }));

async function seek(seconds) {
  await Promise.all([left, right].map(async (video) => {
    if (Math.abs(video.currentTime - seconds) < 1e-3) return;
    const arrived = once(video, "seeked");
    const painted = new Promise((done) => video.requestVideoFrameCallback?.(done) ?? done());
    video.currentTime = seconds;
    await arrived;
    await Promise.race([painted, new Promise((done) => setTimeout(done, 500))]); // a hidden tab paints nothing
  }));
}

async function start() {
  await Promise.all([left, right].map((video) => video.readyState >= 3 || once(video, "canplay")));
  if (left.ended) await seek(0);
  right.currentTime = left.currentTime;
  await Promise.all([left.play(), right.play()]).catch(() => {}); // a browser may refuse to play by itself
}

function stop() {
  left.pause();
  right.pause();
}

const middle = (frame) => (frame + 0.5) / shown.fps;

// Both films at a view that the walk returns to, with what they showed there at first below.
async function showReturn() {
  if (!shown?.revisit) return;
  paused = true;
  stop();
  const [first, again] = shown.revisit;
  await seek(middle(first));
  [left, right].forEach((video, i) => {
    canvases[i].width = video.videoWidth;
    canvases[i].height = video.videoHeight;
    canvases[i].getContext("2d").drawImage(video, 0, 0);
    canvases[i].hidden = false;
  });
  await seek(middle(again));
  pairNote.hidden = false;
}

function hideReturn() {
  for (const canvas of canvases) canvas.hidden = true;
  pairNote.hidden = true;
}

function action(frame) {
  let end = 0;
  for (const [words, frames] of shown?.actions ?? []) {
    end += frames;
    if (frame < end) return words;
  }
  return "";
}

function tick() {
  if (!element.isConnected) return;
  requestAnimationFrame(tick);
  if (!shown || !left.duration) return;
  if (!left.paused && Math.abs(right.currentTime - left.currentTime) > DRIFT) right.currentTime = left.currentTime;
  const ended = left.ended || right.ended;
  if (ended) stop();
  range.value = (1000 * left.currentTime) / left.duration;
  doing.textContent = action(Math.floor(left.currentTime * shown.fps));
  play.textContent = left.paused ? "Play" : "Pause";
  const due = shown.questions[0] === "memory" && shown.revisit && !paused;
  if (due && (ended || (!left.paused && left.currentTime >= middle(shown.revisit[1])))) showReturn();
}

function show() {
  const value = props.value;
  busy = false;
  const pair = value?.pair ?? null;
  for (const part of [films, deck, ask]) part.hidden = !pair;
  note.textContent = value?.note ?? "";
  find(".count").textContent = value?.pairs ? `${value.done} of ${value.pairs} pairs done` : "";
  if (!pair) {
    shown = null;
    stop();
    return;
  }
  const fresh = pair !== shown?.pair;
  shown = value;
  back.hidden = !shown.revisit;
  find(".question").textContent = QUESTIONS[shown.questions[0]];
  ask.dataset.question = shown.questions[0];
  if (shown.questions[0] !== "memory") hideReturn();
  if (fresh) {
    paused = false;
    hideReturn();
    left.src = address(shown.left);
    right.src = address(shown.right);
    start();
  }
  for (const button of answers) button.disabled = false;
}

function vote(choice) {
  if (busy || !shown) return;
  busy = true;
  for (const button of answers) button.disabled = true;
  trigger("vote", { voter: voter(), pair: shown.pair, question: shown.questions[0], choice });
}

for (const button of answers) button.addEventListener("click", () => vote(button.dataset.choice));
play.addEventListener("click", () => (left.paused ? start() : stop()));
back.addEventListener("click", showReturn);
range.addEventListener("input", () => {
  stop();
  if (left.duration) seek((left.duration * range.value) / 1000);
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input:not([type=range]), textarea, select, [contenteditable]");
  if (typing || event.ctrlKey || event.altKey || event.metaKey || event.repeat || !element.offsetParent) return;
  if (KEYS[event.key]) vote(KEYS[event.key]);
});

watch("value", show);
requestAnimationFrame(tick);
trigger("ask", { voter: voter() });
