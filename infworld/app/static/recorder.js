// Held keys become segments in real time: `fps` frames a second, from the first key on.

import { extend } from "./script.js";

const SHORTEST = 3; // frames; fingers are not quicker on purpose

export class Recording {
  since = null; // when the clock started
  frames = 0;
  #taken = [];

  // room: frames at most.
  constructor(vocabulary, fps, room) {
    Object.assign(this, { vocabulary, fps, room });
  }

  start(time) {
    this.since ??= time;
  }

  // What was held until `time` becomes frames.
  sample(time, words) {
    if (this.since === null) return;
    this.until(Math.floor(((time - this.since) * this.fps) / 1000), words);
  }

  // The same until a frame.
  until(frame, words) {
    const due = Math.min(frame, this.room);
    if (due <= this.frames) return;
    extend(this.#taken, { ...this.vocabulary.actionOf(words), frames: due - this.frames });
    this.frames = due;
  }

  get segments() {
    return this.#taken.map((run) => ({ ...run }));
  }

  // Runs shorter than SHORTEST join a neighbour that does all they do: keys pressed or released one after the other,
  // the gap between two presses. A tap stays.
  tidy() {
    const { segments: taken, vocabulary } = this;
    const done = [];
    taken.forEach((run, i) => {
      const [before, after] = [done.at(-1), taken[i + 1]];
      const short = run.frames < SHORTEST;
      if (short && before && vocabulary.within(run, before)) before.frames += run.frames;
      else if (short && after && vocabulary.within(run, after)) after.frames += run.frames;
      else extend(done, run);
    });
    return done;
  }
}
