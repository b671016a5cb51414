// Plays a film while it is made. `props.value.pieces` names the film's fragmented mp4 pieces in order; whatever
// changes at their end is changed in the browser's media source, so that playing goes on through it.

const TYPE = 'video/mp4; codecs="avc1.640028"';
const video = element.querySelector("video");
const still = element.querySelector(".still");
const empty = element.querySelector(".empty");
const waits = element.querySelector(".waits");
const Source = window.MediaSource ?? window.ManagedMediaSource;

let shown = []; // pieces in the media source, each {url, frames, start, end} in seconds
let source = null;
let buffer = null;
let work = Promise.resolve(); // changes to the media source wait for each other

// By path alone: behind a proxy the server may not know under which scheme and name it is reached.
function address(path) {
  const root = new URL(window.gradio_config?.root ?? ".", location.href).pathname.replace(/\/$/, "");
  return `${root}/gradio_api/file=${path.split("/").map(encodeURIComponent).join("/")}`;
}

const once = (target, name) => new Promise((done) => target.addEventListener(name, done, { once: true }));

async function open() {
  source = new Source();
  video.disableRemotePlayback = true; // a managed media source asks for it
  const opened = once(source, "sourceopen");
  video.src = URL.createObjectURL(source);
  await opened;
  URL.revokeObjectURL(video.src);
  buffer = source.addSourceBuffer(TYPE);
  shown = [];
}

function close() {
  source = buffer = null;
  shown = [];
  video.removeAttribute("src");
  video.load();
}

async function change(action) {
  const done = once(buffer, "updateend");
  action();
  await done;
}

async function drop(count) {
  const start = shown[count].start;
  if (video.currentTime > start) video.currentTime = start;
  await change(() => buffer.remove(start, Infinity));
  shown.length = count;
  source.duration = start;
}

async function append(piece, fps) {
  const response = await fetch(address(piece.path));
  if (!response.ok) throw new Error(`${response.status} for a piece of the film`);
  const data = await response.arrayBuffer();
  const start = shown.length ? shown[shown.length - 1].end : 0;
  buffer.timestampOffset = start;
  await change(() => buffer.appendBuffer(data));
  shown.push({ ...piece, start, end: start + piece.frames / fps });
  source.duration = shown[shown.length - 1].end; // a fragmented piece does not say how long it is
}

async function sync(value) {
  const pieces = value?.pieces ?? [];
  const same = pieces.findIndex((piece, i) => piece.path !== shown[i]?.path);
  const kept = same < 0 ? pieces.length : same;
  if (pieces.length && kept === shown.length && kept === pieces.length && source) return finish(value);
  if (!pieces.length) {
    if (source || video.hasAttribute("src")) close();
    return;
  }
  const resume = video.ended || !source;
  if (!Source?.isTypeSupported(TYPE)) return plain(value);
  if (!kept || !source) {
    await open();
  } else if (kept < shown.length) {
    await drop(kept);
  }
  for (const piece of pieces.slice(shown.length)) {
    await append(piece, value.fps);
    if (resume && video.paused) await play(shown[shown.length - 1].start);
  }
  finish(value);
}

// Plays on from a time in seconds. A video that has ended would start over if it were not told where to go.
async function play(from) {
  if (video.currentTime || video.ended) {
    const arrived = once(video, "seeked");
    video.currentTime = from;
    await arrived;
  }
  video.play().catch(() => {}); // a browser may refuse to play by itself
}

function finish(value) {
  if (value.complete && source?.readyState === "open" && !buffer.updating) source.endOfStream();
}

// Without media sources: the complete film once it is there, until then the newest piece by itself.
function plain(value) {
  const url = address(value.complete ?? value.pieces[value.pieces.length - 1].path);
  if (video.getAttribute("src") === url) return;
  video.src = url;
  video.play().catch(() => {});
}

function show() {
  const value = props.value;
  const pieces = value?.pieces ?? [];
  video.hidden = !pieces.length;
  still.hidden = !!pieces.length || !value?.still;
  if (value?.still && still.getAttribute("src") !== value.still) still.src = value.still;
  empty.hidden = !!pieces.length || !!value?.still;
  work = work.then(() => sync(value)).catch((error) => {
    console.warn(`The film cannot be streamed: ${error.message}`);
    if (value?.pieces?.length) plain(value);
  });
  hint();
}

function shape(width, height) {
  element.style.setProperty("--film-shape", width / height);
}

function hint() {
  const stalled = video.readyState < 3 && !video.paused && !video.seeking;
  waits.hidden = !(props.value?.pieces?.length && !props.value.complete && (stalled || video.ended));
}

for (const name of ["waiting", "playing", "pause", "canplay", "seeked", "ended"]) video.addEventListener(name, hint);
still.addEventListener("load", () => shape(still.naturalWidth, still.naturalHeight));
video.addEventListener("loadedmetadata", () => shape(video.videoWidth, video.videoHeight));
watch("value", show);
show();
