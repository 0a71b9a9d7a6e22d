// The form "Make": what the server allows and takes by default, the user's fields, errors at their field.

import { element } from "./dom.js";

const form = document.getElementById("make");
const general = document.getElementById("make-error");
const NOT_FIELDS = new Set(["model", "image", "physics.return_maps"]);
const NUMBERS = new Set(["seed", "num_inference_steps", "guidance_scale", "fps"]);
let defaults = {};
// Names of fields that hold what the user put there; the settings may arrive after the first words.
const touched = new Set();
form.addEventListener("input", (event) => touched.add(event.target.name));
export const isTouched = () => touched.size > 0;

export function build(settings) {
  defaults = settings.defaults;
  const hints = {
    seconds: `at most ${settings.max_seconds}`,
    size: `WIDTHxHEIGHT in steps of ${settings.width_multiple}x${settings.height_multiple}, `
      + `at most ${settings.max_pixels} pixels in all`,
  };
  const { "physics.strength": strengths, ...ranges } = settings.ranges;
  for (const [name, [low, high]] of Object.entries(ranges)) hints[name] = `${low} to ${high}`;
  if (strengths) document.getElementById("strengths-hint").textContent = `${strengths.join(" to ")}; 1 leaves it as it is`;
  for (const [name, text] of Object.entries(hints)) hint(name, text);
  const examples = document.getElementById("examples");
  examples.hidden = settings.examples.length === 0;
  examples.replaceChildren(...settings.examples.map((prompt) => {
    const button = element("button", { type: "button" }, prompt);
    button.addEventListener("click", () => {
      form.elements.prompt.value = prompt;
      touched.add("prompt");
    });
    return button;
  }));
  document.getElementById("physics").hidden = !settings.has_physics;
  document.getElementById("strengths").replaceChildren(...settings.phenomena.map((phenomenon) => {
    const name = `physics.strength.${phenomenon}`;
    return element("div", {}, element("label", { for: name }, phenomenon),
      element("input", { id: name, name, inputmode: "decimal", value: "1" }));
  }));
  for (const field of form.elements) if (!touched.has(field.name)) put(field, {});
  form.querySelector(".primary").disabled = false;
}

function hint(name, text) {
  const field = form.elements[name];
  const id = `${name}-hint`;
  document.getElementById(id)?.remove();
  field.after(element("small", { id }, text));
  field.setAttribute("aria-describedby", id);
}

// Fills the form with a request; what it does not say is the server's default. Returns what the form has no field for.
export function fill(request) {
  touched.clear();
  for (const field of form.elements) put(field, request);
  clearErrors();
  return paths(request).filter((path) => !form.elements[path] && !NOT_FIELDS.has(path));
}

const paths = (value, path = "") => (value instanceof Object
  ? Object.entries(value).flatMap(([key, inner]) => paths(inner, path ? `${path}.${key}` : key)) : [path]);

function put(field, request) {
  if (!field.name || field.type === "file") return;
  const given = value(request, field.name);
  if (given !== undefined) touched.add(field.name);
  if (field.type === "checkbox") field.checked = Boolean(given);
  else field.value = given ?? defaults[field.name] ?? (field.name.startsWith("physics.") ? 1 : "");
}

function value(request, name) {
  if (!name.startsWith("physics.")) return request[name];
  const [, key, ...phenomenon] = name.split(".");
  return key === "strength" ? request.physics?.strength?.[phenomenon.join(".")] : request.physics?.[key];
}

// The request that the form describes, without its image. Numbers that are none go as they are: the server says what is wrong.
// A field left blank is the server's default, but a negative prompt left blank is an empty one: the form showed the default.
export function read(hasPhysics) {
  const request = {};
  for (const field of form.elements) {
    const text = field.value?.trim();
    if (!field.name || field.type === "file" || field.name.startsWith("physics.")) continue;
    if (text === "" && field.name !== "negative_prompt") continue;
    request[field.name] = NUMBERS.has(field.name) ? number(text) : text;
  }
  if (!hasPhysics) return request;
  const physics = { strength: {} };
  for (const field of form.elements) {
    const [section, key, ...phenomenon] = field.name?.split(".") ?? [];
    if (section !== "physics") continue;
    if (field.type === "checkbox") physics[key] = field.checked;
    else if (key !== "strength") physics[key] = number(field.value);
    else if (number(field.value) !== 1) physics.strength[phenomenon.join(".")] = number(field.value);
  }
  physics.return_maps = physics.scale !== 0;
  return { ...request, physics };
}

const number = (text) => (text.trim() === "" || Number.isNaN(Number(text)) ? text : Number(text));

export function showError(error) {
  clearErrors();
  const field = error.param && (form.elements[error.param] ?? null);
  if (!field) {
    general.textContent = error.message;
    return;
  }
  const id = `${error.param}-error`;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-errormessage", id);
  field.after(element("p", { id, class: "error", role: "alert" }, error.message));
  field.closest("details")?.setAttribute("open", "");
  field.focus();
}

export function clearErrors() {
  general.textContent = "";
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
  for (const message of form.querySelectorAll(".error:not(#make-error)")) message.remove();
}
