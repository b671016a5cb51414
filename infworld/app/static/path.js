// Where the actions lead, by `motion`, the numbers of `infworld.camera`: one pose per frame, x to the right and z ahead
// of the start in units, yaw (clockwise) and pitch in degrees.

import { clamp } from "./script.js";

export function walk(segments, motion) {
  const poses = [{ x: 0, z: 0, yaw: 0, pitch: 0 }];
  for (const { move, view, frames } of segments) {
    for (let i = 0; i < frames; i++) poses.push(step(poses.at(-1), motion.moves[move], motion.views[view], motion));
  }
  return poses;
}

function step({ x, z, yaw, pitch }, [aside, ahead], [turn, rise], { pitch_limit }) {
  const heading = ((yaw + turn / 2) * Math.PI) / 180;
  const [sin, cos] = [Math.sin(heading), Math.cos(heading)];
  return {
    x: x + (ahead * sin + aside * cos),
    z: z + (ahead * cos - aside * sin),
    yaw: yaw + turn,
    pitch: clamp(pitch + rise, -pitch_limit, pitch_limit),
  };
}

// The frames of a place (`places`) or of a view (`views`) that was there before and was left in between: those for
// which `camera.seen_before` finds something.
export const revisits = (poses, motion) => ({
  places: seenBefore(poses, motion, () => 0),
  views: seenBefore(poses, motion, degreesApart),
});

function seenBefore(poses, { near, away, alike_degrees, away_degrees }, degrees) {
  const squares = new Map(); // places to frames, so that not all frames are compared with all
  const found = [];
  let again = false;
  poses.forEach((pose, frame) => {
    if (frame && equal(pose, poses[frame - 1])) return again && found.push(frame); // standing still changes nothing
    const left = (i) => distance(pose, poses[i]) > away || degrees(pose, poses[i]) > away_degrees;
    let lastAway = frame - 1;
    while (lastAway > 0 && !left(lastAway)) lastAway--;
    const alike = (i) => distance(pose, poses[i]) < near && degrees(pose, poses[i]) < alike_degrees;
    again = around(squares, pose, near).some((frames) => someBefore(frames, lastAway, alike));
    if (again) found.push(frame);
    const key = `${square(pose, near)}`;
    if (!squares.has(key)) squares.set(key, []);
    squares.get(key).push(frame);
  });
  return found;
}

const equal = (a, b) => a.x === b.x && a.z === b.z && a.yaw === b.yaw && a.pitch === b.pitch;
const distance = (a, b) => Math.hypot(a.x - b.x, a.z - b.z);
const square = ({ x, z }, side) => [Math.floor(x / side), Math.floor(z / side)];

function degreesApart(a, b) {
  const turn = a.yaw - b.yaw;
  return Math.max(Math.abs(turn - 360 * Math.round(turn / 360)), Math.abs(a.pitch - b.pitch));
}

function around(squares, pose, side) {
  const [i, j] = square(pose, side);
  const steps = [-1, 0, 1];
  return steps.flatMap((di) => steps.map((dj) => squares.get(`${[i + di, j + dj]}`) ?? []));
}

// Frames are in order.
function someBefore(frames, end, test) {
  for (const frame of frames) {
    if (frame >= end) return false;
    if (test(frame)) return true;
  }
  return false;
}

// Whole numbers in order -> runs [first, last].
export function runs(numbers) {
  const found = [];
  for (const n of numbers) {
    if (n === found.at(-1)?.[1] + 1) found.at(-1)[1] = n;
    else found.push([n, n]);
  }
  return found;
}
