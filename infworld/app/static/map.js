// The map: the path from above, by dead reckoning, with what is seen or visited again.

import { revisits, runs } from "./path.js";
import { clamp, count } from "./script.js";

const MARGIN = 34; // pixels, room for the view cone
const TICK_PIXELS = 15;
const CONE_PIXELS = 29;
const digits = (numbers) => numbers.map((n) => n.toFixed(1)).join(" ");

export class PathMap {
  #poses = [];
  #project = () => [0, 0];

  constructor(svg, motion) {
    Object.assign(this, { svg, motion });
  }

  draw(poses, chunk, frame) {
    const { svg, motion } = this;
    const [width, height] = [svg.clientWidth || 300, svg.clientHeight || 220];
    this.#poses = poses;
    this.#project = projection(poses, width, height, motion.step * chunk); // a short path is not blown up
    const found = revisits(poses, motion);
    const every = (n) => poses.filter((_, i) => i % n === 0);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.innerHTML = [
      ...runs(found.places).map(([a, b]) => `<path class="again" d="${this.#line(poses.slice(a, b + 1))}"/>`),
      `<path class="ticks" d="${every(chunk / 8).map((pose) => this.#tick(pose)).join("")}"/>`,
      `<path class="path" d="${this.#line(poses)}"/>`,
      ...runs(found.views).map(([a, b]) => this.#circle("same", poses[Math.floor((a + b) / 2)], 7)),
      ...every(chunk).map((pose) => this.#circle("border", pose, 3)),
      this.#circle("start", poses[0], 5),
      `<g class="now" data-part="now"><path class="cone" d="${cone(motion.fov_degrees)}"/><circle r="4"/></g>`,
    ].join("");
    svg.setAttribute("aria-label", title(poses.at(-1), found));
    this.drawNow(frame);
  }

  drawNow(frame) {
    const pose = this.#poses[clamp(frame, 0, this.#poses.length - 1)];
    const place = `translate(${digits(this.#project(pose))}) rotate(${pose.yaw.toFixed(1)})`;
    this.svg.querySelector(".now").setAttribute("transform", place);
  }

  #line(points) {
    return "M" + points.map((p) => digits(this.#project(p))).join("L");
  }

  #circle(name, pose, radius) {
    const [x, y] = this.#project(pose);
    return `<circle class="${name}" cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="${radius}"/>`;
  }

  #tick(pose) {
    const [x, y] = this.#project(pose);
    const angle = (pose.yaw * Math.PI) / 180;
    return `M${digits([x, y])}L${digits([x + TICK_PIXELS * Math.sin(angle), y - TICK_PIXELS * Math.cos(angle)])}`;
  }
}

function projection(points, width, height, least) {
  const [xs, zs] = [points.map((p) => p.x), points.map((p) => p.z)];
  const [left, right, back, front] = [Math.min(...xs), Math.max(...xs), Math.min(...zs), Math.max(...zs)];
  const room = (low, high, size) => (size - 2 * MARGIN) / Math.max(high - low, least);
  const scale = Math.min(room(left, right, width), room(back, front, height));
  return ({ x, z }) => [
    width / 2 + scale * (x - (left + right) / 2),
    height / 2 - scale * (z - (back + front) / 2),
  ];
}

function cone(degrees) {
  const half = (degrees * Math.PI) / 360;
  const [x, y] = [CONE_PIXELS * Math.sin(half), -CONE_PIXELS * Math.cos(half)].map((n) => n.toFixed(1));
  return `M0 0L-${x} ${y}A${CONE_PIXELS} ${CONE_PIXELS} 0 0 1 ${x} ${y}Z`;
}

function title(end, found) {
  const turned = Math.round(((end.yaw % 360) + 360) % 360);
  return (
    `Map of the path from above. It ends ${Math.hypot(end.x, end.z).toFixed(1)} units from the start, turned ` +
    `${turned} degrees clockwise. Visited before: ${count(found.places.length, "frame")}; ` +
    `seen before: ${found.views.length}.`
  );
}
