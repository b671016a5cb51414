// Plays a walk: draws the frames that come, evenly, and tells what is held. `initial`: vocabulary, keys, motion, fps,
// chunk_frames, columns (of frames in a strip).

import { Frames } from "./frames.js";
import { Gamepad } from "./gamepad.js";
import { HeldKeys, hasModifier, isTyping } from "./keys.js";
import { Look } from "./look.js";
import { PathMap } from "./map.js";
import { walk } from "./path.js";
import { extend, Vocabulary } from "./script.js";
import { Steering } from "./steering.js";

const WINDOW = 2000; // milliseconds over which shown frames are counted
const MAP_FRAMES = 3000; // of the path that the map shows at most, the last ones

export function start({ element, props, trigger, watch }, initial) {
  const part = (name) => element.querySelector(`.${name}`);
  const vocabulary = new Vocabulary(initial);
  const canvas = element.querySelector("canvas");
  const map = new PathMap(part("map"), initial.motion);

  let run = null; // the number of the run that is played
  let paused = false;
  let film = []; // segments of the whole film as far as it is shown
  let drawn = []; // times of the last drawn frames
  let delays = []; // milliseconds from a key to its picture, all of this run
  let asked = 0; // when Play was pressed
  let first = null; // milliseconds from then to the first frame
  let chunk = null; // the strip that is shown

  const frames = new Frames({ canvas, columns: initial.columns, fps: initial.fps, shown: onFrame, begun: onStrip });
  const steering = new Steering({
    vocabulary,
    fps: initial.fps,
    state: () => ({ paused, shown: frames.count, stalls: frames.stalls }),
    send: (message) => run !== null && trigger("steer", message),
  });
  const keys = new HeldKeys({
    keys: initial.keys,
    buttons: part("controls"),
    active: () => run !== null,
    changed: (time, pressed) => pressed && canvas.focus({ preventScroll: true }),
    drawn: () => steering.hold("keys", keys.words),
  });
  const gamepad = new Gamepad((words) => steering.hold("gamepad", words));
  new Look({
    view: part("view"),
    degrees: initial.motion.fov_degrees,
    active: () => run !== null && !paused,
    turned: (word, degrees) => steering.look(word, degrees, initial.motion),
  });

  // ---------------------------------------------------------------------------------------------------- what is shown

  function onFrame(now) {
    first ??= now - asked;
    drawn.push(now);
    while (drawn[0] < now - WINDOW) drawn.shift();
    if (drawn.length > 1) write("fps", ((1000 * (drawn.length - 1)) / (now - drawn[0])).toFixed(0));
    if (!frames.ahead) steering.tell(); // what is shown, and that nothing is left
  }

  function onStrip(strip, now) {
    chunk = strip;
    for (const [move, view, n] of strip.actions) extend(film, { move, view, frames: n });
    const delay = steering.seen(strip.steered, now);
    if (delay !== null) {
      delays.push(delay);
      write("delay", `${(delay / 1000).toFixed(2)} s`);
    }
    const slower = frames.rate < 0.97 * initial.fps;
    write("chunk", `${strip.frames} frames`);
    say(slower ? `This computer plays at ${(frames.rate / initial.fps).toFixed(2)} × the film's speed.` : "");
    const poses = walk(film, initial.motion);
    map.draw(poses.slice(-MAP_FRAMES), initial.chunk_frames, MAP_FRAMES);
    steering.tell();
  }

  function write(name, text) {
    part(name).textContent = text;
  }

  const say = (text) => write("says", text);

  function show() {
    const value = props.value;
    if (!value) return;
    if (value.over) return rest(value);
    if (value.run !== run) begin(value.run);
    if (value.says || !frames.any) say(value.says);
    part("turn").hidden = value.seconds_left === null;
    if (value.seconds_left !== null) write("left", `${Math.ceil(value.seconds_left)} s`);
    for (const [number, strip] of Object.entries(value.strips)) frames.add(Number(number), strip);
  }

  function begin(number) {
    run = number;
    paused = false;
    film = asSegments(props.value.film);
    drawn = [];
    delays = [];
    first = null;
    frames.begin();
    steering.begin();
    state(true);
    canvas.focus({ preventScroll: true });
    tick();
  }

  function rest(value) {
    const was = run;
    run = null;
    keys.release();
    frames.end();
    state(false);
    part("begin").disabled = part("go-on").disabled = false;
    part("go-on").hidden = !value.film;
    part("begin").textContent = value.film ? "Play anew" : "Play";
    film = value.film ? asSegments(value.film) : [];
    if (value.frame) picture(value.frame);
    say(value.says);
    if (was !== null) element.dispatchEvent(new CustomEvent("walked", { bubbles: true }));
  }

  const asSegments = (rows) => rows.map(([move, view, n]) => ({ move, view, frames: n }));

  // What the walk begins with, until its first frame is there.
  function picture(address) {
    const still = part("still");
    still.src = address;
    still.hidden = false;
    part("empty").hidden = true;
    still.onload = () => shape(still.naturalWidth / still.naturalHeight);
  }

  function shape(ratio) {
    element.style.setProperty("--film-shape", ratio);
  }

  function state(playing) {
    for (const name of ["pause", "leave"]) part(name).hidden = !playing;
    for (const name of ["begin", "go-on"]) part(name).hidden = playing;
    part("hud").hidden = !playing;
    part("play").classList.toggle("on", playing);
    part("pause").setAttribute("aria-pressed", paused);
    part("pause").textContent = paused ? "Go on" : "Pause";
  }

  function tick() {
    if (run === null) return;
    requestAnimationFrame(tick);
    gamepad.poll();
    if (paused) return;
    if (frames.draw(performance.now()) && !part("still").hidden) {
      part("still").hidden = part("empty").hidden = true;
      shape(canvas.width / canvas.height);
    }
  }

  // ------------------------------------------------------------------------------------------------- what is asked for

  function ask(event) {
    if (run !== null || part("begin").disabled) return;
    part("begin").disabled = part("go-on").disabled = true; // one click, one walk
    asked = performance.now();
    say("Beginning …");
    trigger(event);
  }

  function pause(wanted = !paused) {
    if (run === null || paused === wanted) return;
    paused = wanted;
    keys.release();
    frames.hold(performance.now(), paused);
    state(true);
    steering.tell();
  }

  function leave() {
    if (run === null) return;
    say("Leaving …");
    trigger("leave");
  }

  function fullScreen() {
    const play = element.querySelector(".play");
    if (document.fullscreenElement) document.exitFullscreen();
    else play.requestFullscreen?.();
  }

  part("begin").addEventListener("click", () => ask("begin"));
  part("go-on").addEventListener("click", () => ask("go_on"));
  part("pause").addEventListener("click", () => pause());
  part("leave").addEventListener("click", leave);
  part("full").addEventListener("click", fullScreen);
  document.addEventListener("keydown", (event) => {
    if (run === null || isTyping(event.target) || hasModifier(event) || event.repeat) return;
    const action = { Space: () => pause(), KeyF: fullScreen, Escape: leave }[event.code];
    if (!action || (event.code === "Escape" && document.fullscreenElement)) return;
    event.preventDefault();
    action();
  });
  document.addEventListener("visibilitychange", () => document.hidden && pause(true));
  steering.beat(500);
  watch("value", show);
  show();

  // What `infworld play-benchmark` and the tests read.
  element.measured = () => {
    const { count: shown, stalls, stalled, rate } = frames;
    return { shown, stalls, stalled, rate, delays: [...delays], first, chunk: chunk?.frames };
  };
}
