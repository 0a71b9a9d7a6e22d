// Puts the page together: the key, the form, the list, the panel that looks, the status.

import * as api from "./api.js";
import { byId, element } from "./dom.js";
import * as form from "./form.js";
import * as look from "./look.js";
import { showStatus } from "./status.js";
import * as watch from "./videos.js";

const REFRESH_EVERY_MS = 10_000;
let hasPhysics = false;

function complain(error) {
  if (error.status === 401) askForKey(error);
  byId("alert").textContent = error.message;
  byId("alert").hidden = false;
}

function askForKey() {
  byId("key-form").hidden = false;
  byId("key").focus();
}

async function start() {
  byId("alert").hidden = true;
  const settings = await api.settings();
  byId("key-form").hidden = true;
  byId("model").textContent = settings.model;
  hasPhysics = settings.has_physics;
  form.build(settings);
  if (location.hash.length > 1 && !form.isTouched()) fillFromLink();
  await refresh();
}

function fillFromLink() {
  try {
    form.fill(JSON.parse(decodeURIComponent(location.hash.slice(1))));
  } catch {
    complain(new Error("The link does not describe a video."));
  }
}

async function refresh() {
  await watch.refresh();
  await showStatus();
  byId("alert").hidden = true;
}

async function make(request) {
  const video = await api.create(request);
  watch.add(video);
  watch.render();
  return video;
}

async function show(video) {
  await look.show(video);
  offerComparisons();
  byId("look-title").focus();
  byId("look-title").scrollIntoView();
}

// Every completed video can stand beside the one that is shown; the same seed with the branch off comes first.
function offerComparisons() {
  const shown = look.shownVideo();
  if (shown === null) return;
  const chosen = byId("compare").value;
  const others = watch.videos().filter((video) => video.status === "completed" && video.id !== shown.id);
  const isTwin = (video) => look.describe(video, shown) === "Branch off" && video.prompt === shown.prompt
    && video.seed === shown.seed && video.size === shown.size && video.seconds === shown.seconds;
  others.sort((a, b) => isTwin(b) - isTwin(a));
  byId("compare").replaceChildren(element("option", { value: "" }, "nothing"), ...others.map((video) => {
    const text = isTwin(video) ? "the same with the branch off" : `${video.prompt}: ${look.describe(video, shown)}`;
    return element("option", { value: video.id }, text);
  }));
  if (others.some((video) => video.id === chosen)) byId("compare").value = chosen;
}

byId("make").addEventListener("submit", async (event) => {
  event.preventDefault();
  form.clearErrors();
  try {
    await make(form.read(hasPhysics));
  } catch (error) {
    if (error.status === 401 || error.status === 0) complain(error);
    else form.showError(error);
  }
});
byId("reset").addEventListener("click", () => form.fill({}));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setKey(byId("key").value);
  byId("key").value = "";
  start().catch(complain);
});
byId("compare").addEventListener("change", (event) => {
  const video = watch.videos().find((other) => other.id === event.target.value) ?? null;
  look.compareWith(video).catch(complain);
});
byId("branch-off").addEventListener("click", () => {
  const request = look.request(look.shownVideo());
  make({ ...request, physics: { scale: 0 } }).catch(complain);
});
byId("vary").addEventListener("click", () => {
  form.fill(look.request(look.shownVideo()));
  byId("prompt").focus();
});
window.addEventListener("hashchange", fillFromLink);

watch.watch({
  onLook: show,
  onError: complain,
  onChange: (video, before) => {
    if (before !== undefined) byId("announce").textContent = `${video.prompt}: ${video.status}`;
    offerComparisons();
  },
});
setInterval(() => { if (!document.hidden && byId("key-form").hidden) refresh().catch(complain); }, REFRESH_EVERY_MS);
start().catch(complain);
