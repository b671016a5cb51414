// The action editor in the browser. `editor.py` puts `initial` (settings, vocabulary, limits) in front of this text;
// Gradio runs it once with `element`, `props`, `trigger` and `watch`. There is one state, a list of segments
// { move, view, frames }: timeline, text, map and Gradio's value are all drawn from it, and every edit goes through
// `change`. Action i leads from frame i to frame i + 1, so a film of n frames takes n - 1 actions.

const root = element.querySelector(".action-editor");
const part = (name) => root.querySelector(`[data-part="${name}"]`);
const setting = (name) => props[name] ?? initial[name];
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const sum = (numbers) => numbers.reduce((total, n) => total + n, 0);

// ---------------------------------------------------------------- vocabulary

const KINDS = { move: initial.moves, view: initial.views };
const WORDS = { move: initial.move_words, view: initial.view_words };

const directionOfWords = (kind, text) =>
  text.split("+").reduce(([a, b], word) => {
    const [x, y] = WORDS[kind][word] ?? [0, 0];
    return [a + x, b + y];
  }, [0, 0]);

const DIRECTIONS = {
  move: KINDS.move.map(([, text]) => directionOfWords("move", text)),
  view: KINDS.view.map(([, text]) => directionOfWords("view", text)),
};

const same = (a, b) => a[0] === b[0] && a[1] === b[1];
const indexOf = (kind, direction) => DIRECTIONS[kind].findIndex((d) => same(d, direction));
const sentence = (text) => text[0].toUpperCase() + text.slice(1);

// "No-op" and "uncertain" both stand still; only the first has the word for it.
const label = (kind, index) => {
  const [name, text] = KINDS[kind][index];
  return index && text === initial.wait_word ? name : text;
};

function segmentWords({ move, view }) {
  const texts = [KINDS.move[move][1], KINDS.view[view][1]].filter((text) => text !== initial.wait_word);
  return texts.join("+") || initial.wait_word;
}

// ---------------------------------------------------------------- the script

const total = (segments) => sum(segments.map((s) => s.frames));
const starts = (segments) => {
  let at = 0;
  return segments.map(({ frames }) => (at += frames) - frames);
};
const toText = (segments) => segments.map((s) => `${segmentWords(s)} ${s.frames}`).join(", ");
const toValue = (segments) => ({ segments: segments.map((s) => [s.move, s.view, s.frames]) });
const fromValue = (value) => (value?.segments ?? []).map(([move, view, frames]) => ({ move, view, frames }));
const equal = (a, b) => JSON.stringify(toValue(a)) === JSON.stringify(toValue(b));

// The grammar of ActionScript.parse, with its messages.
function parseText(text) {
  const parts = text.split(/[,;\n]/).map((p) => p.trim());
  return parts.filter(Boolean).map(parseSegment);
}

function parseSegment(text) {
  const match = /^([a-z +\-]*[a-z])\s+(\d{1,6})$/.exec(text.toLowerCase());
  if (!match) {
    throw new Error(`cannot read '${text}': write what to do and for how many frames, such as 'forward+left 60'`);
  }
  const directions = { move: [0, 0], view: [0, 0] };
  for (const word of match[1].split("+").map((w) => w.replace(/[\s-]+/g, " ").trim())) addWord(directions, word, text);
  const frames = Number(match[2]);
  if (frames < 1) throw new Error(`a segment lasts 1 frame or more, not ${frames}`);
  return { move: indexOf("move", directions.move), view: indexOf("view", directions.view), frames };
}

function addWord(directions, word, text) {
  if (word === initial.wait_word) return;
  const kind = Object.keys(WORDS).find((k) => Object.hasOwn(WORDS[k], word));
  if (!kind) {
    const known = [...Object.keys(WORDS.move), ...Object.keys(WORDS.view), initial.wait_word].join(", ");
    throw new Error(`unknown action '${word}' in '${text}'; known are: ${known}`);
  }
  const [[a, b], [x, y]] = [directions[kind], WORDS[kind][word]];
  if ((a && x) || (b && y)) throw new Error(`'${text}' goes both ways at once`);
  directions[kind] = [a + x, b + y];
}

// The exchange format: one {"move": name, "view": name} per frame.
function toJson(segments) {
  const line = (s) => `{"move": "${KINDS.move[s.move][0]}", "view": "${KINDS.view[s.view][0]}"}`;
  return `[\n${segments.flatMap((s) => Array(s.frames).fill(line(s))).join(",\n")}\n]\n`;
}

function fromJson(text) {
  const actions = JSON.parse(text);
  if (!Array.isArray(actions)) throw new Error("the file must hold a list with one entry per frame");
  const segments = [];
  actions.forEach((action, frame) => {
    extend(segments, { move: nameIndex("move", action, frame), view: nameIndex("view", action, frame), frames: 1 });
  });
  return segments;
}

function nameIndex(kind, action, frame) {
  const index = KINDS[kind].findIndex(([name]) => name === action?.[kind]);
  if (index < 0) throw new Error(`frame ${frame}: unknown ${kind} '${action?.[kind]}'`);
  return index;
}

// Adds a segment at the end; one like the last makes the last longer.
function extend(segments, segment) {
  const last = segments.at(-1);
  if (last && last.move === segment.move && last.view === segment.view) last.frames += segment.frames;
  else segments.push({ ...segment });
}

// ---------------------------------------------------------------- the path, by dead reckoning

// One pose per frame: x to the right and y ahead of the start, heading in degrees clockwise.
function walk(segments) {
  const poses = [{ x: 0, y: 0, heading: 0 }];
  for (const { move, view, frames } of segments) {
    const [[ahead, aside], [, turn]] = [DIRECTIONS.move[move], DIRECTIONS.view[view]];
    for (let i = 0; i < frames; i++) poses.push(stepFrom(poses.at(-1), ahead, aside, turn * setting("turn_degrees")));
  }
  return poses;
}

function stepFrom({ x, y, heading }, ahead, aside, turn) {
  const angle = ((heading + turn / 2) * Math.PI) / 180;
  const step = setting("step_units") / Math.max(Math.hypot(ahead, aside), 1);
  return {
    x: x + step * (ahead * Math.sin(angle) + aside * Math.cos(angle)),
    y: y + step * (ahead * Math.cos(angle) - aside * Math.sin(angle)),
    heading: heading + turn,
  };
}

const REACH_FRAMES = 8; // places closer than this many steps are one place
const VIEW_DEGREES = 12; // headings closer than this show one view
const LEFT_DEGREES = 60; // after turning this far the view has been left

// Frames at which the camera is back at an earlier place (`places`), and of these the ones that also look the same
// way as then (`views`). To be back, one must have left: by walking three reaches, or for the view by turning.
// Of every square and view the first visit is kept, so that the work grows with the path, not with its square.
function revisits(poses) {
  const reach = REACH_FRAMES * setting("step_units");
  const firsts = new Map(); // square -> view -> first visit
  const found = { places: new Set(), views: new Set() };
  let [walked, turned] = [0, 0];
  poses.forEach((pose, frame) => {
    const last = poses[Math.max(frame - 1, 0)];
    walked += Math.hypot(pose.x - last.x, pose.y - last.y);
    turned += Math.abs(pose.heading - last.heading);
    const here = { ...pose, frame, walked, turned };
    for (const earlier of near(firsts, here, reach)) compare(found, earlier, here, reach);
    remember(firsts, here, reach);
  });
  return found;
}

function compare(found, earlier, here, reach) {
  const walkedAway = here.walked - earlier.walked > 3 * reach;
  const turnedAway = here.turned - earlier.turned > LEFT_DEGREES;
  if (walkedAway) found.places.add(here.frame);
  const apart = Math.abs(around360(here.heading - earlier.heading + 180) - 180);
  if (apart < VIEW_DEGREES && (walkedAway || turnedAway)) found.views.add(here.frame);
}

const around360 = (degrees) => ((degrees % 360) + 360) % 360;
const square = (x, y, reach) => `${Math.floor(x / reach)},${Math.floor(y / reach)}`;

function remember(firsts, here, reach) {
  const key = square(here.x, here.y, reach);
  const view = Math.floor(around360(here.heading) / VIEW_DEGREES);
  if (!firsts.has(key)) firsts.set(key, new Map());
  if (!firsts.get(key).has(view)) firsts.get(key).set(view, here);
}

function near(firsts, { x, y }, reach) {
  const steps = [-reach, 0, reach];
  const squares = steps.flatMap((dx) => steps.map((dy) => firsts.get(square(x + dx, y + dy, reach))));
  const visits = squares.flatMap((views) => (views ? [...views.values()] : []));
  return visits.filter((visit) => Math.hypot(visit.x - x, visit.y - y) < reach);
}

// Whole numbers in order -> runs [first, last].
function runs(numbers) {
  const found = [];
  for (const n of numbers) {
    if (n === found.at(-1)?.[1] + 1) found.at(-1)[1] = n;
    else found.push([n, n]);
  }
  return found;
}

// ---------------------------------------------------------------- state

let segments = fromValue(props.value);
let selected = -1;
let frame = setting("frame");
let zoom = 1;
let poses = [];
const past = [];
const future = [];
const [TEXT_STEP, FRAMES_STEP] = ["text", "frames"];
let lastStep = null; // edits of one step (a drag, typing) are undone together

function change(next, { select = selected, step = null } = {}) {
  if (next.length > initial.max_segments || total(next) > initial.max_frames) return refuse(step);
  if (!equal(next, segments)) {
    if (step === null || step !== lastStep) past.push({ segments, selected });
    future.length = 0;
  }
  lastStep = step;
  show(next, select);
  publish();
}

function refuse(step) {
  lastStep = step;
  draw();
  showError(`at most ${initial.max_segments} segments and ${initial.max_frames} frames`);
}

function travel(from, to) {
  if (!from.length) return;
  to.push({ segments, selected });
  const state = from.pop();
  lastStep = null;
  show(state.segments, state.selected);
  publish();
}

function show(next, select) {
  segments = next;
  selected = segments.length ? clamp(select, -1, segments.length - 1) : -1;
  draw();
}

function publish() {
  props.value = toValue(segments);
  trigger("input");
}

function adopt() {
  const next = fromValue(props.value);
  if (equal(next, segments)) return;
  if (recorder.on) dropRecording();
  past.push({ segments, selected });
  future.length = 0;
  lastStep = null;
  show(next, -1);
}

const replaceAt = (index, ...others) => segments.toSpliced(index, 1, ...others);
const edit = (changes, step) => change(replaceAt(selected, { ...segments[selected], ...changes }), { step });

// ---------------------------------------------------------------- edits

function add(segment) {
  const at = selected < 0 ? segments.length : selected + 1;
  change(segments.toSpliced(at, 0, segment), { select: at });
  focusSoon();
}

function split() {
  const { frames, ...rest } = segments[selected];
  if (frames < 2) return;
  const inside = frame - starts(segments)[selected];
  const first = inside > 0 && inside < frames ? inside : Math.floor(frames / 2);
  change(replaceAt(selected, { ...rest, frames: first }, { ...rest, frames: frames - first }));
}

function copy() {
  change(segments.toSpliced(selected + 1, 0, { ...segments[selected] }), { select: selected + 1 });
}

function remove() {
  const next = replaceAt(selected);
  change(next, { select: Math.min(selected, next.length - 1) });
}

function moveTo(from, to) {
  const place = clamp(to, 0, segments.length - 1);
  change(replaceAt(from).toSpliced(place, 0, segments[from]), { select: place });
}

function resize(index, frames, step) {
  change(replaceAt(index, { ...segments[index], frames: Math.max(1, frames) }), { select: index, step });
}

// ---------------------------------------------------------------- drawing: timeline

const filmActions = () => (setting("num_frames") ? setting("num_frames") - 1 : 0);
const seconds = (frames) => (frames / setting("fps")).toFixed(1).replace(/\.0$/, "");
const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;

let span = 1; // frames that the strip is wide; held still during a drag
const percent = (frames) => `${(100 * frames) / span}%`;

function draw() {
  poses = walk(segments);
  drawTimeline();
  drawNotes();
  drawInspector();
  drawText();
  drawMap();
}

function drawTimeline() {
  const chunk = setting("chunk_frames");
  if (!drag) span = Math.ceil((Math.max(total(segments), filmActions()) + 1) / chunk) * chunk;
  part("strip").style.setProperty("--chunks", (zoom * span) / chunk);
  part("strip").style.setProperty("--zoom", zoom);
  drawSegments();
  drawRuler(chunk);
  drawZones();
  drawPlayhead();
  part("empty").hidden = segments.length > 0;
}

function drawSegments() {
  const list = part("segments");
  const focused = list.contains(document.activeElement);
  while (list.children.length > segments.length) list.lastElementChild.remove();
  while (list.children.length < segments.length) list.append(newSegment());
  const from = starts(segments);
  segments.forEach((segment, i) => drawSegment(list.children[i], segment, i, from[i]));
  if (focused && !list.contains(document.activeElement)) (list.lastElementChild ?? list).focus(); // its segment is gone
}

function newSegment() {
  const node = document.createElement("div");
  node.className = "segment";
  node.setAttribute("role", "option");
  node.innerHTML = `<div class="lane"></div><div class="lane"></div><span class="handle"></span>`;
  return node;
}

function drawSegment(node, segment, index, start) {
  const chosen = index === selected;
  node.style.left = percent(start);
  node.style.width = percent(segment.frames);
  node.dataset.index = index;
  node.tabIndex = chosen || (selected < 0 && index === 0) ? 0 : -1;
  node.setAttribute("aria-selected", chosen);
  node.setAttribute("aria-label", segmentTitle(segment, index, start));
  node.title = `${segmentWords(segment)}, ${count(segment.frames, "frame")}`;
  drawLane(node.children[0], "move", segment.move);
  drawLane(node.children[1], "view", segment.view);
}

function segmentTitle(segment, index, start) {
  const time = `${seconds(start)} to ${seconds(start + segment.frames)} seconds`;
  return `${index + 1} of ${segments.length}: ${segmentWords(segment)}, ${count(segment.frames, "frame")}, ${time}`;
}

function drawLane(node, kind, index) {
  const key = `${kind} ${index}`;
  if (node.dataset.key === key) return;
  node.dataset.key = key;
  node.classList.toggle("still", same(DIRECTIONS[kind][index], [0, 0]));
  node.style.setProperty("--angle", angleOf(kind, index));
  node.innerHTML = `${symbol(kind, index)}<span>${label(kind, index)}</span>`;
}

// Degrees clockwise from ahead (or up); also turns the colour wheel, so that one direction has one colour.
function angleOf(kind, index) {
  const [along, across] = DIRECTIONS[kind][index];
  return (Math.atan2(across, along) * 180) / Math.PI;
}

const SHAPES = { move: "M8 2.5v11M3.5 7 8 2.5 12.5 7", view: "M3 8.5 8 3.5l5 5M3 13l5-5 5 5", still: "M4 8h8" };

function symbol(kind, index) {
  const shape = same(DIRECTIONS[kind][index], [0, 0]) ? "still" : kind;
  return `<svg class="arrow" viewBox="0 0 16 16" aria-hidden="true"><path d="${SHAPES[shape]}"/></svg>`;
}

function drawRuler(chunk) {
  const width = part("strip").clientWidth || 600;
  const stride = Math.ceil((64 * span) / chunk / width) * chunk; // a label takes 64 pixels
  const borders = [];
  const labels = [];
  for (let at = 0; at <= span; at += chunk) borders.push(`<i style="left:${percent(at)}"></i>`);
  for (let at = 0; at < span; at += stride) labels.push(rulerLabel(at));
  part("borders").innerHTML = borders.join("");
  part("ruler").innerHTML = labels.join("");
}

const rulerLabel = (at) => `<span style="left:${percent(at)}"><b>${seconds(at)} s</b> · ${at}</span>`;

function drawZones() {
  const [have, film] = [total(segments), filmActions()];
  place("waiting", have, have ? film : 0);
  place("unused", film || span, span);
  place("beyond", (setting("horizon_frames") ?? Infinity) - 1, span);
  part("film").hidden = !film;
  part("film").style.left = percent(film);
}

function place(name, from, to) {
  const node = part(name);
  node.hidden = !(to > from);
  if (!node.hidden) Object.assign(node.style, { left: percent(from), width: percent(to - from) });
}

function drawPlayhead() {
  part("playhead").style.left = percent(Math.min(frame, span));
}

// ---------------------------------------------------------------- drawing: words

function drawNotes() {
  const have = total(segments);
  const chunks = Math.ceil(have / setting("chunk_frames"));
  const film = setting("num_frames");
  const facts = [count(have, "frame"), `${seconds(have)} s`, count(chunks, "chunk")];
  part("facts").textContent = facts.join(" · ") + (film ? ` — the film has ${film} frames` : "");
  const items = notes(have, filmActions(), setting("horizon_frames"));
  const list = part("notes");
  const text = items.join("\n");
  if (list.dataset.text === text) return; // a status region speaks whenever it is touched
  list.dataset.text = text;
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
  const segment = segments[selected];
  part("inspector").classList.toggle("idle", !segment);
  for (const control of part("inspector").querySelectorAll("button, select, input")) control.disabled = !segment;
  if (segment) {
    part("move").value = segment.move;
    part("view").value = segment.view;
    if (lastStep !== FRAMES_STEP) part("frames").value = segment.frames;
  }
  root.querySelector('[data-do="undo"]').disabled = !past.length;
  root.querySelector('[data-do="redo"]').disabled = !future.length;
  root.querySelector('[data-do="export"]').disabled = !segments.length;
  root.querySelector('[data-do="clear"]').disabled = !segments.length;
}

function drawText() {
  if (lastStep === TEXT_STEP) return; // never rewrite what is being written
  part("text").value = toText(segments);
  showError("");
}

function showError(message) {
  part("error").textContent = message && sentence(message);
  part("text").setAttribute("aria-invalid", Boolean(message));
}

// ---------------------------------------------------------------- drawing: map

let project = () => [0, 0];

function drawMap() {
  const svg = part("map");
  const [width, height] = [svg.clientWidth || 300, svg.clientHeight || 220];
  project = projection(poses, width, height);
  const found = revisits(poses);
  const chunk = setting("chunk_frames");
  const every = (n) => poses.filter((_, i) => i % n === 0);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.innerHTML = [
    ...runs(found.places).map(([a, b]) => `<path class="again" d="${line(poses.slice(a, b + 1))}"/>`),
    `<path class="ticks" d="${every(chunk / 8).map(tick).join("")}"/>`,
    `<path class="path" d="${line(poses)}"/>`,
    ...runs(found.views).map(([a, b]) => circle("same", poses[Math.floor((a + b) / 2)], 7)),
    ...every(chunk).map((pose) => circle("border", pose, 3)),
    circle("start", poses[0], 5),
    `<g class="now" data-part="now"><path class="cone" d="M0 0-13-26A29 29 0 0 1 13-26Z"/><circle r="4"/></g>`,
  ].join("");
  svg.setAttribute("aria-label", mapTitle(found));
  drawNow();
}

function projection(points, width, height) {
  const [xs, ys] = [points.map((p) => p.x), points.map((p) => p.y)];
  const [left, right, bottom, top] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const least = setting("step_units") * setting("chunk_frames"); // a short path is not blown up
  const margin = 34; // pixels, room for the view cone
  const room = (low, high, size) => (size - 2 * margin) / Math.max(high - low, least);
  const scale = Math.min(room(left, right, width), room(bottom, top, height));
  return ({ x, y }) => [
    width / 2 + scale * (x - (left + right) / 2),
    height / 2 - scale * (y - (bottom + top) / 2),
  ];
}

const digits = (numbers) => numbers.map((n) => n.toFixed(1)).join(" ");
const line = (points) => "M" + points.map((p) => digits(project(p))).join("L");
const circle = (name, pose, radius) => {
  const [x, y] = project(pose);
  return `<circle class="${name}" cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="${radius}"/>`;
};

const TICK_PIXELS = 15;

function tick(pose) {
  const [x, y] = project(pose);
  const angle = (pose.heading * Math.PI) / 180;
  return `M${digits([x, y])}L${digits([x + TICK_PIXELS * Math.sin(angle), y - TICK_PIXELS * Math.cos(angle)])}`;
}

function mapTitle(found) {
  const end = poses.at(-1);
  const away = Math.hypot(end.x, end.y);
  const turned = Math.round(around360(end.heading));
  return (
    `Map of the path from above. It ends ${away.toFixed(1)} units from the start, turned ${turned} degrees ` +
    `clockwise. Visited before: ${count(found.places.size, "frame")}; seen before: ${found.views.size}.`
  );
}

function drawNow() {
  const pose = poses[clamp(frame, 0, poses.length - 1)];
  const [x, y] = project(pose);
  part("now").setAttribute("transform", `translate(${digits([x, y])}) rotate(${pose.heading.toFixed(1)})`);
}

function setFrame(next) {
  frame = Math.max(0, Math.round(next) || 0);
  drawPlayhead();
  drawNow();
}

// ---------------------------------------------------------------- pointer on the timeline

let drag = null; // { kind: "resize" | "reorder" | "scrub", index, x, frames, step, moved, target }
const CLICK_PIXELS = 5;
const SNAP_PIXELS = 6;

const framesPerPixel = () => span / part("strip").clientWidth;
const frameAt = (event) => (event.clientX - part("strip").getBoundingClientRect().left) * framesPerPixel();

function startDrag(event) {
  if (event.button || recorder.on) return;
  const node = event.target.closest(".segment");
  const index = node ? Number(node.dataset.index) : -1;
  const kind = event.target.closest(".handle") ? "resize" : node ? "reorder" : "scrub";
  drag = { kind, index, x: event.clientX, frames: segments[index]?.frames, step: `drag ${event.timeStamp}` };
  if (kind === "scrub") setFrame(clamp(frameAt(event), 0, span));
  if (kind === "resize") show(segments, index);
  if (kind !== "reorder" || event.pointerType === "mouse") part("strip").setPointerCapture(event.pointerId);
}

function whileDrag(event) {
  if (!drag) return;
  drag.moved ||= Math.abs(event.clientX - drag.x) >= CLICK_PIXELS;
  if (drag.kind === "scrub") setFrame(clamp(frameAt(event), 0, span));
  else if (drag.moved && drag.kind === "resize") dragBorder(event);
  else if (drag.moved) dragSegment(event);
}

function dragBorder(event) {
  const start = starts(segments)[drag.index];
  const wanted = drag.frames + (event.clientX - drag.x) * framesPerPixel();
  const end = event.altKey ? start + wanted : snap(start + wanted);
  resize(drag.index, Math.round(end - start), drag.step);
}

function snap(at) {
  const chunk = setting("chunk_frames");
  const border = Math.round(at / chunk) * chunk;
  return Math.abs(border - at) < SNAP_PIXELS * framesPerPixel() ? border : at;
}

function dragSegment(event) {
  const at = frameAt(event);
  const from = starts(segments);
  drag.target = from.filter((start, i) => start + segments[i].frames / 2 < at).length; // before which segment
  part("segments").children[drag.index].style.translate = `${event.clientX - drag.x}px`;
  part("segments").children[drag.index].classList.add("lifted");
  part("drop").hidden = false;
  part("drop").style.left = percent(from[drag.target] ?? total(segments));
}

function endDrag(event) {
  if (!drag) return;
  const { kind, index, moved, target } = drag;
  drag = null;
  dropSegment(index);
  if (kind === "reorder" && moved && event.type === "pointerup") moveTo(index, target > index ? target - 1 : target);
  else if (kind === "reorder" && !moved && event.type === "pointerup") choose(index);
  else draw();
}

function dropSegment(index) {
  part("drop").hidden = true;
  const node = part("segments").children[index];
  node?.classList.remove("lifted");
  node?.style.removeProperty("translate");
}

// ---------------------------------------------------------------- keyboard on the timeline

function choose(index) {
  lastStep = null;
  selected = clamp(index, -1, segments.length - 1);
  drawTimeline();
  drawInspector();
  focusSoon();
}

function focusSoon() {
  const node = part("segments").children[selected];
  node?.focus({ preventScroll: true });
  node?.scrollIntoView?.({ block: "nearest", inline: "nearest" });
}

const longer = (frames) => resize(selected, segments[selected].frames + frames, `resize ${selected}`);

const SEGMENT_KEYS = {
  ArrowLeft: (shift) => (shift ? moveTo(selected, selected - 1) : choose(Math.max(selected - 1, 0))),
  ArrowRight: (shift) => (shift ? moveTo(selected, selected + 1) : choose(selected + 1)),
  ArrowUp: (shift) => longer(shift ? 1 : 10),
  ArrowDown: (shift) => longer(shift ? -1 : -10),
  Home: () => choose(0),
  End: () => choose(segments.length - 1),
  Escape: () => choose(-1),
  Delete: remove,
  Backspace: remove,
  s: split,
  c: copy,
};

function onSegmentKey(event) {
  const node = event.target.closest(".segment");
  const act = SEGMENT_KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!node || !act || recorder.on || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  selected = Number(node.dataset.index);
  act(event.shiftKey);
  focusSoon();
}

function onUndoKey(event) {
  const key = event.key.toLowerCase();
  if (!(event.ctrlKey || event.metaKey) || isTyping(event.target) || recorder.on || !"zy".includes(key)) return;
  event.preventDefault();
  if (key === "y" || event.shiftKey) travel(future, past);
  else travel(past, future);
}

const TYPING = "input:not([type=checkbox], [type=radio], [type=button]), textarea, select, [contenteditable=true]";
const isTyping = (node) => Boolean(node?.closest?.(TYPING));

// ---------------------------------------------------------------- recording keys in real time

const SHORTEST = 3; // frames; fingers are not quicker on purpose
const recorder = { on: false, held: new Map(), before: [], base: [], taken: [], since: null, done: 0, published: 0 };

function startRecording() {
  const base = part("replace").checked ? [] : segments;
  const clock = { since: null, done: 0, published: total(base) };
  Object.assign(recorder, { on: true, before: segments, base, taken: [], ...clock });
  lastStep = null;
  recorder.held.clear();
  listenToKeys(true);
  show(base, -1);
  drawRecorder();
  requestAnimationFrame(whileRecording);
}

function stopRecording() {
  sample(performance.now());
  recorder.on = false;
  recorder.held.clear();
  listenToKeys(false);
  drawRecorder();
  const taken = tidy(recorder.taken);
  while (taken.length && isWait(taken.at(-1))) taken.pop();
  segments = recorder.before; // one recording is one step to undo
  change(taken.length ? [...recorder.base, ...taken] : recorder.before, { select: -1 });
}

function listenToKeys(on) {
  const act = on ? "addEventListener" : "removeEventListener";
  document[act]("keydown", onRecordKey, true);
  document[act]("keyup", onRecordKey, true);
  document[act]("visibilitychange", stopWhenHidden);
  window[act]("blur", releaseAll);
}

function onRecordKey(event) {
  if (event.key === "Escape" && event.type === "keydown") return stopRecording();
  const [word, pressed] = [initial.keys[event.code], event.type === "keydown"];
  const elsewhere = isTyping(event.target) || event.ctrlKey || event.metaKey || event.altKey;
  if (!word || (pressed && elsewhere)) return; // a release always counts
  if (!elsewhere) event.preventDefault();
  if (!event.repeat) hold(event.code, pressed ? word : null, event.timeStamp);
}

// `source` (a key or a pointer) holds `word` from `time` on, or nothing.
function hold(source, word, time) {
  if (!recorder.on) return;
  sample(time);
  if (word) recorder.held.set(source, word);
  else recorder.held.delete(source);
  if (word && recorder.since === null) recorder.since = time; // the clock starts with the first key
  drawRecorder();
}

function releaseAll() {
  sample(performance.now());
  recorder.held.clear();
  drawRecorder();
}

function stopWhenHidden() {
  if (document.hidden) stopRecording();
}

// What was held until `time` becomes frames.
function sample(time) {
  if (recorder.since === null) return;
  const room = initial.max_frames - total(recorder.base);
  const due = Math.min(Math.floor(((time - recorder.since) * setting("fps")) / 1000), room);
  if (due <= recorder.done) return;
  extend(recorder.taken, { ...heldAction(), frames: due - recorder.done });
  recorder.done = due;
}

function heldAction() {
  const words = new Set(recorder.held.values());
  const direction = (kind) => {
    const held = Object.entries(WORDS[kind]).filter(([word]) => words.has(word));
    return [0, 1].map((axis) => sum(held.map(([, d]) => d[axis]))); // opposite keys cancel
  };
  return { move: indexOf("move", direction("move")), view: indexOf("view", direction("view")) };
}

// Runs shorter than SHORTEST join a neighbour that does all they do: keys pressed or released one after the other,
// the gap between two presses. A tap stays.
function tidy(taken) {
  const done = [];
  taken.forEach((run, i) => {
    const [before, after] = [done.at(-1), taken[i + 1]];
    const short = run.frames < SHORTEST;
    if (short && before && within(run, before)) before.frames += run.frames;
    else if (short && after && within(run, after)) taken[i + 1] = { ...after, frames: after.frames + run.frames };
    else extend(done, run);
  });
  return done;
}

const isWait = (s) => s.move === 0 && s.view === 0;
const axes = (s) => [...DIRECTIONS.move[s.move], ...DIRECTIONS.view[s.view]];
const within = (a, b) => axes(a).every((d, i) => d === 0 || d === axes(b)[i]);

function whileRecording(time) {
  if (!recorder.on) return;
  if (!root.isConnected) return dropRecording();
  const before = Math.floor(recorder.done / SHORTEST);
  sample(time);
  if (Math.floor(recorder.done / SHORTEST) > before) showRecording();
  requestAnimationFrame(whileRecording);
}

function dropRecording() {
  recorder.on = false;
  listenToKeys(false);
  drawRecorder();
}

// Gradio hears of a recording at each chunk border, not thirty times a second.
function showRecording() {
  show([...recorder.base, ...tidy([...recorder.taken])], -1);
  part("scroller").scrollLeft = part("scroller").scrollWidth;
  drawRecorder();
  const chunk = setting("chunk_frames");
  if (Math.floor(total(segments) / chunk) > Math.floor(recorder.published / chunk)) publish();
  recorder.published = total(segments);
}

function drawRecorder() {
  const held = new Set(recorder.held.values());
  root.classList.toggle("recording", recorder.on);
  part("record").setAttribute("aria-pressed", recorder.on);
  part("record-label").textContent = recorder.on ? "Stop" : "Record keys";
  for (const key of part("pads").querySelectorAll("button")) key.classList.toggle("held", held.has(key.dataset.word));
  part("keys-status").ariaLive = recorder.since === null ? "polite" : "off"; // a running clock is not read out
  part("keys-status").textContent = recorder.on ? recordingStatus(held) : restingStatus();
}

const restingStatus = () =>
  `An arrow adds ${count(setting("chunk_frames"), "frame")} after the selected segment, or at the end.`;

function recordingStatus(held) {
  if (recorder.since === null) return "Hold W A S D to walk, arrow keys to look. Time starts with the first key.";
  return `${seconds(recorder.done)} s · ${[...held].join(" + ") || initial.wait_word}`;
}

// ---------------------------------------------------------------- the pads

const CAPS = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→" };

function buildPads() {
  const keys = Object.entries(initial.keys);
  const pad = (kind, more = "") => {
    const own = keys.filter(([, word]) => word in WORDS[kind]).map(([code, word]) => padKey(kind, code, word));
    const name = sentence(kind);
    return `<div class="pad" role="group" aria-label="${name}"><span>${name}</span>${own.join("")}${more}</div>`;
  };
  part("pads").innerHTML = pad("move") + pad("view", waitKey());
}

function padKey(kind, code, word) {
  const [along, across] = WORDS[kind][word];
  const angle = angleOf(kind, indexOf(kind, [along, across]));
  const cap = CAPS[code] ?? code.at(-1);
  const name = sentence(word);
  return `<button type="button" data-word="${word}" data-kind="${kind}" aria-label="${name}" title="${name} (${cap})"
    style="--angle:${angle};grid-area:${along > 0 ? 1 : 2}/${2 + across}"
    >${symbol(kind, indexOf(kind, [along, across]))}<kbd>${cap}</kbd></button>`;
}

const waitKey = () =>
  `<button type="button" class="wait" data-word="${initial.wait_word}">${sentence(initial.wait_word)}</button>`;

function onPad(event) {
  const key = event.target.closest("[data-word]");
  if (!key || recorder.on) return;
  const { kind, word } = key.dataset;
  const chosen = kind ? { [kind]: indexOf(kind, WORDS[kind][word]) } : {};
  add({ move: 0, view: 0, ...chosen, frames: setting("chunk_frames") });
}

function onPadPointer(event) {
  if (!recorder.on) return;
  const source = `pointer ${event.pointerId}`;
  const key = event.type === "pointerdown" ? event.target.closest("[data-kind]") : null;
  if (key) key.setPointerCapture(event.pointerId);
  if (key || recorder.held.has(source)) hold(source, key?.dataset.word, event.timeStamp);
}

// ---------------------------------------------------------------- files, text, film

async function importFile() {
  const [file] = part("file").files;
  part("file").value = "";
  if (!file) return;
  try {
    change(fromJson(await file.text()), { select: -1 });
  } catch (error) {
    showError(`${file.name}: ${error.message}`);
  }
}

function exportFile() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([toJson(segments)], { type: "application/json" }));
  link.download = "actions.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function onText() {
  try {
    const next = parseText(part("text").value);
    showError("");
    change(next, { select: -1, step: TEXT_STEP });
  } catch (error) {
    showError(error.message);
  }
}

function leaveText() {
  lastStep = null;
  if (part("text").getAttribute("aria-invalid") !== "true") part("text").value = toText(segments);
}

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

// ---------------------------------------------------------------- wiring

const DO = {
  undo: () => travel(past, future),
  redo: () => travel(future, past),
  import: () => part("file").click(),
  export: exportFile,
  clear: () => change([], { select: -1 }),
  "zoom-in": () => zoomTo(zoom * 1.5),
  "zoom-out": () => zoomTo(zoom / 1.5),
  earlier: () => moveTo(selected, selected - 1),
  later: () => moveTo(selected, selected + 1),
  split,
  copy,
  delete: remove,
  record: () => (recorder.on ? stopRecording() : startRecording()),
};

function zoomTo(next) {
  const scroller = part("scroller");
  const middle = (scroller.scrollLeft + scroller.clientWidth / 2) / scroller.scrollWidth;
  zoom = clamp(next, 1, 40);
  drawTimeline();
  scroller.scrollLeft = middle * scroller.scrollWidth - scroller.clientWidth / 2;
}

function onButton(event) {
  const button = event.target.closest("[data-do]");
  if (!button) return;
  if (recorder.on && button.dataset.do !== "record") stopRecording();
  DO[button.dataset.do]();
}

function buildPresets() {
  const chips = initial.presets.map(([name], i) => `<button type="button" data-preset="${i}">${name}</button>`);
  part("presets").innerHTML = `<span class="hint">Start from</span>${chips.join("")}`;
}

function onPreset(event) {
  const button = event.target.closest("[data-preset]");
  if (!button) return;
  if (recorder.on) stopRecording();
  change(fromValue({ segments: initial.presets[button.dataset.preset][1] }), { select: -1 });
}

function buildSelects() {
  for (const kind of Object.keys(KINDS)) {
    const options = KINDS[kind].map((_, i) => `<option value="${i}">${label(kind, i)}</option>`);
    part(kind).innerHTML = options.join("");
    part(kind).addEventListener("change", () => edit({ [kind]: Number(part(kind).value) }));
  }
}

function onFrames() {
  const frames = Math.floor(Number(part("frames").value));
  if (frames >= 1) edit({ frames }, FRAMES_STEP);
}

function leaveFrames() {
  lastStep = null;
  drawInspector();
}

function exposeFrames() {
  root.addEventListener("infworld-frame", ({ detail }) => setFrame(detail));
  window.infworldSetFrame = (id, next) => {
    const editor = document.getElementById(id)?.querySelector(".action-editor");
    editor?.dispatchEvent(new CustomEvent("infworld-frame", { detail: next }));
  };
}

let width = 0; // of the timeline when it was last drawn; drawing may change its height

function onTimelineSize() {
  if (width === part("scroller").clientWidth) return;
  width = part("scroller").clientWidth;
  drawTimeline();
}

function listen() {
  root.addEventListener("click", onButton);
  root.addEventListener("keydown", onUndoKey);
  part("presets").addEventListener("click", onPreset);
  part("pads").addEventListener("click", onPad);
  for (const type of ["pointerdown", "pointerup", "pointercancel"]) part("pads").addEventListener(type, onPadPointer);
  part("strip").addEventListener("pointerdown", startDrag);
  part("strip").addEventListener("pointermove", whileDrag);
  for (const type of ["pointerup", "pointercancel"]) part("strip").addEventListener(type, endDrag);
  part("segments").addEventListener("keydown", onSegmentKey);
  part("file").addEventListener("change", importFile);
  part("text").addEventListener("input", onText);
  part("text").addEventListener("blur", leaveText);
  part("frames").addEventListener("input", onFrames);
  part("frames").addEventListener("blur", leaveFrames);
  document.addEventListener("timeupdate", onVideo, true);
  new ResizeObserver(onTimelineSize).observe(part("scroller"));
  new ResizeObserver(drawMap).observe(part("map"));
  watch("value", adopt);
  watch(["num_frames", "horizon_frames", "chunk_frames", "turn_degrees", "step_units"], draw);
  watch("frame", () => setFrame(setting("frame")));
}

buildPresets();
buildPads();
buildSelects();
exposeFrames();
drawRecorder();
listen();
draw();
