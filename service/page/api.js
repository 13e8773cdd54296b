/** Talking to the daemon: one way to ask, to upload, to listen and to open a socket; the token is added here alone. */

import { t } from "./words.js";

const TOKEN = "avatard.token";
const SILENCE_MS = 60_000;

let held = null;
let asking = null;
let declined = false;
let ask = async () => null;

/** What the server said when it did not do what it was asked; `status` 0: it did not answer. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** `dialog(wrong)` asks the person for a token and gives it, or null. */
export function onToken(dialog) {
  ask = dialog;
}

/** An address of the daemon's, below wherever the page itself lies. */
export function address(path) {
  return new URL(path, document.baseURI).href;
}

export function hasToken() {
  return token() !== null;
}

/** A response with an answer of 2xx. Asks for a token once the server wants one. Raises: ServerError. */
export async function call(method, path, { body, headers = {}, signal } = {}) {
  for (;;) {
    const used = token();
    const authorised = used === null ? headers : { ...headers, Authorization: `Bearer ${used}` };
    let response;
    try {
      response = await fetch(address(path), { method, body, headers: authorised, signal, cache: "no-store", credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, t("error.unreachable"));
    }
    if (response.ok) return response;
    if (response.status === 401 && (await newToken(used))) continue;
    throw new ServerError(response.status, complaint(response.status, await response.text().catch(() => "")));
  }
}

/** The answer as JSON; null when there is none. Raises: ServerError. */
export async function json(method, path, body, signal) {
  const sent = body === undefined ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  const response = await call(method, path, { ...sent, signal });
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

/** Send a file, tell how much of it has left (0 to 1), and give what the server calls it. Raises: ServerError. */
export async function upload(file, kind, onProgress, signal) {
  for (;;) {
    const used = token();
    const { status, text } = await send(file, kind, used, onProgress, signal);
    if (status >= 200 && status < 300) return JSON.parse(text);
    if (status === 401 && (await newToken(used))) continue;
    throw new ServerError(status, status ? complaint(status, text) : t("error.unreachable"));
  }
}

/** Server-sent events as {kind, body}, until the server ends them. Raises: ServerError. */
export async function* events(path, signal) {
  const silence = new AbortController();
  const stop = () => silence.abort();
  signal?.addEventListener("abort", stop);
  let timer = setTimeout(stop, SILENCE_MS);
  try {
    const response = await call("GET", path, { headers: { Accept: "text/event-stream" }, signal: silence.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(stop, SILENCE_MS);
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const event = parsed(block);
        if (event) yield event;
      }
    }
  } catch (error) {
    if (signal?.aborted || error instanceof ServerError) throw error;
    throw new ServerError(0, t("error.unreachable"));
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", stop);
    silence.abort();
  }
}

/** A WebSocket. A browser cannot add headers to one, so the token goes along as a protocol, never in the address. */
export function socket(path) {
  const url = new URL(path, document.baseURI);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const used = token();
  const opened = new WebSocket(url, used === null ? ["avatard"] : ["avatard", `bearer.${base64url(used)}`]);
  opened.binaryType = "arraybuffer";
  return opened;
}

/** The message of an error of any kind, for a person. */
export function told(error) {
  return error instanceof Error ? error.message : String(error);
}

function token() {
  try {
    return sessionStorage.getItem(TOKEN) ?? held;
  } catch {
    return held;
  }
}

function keep(value) {
  held = value;
  try {
    sessionStorage.setItem(TOKEN, value);
  } catch {
    // Storage may be forbidden; the token then lasts as long as the page.
  }
}

/**
 * Whether there is another token than `used` now. However many requests wait, the person is asked once; and once they
 * have said no, only again when they have just done something.
 */
async function newToken(used) {
  if (token() !== used) return true;
  if (declined && !navigator.userActivation?.isActive) return false;
  asking ??= ask(used !== null).finally(() => (asking = null));
  const given = await asking;
  declined = given === null;
  if (!declined) keep(given);
  return !declined;
}

function send(file, kind, used, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const query = new URLSearchParams({ kind, name: file.name.slice(-255) });
    request.open("POST", address(`v1/uploads?${query}`));
    if (used !== null) request.setRequestHeader("Authorization", `Bearer ${used}`);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onload = () => resolve({ status: request.status, text: request.responseText });
    request.onerror = () => resolve({ status: 0, text: "" });
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    signal?.addEventListener("abort", () => request.abort());
    request.send(file);
  });
}

function complaint(status, text) {
  try {
    const { detail } = JSON.parse(text);
    if (typeof detail === "string") return detail;
    if (Array.isArray(detail)) return detail.map(({ loc = [], msg }) => [loc.slice(1).join("."), msg].filter(Boolean).join(": ")).join("; ");
  } catch {
    // Something between us and the daemon has answered.
  }
  return t("error.status", { status });
}

function parsed(block) {
  let kind = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) kind = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  return data.length ? { kind, body: JSON.parse(data.join("\n")) } : null;
}

function base64url(text) {
  const bytes = String.fromCharCode(...new TextEncoder().encode(text));
  return btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}
