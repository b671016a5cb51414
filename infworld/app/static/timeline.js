// The timeline: segments in two lanes over a ruler, dragged with a pointer, edited with the keyboard.

import { hasModifier } from "./keys.js";
import { clamp, count, starts, total } from "./script.js";
import { symbol } from "./symbols.js";

const CLICK_PIXELS = 5;
const SNAP_PIXELS = 6;

export class Timeline {
  zoom = 1;
  #span = 1; // frames that the strip is wide; held still during a drag
  #drag = null; // { kind: "resize" | "reorder" | "scrub", index, x, frames, step, moved, target }
  #width = 0; // of the timeline when it was last drawn; drawing may change its height

  // part(name): the node. setting(name): of the editor. locked(): nothing may be edited. scrubbed(frame): the current
  // moment was moved. selected(): another segment was chosen.
  constructor(edits, vocabulary, { part, setting, locked, scrubbed, selected }) {
    Object.assign(this, { edits, vocabulary, part, setting, locked, scrubbed, selected });
    const strip = part("strip");
    strip.addEventListener("pointerdown", (event) => this.#startDrag(event));
    strip.addEventListener("pointermove", (event) => this.#whileDrag(event));
    for (const type of ["pointerup", "pointercancel"]) strip.addEventListener(type, (event) => this.#endDrag(event));
    part("segments").addEventListener("keydown", (event) => this.#onKey(event));
    new ResizeObserver(() => this.#onSize()).observe(part("scroller"));
  }

  // ---------------------------------------------------------------- drawing

  draw(frame = this.frame) {
    this.frame = frame;
    const [chunk, { part, edits }] = [this.setting("chunk_frames"), this];
    const longest = Math.max(total(edits.segments), this.#filmActions());
    if (!this.#drag) this.#span = Math.ceil((longest + 1) / chunk) * chunk;
    part("strip").style.setProperty("--chunks", (this.zoom * this.#span) / chunk);
    part("strip").style.setProperty("--zoom", this.zoom);
    this.#drawSegments();
    this.#drawRuler(chunk);
    this.#drawZones();
    this.drawPlayhead(frame);
    part("empty").hidden = edits.segments.length > 0;
  }

  drawPlayhead(frame) {
    this.frame = frame;
    this.part("playhead").style.left = this.#percent(Math.min(frame, this.#span));
  }

  zoomTo(next) {
    const scroller = this.part("scroller");
    const middle = (scroller.scrollLeft + scroller.clientWidth / 2) / scroller.scrollWidth;
    this.zoom = clamp(next, 1, 40);
    this.draw();
    scroller.scrollLeft = middle * scroller.scrollWidth - scroller.clientWidth / 2;
  }

  #percent(frames) {
    return `${(100 * frames) / this.#span}%`;
  }

  #filmActions() {
    return this.setting("num_frames") ? this.setting("num_frames") - 1 : 0;
  }

  #seconds(frames) {
    return (frames / this.setting("fps")).toFixed(1).replace(/\.0$/, "");
  }

  #drawSegments() {
    const list = this.part("segments");
    const { segments } = this.edits;
    const focused = list.contains(document.activeElement);
    while (list.children.length > segments.length) list.lastElementChild.remove();
    while (list.children.length < segments.length) list.append(newSegment());
    const from = starts(segments);
    segments.forEach((segment, i) => this.#drawSegment(list.children[i], segment, i, from[i]));
    if (focused && !list.contains(document.activeElement)) (list.lastElementChild ?? list).focus(); // its segment is gone
  }

  #drawSegment(node, segment, index, start) {
    const { segments, selected } = this.edits;
    const chosen = index === selected;
    const words = `${this.vocabulary.segmentWords(segment)}, ${count(segment.frames, "frame")}`;
    const time = `${this.#seconds(start)} to ${this.#seconds(start + segment.frames)} seconds`;
    Object.assign(node.style, { left: this.#percent(start), width: this.#percent(segment.frames) });
    node.dataset.index = index;
    node.tabIndex = chosen || (selected < 0 && index === 0) ? 0 : -1;
    node.setAttribute("aria-selected", chosen);
    node.setAttribute("aria-label", `${index + 1} of ${segments.length}: ${words}, ${time}`);
    node.title = words;
    this.#drawLane(node.children[0], "move", segment.move);
    this.#drawLane(node.children[1], "view", segment.view);
  }

  #drawLane(node, kind, index) {
    const key = `${kind} ${index}`;
    if (node.dataset.key === key) return;
    node.dataset.key = key;
    node.classList.toggle("still", this.vocabulary.isStill(kind, index));
    node.style.setProperty("--angle", this.vocabulary.angleOf(kind, index));
    node.innerHTML = `${symbol(this.vocabulary, kind, index)}<span>${this.vocabulary.label(kind, index)}</span>`;
  }

  #drawRuler(chunk) {
    const width = this.part("strip").clientWidth || 600;
    const stride = Math.ceil((64 * this.#span) / chunk / width) * chunk; // a label takes 64 pixels
    const marks = (step, end, text) => {
      const found = [];
      for (let at = 0; at <= end; at += step) found.push(text(at, `style="left:${this.#percent(at)}"`));
      return found.join("");
    };
    this.part("borders").innerHTML = marks(chunk, this.#span, (_, left) => `<i ${left}></i>`);
    const label = (at, left) => `<span ${left}><b>${this.#seconds(at)} s</b> · ${at}</span>`;
    this.part("ruler").innerHTML = marks(stride, this.#span - 1, label);
  }

  #drawZones() {
    const [have, film] = [total(this.edits.segments), this.#filmActions()];
    this.#place("waiting", have, have ? film : 0);
    this.#place("unused", film || this.#span, this.#span);
    this.#place("beyond", (this.setting("horizon_frames") ?? Infinity) - 1, this.#span);
    this.part("film").hidden = !film;
    this.part("film").style.left = this.#percent(film);
  }

  #place(name, from, to) {
    const node = this.part(name);
    node.hidden = !(to > from);
    if (!node.hidden) Object.assign(node.style, { left: this.#percent(from), width: this.#percent(to - from) });
  }

  #onSize() {
    if (this.#width === this.part("scroller").clientWidth) return;
    this.#width = this.part("scroller").clientWidth;
    this.draw();
  }

  // ---------------------------------------------------------------- pointer

  #framesPerPixel() {
    return this.#span / this.part("strip").clientWidth;
  }

  #frameAt(event) {
    return (event.clientX - this.part("strip").getBoundingClientRect().left) * this.#framesPerPixel();
  }

  #startDrag(event) {
    if (event.button || this.locked()) return;
    const node = event.target.closest(".segment");
    const index = node ? Number(node.dataset.index) : -1;
    const kind = event.target.closest(".handle") ? "resize" : node ? "reorder" : "scrub";
    const { frames } = this.edits.segments[index] ?? {};
    this.#drag = { kind, index, x: event.clientX, frames, step: `drag ${event.timeStamp}` };
    if (kind === "scrub") this.#scrub(event);
    if (kind === "resize") this.edits.show(this.edits.segments, index);
    if (kind !== "reorder" || event.pointerType === "mouse") this.part("strip").setPointerCapture(event.pointerId);
  }

  #whileDrag(event) {
    const drag = this.#drag;
    if (!drag) return;
    drag.moved ||= Math.abs(event.clientX - drag.x) >= CLICK_PIXELS;
    if (drag.kind === "scrub") this.#scrub(event);
    else if (drag.moved && drag.kind === "resize") this.#dragBorder(event, drag);
    else if (drag.moved) this.#dragSegment(event, drag);
  }

  #scrub(event) {
    this.scrubbed(clamp(this.#frameAt(event), 0, this.#span));
  }

  #dragBorder(event, { index, x, frames, step }) {
    const start = starts(this.edits.segments)[index];
    const end = start + frames + (event.clientX - x) * this.#framesPerPixel();
    this.edits.resize(index, Math.round((event.altKey ? end : this.#snap(end)) - start), step);
  }

  #snap(at) {
    const chunk = this.setting("chunk_frames");
    const border = Math.round(at / chunk) * chunk;
    return Math.abs(border - at) < SNAP_PIXELS * this.#framesPerPixel() ? border : at;
  }

  #dragSegment(event, drag) {
    const [at, { segments }] = [this.#frameAt(event), this.edits];
    const from = starts(segments);
    drag.target = from.filter((start, i) => start + segments[i].frames / 2 < at).length; // before which segment
    const node = this.part("segments").children[drag.index];
    node.style.translate = `${event.clientX - drag.x}px`;
    node.classList.add("lifted");
    this.part("drop").hidden = false;
    this.part("drop").style.left = this.#percent(from[drag.target] ?? total(segments));
  }

  #endDrag(event) {
    if (!this.#drag) return;
    const { kind, index, moved, target } = this.#drag;
    this.#drag = null;
    this.#drop(index);
    if (kind !== "reorder" || event.type !== "pointerup") this.edits.drawn();
    else if (moved) this.edits.moveTo(index, target > index ? target - 1 : target);
    else this.choose(index);
  }

  #drop(index) {
    this.part("drop").hidden = true;
    const node = this.part("segments").children[index];
    node?.classList.remove("lifted");
    node?.style.removeProperty("translate");
  }

  // ---------------------------------------------------------------- keyboard

  choose(index) {
    this.edits.lastStep = null;
    this.edits.selected = clamp(index, -1, this.edits.segments.length - 1);
    this.draw();
    this.selected();
    this.focus();
  }

  focus() {
    const node = this.part("segments").children[this.edits.selected];
    node?.focus({ preventScroll: true });
    node?.scrollIntoView?.({ block: "nearest", inline: "nearest" });
  }

  #onKey(event) {
    const node = event.target.closest(".segment");
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (!node || !Object.hasOwn(this.#keys, key) || this.locked() || hasModifier(event)) return;
    event.preventDefault();
    this.edits.selected = Number(node.dataset.index);
    this.#keys[key](event.shiftKey);
    this.focus();
  }

  #keys = {
    ArrowLeft: (shift) => this.#aside(-1, shift),
    ArrowRight: (shift) => this.#aside(1, shift),
    ArrowUp: (shift) => this.#longer(shift ? 1 : 10),
    ArrowDown: (shift) => this.#longer(shift ? -1 : -10),
    Home: () => this.choose(0),
    End: () => this.choose(this.edits.segments.length - 1),
    Escape: () => this.choose(-1),
    Delete: () => this.edits.remove(),
    Backspace: () => this.edits.remove(),
    s: () => this.edits.split(this.frame),
    c: () => this.edits.copy(),
  };

  #aside(by, carry) {
    const { selected } = this.edits;
    if (carry) this.edits.moveTo(selected, selected + by);
    else this.choose(Math.max(selected + by, 0));
  }

  #longer(frames) {
    const { selected, chosen } = this.edits;
    this.edits.resize(selected, chosen.frames + frames, `resize ${selected}`);
  }
}

function newSegment() {
  const node = document.createElement("div");
  node.className = "segment";
  node.setAttribute("role", "option");
  node.innerHTML = `<div class="lane"></div><div class="lane"></div><span class="handle"></span>`;
  return node;
}
