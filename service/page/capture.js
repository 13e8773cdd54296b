/** In the sound thread: what the microphone hears, at 16 kHz as signed 16-bit numbers, 20 ms at a time. */

const RATE = 16000;
const PIECE = RATE / 50;
const CROSSINGS = 16;
const PHASES = 256;

/**
 * Any rate to 16 kHz, in pieces of any length: a windowed sinc whose cut-off lies below the lower of both Nyquist
 * rates, so that nothing folds back.
 */
class Resampler {
  constructor(rate) {
    this.step = rate / RATE;
    const width = Math.max(1, this.step) / 0.92;
    this.reach = Math.ceil(CROSSINGS * width);
    this.taps = new Float32Array((PHASES + 1) * 2 * this.reach);
    for (let phase = 0; phase <= PHASES; phase++) {
      let sum = 0;
      for (let tap = 0; tap < 2 * this.reach; tap++) {
        const x = (tap - this.reach + 1 - phase / PHASES) / width;
        const window = Math.abs(x) < CROSSINGS ? 0.5 + 0.5 * Math.cos((Math.PI * x) / CROSSINGS) : 0;
        const value = (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x)) * window;
        this.taps[phase * 2 * this.reach + tap] = value;
        sum += value;
      }
      for (let tap = 0; tap < 2 * this.reach; tap++) this.taps[phase * 2 * this.reach + tap] /= sum;
    }
    this.samples = new Float32Array(2 * this.reach);
    this.count = this.reach - 1;
    this.at = this.reach - 1;
  }

  /** Calls `out` with each sample that is now complete. */
  push(input, out) {
    if (this.count + input.length > this.samples.length) {
      const grown = new Float32Array(2 * (this.count + input.length));
      grown.set(this.samples.subarray(0, this.count));
      this.samples = grown;
    }
    this.samples.set(input, this.count);
    this.count += input.length;
    for (; Math.floor(this.at) + this.reach < this.count; this.at += this.step) {
      const whole = Math.floor(this.at);
      const row = Math.round((this.at - whole) * PHASES) * 2 * this.reach;
      let value = 0;
      for (let tap = 0; tap < 2 * this.reach; tap++) value += this.taps[row + tap] * this.samples[whole - this.reach + 1 + tap];
      out(value);
    }
    const done = Math.floor(this.at) - this.reach + 1;
    this.samples.copyWithin(0, done, this.count);
    this.count -= done;
    this.at -= done;
  }
}

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate);
    this.piece = new Int16Array(PIECE);
    this.filled = 0;
    this.peak = 0;
    this.port.onmessage = () => (this.stopped = true);
  }

  process([channels]) {
    if (channels.length) this.resampler.push(this.mixed(channels), (value) => this.put(value));
    return !this.stopped;
  }

  mixed(channels) {
    if (channels.length === 1) return channels[0];
    return channels[0].map((value, index) => channels.reduce((sum, channel) => sum + channel[index], 0) / channels.length);
  }

  put(value) {
    const kept = Math.max(-1, Math.min(1, value));
    this.peak = Math.max(this.peak, Math.abs(kept));
    this.piece[this.filled++] = Math.round(kept * 32767);
    if (this.filled < PIECE) return;
    this.port.postMessage({ sound: this.piece.buffer, peak: this.peak }, [this.piece.buffer]);
    this.piece = new Int16Array(PIECE);
    this.filled = 0;
    this.peak = 0;
  }
}

registerProcessor("capture", Capture);
