/** How fast to play so as to stay close behind what arrives: pure arithmetic, no element, no clock. */

const WINDOW_S = 2;
const LEAST_S = 0.12;
const MOST_S = 0.8;
const NEAR_S = 0.06;
const JUMP_S = 1;
const HOLD_S = 15;

/**
 * What arrives comes in pieces, so the time between the picture shown and the end of the buffer is a saw. What counts
 * is the bottom of the saw, the margin: less than nothing is a stall, more than needed is delay. The margin wanted
 * grows with each stall, and shrinks while there is none.
 */
export class LiveEdge {
  constructor() {
    this.wanted_s = LEAST_S;
    this.seen = [];
    this.quietSince = null;
  }

  /** Playing stood still because there was nothing to play. */
  stalled(now_s) {
    this.wanted_s = Math.min(MOST_S, this.wanted_s * 1.4 + 0.04);
    this.quietSince = now_s;
    this.seen = [];
  }

  /**
   * behind_s: from the picture shown to the end of the buffer. Gives the rate to play at, and jump_s: by how much to
   * go forward at once, since no rate that one does not hear would catch up soon.
   */
  decide(behind_s, now_s) {
    this.quietSince ??= now_s;
    if (now_s - this.quietSince > HOLD_S) {
      this.wanted_s = Math.max(LEAST_S, this.wanted_s - 0.05);
      this.quietSince = now_s;
    }
    this.seen.push([now_s, behind_s]);
    while (this.seen[0][0] < now_s - WINDOW_S) this.seen.shift();
    const margin_s = Math.min(...this.seen.map(([, behind]) => behind));
    const excess_s = margin_s - this.wanted_s;
    if (excess_s > JUMP_S) {
      this.seen = [];
      return { rate: 1, jump_s: excess_s };
    }
    if (Math.abs(excess_s) < NEAR_S) return { rate: 1, jump_s: 0 };
    return { rate: 1 + Math.min(0.1, Math.max(-0.04, 0.3 * excess_s)), jump_s: 0 };
  }
}
