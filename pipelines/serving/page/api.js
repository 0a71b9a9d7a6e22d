// The public API, asked with the user's key. The key lives in this tab's session storage and in no URL.

const KEY = "prophy-key";
const RETRY_AFTER_MS = [500, 1000, 2000];

export class ApiError extends Error {
  constructor(status, { message, param, code }) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new ApiError(0, { message: "The server does not answer.", code: "unreachable" });
  }
  if (response.ok) return response;
  // Asked with a key that the user has changed meanwhile.
  if (response.status === 401 && key !== sessionStorage.getItem(KEY)) return ask(path, options);
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error ?? { message: `The server answers ${response.status}.` });
}

const json = async (path, options) => (await ask(path, options)).json();
const video = (id) => `v1/videos/${encodeURIComponent(id)}`;

export const settings = () => json("v1/settings");
export const metrics = async () => (await ask("metrics")).text();
export const list = (after) => json(`v1/videos?limit=20${after ? `&after=${encodeURIComponent(after)}` : ""}`);
export const remove = (id) => json(video(id), { method: "DELETE" });
export const physics = (id) => json(`${video(id)}/physics`);
export const content = async (id, variant) => (await ask(`${video(id)}/content?variant=${variant}`)).blob();

export const image = async (id, variant) => (await ask(`${video(id)}/input_reference?variant=${variant}`)).blob();

export const layer = async (id, phenomenon) =>
  (await ask(`${video(id)}/physics/overlay?variant=layer&phenomenon=${encodeURIComponent(phenomenon)}`)).blob();

const jsonBody = (fields) => ({ headers: { "content-type": "application/json" }, body: JSON.stringify(fields) });

function form(fields, image) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields))
    body.set(name, value instanceof Object ? JSON.stringify(value) : value);
  body.set("input_reference", image);
  return { headers: {}, body };
}

// Tried again where no answer came, or the server says that it cannot now: by its key it stays one video.
export async function create(fields, image) {
  const { headers, body } = image ? form(fields, image) : jsonBody(fields);
  const key = crypto.randomUUID?.() ?? String(Math.random());
  const options = { method: "POST", headers: { ...headers, "idempotency-key": key }, body };
  for (const waitMs of RETRY_AFTER_MS) {
    try {
      return await json("v1/videos", options);
    } catch (error) {
      if (error.status !== 0 && error.status !== 503) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, waitMs));
  }
  return json("v1/videos", options);
}

// A video, and the milliseconds after which the server wants to be asked again.
export async function retrieve(id) {
  const response = await ask(video(id));
  return [await response.json(), Number(response.headers.get("openai-poll-after-ms")) || 1000];
}
