// The script in the making: its segments, which one is selected, and what can be undone.

import { clamp, equal, starts, total } from "./script.js";

export class Edits {
  segments = [];
  selected = -1;
  lastStep = null; // edits of one step (a drag, typing) are undone together
  #past = [];
  #future = [];

  // drawn(): the state has changed; published(): and the person did it; refused(message): it was not changed.
  constructor(maxFrames, { drawn, published, refused }) {
    Object.assign(this, { maxFrames, drawn, published, refused });
  }

  get chosen() {
    return this.segments[this.selected];
  }

  get canUndo() {
    return this.#past.length > 0;
  }

  get canRedo() {
    return this.#future.length > 0;
  }

  change(next, { select = this.selected, step = null } = {}) {
    if (total(next) > this.maxFrames) {
      this.lastStep = step;
      this.drawn();
      return this.refused(`the actions may last at most ${this.maxFrames} frames`);
    }
    if (!equal(next, this.segments)) {
      if (step === null || step !== this.lastStep) this.#keep();
      this.#future = [];
    }
    this.lastStep = step;
    this.show(next, select);
    this.published();
  }

  // A script from elsewhere, which can be undone like an edit.
  adopt(next) {
    this.#keep();
    this.#future = [];
    this.lastStep = null;
    this.show(next, -1);
  }

  show(next, select) {
    this.segments = next;
    this.selected = clamp(select, -1, next.length - 1);
    this.drawn();
  }

  #keep() {
    this.#past.push({ segments: this.segments, selected: this.selected });
  }

  undo() {
    this.#travel(this.#past, this.#future);
  }

  redo() {
    this.#travel(this.#future, this.#past);
  }

  #travel(from, to) {
    if (!from.length) return;
    to.push({ segments: this.segments, selected: this.selected });
    const { segments, selected } = from.pop();
    this.lastStep = null;
    this.show(segments, selected);
    this.published();
  }

  add(segment) {
    const at = this.selected < 0 ? this.segments.length : this.selected + 1;
    this.change(this.segments.toSpliced(at, 0, segment), { select: at });
  }

  #replace(index, ...others) {
    return this.segments.toSpliced(index, 1, ...others);
  }

  edit(changes, step = null) {
    this.change(this.#replace(this.selected, { ...this.chosen, ...changes }), { step });
  }

  // At a frame of the script if that is inside, else in the middle.
  split(frame) {
    const { frames, ...rest } = this.chosen;
    if (frames < 2) return;
    const inside = frame - starts(this.segments)[this.selected];
    const first = inside > 0 && inside < frames ? inside : Math.floor(frames / 2);
    this.change(this.#replace(this.selected, { ...rest, frames: first }, { ...rest, frames: frames - first }));
  }

  copy() {
    const select = this.selected + 1;
    this.change(this.segments.toSpliced(select, 0, { ...this.chosen }), { select });
  }

  remove() {
    const next = this.#replace(this.selected);
    this.change(next, { select: Math.min(this.selected, next.length - 1) });
  }

  moveTo(from, to) {
    const select = clamp(to, 0, this.segments.length - 1);
    this.change(this.#replace(from).toSpliced(select, 0, this.segments[from]), { select });
  }

  resize(index, frames, step) {
    const segment = { ...this.segments[index], frames: Math.max(1, frames) };
    this.change(this.#replace(index, segment), { select: index, step });
  }
}
