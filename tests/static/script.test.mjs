import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

const { Vocabulary, extend, fromValue, starts, toValue, total } = await load("script.js");
const { Edits } = await load("edits.js");
const { Recording } = await load("recorder.js");

function load(name) {
  return import(`../../infworld/app/static/${name}`);
}

const given = JSON.parse(readFileSync(0, "utf8")); // what Python gives the browser
const vocabulary = new Vocabulary(given);
const parse = (text) => vocabulary.parse(text);

test("text is read back as it was written", () => {
  const text = "forward+left 3, strafe right+up 4, wait 2, back 1";
  assert.equal(vocabulary.toText(parse(text)), text);
  assert.deepEqual(starts(parse(text)), [0, 3, 7, 9]);
  assert.equal(total(parse(text)), 10);
});

test("the exchange format keeps what has no words", () => {
  const segments = [{ move: 9, view: 1, frames: 2 }, { move: 0, view: 9, frames: 1 }];
  assert.deepEqual(vocabulary.fromJson(vocabulary.toJson(segments)), segments);
  assert.deepEqual(fromValue(JSON.parse(JSON.stringify(toValue(segments)))), segments);
});

test("opposite keys cancel, and others add up", () => {
  const words = (...held) => vocabulary.segmentWords(vocabulary.actionOf(new Set(held)));
  assert.equal(words("forward", "strafe left", "up"), "forward+strafe left+up");
  assert.equal(words("forward", "back", "left"), "left");
  assert.equal(words("left", "right", "forward", "back"), "wait");
  assert.equal(words(), "wait");
});

test("equal neighbours become one segment", () => {
  const segments = [];
  for (const text of ["forward 1", "forward 2", "left 1", "forward 1"]) extend(segments, parse(text)[0]);
  assert.equal(vocabulary.toText(segments), "forward 3, left 1, forward 1");
});

function recorded(events, end) {
  const [recording, held] = [new Recording(vocabulary, 30, 100), new Set()];
  for (const [time, word, down] of events) {
    recording.sample(time, held);
    recording.start(time);
    if (down) held.add(word);
    else held.delete(word);
  }
  recording.sample(end, held);
  return recording;
}

test("held keys become segments from the first key on", () => {
  const recording = recorded([[5000, "forward", true], [6000, "left", true], [7000, "forward", false]], 8000);
  assert.equal(vocabulary.toText(recording.segments), "forward 30, forward+left 30, left 30");
});

test("fingers that are not quite together leave no crumbs, and a tap stays", () => {
  const both = [[0, "forward", true], [50, "left", true], [1000, "left", false], [1050, "forward", false]];
  assert.equal(vocabulary.toText(recorded(both, 1050).tidy()), "forward+left 31");
  const tap = [[0, "up", true], [40, "up", false], [1000, "down", true]];
  assert.deepEqual(recorded(tap, 2000).tidy().map((s) => vocabulary.segmentWords(s)), ["up", "wait", "down"]);
});

test("a recording ends where there is no more room, and tidying it changes nothing in it", () => {
  const recording = recorded([[0, "forward", true], [50, "left", true]], 60_000);
  assert.equal(recording.frames, 100);
  const before = vocabulary.toText(recording.segments);
  recording.tidy();
  assert.equal(vocabulary.toText(recording.segments), before);
});

function editing(text) {
  const said = [];
  const edits = new Edits(1000, { drawn() {}, published() {}, refused: (message) => said.push(message) });
  edits.change(parse(text), { select: -1 });
  return [edits, said, () => vocabulary.toText(edits.segments)];
}

test("edits of one step are undone together, others one by one", () => {
  const [edits, , text] = editing("forward 10, left 10");
  for (const frames of [11, 12, 13]) edits.resize(0, frames, "drag 1");
  edits.moveTo(0, 5);
  assert.equal(text(), "left 10, forward 13");
  edits.undo();
  assert.equal(text(), "forward 13, left 10");
  edits.undo();
  assert.equal(text(), "forward 10, left 10");
  edits.redo();
  edits.change(parse("wait 1"));
  assert.equal(edits.canRedo, false);
});

test("split, copy, add and remove keep the selection where the person is", () => {
  const [edits, , text] = editing("forward 10, left 5");
  edits.selected = 0;
  edits.split(4);
  assert.equal(text(), "forward 4, forward 6, left 5");
  edits.split(99);
  assert.equal(text(), "forward 2, forward 2, forward 6, left 5");
  edits.copy();
  assert.equal(edits.selected, 1);
  edits.add(parse("up 3")[0]);
  assert.equal(edits.selected, 2);
  edits.remove();
  assert.equal(text(), "forward 2, forward 2, forward 2, forward 6, left 5");
});

test("a script that is too long is refused and changes nothing", () => {
  const [edits, said, text] = editing("forward 999");
  edits.change(parse("forward 1001"));
  assert.equal(text(), "forward 999");
  assert.deepEqual(said, ["the actions may last at most 1000 frames"]);
});
