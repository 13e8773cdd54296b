/** The page: words, token, the two views, and whether the daemon is well. */

import { address, onToken } from "./api.js";
import { ClipView } from "./clip.js";
import { complain, takeDrops } from "./field.js";
import { LiveView } from "./live.js";
import { begin, known, onLanguage, t } from "./words.js";

const LOOK_MS = 10_000;

const $ = (id) => document.getElementById(id);

/** Ask for a token; null when the person does not give one. */
function askToken(wrong) {
  const dialog = $("token");
  complain($("token-complaint"), wrong ? t("token.wrong") : null);
  dialog.showModal();
  return new Promise((resolve) => {
    const over = new AbortController();
    const end = (value) => {
      over.abort();
      $("token-value").value = "";
      if (dialog.open) dialog.close();
      resolve(value);
    };
    const once = { signal: over.signal };
    const submit = (event) => {
      event.preventDefault();
      const value = $("token-value").value.trim();
      if (value) end(value);
    };
    $("token-form").addEventListener("submit", submit, once);
    $("token-no").addEventListener("click", () => end(null), once);
    dialog.addEventListener("close", () => end(null), once);
  });
}

/** The line in the bar that says whether the model is ready. */
class Engine {
  constructor() {
    this.state = null;
    onLanguage(() => this.draw());
    this.watch();
  }

  async watch() {
    for (;;) {
      if (document.visibilityState === "visible") await this.look();
      await new Promise((resolve) => setTimeout(resolve, this.state === "ready" ? LOOK_MS : LOOK_MS / 5));
    }
  }

  async look() {
    try {
      const response = await fetch(address("readyz"), { cache: "no-store" });
      const answer = await response.json().catch(() => ({}));
      this.state = answer.engine ?? answer.state ?? (response.ok ? "ready" : "loading");
    } catch {
      this.state = "unreachable";
    }
    this.draw();
  }

  draw() {
    const shown = this.state === null ? "" : known(`engine.${this.state}`, this.state);
    if ($("engine").textContent !== shown) $("engine").textContent = shown;
    $("engine").dataset.state = this.state ?? "";
  }
}

function main() {
  onToken(askToken);
  begin($("language"));
  const views = { clip: new ClipView(), live: new LiveView((is) => ($("live-dot").hidden = !is)) };
  const shown = () => (location.hash === "#live" ? "live" : "clip");
  const show = () => {
    for (const name of Object.keys(views)) {
      $(name).hidden = name !== shown();
      if (name === shown()) $(`go-${name}`).setAttribute("aria-current", "page");
      else $(`go-${name}`).removeAttribute("aria-current");
    }
    views[shown()].enterView?.();
  };
  window.addEventListener("hashchange", () => {
    show();
    $("main").focus({ preventScroll: true });
    window.scrollTo(0, 0);
  });
  takeDrops((file) => views[shown()].take(file));
  show();
  new Engine();
}

main();
