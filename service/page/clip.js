/** The view that makes clips: a form, the clip being made or shown, and the last ones. */

import { address, call, events, hasToken, json, ServerError, told, upload } from "./api.js";
import { complain, FileField, kindOf, seedIn } from "./field.js";
import { duration, known, number, onLanguage, t } from "./words.js";

const KEPT = "avatard.clips";
const LAST = 12;
const THUMBNAIL = 96;
const RETRY_MS = 2000;
const LOOK_MS = 4000;
const ENDED = new Set(["completed", "failed", "cancelled"]);

const $ = (id) => document.getElementById(id);

export class ClipView {
  constructor() {
    this.shown = null;
    this.work = null;
    this.jobs = new Map();
    this.kept = read();
    const complaint = { onComplaint: (message) => complain($("clip-complaint"), message) };
    this.image = new FileField($("clip-image"), "image", { ...complaint, onChange: (file) => this.chose(file) });
    this.audio = new FileField($("clip-audio"), "audio", { ...complaint, onChange: () => this.listen() });
    $("clip-image-clear").addEventListener("click", () => this.image.clear());
    for (const radio of $("clip-form").elements.speech) radio.addEventListener("change", () => this.bySound(radio.value));
    $("clip-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.generate();
    });
    $("clip-cancel").addEventListener("click", () => this.cancel());
    $("clip-again").addEventListener("click", () => this.show(null));
    $("clip-download").addEventListener("click", (event) => this.download(event));
    $("clip-video").addEventListener("error", () => $("clip-video").hasAttribute("src") && this.unplayable());
    onLanguage(() => this.draw());
    this.show(this.kept[0]?.id ?? null);
    this.lookAround();
  }

  /** A file that was dropped anywhere on the page. */
  take(file) {
    if (kindOf(file) === "audio") {
      this.say("audio");
      this.audio.take(file);
    } else this.image.take(file);
  }

  chose(file) {
    complain($("clip-complaint"));
    $("clip-image-clear").hidden = file === null;
  }

  listen() {
    complain($("clip-complaint"));
    const player = $("clip-listen");
    player.hidden = this.audio.file === null;
    if (this.audio.url) player.src = this.audio.url;
    else player.removeAttribute("src");
  }

  say(how) {
    $("clip-form").elements.speech.value = how;
    this.bySound(how);
  }

  bySound(how) {
    $("clip-by-audio").hidden = how !== "audio";
    $("clip-by-text").hidden = $("clip-voice-row").hidden = how !== "text";
    complain($("clip-complaint"));
  }

  /** The command as the form stands, its files not sent yet. Raises: Error in words for a person. */
  order() {
    const order = { title: "", command: {}, image: this.image.file, audio: null };
    if ($("clip-form").elements.speech.value === "audio") {
      if (!this.audio.file) throw new Error(t("audio.missing"));
      order.audio = this.audio.file;
      order.title = this.audio.file.name;
    } else {
      const text = $("clip-text").value.trim();
      if (!text) throw new Error(t("text.missing"));
      order.command.text = text;
      order.title = text.slice(0, 60);
      if ($("clip-voice").value.trim()) order.command.voice = $("clip-voice").value.trim();
    }
    const seed = seedIn($("clip-seed"));
    if (seed !== null) order.command.seed = seed;
    if ($("clip-prompt").value.trim()) order.command.prompt = $("clip-prompt").value.trim();
    return order;
  }

  async generate() {
    if (this.work) return;
    const work = (this.work = new AbortController());
    const before = this.shown;
    try {
      complain($("clip-complaint"));
      const order = this.order();
      const thumbnail = this.image.file ? await small($("clip-image").querySelector("img")) : null;
      this.shown = null;
      $("clip-go").disabled = true;
      $("clip-stage").scrollIntoView({ block: "nearest" });
      const { command } = order;
      const files = [["image", order.image], ["audio", order.audio]].filter(([, file]) => file);
      const total = files.reduce((sum, [, file]) => sum + file.size, 0);
      let sent = 0;
      for (const [kind, file] of files) {
        this.working(t("clip.upload", { percent: 0 }), 0, this.image.url);
        const answer = await upload(file, kind, (part) => {
          const whole = (sent + part * file.size) / total;
          this.working(t("clip.upload", { percent: Math.floor(whole * 100) }), whole);
        }, work.signal);
        command[kind] = { upload: answer.upload };
        sent += file.size;
      }
      this.working(t("clip.submit"), null, this.image.url);
      const job = await json("POST", "v1/jobs", command, work.signal);
      this.kept = [{ id: job.id, title: order.title, at: Date.now(), thumbnail }, ...this.kept].slice(0, LAST);
      write(this.kept);
      this.jobs.set(job.id, job);
      this.show(job.id);
    } catch (error) {
      this.work = null;
      this.show(before);
      if (error.name !== "AbortError") {
        complain($("clip-complaint"), told(error));
        $("clip-complaint").scrollIntoView({ block: "nearest" });
      }
    } finally {
      this.work = null;
      $("clip-go").disabled = false;
    }
  }

  async cancel() {
    if (this.work) return this.work.abort();
    const id = this.shown;
    try {
      const job = await json("DELETE", pathOf(id));
      if (job) this.heard(id, job);
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.tell(told(error));
    }
  }

  /** Keep up with the clip that is shown until it has ended, through any loss of the connection. */
  async follow(id) {
    this.following?.abort();
    const { signal } = (this.following = new AbortController());
    while (id !== null && !this.ended(id) && !signal.aborted) {
      try {
        for await (const { kind, body } of events(`${pathOf(id)}/events`, signal)) {
          this.heard(id, { ...body, state: kind === "progress" ? "running" : kind });
          if (this.ended(id)) break;
        }
        await this.ask(id);
      } catch (error) {
        if (signal.aborted) return;
        if (!(error instanceof ServerError)) throw error;
        if (error.status === 404) return this.forget(id);
        if (error.status === 401) return;
        this.tell(told(error));
      }
      if (!this.ended(id)) await pause(RETRY_MS);
    }
  }

  /** The others are asked for now and then: a browser has six connections to a server, and each stream takes one. */
  async lookAround() {
    for (;;) {
      for (const { id } of [...this.kept]) {
        if (id !== this.shown && !this.ended(id)) await this.ask(id).catch((error) => error.status === 404 && this.forget(id));
      }
      await pause(LOOK_MS);
    }
  }

  async ask(id) {
    this.heard(id, await json("GET", pathOf(id)));
  }

  ended(id) {
    return ENDED.has(this.jobs.get(id)?.state);
  }

  heard(id, news) {
    this.jobs.set(id, { ...this.jobs.get(id), ...news, id });
    this.draw();
  }

  forget(id) {
    this.kept = this.kept.filter((one) => one.id !== id);
    write(this.kept);
    this.jobs.delete(id);
    if (this.shown === id) this.show(null);
    else this.draw();
  }

  show(id) {
    this.shown = id;
    this.started = null;
    this.playingId = null;
    $("clip-video").pause();
    this.draw();
    this.follow(id);
  }

  draw() {
    this.drawList();
    if (this.work && this.shown === null) return;
    const job = this.jobs.get(this.shown);
    if (this.shown === null) return this.stage("empty");
    if (!job) return this.working(t("job.unknown"), null, this.thumbnail());
    if (job.state === "completed") return this.done(job);
    if (job.state === "failed" || job.state === "cancelled") {
      $("clip-error").textContent = job.state === "failed" ? job.error ?? t("job.failed") : t("job.cancelled");
      return this.stage("failed");
    }
    this.progress(job);
  }

  stage(state) {
    $("clip-stage").dataset.state = state;
    for (const one of ["empty", "working", "failed", "done"]) $(`clip-${one}`).hidden = one !== state;
    if (state !== "done" && $("clip-video").hasAttribute("src")) {
      $("clip-video").removeAttribute("src");
      $("clip-video").load();
    }
    if (state === "failed") this.tell($("clip-error").textContent);
  }

  progress(job) {
    const { frames = 0, total_frames: total } = job;
    const running = job.state === "running";
    if (running && !this.started) this.started = { at: performance.now(), frames };
    const part = running && total ? Math.min(1, frames / total) : null;
    this.working(t(`job.${job.state}`), part, this.thumbnail());
    const words = [];
    if (running && total) words.push(t("clip.frames", { done: number(frames), total: number(total) }));
    else if (running && frames) words.push(t("clip.pieces", { done: number(frames) }));
    const rate = this.started ? (frames - this.started.frames) / (performance.now() - this.started.at) : 0;
    const left_s = rate > 0 && total ? (total - frames) / rate / 1000 : 0;
    if (left_s >= 1) words.push(t("clip.left", { time: duration(left_s) }));
    $("clip-working-left").textContent = words.join(" · ");
    if (part !== null) this.tellPart(part);
  }

  /** Work that is not done; part: 0 to 1, null where nobody knows. */
  working(what, part, picture) {
    this.stage("working");
    if ($("clip-working-what").textContent !== what) $("clip-working-what").textContent = what;
    $("clip-working-left").textContent = "";
    if (part === null) $("clip-progress").removeAttribute("value");
    else $("clip-progress").value = part;
    if (picture === undefined) return;
    $("clip-working-picture").hidden = !picture;
    if (picture && $("clip-working-picture").src !== picture) $("clip-working-picture").src = picture;
  }

  async done(job) {
    this.stage("done");
    const { width, height, seconds } = job.result ?? {};
    $("clip-facts").textContent = width ? t("clip.facts", { time: duration(seconds), width, height }) : "";
    $("clip-download").setAttribute("download", `${job.id}.mp4`);
    $("clip-download").href = address(`${pathOf(job.id)}/result`);
    if (this.playingId === job.id) return;
    this.playingId = job.id;
    const url = hasToken() ? await this.loaded(job.id) : address(`${pathOf(job.id)}/result`);
    if (!url || this.shown !== job.id) return;
    $("clip-video").src = url;
    this.tell(t("job.completed"));
  }

  /** A video element cannot send a token, so with one the file is loaded first. */
  async loaded(id) {
    if (this.result?.id === id) return this.result.url;
    try {
      const blob = await (await call("GET", `${pathOf(id)}/result`)).blob();
      if (this.result) URL.revokeObjectURL(this.result.url);
      this.result = { id, url: URL.createObjectURL(blob) };
      return this.result.url;
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      $("clip-facts").textContent = told(error);
      return null;
    }
  }

  async download(event) {
    if (!hasToken()) return;
    const link = event.currentTarget;
    if (link.href.startsWith("blob:")) return;
    event.preventDefault();
    const url = await this.loaded(this.shown);
    if (!url) return;
    link.href = url;
    link.click();
  }

  unplayable() {
    if ($("clip-stage").dataset.state === "done") $("clip-facts").textContent = t("job.cannot");
  }

  /** To a screen reader, no oftener than each tenth. */
  tellPart(part) {
    const tenth = Math.floor(part * 10);
    if (tenth === this.tenth) return;
    this.tenth = tenth;
    this.tell(t("clip.told", { what: t("job.running"), percent: tenth * 10 }));
  }

  tell(message) {
    $("clip-told").textContent = message;
  }

  thumbnail() {
    return this.kept.find((one) => one.id === this.shown)?.thumbnail ?? null;
  }

  drawList() {
    $("clip-last-empty").hidden = this.kept.length > 0;
    const list = $("clip-jobs");
    const rows = this.kept.map((one) => this.row(one));
    const focused = document.activeElement?.dataset?.act;
    list.replaceChildren(...rows);
    if (focused) list.querySelector(`[data-act="${CSS.escape(focused)}"]`)?.focus();
  }

  row({ id, title, at, thumbnail }) {
    const job = this.jobs.get(id);
    const state = job ? known(`job.${job.state}`, job.state) : t("job.unknown");
    const row = document.createElement("li");
    row.classList.toggle("current", id === this.shown);
    row.dataset.state = job?.state ?? "unknown";
    const open = button(`open ${id}`, t("job.open", { title, state }), () => this.show(id));
    open.className = "job";
    const picture = document.createElement(thumbnail ? "img" : "span");
    picture.className = "thumbnail";
    if (thumbnail) Object.assign(picture, { src: thumbnail, alt: "" });
    const words = document.createElement("span");
    words.className = "job-words";
    const [name, line] = [document.createElement("b"), document.createElement("span")];
    name.textContent = title;
    line.textContent = [state, this.partOf(job), clock(at)].filter(Boolean).join(" · ");
    words.append(name, line);
    open.append(picture, words);
    const forget = button(`forget ${id}`, t("job.forget", { title }), () => this.forget(id));
    forget.className = "plain icon";
    forget.textContent = "×";
    row.append(open, forget);
    return row;
  }

  partOf(job) {
    if (job?.state === "running" && job.total_frames) return `${Math.floor((100 * job.frames) / job.total_frames)} %`;
    return job?.state === "completed" && job.result ? duration(job.result.seconds) : "";
  }
}

function pathOf(id) {
  return `v1/jobs/${encodeURIComponent(id)}`;
}

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

function button(act, label, does) {
  const made = document.createElement("button");
  made.type = "button";
  made.dataset.act = act;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", does);
  return made;
}

function clock(at) {
  const moment = new Date(at);
  const today = moment.toDateString() === new Date().toDateString();
  return moment.toLocaleString(document.documentElement.lang, today ? { timeStyle: "short" } : { dateStyle: "short" });
}

/** A small square of a picture, as a data: address. */
async function small(picture) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = THUMBNAIL;
  const side = Math.min(picture.naturalWidth, picture.naturalHeight);
  const [x, y] = [(picture.naturalWidth - side) / 2, (picture.naturalHeight - side) / 4];
  canvas.getContext("2d").drawImage(picture, x, y, side, side, 0, 0, THUMBNAIL, THUMBNAIL);
  return canvas.toDataURL("image/jpeg", 0.8);
}

function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) ?? "[]");
    return Array.isArray(kept) ? kept.filter((one) => typeof one?.id === "string").slice(0, LAST) : [];
  } catch {
    return [];
  }
}

function write(kept) {
  try {
    localStorage.setItem(KEPT, JSON.stringify(kept));
  } catch {
    // Storage is full or forbidden; the list then lasts as long as the page.
  }
}
