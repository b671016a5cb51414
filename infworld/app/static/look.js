// Dragging the picture looks around: the world follows the pointer.

export class Look {
  // degrees: that the view's width shows. turned(word, degrees): as the pointer moves.
  constructor({ view, degrees, active, turned }) {
    let last = null;
    view.addEventListener("pointerdown", (event) => {
      if (!active() || event.target.closest("button")) return;
      last = [event.clientX, event.clientY];
      view.setPointerCapture(event.pointerId);
    });
    view.addEventListener("pointermove", (event) => {
      if (!last || !active()) return;
      const scale = degrees / view.clientWidth;
      const [dx, dy] = [(event.clientX - last[0]) * scale, (event.clientY - last[1]) * scale];
      last = [event.clientX, event.clientY];
      if (dx) turned(dx > 0 ? "left" : "right", Math.abs(dx));
      if (dy) turned(dy > 0 ? "up" : "down", Math.abs(dy));
    });
    for (const type of ["pointerup", "pointercancel"]) view.addEventListener(type, () => (last = null));
  }
}
