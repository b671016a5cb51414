// Keys and buttons that are held: the one recorder of the editor and of driving. `source` (a key's code or a pointer)
// holds a word; `changed(time, pressed)` is called before what is held changes, with the new word or null.

const TYPING = "input:not([type=checkbox], [type=radio], [type=button], [type=range]), textarea, select, " +
  "[contenteditable=true]";
export const isTyping = (node) => Boolean(node?.closest?.(TYPING));
export const hasModifier = (event) => event.ctrlKey || event.metaKey || event.altKey;

export class HeldKeys {
  #sources = new Map();

  // keys: KeyboardEvent.code -> word. buttons: the element with the buttons [data-word].
  constructor({ keys, buttons, active, changed, drawn = () => {}, escape = () => {} }) {
    Object.assign(this, { keys, buttons, active, changed, drawn, escape });
    for (const type of ["keydown", "keyup"]) document.addEventListener(type, (event) => this.#onKey(event), true);
    window.addEventListener("blur", () => this.release());
    for (const type of ["pointerdown", "pointerup", "pointercancel"]) {
      buttons.addEventListener(type, (event) => this.#onPointer(event));
    }
  }

  get words() {
    return new Set(this.#sources.values());
  }

  hold(source, word, time) {
    if (!this.active()) return;
    this.changed(time, word && !this.words.has(word) ? word : null);
    if (word) this.#sources.set(source, word);
    else this.#sources.delete(source);
    this.#draw();
  }

  release() {
    if (this.active()) this.changed(performance.now(), null);
    this.#sources.clear();
    this.#draw();
  }

  #draw() {
    const held = this.words;
    for (const button of this.buttons.querySelectorAll("[data-word]")) {
      button.classList.toggle("held", held.has(button.dataset.word));
    }
    this.drawn();
  }

  #onKey(event) {
    if (!this.active()) return;
    const [word, pressed] = [this.keys[event.code], event.type === "keydown"];
    if (event.key === "Escape" && pressed) return this.escape();
    const elsewhere = isTyping(event.target) || hasModifier(event);
    if (!word || (pressed && elsewhere)) return; // a release always counts
    if (!elsewhere) {
      event.preventDefault();
      event.stopPropagation();
    }
    if (!event.repeat) this.hold(event.code, pressed ? word : null, event.timeStamp);
  }

  #onPointer(event) {
    if (!this.active()) return;
    const source = `pointer ${event.pointerId}`;
    const button = event.type === "pointerdown" ? event.target.closest("[data-word]") : null;
    if (button) button.setPointerCapture(event.pointerId);
    if (button || this.#sources.has(source)) this.hold(source, button?.dataset.word, event.timeStamp);
  }
}
