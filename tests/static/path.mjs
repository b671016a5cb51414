// Scripts and a camera's motion on stdin -> the path of each and what is seen again, as JSON.
import { readFileSync } from "node:fs";
import { revisits, walk } from "../../infworld/app/static/path.js";
import { fromValue } from "../../infworld/app/static/script.js";

const { values, motion } = JSON.parse(readFileSync(0, "utf8"));
const results = values.map((value) => {
  const poses = walk(fromValue(value), motion);
  return { poses: poses.map((p) => [p.x, p.z, p.yaw, p.pitch]), ...revisits(poses, motion) };
});
process.stdout.write(JSON.stringify(results));
