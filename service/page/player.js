/** A live picture in a <video>: fragments of MP4 from a WebSocket, close behind what arrives, for as long as asked. */

import { address, call, hasToken, json, socket } from "./api.js";
import { LiveEdge } from "./edge.js";

const LOOK_MS = 50;
const QUIET_MS = 1500;
const SILENT_MS = 8000;
const KEEP_S = 8;
const WAITING_BYTES = 16e6;
const RETRY_MS = [300, 600, 1200, 2400, 4000];

const Source = globalThis.MediaSource ?? globalThis.ManagedMediaSource;

/**
 * Plays sessions/{id}/view, connected anew whenever it is lost.
 *
 * tell(state): "connecting", "waiting" (connected, no pictures), "playing", "lost" (tried again), "blocked" (the browser
 * wants a tap: call play()), "cannot". held: a canvas that shows the last picture while a new connection has none.
 */
export class LivePlayer {
  constructor(video, held, path, tell) {
    Object.assign(this, { video, held, path, tell });
    this.state = null;
    this.failures = 0;
    this.connection = null;
    this.edge = new LiveEdge();
    this.playing = () => this.shown();
    this.stalled = () => this.connection?.begun && !this.video.seeking && this.edge.stalled(performance.now() / 1000);
    this.broken = () => this.video.hasAttribute("src") && this.lost("error");
    this.online = () => this.connection === null && this.connect();
  }

  start() {
    this.video.addEventListener("playing", this.playing);
    this.video.addEventListener("waiting", this.stalled);
    this.video.addEventListener("error", this.broken);
    window.addEventListener("online", this.online);
    this.timer = setInterval(() => this.look(), LOOK_MS);
    this.connect();
  }

  stop() {
    clearInterval(this.timer);
    clearTimeout(this.retry);
    this.video.removeEventListener("playing", this.playing);
    this.video.removeEventListener("waiting", this.stalled);
    this.video.removeEventListener("error", this.broken);
    window.removeEventListener("online", this.online);
    this.connection?.close();
    this.connection = null;
    this.stopped = true;
    this.video.removeAttribute("src");
    this.video.load();
    this.held.hidden = true;
  }

  /** From a tap, where the browser plays nothing by itself. */
  async play() {
    try {
      await this.video.play();
      if (this.state === "blocked") this.say("waiting");
    } catch (error) {
      if (error.name === "NotAllowedError") this.say("blocked");
    }
  }

  /** Seconds from the picture shown to the last one that has arrived; null while nothing plays. */
  get behind_s() {
    const { buffered, currentTime } = this.video;
    return this.state === "playing" && buffered.length ? buffered.end(buffered.length - 1) - currentTime : null;
  }

  say(state) {
    if (state !== this.state) this.tell((this.state = state));
  }

  connect() {
    clearTimeout(this.retry);
    if (!Source) return this.withoutSource();
    if (this.state === null) this.say("connecting");
    this.connection = new Connection(this.video, this.path, {
      opened: () => this.say("waiting"),
      lost: (why) => this.lost(why),
      ready: () => this.play(),
    });
  }

  /** An old iPhone plays lists of segments by itself, some seconds behind; others perhaps the endless file. */
  async withoutSource() {
    const { video } = this;
    if (hasToken()) return this.say("cannot");
    this.say("connecting");
    if (video.canPlayType("application/vnd.apple.mpegurl") === "") video.src = address(`${this.path}/view.mp4`);
    else if (await this.hasList()) video.src = address(`${this.path}/hls/index.m3u8`);
    else return this.again("waiting");
    this.play();
  }

  /** Whether there is a list to play. The first time it is asked for, that it be written. */
  async hasList() {
    try {
      if (!this.listed) await json("POST", `${this.path}/outputs`, { target: "hls:page" });
    } catch {
      // It is written already, or may not be; the list itself will tell.
    }
    this.listed = true;
    return call("GET", `${this.path}/hls/index.m3u8`).then(() => true, () => false);
  }

  lost(why) {
    this.hold();
    this.connection?.close();
    this.connection = null;
    if (this.stopped) return;
    if (why === "type") return this.say("cannot");
    this.again("lost");
  }

  again(state) {
    this.say(state);
    this.retry = setTimeout(() => this.connect(), RETRY_MS[Math.min(this.failures++, RETRY_MS.length - 1)]);
  }

  /** The last picture stays to be seen while the element has none. */
  hold() {
    const { video, held } = this;
    if (!video.videoWidth || !held.hidden) return;
    [held.width, held.height] = [video.videoWidth, video.videoHeight];
    held.getContext("2d").drawImage(video, 0, 0);
    held.hidden = false;
  }

  shown() {
    this.failures = 0;
    this.held.hidden = true;
    this.say("playing");
  }

  look() {
    const { video, connection } = this;
    if (!connection) return;
    if (connection.silent(SILENT_MS)) return this.lost("silent");
    const moved = video.currentTime !== this.seen_s;
    this.seen_s = video.currentTime;
    if (!connection.begun || !video.buffered.length) return;
    const end = video.buffered.end(video.buffered.length - 1);
    const start = video.buffered.start(video.buffered.length - 1);
    // A gap: the server left out what we were too slow for, or the stream begins at a time of its own.
    if (video.currentTime < start) video.currentTime = Math.max(start, end - this.edge.wanted_s);
    if (!moved) return this.state === "playing" && connection.silent(QUIET_MS) && this.say("waiting");
    if (this.state === "waiting") this.shown();
    const { rate, jump_s } = this.edge.decide(end - video.currentTime, performance.now() / 1000);
    if (jump_s) video.currentTime += jump_s;
    if (video.playbackRate !== rate) video.playbackRate = rate;
    connection.forget(video.currentTime - KEEP_S);
  }
}

/** One WebSocket and the buffer that it fills. */
class Connection {
  constructor(video, path, { opened, lost, ready }) {
    Object.assign(this, { video, lost, ready });
    this.waiting = [];
    this.bytes = 0;
    this.begun = false;
    this.heard = performance.now();
    this.source = new Source();
    this.url = URL.createObjectURL(this.source);
    // ManagedMediaSource opens only where nothing could be sent on to a television.
    video.disableRemotePlayback = true;
    video.src = this.url;
    this.open = new Promise((resolve) => this.source.addEventListener("sourceopen", resolve, { once: true }));
    this.socket = socket(`${path}/view`);
    this.socket.onopen = opened;
    this.socket.onclose = () => this.end("closed");
    this.socket.onmessage = ({ data }) => {
      this.heard = performance.now();
      if (typeof data === "string") this.begin(JSON.parse(data));
      else this.take(data);
    };
  }

  silent(limit_ms) {
    return performance.now() - this.heard > limit_ms;
  }

  close() {
    this.socket.onclose = this.socket.onmessage = null;
    this.socket.close();
    this.closed = true;
    URL.revokeObjectURL(this.url);
  }

  end(why) {
    if (!this.closed) this.lost(why);
  }

  async begin({ type }) {
    if (!type || this.buffer) return;
    if (!Source.isTypeSupported(type)) return this.end("type");
    await this.open;
    if (this.closed) return;
    if (this.source.readyState !== "open") return this.end("source");
    this.buffer = this.source.addSourceBuffer(type);
    this.buffer.addEventListener("updateend", () => this.next());
    this.buffer.addEventListener("error", () => this.end("decode"));
    this.next();
  }

  take(data) {
    this.waiting.push(data);
    this.bytes += data.byteLength;
    if (this.bytes > WAITING_BYTES) return this.end("behind");
    this.next();
  }

  /** Hand over what waits, as one piece: an append for each message would not keep up on a slow phone. */
  next() {
    if (!this.buffer || this.buffer.updating || this.closed) return;
    if (!this.begun && this.video.buffered.length) {
      this.begun = true;
      this.ready();
    }
    if (!this.waiting.length) return;
    const joined = new Uint8Array(this.bytes);
    let at = 0;
    for (const piece of this.waiting) {
      joined.set(new Uint8Array(piece), at);
      at += piece.byteLength;
    }
    this.waiting = [];
    this.bytes = 0;
    try {
      this.buffer.appendBuffer(joined);
    } catch {
      // Full, or the element has given up on what it was given: begin anew.
      this.end("append");
    }
  }

  /** What lies so far back is not needed any more. */
  forget(before_s) {
    const { buffer } = this;
    if (!buffer || buffer.updating || !buffer.buffered.length || buffer.buffered.start(0) > before_s - KEEP_S) return;
    buffer.remove(0, before_s);
  }
}
