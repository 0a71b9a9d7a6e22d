// Frames of videos on canvases, all at the same frame. A film is one picture with ceil(sqrt(N)) columns of N frames,
// so that every frame is exact, films play in step, and no video element is needed. A map's layer is such a film too.

import { content, layer } from "./api.js";

export const loadFilm = async (video) => film(video, await content(video.id, "spritesheet"));
export const loadLayer = async (video, phenomenon) => film(video, await layer(video.id, phenomenon));

async function film(video, picture) {
  const sheet = await createImageBitmap(picture);
  const columns = Math.ceil(Math.sqrt(video.num_frames));
  const rows = Math.ceil(video.num_frames / columns);
  return {
    sheet, columns, numFrames: video.num_frames, fps: video.fps,
    width: sheet.width / columns, height: sheet.height / rows,
  };
}

export function drawFrame(canvas, { sheet, columns, numFrames, width, height }, index) {
  const frame = Math.min(index, numFrames - 1);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.clearRect(0, 0, width, height);
  context.drawImage(sheet, (frame % columns) * width, Math.floor(frame / columns) * height,
    width, height, 0, 0, width, height);
}

// Lays a frame of a map over a canvas; `opacity` is that of its hottest place.
export function drawLayer(canvas, layer, index, opacity) {
  const cells = new OffscreenCanvas(layer.width, layer.height);
  drawFrame(cells, layer, index);
  const context = canvas.getContext("2d");
  context.globalAlpha = opacity;
  context.drawImage(cells, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 1;
}

// |a - b| of two drawn frames, four times as bright; returns the mean difference of a pixel, 0 to 255.
export function drawDifference(canvas, first, second) {
  const { width, height } = first;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const read = (of) => of.getContext("2d").getImageData(0, 0, width, height);
  const one = read(first), two = read(second), out = new ImageData(width, height);
  let sum = 0;
  for (let i = 0; i < out.data.length; i += 4) {
    for (let channel = 0; channel < 3; channel++) {
      const difference = Math.abs(one.data[i + channel] - two.data[i + channel]);
      sum += difference;
      out.data[i + channel] = 4 * difference;
    }
    out.data[i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(out, 0, 0);
  return sum / (3 * width * height);
}
