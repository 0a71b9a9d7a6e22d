// The panel "Look": a video frame by frame, beside another one, with the map of a phenomenon over it.

import { byId } from "./dom.js";
import { drawDifference, drawFrame, loadFilm } from "./film.js";
import * as maps from "./maps.js";
import { describe, isTwin } from "./recipe.js";

const frameSlider = byId("frame");
let shown = null;       // { video, film }
let compared = null;    // the same of the video beside it
// They count what was asked for: what comes after a later one is not wanted any more.
let shows = 0, comparisons = 0;
let playing = null;     // the timer of the player

export const shownVideo = () => shown?.video ?? null;

export async function show(video) {
  pause();
  const mine = ++shows;
  const [film, all] = await Promise.all([loadFilm(video), maps.load(video)]);
  if (mine !== shows) return;
  shown = { video, film };
  byId("look").hidden = false;
  byId("look-empty").hidden = true;
  byId("look-prompt").textContent = video.prompt;
  frameSlider.max = film.numFrames - 1;
  frameSlider.value = 0;
  byId("branch-off").hidden = video.physics?.scale === 0;
  byId("said").textContent = "";
  byId("compare").value = "";
  const layer = maps.show(video, all);
  await compareWith(null);
  await layer;
  draw();
}

export async function compareWith(video) {
  const mine = ++comparisons;
  const film = video && await loadFilm(video);
  if (mine !== comparisons) return;
  compared = video && { video, film };
  byId("other-figure").hidden = byId("difference-figure").hidden = compared === null;
  if (compared)
    byId("other-caption").textContent = isTwin(video, shown.video) ? "Branch off" : describe(video, shown.video);
  draw();
}

export function draw() {
  if (!shown) return;
  const index = Number(frameSlider.value), { film } = shown;
  byId("frame-number").textContent = `${index + 1} of ${film.numFrames}`;
  drawFrame(byId("film"), film, index);
  if (compared) {
    drawFrame(byId("other"), compared.film, index);
    const sameSize = compared.film.width === film.width && compared.film.height === film.height;
    byId("difference-figure").hidden = !sameSize;
    if (sameSize) {
      const difference = drawDifference(byId("difference"), byId("film"), byId("other"));
      byId("difference-caption").textContent = `Difference × 4; here ${difference.toFixed(1)} of 255 a pixel`;
    }
  }
  maps.lay(byId("film"), index);
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
for (const id of ["frame", "opacity"]) byId(id).addEventListener("input", draw);
