import assert from "node:assert/strict";
import { test } from "node:test";

const { Frames } = await import("../../infworld/app/static/frames.js");

// What the browser has: a picture that is decoded at once.
globalThis.Blob = class {};
globalThis.createImageBitmap = async () => ({ close() {} });
const canvas = { getContext: () => ({ drawImage() {} }) };

// Frames that draw what comes at these milliseconds: [when, frames, seconds that they have to last]; when each was drawn.
async function play(strips, until) {
  const drawn = [];
  const frames = new Frames({ canvas, columns: 4, fps: 30, shown: (now) => drawn.push(now), begun() {} });
  let number = 0;
  for (let now = 0; now < until; now += 1000 / 60) {
    while (number < strips.length && strips[number][0] <= now) {
      const [, count, lasts] = strips[number++];
      await frames.add(number, { jpeg: "", size: [8, 6], frames: count, lasts });
    }
    frames.draw(now);
  }
  return { frames, drawn };
}

const gaps = (times) => times.slice(1).map((time, i) => time - times[i]);

test("frames that are there in time are drawn at the film's own rate", async () => {
  const { frames, drawn } = await play([0, 500, 1000].map((when) => [when, 16, 0.4]), 1500);
  assert.equal(frames.rate, 30);
  assert.equal(frames.stalls, 0);
  assert.ok(drawn.length >= 44);
});

test("frames last until there are new ones, evenly and without a stop", async () => {
  const strips = [...Array(10).keys()].map((i) => [1000 * i, 16, 1.05]);
  const { frames, drawn } = await play(strips, 10000);
  assert.equal(frames.stalls, 0);
  assert.ok(drawn.length > 150);
  assert.ok(Math.max(...gaps(drawn)) < 85, Math.max(...gaps(drawn)));
});

test("what has been waiting is drawn faster, so that no queue is left", async () => {
  const strips = [0, 1000, 1000, 1000, 2000, 3000, 4000].map((when) => [when, 16, 1.05]);
  const { frames, drawn } = await play(strips, 5000);
  assert.equal(frames.stalls, 0);
  assert.ok(drawn.length > 105, drawn.length);
});
