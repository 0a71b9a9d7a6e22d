// The panel "Look": a video frame by frame, beside another one, with the map of a phenomenon over it.

import { content, physics } from "./api.js";
import { byId, element } from "./dom.js";
import { drawDifference, drawFrame, loadFilm } from "./film.js";
import { drawHeat, mean } from "./heat.js";

const frameSlider = byId("frame");
let shown = null;       // { video, film, maps }
let compared = null;    // the same of the video beside it
let playing = null;     // the timer of the player

export const shownVideo = () => shown?.video ?? null;

export async function show(video) {
  pause();
  const [film, maps] = await Promise.all([loadFilm(video), loadMaps(video)]);
  shown = { video, film, maps };
  compared = null;
  byId("look").hidden = false;
  byId("look-empty").hidden = true;
  byId("look-prompt").textContent = video.prompt;
  frameSlider.max = film.numFrames - 1;
  frameSlider.value = 0;
  byId("branch-off").hidden = video.physics?.scale === 0;
  showMaps();
  draw();
}

export async function compareWith(video) {
  compared = video === null ? null : { video, film: await loadFilm(video), maps: null };
  byId("other-figure").hidden = byId("difference-figure").hidden = compared === null;
  if (compared) byId("other-caption").textContent = describe(compared.video, shown.video);
  draw();
}

// In what `video` differs from `base`, in a few words.
export function describe(video, base) {
  if (video.physics?.scale === 0 && base.physics?.scale !== 0) return "Branch off";
  const keys = ["prompt", "seed", "size", "seconds", "num_inference_steps", "guidance_scale", "negative_prompt", "fps"];
  const parts = keys.filter((key) => video[key] !== base[key]).map((key) => `${key} ${video[key]}`);
  const physics = (of) => JSON.stringify({ ...of.physics, return_maps: null });
  if (physics(video) !== physics(base)) {
    const { scale = 1, strength = {}, invert_refinement: inverted } = video.physics ?? {};
    if (scale !== 1) parts.push(`scale ${scale}`);
    for (const [phenomenon, factor] of Object.entries(strength)) parts.push(`${phenomenon} × ${factor}`);
    if (inverted) parts.push("experts inverted");
  }
  return parts.join(", ") || "the same request";
}

async function loadMaps(video) {
  return video.physics?.return_maps ? (await physics(video.id)).maps : null;
}

function showMaps() {
  const { maps } = shown;
  byId("maps").hidden = maps === null;
  byId("no-maps").hidden = maps !== null;
  if (maps === null) return;
  const means = Object.entries(maps).map(([name, map]) => [name, mean(map)]).sort((a, b) => b[1] - a[1]);
  byId("phenomenon").replaceChildren(element("option", { value: "" }, "none"),
    ...means.map(([name]) => element("option", { value: name }, name)));
  byId("bars").replaceChildren(...means.map(([name, value]) => {
    const bar = element("progress", { max: 1, value, "aria-label": name });
    return element("li", {}, element("span", {}, name), bar, element("span", {}, value.toFixed(2)));
  }));
}

function draw() {
  if (!shown) return;
  const index = Number(frameSlider.value), { film, maps } = shown;
  byId("frame-number").textContent = `${index + 1} of ${film.numFrames}`;
  const context = drawFrame(byId("film"), film, index);
  if (compared) {
    drawFrame(byId("other"), compared.film, index);
    const sameSize = compared.film.width === film.width && compared.film.height === film.height;
    byId("difference-figure").hidden = !sameSize;
    if (sameSize) {
      const difference = drawDifference(byId("difference"), byId("film"), byId("other"));
      byId("difference-caption").textContent = `Difference × 4; here ${difference.toFixed(1)} of 255 a pixel`;
    }
  }
  const map = maps?.[byId("phenomenon").value];
  if (map) drawHeat(context, map, index, film.numFrames, Number(byId("opacity").value) / 100);
}

function step(frames) {
  const last = Number(frameSlider.max);
  frameSlider.value = (Number(frameSlider.value) + frames + last + 1) % (last + 1);
  draw();
}

function pause() {
  clearInterval(playing);
  playing = null;
  byId("play").setAttribute("aria-pressed", "false");
  byId("play").textContent = "Play";
}

function togglePlay() {
  if (playing !== null) return pause();
  playing = setInterval(() => step(1), 1000 / shown.film.fps);
  byId("play").setAttribute("aria-pressed", "true");
  byId("play").textContent = "Pause";
}

byId("play").addEventListener("click", togglePlay);
byId("back").addEventListener("click", () => { pause(); step(-1); });
byId("forward").addEventListener("click", () => { pause(); step(1); });
for (const id of ["frame", "phenomenon", "opacity"]) byId(id).addEventListener("input", draw);
byId("download").addEventListener("click", async () =>
  save(await content(shown.video.id, "video"), `${shown.video.id}.mp4`));
byId("recipe").addEventListener("click", () =>
  save(new Blob([JSON.stringify(request(shown.video), null, 2)]), `${shown.video.id}.json`));
byId("link").addEventListener("click", async () => {
  const url = `${location.origin}${location.pathname}#${encodeURIComponent(JSON.stringify(request(shown.video)))}`;
  await navigator.clipboard.writeText(url).catch(() => { location.hash = url.split("#")[1]; });
});

// The request that makes this video again, bit for bit on the same server.
export function request(video) {
  const keys = ["prompt", "model", "seconds", "size", "seed", "num_inference_steps", "guidance_scale",
    "negative_prompt", "fps", "physics"];
  return Object.fromEntries(keys.filter((key) => video[key] !== null).map((key) => [key, video[key]]));
}

function save(blob, name) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  URL.revokeObjectURL(url);
}
