// The list "Watch": videos, newest first; those that are not finished are asked after until they are.

import { image, list, remove, retrieve } from "./api.js";
import { byId, element } from "./dom.js";
import { draw } from "./image.js";
import { knobs } from "./recipe.js";

let known = new Map();      // id -> video, newest first
const begun = new Map();    // id -> [time, progress] when its progress was first seen
const polled = new Set();   // ids that are being asked after
const removed = new Set();  // ids that this tab deleted; a list that was under way still has them
let atEnd = true;           // whether the list was read to its end
let report = () => {};

export const videos = () => [...known.values()];

// `onChange(video, before)` is called with each video whose state is new, and as it was before, if it was known;
// `onLook(video)` when a user wants to see one.
export function watch({ onChange, onLook, onError }) {
  report = onChange;
  byId("videos").addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    const video = known.get(button?.closest("li")?.dataset.id);
    if (!video) return;
    try {
      if (button.name === "look") await onLook(video);
      else await forget(video);
    } catch (error) {
      onError(error);
    }
  });
  byId("more").addEventListener("click", () => older().catch(onError));
}

// The newest page. Another tab may have made or removed videos, so what is not on it any more goes.
// One that this tab made while the page was under way is not on it, and stays.
export async function refresh() {
  const before = new Set(known.keys());
  const page = await list();
  const listed = new Set(page.data.map((video) => video.id));
  const oldest = page.data.at(-1)?.created_at ?? Infinity;
  // After more new videos than a page holds, older ones would stand behind a gap.
  const follows = [...before].some((id) => listed.has(id));
  const others = videos().filter((video) => !listed.has(video.id));
  const older = others.filter((video) =>
    before.has(video.id) && page.has_more && follows && video.created_at <= oldest);
  page.data.forEach(add);
  const made = others.filter((video) => !before.has(video.id));
  const newest = page.data.map((video) => known.get(video.id)).filter(Boolean);
  known = new Map([...made, ...newest, ...older].map((video) => [video.id, video]));
  if (!page.has_more || !follows) atEnd = !page.has_more;
  render();
}

async function older() {
  const page = await list(videos().at(-1)?.id);
  atEnd = !page.has_more;
  page.data.forEach(add);
  render();
}

export function addNewest(video) {
  known = new Map([[video.id, video], ...known]);
  add(video);
  render();
}

function add(video) {
  const before = known.get(video.id);
  // A list that was long under way may say less than is known.
  if (removed.has(video.id) || (before && !unfinished(before) && unfinished(video))) return;
  known.set(video.id, video);
  if (video.status === "in_progress" && video.progress > 0 && !(begun.get(video.id)?.[1] <= video.progress))
    begun.set(video.id, [Date.now(), video.progress]);
  if (before?.status !== video.status) report(video, before);
  if (unfinished(video) && !polled.has(video.id)) poll(video.id);
}

const unfinished = (video) => video.status === "queued" || video.status === "in_progress";

async function poll(id) {
  polled.add(id);
  let wait = 500;
  while (known.has(id) && unfinished(known.get(id))) {
    await new Promise((resolve) => setTimeout(resolve, document.hidden ? 5 * wait : wait));
    try {
      const [video, next] = await retrieve(id);
      if (!known.has(id)) break;
      wait = next;
      add(video);
    } catch (error) {
      if (error.status === 404) known.delete(id);
      else wait = 5000;
    }
    render();
  }
  polled.delete(id);
}

async function forget(video) {
  await remove(video.id).catch((error) => { if (error.status !== 404) throw error; });
  removed.add(video.id);
  known.delete(video.id);
  render();
}

function render() {
  const sorted = videos();
  const rows = byId("videos"), old = new Map([...rows.children].map((row) => [row.dataset.id, row]));
  const wanted = sorted.map((video) => update(old.get(video.id) ?? row(video), video));
  // Rows that stay keep the keyboard's focus.
  for (const [id, gone] of old) if (!known.has(id)) gone.remove();
  wanted.forEach((item, place) => { if (rows.children[place] !== item) rows.insertBefore(item, rows.children[place] ?? null); });
  byId("no-videos").hidden = sorted.length > 0;
  byId("more").hidden = atEnd;
}

function row(video) {
  const item = element("li", {}, ...(video.image ? [beginning(video)] : []),
    element("p", { class: "prompt" }, video.prompt),
    element("p", { class: "state" }),
    element("progress", { max: 100, "aria-label": `Progress of: ${video.prompt}` }),
    element("div", { class: "buttons" },
      element("button", { type: "button", name: "look" }, "Look"),
      element("button", { type: "button", name: "forget" })));
  item.dataset.id = video.id;
  return item;
}

// What the video begins with; not there any more where the video failed or has expired.
function beginning(video) {
  const canvas = element("canvas", { class: "begins", role: "img", "aria-label": "The image that it begins with" });
  canvas.hidden = true;
  image(video.id, "preview").then((blob) => createImageBitmap(blob)).then((picture) => {
    draw(canvas, picture);
    canvas.hidden = false;
  }).catch(() => {});
  return canvas;
}

function update(item, video) {
  item.querySelector(".state").textContent = state(video);
  const progress = item.querySelector("progress");
  progress.hidden = !unfinished(video);
  progress.value = video.progress;
  item.querySelector("[name=look]").hidden = video.status !== "completed";
  item.querySelector("[name=forget]").textContent = unfinished(video) ? "Cancel" : "Delete";
  return item;
}

function state(video) {
  const from = video.image ? ["from an image"] : [];
  const shape = [`${video.seconds} s`, video.size, `seed ${video.seed}`, ...from, ...knobs(video)].join(", ");
  if (video.status === "queued") return `Queued, ${video.queue_position ? `${video.queue_position} before it` : "next"}; ${shape}`;
  if (video.status === "failed") return `Failed: ${video.error?.message}`;
  if (video.status === "completed") return `Completed in ${video.inference_time_s?.toFixed(1)} s; ${shape}`;
  const step = Math.round(video.progress / 100 * video.num_inference_steps);
  return `Step ${step} of ${video.num_inference_steps}${left(video)}; ${shape}`;
}

function left(video) {
  const [time, progress] = begun.get(video.id) ?? [];
  if (time === undefined || video.progress <= progress) return "";
  const seconds = (Date.now() - time) / 1000 * (100 - video.progress) / (video.progress - progress);
  return `, about ${Math.ceil(seconds)} s left`;
}
