// The first gamepad's sticks and cross as held words: the left stick walks, the right one looks.

const TILT = 0.5; // of a stick, from which on it counts
const AXES = [["strafe left", "strafe right"], ["forward", "back"], ["left", "right"], ["up", "down"]];
const BUTTONS = { 12: "forward", 13: "back", 14: "left", 15: "right" }; // the cross of the standard layout

export class Gamepad {
  constructor(held) {
    this.held = held;
  }

  poll() {
    const pad = navigator.getGamepads?.().find(Boolean);
    if (!pad) return;
    const tilted = AXES.flatMap(([low, high], i) => (pad.axes[i] < -TILT ? [low] : pad.axes[i] > TILT ? [high] : []));
    const pressed = Object.entries(BUTTONS).filter(([i]) => pad.buttons[i]?.pressed).map(([, word]) => word);
    this.held(new Set([...tilted, ...pressed]));
  }
}
