// The field for the image that a video begins with: chosen, dropped or pasted, seen, taken away again.

import { ApiError } from "./api.js";
import { byId } from "./dom.js";

const input = byId("input_reference");
const MAX_SIDE = 320;   // pixels of what is shown of it
let maxBytes = 0;
let shows = 0;          // what is shown after a later one was chosen is not wanted any more

export const isTaken = () => !byId("image-field").hidden;

export function build({ images, image_formats: formats, max_image_bytes: bytes }) {
  maxBytes = bytes;
  input.accept = formats.map((format) => `image/${format.toLowerCase()}`).join();
  input.required = images === "required";
  byId("input_reference-hint").textContent = `${input.required ? "This model needs one. " : ""}${formats.join(", ")}, `
    + `at most ${Number((bytes / 2 ** 20).toPrecision(2))} MiB; its centre is cut to the video's shape. It may be dropped anywhere on this page.`;
  byId("image-field").hidden = images === "never";
}

// The file, or null. Throws what is wrong at the field.
export function chosen() {
  const file = input.files[0] ?? null;
  if (file?.size > maxBytes) throw wrong(`The image has ${file.size} bytes; choose one of at most ${maxBytes}.`);
  return file;
}

export const wrong = (message) => new ApiError(422, { message, param: input.name });

// Puts a file, or null for none, in the place of what was chosen.
export async function choose(file) {
  const files = new DataTransfer();
  if (file) files.items.add(file);
  input.files = files.files;
  await show();
}

export async function show() {
  const mine = ++shows, canvas = byId("image-preview");
  byId("image-chosen").hidden = true;
  const file = chosen();
  if (file === null) return;
  const picture = await createImageBitmap(file).catch(() => null);
  if (mine !== shows) return;
  if (picture === null) throw wrong(`${file.name} is no image that this browser can read; choose another file.`);
  draw(canvas, picture);
  byId("image-chosen").hidden = false;
}

export function draw(canvas, picture) {
  const scale = Math.min(1, MAX_SIDE / picture.width, MAX_SIDE / picture.height);
  const [width, height] = [picture.width, picture.height].map((side) => Math.max(1, Math.round(side * scale)));
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").drawImage(picture, 0, 0, width, height);
}
