// The pads of move and view: a click adds a segment, or, while keys are recorded, a button is held like a key.

import { sentence } from "./script.js";
import { symbol } from "./symbols.js";

const CAPS = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→" };

export function buildPads(node, vocabulary, keys) {
  const pad = (kind, more = "") => {
    const own = Object.entries(keys).filter(([, word]) => word in vocabulary.words[kind]);
    const buttons = own.map(([code, word]) => button(vocabulary, kind, code, word)).join("");
    const name = sentence(kind);
    return `<div class="pad" role="group" aria-label="${name}"><span>${name}</span>${buttons}${more}</div>`;
  };
  const { wait } = vocabulary;
  const waiting = `<button type="button" class="wait" data-word="${wait}">${sentence(wait)}</button>`;
  node.innerHTML = pad("move") + pad("view", waiting);
}

function button(vocabulary, kind, code, word) {
  const [along, across] = vocabulary.words[kind][word];
  const index = vocabulary.indexOf(kind, [along, across]);
  const [cap, name] = [CAPS[code] ?? code.at(-1), sentence(word)];
  return `<button type="button" data-word="${word}" aria-label="${name}" title="${name} (${cap})"
    style="--angle:${vocabulary.angleOf(kind, index)};grid-area:${along > 0 ? 1 : 2}/${2 + across}"
    >${symbol(vocabulary, kind, index)}<kbd>${cap}</kbd></button>`;
}
