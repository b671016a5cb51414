// What is held, by whatever source, and what was over before a chunk began with it: told to Python in messages with
// growing numbers (`infworld.app.steering`).

const KEPT = 16; // taps that a message repeats, should an earlier one be late
const SHORTEST = 2; // frames that even the shortest press is worth
const LOOKED = 2; // frames of looking about that are told at once

export class Steering {
  #held = new Map(); // source -> words
  #presses = new Map(); // word -> {number, time}
  #taps = [];
  #sent = new Map(); // number -> when it was held, until its picture is seen
  #turned = new Map(); // word -> degrees not told yet

  // state(): {paused, shown, stalls}. send(message).
  constructor({ vocabulary, fps, state, send }) {
    Object.assign(this, { vocabulary, fps, state, send });
    this.begin();
  }

  begin() {
    for (const kept of [this.#held, this.#presses, this.#sent, this.#turned]) kept.clear();
    this.#taps = [];
    this.number = 0;
    this.steered = 0; // the number that the newest chunk was made with
  }

  get words() {
    return new Set([...this.#held.values()].flatMap((words) => [...words]));
  }

  // What a source holds now.
  hold(source, words) {
    const before = this.words;
    this.#held.set(source, new Set(words));
    const now = this.words;
    const [pressed, released] = [[...now].filter((w) => !before.has(w)), [...before].filter((w) => !now.has(w))];
    if (!pressed.length && !released.length) return;
    const time = performance.now();
    this.number += 1;
    this.#sent.set(this.number, time);
    for (const word of pressed) this.#presses.set(word, { number: this.number, time });
    const taps = released.map((word) => [word, this.#presses.get(word)]).filter(([, press]) => press);
    if (taps.length) this.#tap(before, taps, time);
    for (const word of released) this.#presses.delete(word);
    this.tell();
  }

  // A press that no chunk has been made with becomes frames of its own.
  #tap(words, taps, time) {
    const [, press] = taps.reduce((last, tap) => (tap[1].number > last[1].number ? tap : last));
    if (press.number <= this.steered) return;
    const frames = Math.max(SHORTEST, Math.round(((time - press.time) * this.fps) / 1000));
    this.#add(press.number, words, frames);
  }

  #add(number, words, frames) {
    const { move, view } = this.vocabulary.actionOf(words);
    this.#taps = [...this.#taps, [number, move, view, frames]].slice(-KEPT);
  }

  // Looking about by so many degrees, as often as the mouse moves.
  look(word, degrees, { views }) {
    const total = (this.#turned.get(word) ?? 0) + degrees;
    const { view } = this.vocabulary.actionOf(new Set([word]));
    const frames = Math.floor(total / Math.max(...views[view].map(Math.abs)));
    if (frames < LOOKED) return this.#turned.set(word, total);
    this.#turned.delete(word);
    this.number += 1;
    this.#sent.set(this.number, performance.now());
    this.#add(this.number, new Set([...this.words, word]), frames);
    this.tell();
  }

  // A chunk made with this number is on the screen: milliseconds since the oldest steering that is new in it.
  seen(steered, now) {
    this.steered = Math.max(this.steered, steered);
    const times = [...this.#sent].filter(([number]) => number <= steered);
    for (const [number] of times) this.#sent.delete(number);
    return times.length ? now - times[0][1] : null;
  }

  tell() {
    const { move, view } = this.vocabulary.actionOf(this.words);
    this.told = performance.now();
    this.send({ number: this.number, move, view, taps: this.#taps, ...this.state() });
  }

  // Something is told at least this often, so that Python knows the page is there.
  beat(milliseconds) {
    setInterval(() => performance.now() - this.told > milliseconds / 2 && this.tell(), milliseconds);
  }
}
