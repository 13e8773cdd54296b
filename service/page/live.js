/** The view that is on air: a picture that speaks what the microphone hears or what is typed. */

import { json, ServerError, told, upload } from "./api.js";
import { complain, FileField, kindOf, seedIn } from "./field.js";
import { Microphone } from "./microphone.js";
import { LivePlayer } from "./player.js";
import { known, number, onLanguage, t } from "./words.js";

const KEPT = "avatard.session";
const LOOK_MS = 1000;
const OVER = new Set(["closed", "failed"]);

const $ = (id) => document.getElementById(id);

/** onAir(is): whether this page has somebody on air, for whoever shows it elsewhere. */
export class LiveView {
  constructor(onAir) {
    this.onAir = onAir;
    this.id = null;
    this.status = null;
    this.frames = [];
    this.micState = "off";
    this.turn = 0;
    this.saying = Promise.resolve();
    const complaint = { onComplaint: (message) => complain($("live-complaint"), message) };
    this.image = new FileField($("live-image"), "image", { ...complaint, onChange: () => complain($("live-complaint")) });
    $("live-form").addEventListener("submit", (event) => this.asked(event, () => (this.id ? this.change() : this.open())));
    $("live-say").addEventListener("submit", (event) => this.asked(event, () => this.speak()));
    $("live-output-form").addEventListener("submit", (event) => this.asked(event, () => this.addOutput()));
    $("live-text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) this.asked(event, () => this.speak());
    });
    $("live-mic").addEventListener("click", () => (this.microphone ? this.microphone.stop() : this.listen()));
    $("live-interrupt").addEventListener("click", () => this.interrupt());
    $("live-sound").addEventListener("click", () => this.mute(!$("live-video").muted));
    $("live-end").addEventListener("click", () => this.end());
    $("live-tap").addEventListener("click", () => this.player?.play());
    document.addEventListener("keydown", (event) => {
      const busy = document.querySelector("dialog[open]") || event.isComposing || $("live").hidden;
      if (event.key === "Escape" && this.id && !busy) this.interrupt();
    });
    document.addEventListener("visibilitychange", () => this.stayAwake());
    onLanguage(() => this.draw());
    const kept = remembered();
    if (kept) this.enter(kept);
    else this.draw();
    this.timer = setInterval(() => this.look(), LOOK_MS);
  }

  take(file) {
    if (kindOf(file) === "image") this.image.take(file);
    else complain($("live-complaint"), t("file.unknown", { name: file.name }));
  }

  /** The view is seen: show who is on air already. */
  enterView() {
    this.look();
  }

  /** Do what a form asks for, once at a time, and say under it why not. */
  async asked(event, does) {
    event.preventDefault();
    const form = event.currentTarget.closest("form");
    const button = form.querySelector("[type=submit]");
    const complaint = form.querySelector(".notice.error") ?? $("live-note");
    if (button.disabled) return;
    button.disabled = true;
    try {
      if (complaint !== $("live-note")) complain(complaint);
      await does();
    } catch (error) {
      if (complaint === $("live-note")) this.note(told(error));
      else complain(complaint, told(error));
    } finally {
      button.disabled = false;
    }
  }

  async open() {
    const seed = seedIn($("live-seed"));
    const command = {};
    if (seed !== null) command.seed = seed;
    if ($("live-prompt").value.trim()) command.prompt = $("live-prompt").value.trim();
    this.stage("opening");
    try {
      if (this.image.file) command.image = await this.sent();
      const status = await json("POST", "v1/sessions", command);
      this.enter(status.id, status);
    } catch (error) {
      this.stage("off");
      throw error;
    }
  }

  async change() {
    const command = {};
    if (this.image.file) command.image = await this.sent();
    if ($("live-prompt").value.trim()) command.prompt = $("live-prompt").value.trim();
    await this.ask("POST", "set", command);
    this.note(t("live.changed"));
    this.image.clear();
  }

  async sent() {
    const answer = await upload(this.image.file, "image", () => {});
    return { upload: answer.upload };
  }

  /** A session is on air, ours or somebody's: watch it, and steer it. */
  enter(id, status = null) {
    Object.assign(this, { id, status, frames: [], wasLost: false });
    remember(id);
    this.image.clear();
    this.mute(false);
    this.player = new LivePlayer($("live-video"), $("live-held"), this.path(), (state) => this.playerSays(state));
    this.player.start();
    this.stage("on");
    this.onAir(true);
    this.stayAwake();
    this.look();
  }

  /** It is over, or no longer ours. */
  leave(message) {
    this.microphone?.stop();
    this.player?.stop();
    Object.assign(this, { id: null, status: null, player: null, microphone: null });
    remember(null);
    this.stage("off");
    this.note(message);
    this.onAir(false);
    this.awake?.release().catch(() => {});
    this.awake = null;
    this.look();
  }

  async end() {
    $("live-end").disabled = true;
    try {
      await json("DELETE", this.path());
      this.leave(t("live.ended"));
    } catch (error) {
      if (error.status === 404) this.leave(t("live.ended"));
      else this.note(told(error));
    } finally {
      $("live-end").disabled = false;
    }
  }

  async listen() {
    const microphone = new Microphone(this.path(), {
      tell: (state) => this.micSays(microphone, state),
      hear: (peak) => this.loudness(peak),
      complain: (message) => this.note(message),
    });
    this.microphone = microphone;
    try {
      await microphone.start();
      this.mute(true);
      this.note(t("mic.muted"));
    } catch (error) {
      this.note(told(error));
    }
  }

  /**
   * The server answers when the text has become sound, which may take as long as it is; one can type on meanwhile.
   * What was typed before an interruption and has not been sent by then is not said.
   */
  async speak() {
    const text = $("live-text").value.trim();
    if (!text) return;
    $("live-text").value = "";
    this.note(t("say.told"));
    const interrupt = $("live-over").checked;
    if (interrupt) this.forgetTexts();
    const turn = this.turn;
    const say = () => (turn === this.turn ? this.ask("POST", "say", { text, interrupt }) : null);
    this.saying = this.saying.then(say).catch((error) => {
      $("live-text").value ||= text;
      this.note(told(error));
    });
  }

  forgetTexts() {
    this.turn++;
    this.saying = Promise.resolve();
  }

  async interrupt() {
    this.forgetTexts();
    try {
      const told = await this.ask("POST", "interrupt");
      const dropped = told?.dropped_s;
      this.note(dropped === undefined ? t("interrupt.plain") : t("interrupt.told", { seconds: number(dropped, 1) }));
    } catch (error) {
      this.note(told(error));
    }
  }

  async addOutput() {
    const [server, key] = [$("live-server").value.trim(), $("live-key").value.trim()];
    if (!server) throw new Error(t("outputs.missing"));
    await this.ask("POST", "outputs", { target: key ? `${server.replace(/\/+$/, "")}/${key}` : server });
    // Not shown again, here or anywhere: the server names the output without its key.
    $("live-key").value = $("live-server").value = "";
    await this.look();
  }

  async removeOutput(name) {
    try {
      await this.ask("DELETE", `outputs/${encodeURIComponent(name)}`);
      await this.look();
    } catch (error) {
      complain($("live-output-complaint"), told(error));
    }
  }

  ask(method, what, body) {
    return json(method, `${this.path()}/${what}`, body);
  }

  path() {
    return `v1/sessions/${encodeURIComponent(this.id)}`;
  }

  /** How it stands now; every second, while somebody looks. */
  async look() {
    if ($("live").hidden && !this.id) return;
    if (this.looking || document.visibilityState === "hidden") return;
    this.looking = true;
    const id = this.id;
    try {
      if (id) {
        const status = await json("GET", this.path());
        if (this.id !== id) return;
        if (OVER.has(status.state)) return this.leave(status.error ?? t("live.ended"));
        this.heard(status);
      } else {
        const answer = await json("GET", "v1/sessions");
        if (!this.id) this.drawOthers(answer.sessions ?? []);
      }
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      // Of one that was on air while we looked, the server says why it is over.
      if (id && this.id === id && error.status === 404) this.leave(this.status ? told(error) : t("live.ended"));
    } finally {
      this.looking = false;
    }
  }

  heard(status) {
    this.status = status;
    this.frames.push([performance.now(), status.frames]);
    if (this.frames.length > 6) this.frames.shift();
    this.draw();
  }

  /** Frames per second of the last seconds; null before there are two looks. */
  fps() {
    const [first, last] = [this.frames[0], this.frames.at(-1)];
    return this.frames.length > 1 ? ((last[1] - first[1]) / (last[0] - first[0])) * 1000 : null;
  }

  playerSays(state) {
    if (state === "lost" && this.status?.on_air) {
      this.wasLost = true;
      this.note(t("live.lost"));
    }
    if (state === "playing" && this.wasLost) {
      this.wasLost = false;
      this.note(t("live.back"));
    }
    this.draw();
  }

  micSays(microphone, state) {
    if (state === "off" && this.microphone === microphone) {
      this.microphone = null;
      if ($("live-note").textContent === t("mic.muted")) this.note("");
      this.mute(false);
      this.loudness(0);
    }
    this.micState = state;
    this.drawControls();
  }

  loudness(peak) {
    const meter = $("live-level");
    meter.value = Math.max(peak, meter.value * 0.9);
  }

  mute(muted) {
    $("live-video").muted = muted;
    this.drawControls();
  }

  note(message) {
    $("live-note").textContent = message;
  }

  stage(state) {
    $("live").dataset.state = state;
    this.draw();
  }

  draw() {
    const state = $("live").dataset.state;
    const on = state === "on";
    for (const element of document.querySelectorAll("#live .on-air")) element.hidden = !on;
    $("live-controls").hidden = !on;
    $("live-empty").hidden = on;
    $("live-empty-text").textContent = t(state === "opening" ? "live.opening" : "live.empty");
    $("live-go").textContent = t(on ? "live.change" : "live.go");
    $("live-go").classList.toggle("quiet", on);
    $("live-go").classList.toggle("main", !on);
    $("live-image-hint").textContent = t(on ? "picture.keep" : "picture.hint");
    $("live-seed-row").hidden = on;
    this.drawControls();
    $("live-running").hidden = on || !$("live-sessions").children.length;
    if (!on) {
      $("live-badge").hidden = $("live-veil").hidden = $("live-tap").hidden = true;
      return;
    }
    this.drawVeil();
    this.drawBadge();
    this.drawFigures();
    this.drawOutputs(this.status?.outputs ?? []);
  }

  drawControls() {
    $("live-mic").setAttribute("aria-pressed", String(this.micState !== "off"));
    $("live-mic-text").textContent = t({ asking: "mic.asking", lost: "mic.lost" }[this.micState] ?? "mic");
    $("live-sound").setAttribute("aria-pressed", String(!$("live-video").muted));
  }

  /** What lies over the picture while there is none. */
  drawVeil() {
    const words = { connecting: "live.opening", waiting: "live.waiting", lost: "live.lost", cannot: "live.cannot" };
    const { state } = this.player;
    const opening = this.status?.on_air === false && state !== "cannot";
    const word = opening ? "live.opening" : words[state];
    $("live-tap").hidden = state !== "blocked";
    $("live-veil").hidden = word === undefined;
    if (word && $("live-veil").textContent !== t(word)) $("live-veil").textContent = t(word);
  }

  drawBadge() {
    const { status } = this;
    const shown = Boolean(status?.on_air);
    $("live-badge").hidden = !shown;
    if (!shown) return;
    const slow = status.load > 1;
    $("live-badge").dataset.tone = slow ? "slow" : status.speaking ? "speaking" : "on";
    $("live-badge").textContent = t(slow ? "live.slow" : status.speaking ? "live.speaking" : "live.on");
  }

  drawFigures() {
    const { status } = this;
    const figures = [];
    const add = (word, text, tone = "") => figures.push([word, text, tone]);
    const fps = this.fps();
    if (fps !== null) add("health.fps", number(fps, 1));
    const behind = this.player?.behind_s ?? null;
    if (behind !== null) add("health.behind", `${number(behind, 2)} s`, behind > 2 ? "bad" : "");
    if (status?.on_air) {
      const dropped = status.held + (status.outputs ?? []).reduce((sum, lane) => sum + (lane.dropped_frames ?? 0), 0);
      add("health.ahead", `${number(status.ahead_s, 2)} s`);
      add("health.skew", `${number(status.skew_s * 1000, 1)} ms`, Math.abs(status.skew_s) > 0.04 ? "bad" : "");
      add("health.drops", number(dropped), dropped ? "poor" : "");
      if (status.load !== null) add("health.load", `${number(status.load * 100)} %`, status.load > 1 ? "bad" : "");
    }
    if (status?.engine) add("health.engine", known(`engine.${status.engine}`, status.engine), status.engine === "ready" ? "" : "bad");
    if (status?.gpu) add("health.gpu", String(status.gpu));
    if (status?.viewers !== undefined) add("health.viewers", number(status.viewers));
    $("live-figures").replaceChildren(
      ...figures.map(([word, text, tone]) => {
        const [pair, name, value] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
        name.textContent = t(word);
        value.textContent = text;
        if (tone) value.dataset.tone = tone;
        value.dataset.figure = word.split(".")[1];
        pair.append(name, value);
        return pair;
      }),
    );
  }

  drawOutputs(outputs) {
    const rows = outputs.map(({ name, state, last_error: why }) => {
      const words = [known(`lane.${state}`, state), state === "sending" ? "" : why].filter(Boolean).join(": ");
      return row(name, words, [[`remove ${name}`, t("outputs.remove", { name }), "×", () => this.removeOutput(name)]]);
    });
    replace($("live-lanes"), rows);
  }

  drawOthers(sessions) {
    const rows = sessions
      .filter(({ state }) => !OVER.has(state))
      .map(({ id, speaking }) => row(id, t(speaking ? "live.speaking" : "live.on"), [[`watch ${id}`, `${t("live.watch")}: ${id}`, t("live.watch"), () => this.enter(id)]]));
    replace($("live-sessions"), rows);
    $("live-running").hidden = !rows.length;
  }

  /** A phone that dims its screen also stops the microphone. */
  async stayAwake() {
    if (!this.id || document.visibilityState !== "visible" || (this.awake && !this.awake.released)) return;
    this.awake = await navigator.wakeLock?.request("screen").catch(() => null);
  }
}

function row(name, words, acts) {
  const made = document.createElement("li");
  const [title, line] = [document.createElement("b"), document.createElement("span")];
  title.textContent = name;
  line.textContent = words;
  const text = document.createElement("div");
  text.append(title, line);
  made.append(text);
  for (const [act, label, sign, does] of acts) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = sign === "×" ? "plain icon" : "quiet";
    button.dataset.act = act;
    button.setAttribute("aria-label", label);
    button.textContent = sign;
    button.addEventListener("click", does);
    made.append(button);
  }
  return made;
}

/** Replace rows only when they say something else, so that a finger or a reader on them is not disturbed. */
function replace(list, rows) {
  const same = rows.length === list.children.length && rows.every((row, index) => row.isEqualNode(list.children[index]));
  if (!same) list.replaceChildren(...rows);
}

function remembered() {
  try {
    return sessionStorage.getItem(KEPT);
  } catch {
    return null;
  }
}

function remember(id) {
  try {
    if (id === null) sessionStorage.removeItem(KEPT);
    else sessionStorage.setItem(KEPT, id);
  } catch {
    // Storage may be forbidden; a reload then finds the session among those that are on air.
  }
}
