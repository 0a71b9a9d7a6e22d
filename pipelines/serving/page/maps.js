// The part of "Look" that says where each phenomenon acts: the map over the video, and bars.

import { physics } from "./api.js";
import { byId, element } from "./dom.js";
import { drawLayer, loadLayer } from "./film.js";

let video = null;           // the one that is shown, if it was made with maps
const layers = new Map();   // phenomenon -> the film of its map

export const load = async (of) => (of.physics?.return_maps ? (await physics(of.id)).maps : null);

// Begins with the map of what the prompt names; of several, with the first.
export async function show(of, maps) {
  video = maps && of;
  layers.clear();
  byId("maps").hidden = maps === null;
  byId("no-maps").hidden = maps !== null;
  if (maps === null) return;
  const means = Object.entries(maps).map(([name, map]) => [name, mean(map)]).sort((a, b) => b[1] - a[1]);
  const [named, others] = [true, false].map((is) => means.filter(([name]) => of.phenomena.includes(name) === is));
  byId("named").textContent = named.length
    ? `The prompt names ${named.map(([name]) => name).join(", ")}.`
    : "The prompt names no phenomenon that this model tells apart. Choose any to see its map.";
  const options = (means) => means.map(([name]) => element("option", { value: name }, name));
  const groups = [["The prompt names", named], ["Others", others]].filter(([, means]) => means.length);
  byId("phenomenon").replaceChildren(element("option", { value: "" }, "none"),
    ...groups.map(([label, means]) => element("optgroup", { label }, ...options(means))));
  byId("phenomenon").value = named[0]?.[0] ?? "";
  byId("bars").replaceChildren(...[...named, ...others].map(([name, value], place) =>
    element("li", place < named.length ? { class: "named" } : {}, element("span", {}, name),
      element("progress", { max: 1, value, "aria-label": name }), element("span", {}, value.toFixed(2)))));
  await choose();
}

// Gets the layer of the phenomenon that is chosen. Another may be chosen meanwhile; then this one lies ready.
export async function choose() {
  const of = video, phenomenon = byId("phenomenon").value;
  if (!phenomenon || layers.has(phenomenon)) return;
  const layer = await loadLayer(of, phenomenon);
  if (of === video) layers.set(phenomenon, layer);
}

export function lay(canvas, index) {
  const layer = video && layers.get(byId("phenomenon").value);
  if (layer) drawLayer(canvas, layer, index, Number(byId("opacity").value) / 100);
}

function mean(map) {
  const values = map.flat(2);
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
