// The frames of a walk in the order of their numbers, drawn one by one at an even rate: as slowly as it takes until there
// are new ones, where they are late. A strip is one JPEG of a chunk.

export class Frames {
  #strips = new Map(); // number -> {bitmap, size, frames, ...}, decoded and waiting
  #known = new Set();
  #run = 0; // what is decoded for an earlier run is dropped

  // shown(now): after each frame. begun(strip, now): at a strip's first frame.
  constructor({ canvas, columns, fps, shown, begun }) {
    Object.assign(this, { canvas, columns, fps, shown, begun });
    this.context = canvas.getContext("2d", { alpha: false });
    this.begin();
  }

  begin() {
    this.#run += 1;
    this.#strips.clear();
    this.#known.clear();
    this.count = 0; // frames drawn
    this.stalls = 0; // how often there was nothing to draw, though the walk went on
    this.stalled = 0; // milliseconds of it
    this.number = 1; // of the strip that is drawn
    this.at = 0; // its next frame
    this.due = 0; // when that is to be drawn
    this.since = null; // when the frames ran out
    this.rate = this.fps; // at which frames are drawn
  }

  end() {
    this.since = null;
  }

  get any() {
    return this.#known.size > 0;
  }

  get ahead() {
    return this.#strips.size;
  }

  async add(number, strip) {
    if (number < this.number || this.#known.has(number)) return;
    this.#known.add(number);
    const run = this.#run;
    const bytes = Uint8Array.from(atob(strip.jpeg), (char) => char.charCodeAt(0));
    const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
    if (run !== this.#run) return;
    this.#strips.set(number, { ...strip, jpeg: null, bitmap });
    this.#last(strip.lasts);
  }

  // What is there has to last for so many seconds.
  #last(seconds) {
    const left = [...this.#strips.values()].reduce((sum, { frames }) => sum + frames, -this.at);
    this.rate = Math.min(this.fps, left / seconds);
  }

  // Draws the frame that is due, if one is; returns whether it did. Late frames are drawn later, and never left out.
  draw(now) {
    if (now < this.due - 2) return false;
    const strip = this.#strips.get(this.number);
    if (!strip) {
      if (this.count && this.since === null) [this.since, this.stalls] = [now, this.stalls + 1];
      return false;
    }
    if (this.since !== null) {
      this.stalled += now - this.since;
      this.since = null;
    }
    if (this.at === 0) this.begun(strip, now);
    this.#paint(strip, this.at);
    this.count += 1;
    this.at += 1;
    const step = 1000 / this.rate;
    this.due = now - this.due < step ? this.due + step : now + step;
    if (this.at === strip.frames) {
      strip.bitmap.close();
      this.#strips.delete(this.number);
      this.number += 1;
      this.at = 0;
    }
    this.shown(now);
    return true;
  }

  // While paused no time passes.
  hold(now, paused) {
    if (!paused) this.due = now;
    this.since = null;
  }

  #paint({ bitmap, size: [width, height] }, index) {
    const { canvas, columns } = this;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const [x, y] = [index % columns, Math.floor(index / columns)];
    this.context.drawImage(bitmap, x * width, y * height, width, height, 0, 0, width, height);
  }
}
