// Frames of videos on canvases, all at the same frame. A film is one picture with ceil(sqrt(N)) columns of N frames,
// so that every frame is exact, films play in step, and no video element is needed.

import { content } from "./api.js";

export async function loadFilm(video) {
  const sheet = await createImageBitmap(await content(video.id, "spritesheet"));
  const columns = Math.ceil(Math.sqrt(video.num_frames));
  const rows = Math.ceil(video.num_frames / columns);
  return {
    sheet, columns, numFrames: video.num_frames, fps: video.fps,
    width: sheet.width / columns, height: sheet.height / rows,
  };
}

export function drawFrame(canvas, film, index) {
  const { sheet, columns, width, height } = film;
  const frame = Math.min(index, film.numFrames - 1);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(sheet, (frame % columns) * width, Math.floor(frame / columns) * height,
    width, height, 0, 0, width, height);
  return context;
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
