// A phenomenon's map over a frame, as `heat_overlay` of the reports draws it: scaled to its own range over the whole
// video, resampled linearly, and the more heat, the more opaque.

// Nine evenly spaced colours of matplotlib's "inferno".
const COLOURS = [[0, 0, 4], [33, 12, 74], [87, 16, 110], [138, 34, 106], [188, 55, 84], [228, 90, 49],
  [249, 142, 9], [249, 203, 53], [252, 255, 164]];

function colour(heat) {
  const place = heat * (COLOURS.length - 1);
  const below = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[below].map((low, channel) => low + (place - below) * (COLOURS[below + 1][channel] - low));
}

export function range(map) {
  const values = map.flat(2);
  return [Math.min(...values), Math.max(...values)];
}

export const mean = (map) => {
  const values = map.flat(2);
  return values.reduce((sum, value) => sum + value, 0) / values.length;
};

// Lays the map `[t][h][w]` over frame `index` of `numFrames` on a canvas; `opacity` is that of its hottest place.
export function drawHeat(context, map, index, numFrames, opacity) {
  const place = Math.min(Math.max((index + 0.5) * map.length / numFrames - 0.5, 0), map.length - 1);
  const before = Math.floor(place), after = Math.min(before + 1, map.length - 1), share = place - before;
  const rows = map[0].length, columns = map[0][0].length, [low, high] = range(map);
  const cells = new ImageData(columns, rows);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) {
      const value = (1 - share) * map[before][y][x] + share * map[after][y][x];
      const heat = (value - low) / Math.max(high - low, 1e-12);
      cells.data.set([...colour(heat), 255 * opacity * heat], 4 * (y * columns + x));
    }
  }
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d").putImageData(cells, 0, 0);
  context.imageSmoothingEnabled = true;
  context.drawImage(small, 0, 0, context.canvas.width, context.canvas.height);
}
