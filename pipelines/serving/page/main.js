// Puts the page together: the key, the form, the list, the panel that looks, the status.

import * as api from "./api.js";
import { byId, element, save } from "./dom.js";
import * as form from "./form.js";
import * as image from "./image.js";
import * as look from "./look.js";
import * as maps from "./maps.js";
import { describe, isTwin, link, readLink, recipe, request } from "./recipe.js";
import { showStatus } from "./status.js";
import * as watch from "./videos.js";

const REFRESH_EVERY_MS = 10_000;
let settings = null;    // the server's
let refusal = null;     // what a refresh has complained of, which the next one takes back

function complain(error) {
  if (error.status === 401) askForKey();
  byId("alert").textContent = error.message;
  byId("alert").hidden = false;
}

function askForKey() {
  byId("key-form").hidden = false;
  byId("key").focus();
}

// Does what a user asks for; the complaint about what was asked before goes.
function on(id, event, act) {
  byId(id).addEventListener(event, async (happened) => {
    if (event === "submit") happened.preventDefault();
    byId("alert").hidden = true;
    try {
      await act(happened);
    } catch (error) {
      complain(error);
    }
  });
}

async function start() {
  settings = await api.settings();
  byId("key-form").hidden = true;
  byId("model").textContent = settings.model;
  form.build(settings);
  image.build(settings);
  if (location.hash.length > 1 && !form.isTouched()) fillFromLink();
  await refresh();
}

function fillFromLink() {
  const wanted = readLink();
  const ignored = form.fill(wanted);
  image.choose(null);
  if (wanted.model && wanted.model !== settings.model)
    complain(new Error(`The link's video was made by ${wanted.model}; this server has ${settings.model}.`));
  else if (ignored.length) complain(new Error(`The link has what this server does not know: ${ignored.join(", ")}.`));
  else if (wanted.image && image.isTaken())
    form.showError(image.wrong("The link's video begins with an image, which no link holds; choose it again."));
  else if (wanted.image) complain(new Error("The link's video begins with an image; this server takes none."));
}

// The image that a video begins with, or null.
const imageOf = async (video) => (video.image ? new File([await api.image(video.id, "file")], "image") : null);

async function refresh() {
  await watch.refresh();
  await showStatus();
}

async function refreshNow() {
  try {
    await (settings ? refresh() : start());
    if (refusal === byId("alert").textContent) byId("alert").hidden = true;
  } catch (error) {
    complain(error);
    refusal = error.message;
  }
}

// One refresh at a time, also where the server takes longer than there is between two.
async function keepFresh() {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, REFRESH_EVERY_MS));
    if (!document.hidden && byId("key-form").hidden) await refreshNow();
  }
}

async function make(fields, file) {
  watch.addNewest(await api.create(fields, file));
}

// Does what may fail by one field of the form, and says it there.
async function atField(act) {
  form.clearErrors();
  try {
    await act();
  } catch (error) {
    if (error.status === 401 || error.status === 0) throw error;
    form.showError(error);
  }
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
  others.sort((a, b) => isTwin(b, shown) - isTwin(a, shown));
  byId("compare").replaceChildren(element("option", { value: "" }, "nothing"), ...others.map((video) => {
    const text = isTwin(video, shown) ? "the same with the branch off" : describe(video, shown);
    return element("option", { value: video.id }, text);
  }));
  if (others.some((video) => video.id === chosen)) byId("compare").value = chosen;
}

on("make", "submit", () =>
  atField(() => make(form.read(settings.has_physics), image.isTaken() ? image.chosen() : null)));
on("input_reference", "change", () => atField(image.show));
on("image-remove", "click", () => atField(async () => {
  await image.choose(null);
  byId("input_reference").focus();
}));
on("reset", "click", async () => {
  form.fill({});
  await image.choose(null);
});
on("key-form", "submit", () => {
  api.setKey(byId("key").value);
  byId("key").value = "";
  return start();
});
on("compare", "change", (event) =>
  look.compareWith(watch.videos().find((other) => other.id === event.target.value) ?? null));
on("branch-off", "click", async () => {
  const video = look.shownVideo();
  await make({ ...request(video), physics: { scale: 0 } }, await imageOf(video));
});
on("vary", "click", async () => {
  const video = look.shownVideo();
  form.fill(request(video));
  await image.choose(await imageOf(video));
  byId("prompt").focus();
});
on("phenomenon", "change", async () => {
  look.draw();
  await maps.choose();
  look.draw();
});
on("download", "click", async () => {
  const { id } = look.shownVideo();
  save(await api.content(id, "video"), `${id}.mp4`);
});
on("recipe", "click", async () => {
  const video = look.shownVideo();
  save(new Blob([await recipe(video, await imageOf(video))]), `${video.id}.json`);
});
on("link", "click", async () => {
  const video = look.shownVideo(), url = link(video);
  try {
    await navigator.clipboard.writeText(url);
    byId("said").textContent = video.image ? "Copied; whoever opens it must choose the image again." : "Copied.";
  } catch {
    history.replaceState(null, "", url);
    byId("said").textContent = "This browser does not let a page copy; the link stands in its address bar.";
  }
});
// A picture that is dropped or pasted anywhere: the browser would leave the page for it, or do nothing.
for (const event of ["dragover", "drop", "paste"]) {
  document.addEventListener(event, (happened) => {
    const { types, files } = happened.dataTransfer ?? happened.clipboardData;
    if (!types.includes("Files")) return;
    happened.preventDefault();
    if (event === "dragover") return;
    if (settings === null) complain(new Error("The server has not said yet whether it takes an image; give it again then."));
    else if (!image.isTaken()) complain(new Error("Videos are made from text alone here; an image is not taken."));
    else if (files.length !== 1) form.showError(image.wrong(`These are ${files.length} files; give one image.`));
    else atField(() => image.choose(files[0])).catch(complain);
  });
}
window.addEventListener("hashchange", () => {
  if (settings === null) return;
  try {
    fillFromLink();
  } catch (error) {
    complain(error);
  }
});

watch.watch({
  onLook: show,
  onError: complain,
  onChange: (video, before) => {
    if (before !== undefined) byId("announce").textContent = `${video.prompt}: ${video.status}`;
    offerComparisons();
  },
});
start().catch(complain);
keepFresh();
