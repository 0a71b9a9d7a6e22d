// What made a video: its request, in words, as a file, as a link.

// The request that makes this video again, bit for bit on the same server; the image that it begins with is apart.
export function request(video) {
  const keys = ["prompt", "model", "seconds", "size", "seed", "num_inference_steps", "guidance_scale",
    "negative_prompt", "fps", "physics"];
  return Object.fromEntries(keys.filter((key) => video[key] !== null).map((key) => [key, video[key]]));
}

// In what the physics of a video differ from the model's own, each in a few words.
export function knobs({ physics }) {
  const { scale = 1, strength = {}, invert_refinement: inverted = false } = physics ?? {};
  if (scale === 0) return ["branch off"];
  return [
    ...(scale === 1 ? [] : [`scale ${scale}`]),
    ...Object.entries(strength).filter(([, factor]) => factor !== 1).map(([name, factor]) => `${name} × ${factor}`),
    ...(inverted ? ["experts inverted"] : []),
  ];
}

const SAMPLING = ["prompt", "seed", "size", "seconds", "num_inference_steps", "guidance_scale", "negative_prompt", "fps"];

// In what `video` differs from `base`, in a few words.
export function describe(video, base) {
  const parts = SAMPLING.filter((key) => video[key] !== base[key]).map((key) => `${key} ${video[key]}`);
  if (video.image !== base.image) parts.push(video.image ? "another image" : "no image");
  if (knobs(video).join() !== knobs(base).join()) parts.push(...(knobs(video).length ? knobs(video) : ["knobs at 1"]));
  return parts.join(", ") || "the same request";
}

export const isTwin = (video, base) => describe(video, base) === "branch off";

// The request as a file's text, with the image in it.
export async function recipe(video, image) {
  const reference = image ? { input_reference: { image_url: await dataUrl(image) } } : {};
  return JSON.stringify({ ...request(video), ...reference }, null, 2);
}

const dataUrl = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});

// Too short for an image: it says which one there was.
export function link(video) {
  const fields = { ...request(video), ...(video.image ? { image: video.image } : {}) };
  return `${location.origin}${location.pathname}#${encodeURIComponent(JSON.stringify(fields))}`;
}

export function readLink() {
  try {
    return Object(JSON.parse(decodeURIComponent(location.hash.slice(1))));
  } catch {
    throw new Error("The link does not describe a video.");
  }
}
