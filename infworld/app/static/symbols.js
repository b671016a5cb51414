// Arrows for moves and views.

const SHAPES = { move: "M8 2.5v11M3.5 7 8 2.5 12.5 7", view: "M3 8.5 8 3.5l5 5M3 13l5-5 5 5", still: "M4 8h8" };

export function symbol(vocabulary, kind, index) {
  const shape = vocabulary.isStill(kind, index) ? "still" : kind;
  return `<svg class="arrow" viewBox="0 0 16 16" aria-hidden="true"><path d="${SHAPES[shape]}"/></svg>`;
}
