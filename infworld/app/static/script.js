// The actions as a list of segments { move, view, frames }: what they are called, and their forms as text and as file.

export const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
export const sum = (numbers) => numbers.reduce((total, n) => total + n, 0);
export const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
export const sentence = (text) => text[0].toUpperCase() + text.slice(1);

export const total = (segments) => sum(segments.map((s) => s.frames));
export const starts = (segments) => {
  let at = 0;
  return segments.map(({ frames }) => (at += frames) - frames);
};
export const toValue = (segments) => ({ segments: segments.map((s) => [s.move, s.view, s.frames]) });
export const fromValue = (value) =>
  (value?.segments ?? []).map(([move, view, frames]) => ({ move, view, frames }));
export const equal = (a, b) => JSON.stringify(toValue(a)) === JSON.stringify(toValue(b));
export const isWait = (s) => s.move === 0 && s.view === 0;

// Adds a segment at the end; one like the last makes the last longer.
export function extend(segments, segment) {
  const last = segments.at(-1);
  if (last && last.move === segment.move && last.view === segment.view) last.frames += segment.frames;
  else segments.push({ ...segment });
}

const plus = ([a, b], [x, y]) => [a + x, b + y];
const same = (a, b) => a[0] === b[0] && a[1] === b[1];

// What `editor.py` tells of moves and views: their names, words, and the directions of single words.
export class Vocabulary {
  constructor({ moves, views, move_words, view_words, wait_word, max_frames }) {
    this.kinds = { move: moves, view: views };
    this.words = { move: move_words, view: view_words };
    this.wait = wait_word;
    this.maxFrames = max_frames;
    const direction = (kind, text) =>
      text.split("+").reduce((sum, word) => plus(sum, this.words[kind][word] ?? [0, 0]), [0, 0]);
    this.directions = {
      move: moves.map(([, text]) => direction("move", text)),
      view: views.map(([, text]) => direction("view", text)),
    };
  }

  indexOf(kind, direction) {
    return this.directions[kind].findIndex((d) => same(d, direction));
  }

  isStill(kind, index) {
    return same(this.directions[kind][index], [0, 0]);
  }

  // Degrees clockwise from ahead (or up); also turns the colour wheel, so that one direction has one colour.
  angleOf(kind, index) {
    const [along, across] = this.directions[kind][index];
    return (Math.atan2(across, along) * 180) / Math.PI;
  }

  // "No-op" and "uncertain" both stand still; only the first has the word for it.
  label(kind, index) {
    const [name, text] = this.kinds[kind][index];
    return index && text === this.wait ? name : text;
  }

  segmentWords({ move, view }) {
    const texts = [this.kinds.move[move][1], this.kinds.view[view][1]].filter((text) => text !== this.wait);
    return texts.join("+") || this.wait;
  }

  // The move and view of words that are held at once; opposite ones cancel.
  actionOf(words) {
    const index = (kind) => {
      const held = Object.entries(this.words[kind]).filter(([word]) => words.has(word));
      return this.indexOf(kind, held.reduce((sum, [, direction]) => plus(sum, direction), [0, 0]));
    };
    return { move: index("move"), view: index("view") };
  }

  // Whether segment b does all that a does.
  within(a, b) {
    const axes = (s) => [...this.directions.move[s.move], ...this.directions.view[s.view]];
    return axes(a).every((d, i) => d === 0 || d === axes(b)[i]);
  }

  toText(segments) {
    return segments.map((s) => `${this.segmentWords(s)} ${s.frames}`).join(", ");
  }

  // The grammar of ActionScript.parse, with its messages.
  parse(text) {
    const parts = text.split(/[,;\n]/).map((p) => p.trim());
    return parts.filter(Boolean).map((part) => this.#parseSegment(part));
  }

  #parseSegment(text) {
    const match = /^([a-z +\-]*[a-z])\s+(\d{1,6})$/.exec(text.toLowerCase());
    if (!match) {
      throw new Error(`cannot read '${text}': write what to do and for how many frames, such as 'forward+left 60'`);
    }
    const directions = { move: [0, 0], view: [0, 0] };
    for (const word of match[1].split("+").map((w) => w.replace(/[\s-]+/g, " ").trim())) {
      this.#addWord(directions, word, text);
    }
    const frames = Number(match[2]);
    if (frames < 1) throw new Error(`a segment lasts 1 frame or more, not ${frames}`);
    if (frames > this.maxFrames) throw new Error(`the actions may last at most ${this.maxFrames} frames`);
    return { move: this.indexOf("move", directions.move), view: this.indexOf("view", directions.view), frames };
  }

  #addWord(directions, word, text) {
    if (word === this.wait) return;
    const kind = Object.keys(this.words).find((k) => Object.hasOwn(this.words[k], word));
    if (!kind) {
      const known = [...Object.keys(this.words.move), ...Object.keys(this.words.view), this.wait].join(", ");
      throw new Error(`unknown action '${word}' in '${text}'; known are: ${known}`);
    }
    const [[a, b], [x, y]] = [directions[kind], this.words[kind][word]];
    if ((a && x) || (b && y)) throw new Error(`'${text}' goes both ways at once`);
    directions[kind] = [a + x, b + y];
  }

  // The exchange format: one {"move": name, "view": name} per frame.
  toJson(segments) {
    const { move, view } = this.kinds;
    const line = (s) => `{"move": "${move[s.move][0]}", "view": "${view[s.view][0]}"}`;
    return `[\n${segments.flatMap((s) => Array(s.frames).fill(line(s))).join(",\n")}\n]\n`;
  }

  fromJson(text) {
    const actions = JSON.parse(text);
    if (!Array.isArray(actions)) throw new Error("the file must hold a list with one entry per frame");
    const segments = [];
    actions.forEach((action, frame) => {
      const [move, view] = ["move", "view"].map((kind) => this.#indexOfName(kind, action, frame));
      extend(segments, { move, view, frames: 1 });
    });
    return segments;
  }

  #indexOfName(kind, action, frame) {
    const index = this.kinds[kind].findIndex(([name]) => name === action?.[kind]);
    if (index < 0) throw new Error(`frame ${frame}: unknown ${kind} '${action?.[kind]}'`);
    return index;
  }
}
