/* Pages attended, by layer: one canvas per run, one row per layer, the context from left to right. */

const FULL = 255;

/** What one run's worker recorded: length of the context -> layer -> {perCell, share}. */
export class Trace {
  constructor() {
    this.steps = new Map();
  }

  add(records) {
    for (const [length, layer, perCell, encoded] of records) {
      if (!this.steps.has(length)) this.steps.set(length, new Map());
      const share = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
      this.steps.get(length).set(layer, { perCell, share });
    }
  }

  /** Lengths of the context at which something was recorded, ascending. */
  get lengths() {
    return [...this.steps.keys()].sort((a, b) => a - b);
  }

  /** Layers of one step, or of all of them with the mean share in each cell. */
  layers(length) {
    return length === null ? this.mean() : this.steps.get(length) || new Map();
  }

  mean() {
    const sums = new Map();
    for (const layers of this.steps.values()) {
      for (const [layer, { perCell, share }] of layers) {
        const sum = sums.get(layer) || { perCell, total: [], count: [] };
        sums.set(layer, sum);
        if (sum.perCell !== perCell) continue; // the cells grew: not comparable
        share.forEach((value, cell) => {
          sum.total[cell] = (sum.total[cell] || 0) + value;
          sum.count[cell] = (sum.count[cell] || 0) + 1;
        });
      }
    }
    const means = new Map();
    for (const [layer, { perCell, total, count }] of sums) {
      means.set(layer, { perCell, share: total.map((value, cell) => Math.round(value / count[cell])) });
    }
    return means;
  }
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const parse = (name) => {
    const hex = style.getPropertyValue(name).trim().slice(1);
    return [0, 2, 4].map((place) => parseInt(hex.slice(place, place + 2), 16));
  };
  return { none: parse("--none"), full: parse("--accent") };
}

/** Draw `layers` (layer -> {share}); a layer without an entry read everything. */
export function drawMap(canvas, info, layers, cells) {
  const { none, full } = colours();
  canvas.width = Math.max(1, cells);
  canvas.height = info.layers;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let layer = 0; layer < info.layers; layer += 1) {
    const share = layers.has(layer) ? layers.get(layer).share : null;
    for (let cell = 0; cell < canvas.width; cell += 1) {
      const part = share === null ? 1 : (share[cell] || 0) / FULL;
      // the square root lets a cell with one page of many be seen
      const mix = Math.sqrt(part);
      const pixel = 4 * (layer * canvas.width + cell);
      for (let channel = 0; channel < 3; channel += 1) {
        image.data[pixel + channel] = none[channel] + mix * (full[channel] - none[channel]);
      }
      image.data[pixel + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}

/** What lies under a place of the canvas, in words; null outside of it. */
export function describePlace(canvas, info, layers, event) {
  const box = canvas.getBoundingClientRect();
  const cell = Math.floor(((event.clientX - box.left) / box.width) * canvas.width);
  const layer = Math.floor(((event.clientY - box.top) / box.height) * canvas.height);
  if (cell < 0 || layer < 0 || cell >= canvas.width || layer >= canvas.height) return null;
  const entry = layers.get(layer);
  if (!entry) return `Layer ${layer}: every page`;
  const first = cell * entry.perCell * info.page_size;
  const last = first + entry.perCell * info.page_size - 1;
  return `Layer ${layer}, tokens ${first}–${last}: read for ${Math.round((100 * (entry.share[cell] || 0)) / FULL)}%`
    + ` of ${info.select_heads} heads`;
}
