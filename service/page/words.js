/** The words of the page in the reader's language: one table for each, the same keys in all. */

import en from "./en.js";
import zh from "./zh.js";

const TABLES = { en, zh };
const KEPT = "avatard.language";

let language = "en";
const listeners = new Set();

/** The first language of the browser's that there is a table for; English when there is none. */
function preferred(languages, kept = null) {
  if (kept in TABLES) return kept;
  const codes = languages.map((code) => code.toLowerCase().split("-")[0]);
  return codes.find((code) => code in TABLES) ?? "en";
}

export function current() {
  return language;
}

/** The word for `key`, its {names} replaced by `values`. */
export function t(key, values = {}) {
  const word = TABLES[language][key];
  if (word === undefined) {
    console.error(`no word for ${key}`);
    return key;
  }
  return word.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

/** t(), or `otherwise` where the server names something that the page does not know. */
export function known(key, otherwise) {
  return key in TABLES[language] ? t(key) : otherwise;
}

export function number(value, digits = 0) {
  return new Intl.NumberFormat(language, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
}

/** 65 → 1:05 */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (part) => String(part).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

/** Fill in every element that names its word: data-t for text, data-t-label and data-t-placeholder for attributes. */
function fill(root = document) {
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of root.querySelectorAll("[data-t-label]")) element.setAttribute("aria-label", t(element.dataset.tLabel));
  for (const element of root.querySelectorAll("[data-t-placeholder]")) element.placeholder = t(element.dataset.tPlaceholder);
}

/** Called after each change of language, and once at the beginning. */
export function onLanguage(listener) {
  listeners.add(listener);
}

export function speak(code) {
  language = code;
  document.documentElement.lang = code === "zh" ? "zh-Hans" : code;
  fill();
  for (const listener of listeners) listener();
}

/** In the language of the browser, or the one chosen here before; `select` changes it. */
export function begin(select) {
  let kept = null;
  try {
    kept = localStorage.getItem(KEPT);
  } catch {
    // Storage may be forbidden; the choice then lasts as long as the page.
  }
  select.addEventListener("change", () => {
    try {
      localStorage.setItem(KEPT, select.value);
    } catch {
      // As above.
    }
    speak(select.value);
  });
  const code = preferred(navigator.languages ?? [navigator.language], kept);
  select.value = code;
  speak(code);
}
