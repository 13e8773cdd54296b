/** The microphone, sent to a session while it is heard. */

import { address, socket } from "./api.js";
import { t } from "./words.js";

const FORMAT = "s16le:16000:1";
const WAITING_BYTES = 16_000;
const SENT_AWAY = 1008;
const RETRY_MS = [300, 600, 1200, 2400, 4000];

/**
 * tell(state): "asking", "on", "lost" (the connection is tried again), "off". hear(peak): 0 to 1, fifty times a second.
 * complain(message): what the server says against it. dropped_s: sound that the network did not take in time; sent late it would only add delay.
 */
export class Microphone {
  constructor(path, { tell, hear, complain }) {
    Object.assign(this, { path, tell, hear, complain });
    this.failures = 0;
    this.dropped_s = 0;
    this.stopped = false;
  }

  /** Raises: Error with a message for a person: not allowed, none there, or the page is not secure. */
  async start() {
    this.tell("asking");
    // A browser only lets sound begin in the moment of a tap: before anything is waited for.
    this.context = globalThis.AudioContext ? new AudioContext({ latencyHint: "interactive" }) : null;
    try {
      if (!navigator.mediaDevices || !this.context?.audioWorklet) throw new Error(t("mic.insecure"));
      const wanted = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
      const [stream] = await Promise.all([
        navigator.mediaDevices.getUserMedia({ audio: wanted }),
        this.context.audioWorklet.addModule(address("page/capture.js")),
        this.context.resume(),
      ]);
      this.stream = stream;
    } catch (error) {
      this.stop();
      throw plain(error);
    }
    if (this.stopped) return this.release();
    this.stream.getAudioTracks()[0].onended = () => this.stop();
    this.capture = new AudioWorkletNode(this.context, "capture");
    this.capture.port.onmessage = ({ data }) => this.send(data);
    // To the loudspeaker it sends silence; but what leads nowhere is not run by every browser.
    this.context.createMediaStreamSource(this.stream).connect(this.capture).connect(this.context.destination);
    // A call on the phone takes the sound away; it comes back when the page is looked at again.
    this.visible = () => document.visibilityState === "visible" && this.context.resume().catch(() => {});
    document.addEventListener("visibilitychange", this.visible);
    this.connect();
  }

  stop() {
    if (this.stopped) return;
    this.stopped = true;
    clearTimeout(this.retry);
    document.removeEventListener("visibilitychange", this.visible);
    if (this.socket) {
      this.socket.onclose = null;
      if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type: "end" }));
      this.socket.close();
    }
    this.release();
    this.tell("off");
  }

  release() {
    this.capture?.port.postMessage("stop");
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    if (this.context && this.context.state !== "closed") this.context.close();
  }

  connect() {
    this.socket = socket(`${this.path}/audio?format=${encodeURIComponent(FORMAT)}`);
    this.socket.onopen = () => {
      this.failures = 0;
      this.tell("on");
    };
    this.socket.onmessage = ({ data }) => {
      const { event, detail } = JSON.parse(data);
      if (event === "error") this.complain(detail);
    };
    this.socket.onclose = ({ code, reason }) => {
      if (code === SENT_AWAY) {
        // Somebody else speaks into the session now; to come back at once would cut them off in turn.
        this.complain(reason);
        return this.stop();
      }
      this.tell("lost");
      this.retry = setTimeout(() => this.connect(), RETRY_MS[Math.min(this.failures++, RETRY_MS.length - 1)]);
    };
  }

  send({ sound, peak }) {
    this.hear(peak);
    if (this.socket.readyState !== WebSocket.OPEN) return;
    if (this.socket.bufferedAmount > WAITING_BYTES) this.dropped_s += 0.02;
    else this.socket.send(sound);
  }
}

function plain(error) {
  if (error.name === "NotAllowedError") return new Error(t("mic.denied"));
  if (error.name === "NotFoundError") return new Error(t("mic.none"));
  return error.name === "Error" ? error : new Error(t("mic.failed", { why: error.message }));
}
