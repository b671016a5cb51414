// The script as text and as file, and what is wrong with either.

import { sentence } from "./script.js";

const STEP = "text"; // typing is one step to undo

export class TextForm {
  constructor(edits, vocabulary, part) {
    Object.assign(this, { edits, vocabulary, part });
    part("text").addEventListener("input", () => this.#onInput());
    part("text").addEventListener("blur", () => this.#leave());
    part("file").addEventListener("change", () => this.#import());
  }

  draw() {
    if (this.edits.lastStep === STEP) return; // never rewrite what is being written
    this.part("text").value = this.vocabulary.toText(this.edits.segments);
    this.showError("");
  }

  showError(message) {
    this.part("error").textContent = message && sentence(message);
    this.part("text").setAttribute("aria-invalid", Boolean(message));
  }

  #onInput() {
    try {
      const next = this.vocabulary.parse(this.part("text").value);
      this.showError("");
      this.edits.change(next, { select: -1, step: STEP });
    } catch (error) {
      this.showError(error.message);
    }
  }

  #leave() {
    this.edits.lastStep = null;
    if (this.part("text").getAttribute("aria-invalid") !== "true") this.draw();
  }

  async #import() {
    const [file] = this.part("file").files;
    this.part("file").value = "";
    if (!file) return;
    try {
      this.edits.change(this.vocabulary.fromJson(await file.text()), { select: -1 });
    } catch (error) {
      this.showError(`${file.name}: ${error.message}`);
    }
  }

  export() {
    const link = document.createElement("a");
    const text = this.vocabulary.toJson(this.edits.segments);
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "actions.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}
