/** A place to choose a file, or to drop one; a picture is shown in it. */

import { t } from "./words.js";

const KINDS = { image: /^image\//, audio: /^(audio|video)\// };
const SOUNDS = /\.(wav|mp3|m4a|aac|ogg|oga|opus|flac|webm|mp4)$/i;
const PICTURES = /\.(png|jpe?g|webp|bmp|gif|avif|heic)$/i;

/** "image", "audio" or null. */
export function kindOf(file) {
  if (KINDS.image.test(file.type) || PICTURES.test(file.name)) return "image";
  if (KINDS.audio.test(file.type) || SOUNDS.test(file.name)) return "audio";
  return null;
}

/** file: what was chosen, or null. url: of it, for an element that shows or plays it. */
export class FileField {
  constructor(label, kind, { onChange = () => {}, onComplaint = () => {} } = {}) {
    Object.assign(this, { label, kind, onChange, onComplaint, file: null, url: null });
    this.input = label.querySelector("input");
    this.picture = label.querySelector("img");
    this.chosen = label.querySelector(".chosen");
    this.input.addEventListener("change", () => this.input.files.length && this.take(this.input.files[0]));
    for (const name of ["dragenter", "dragover"]) label.addEventListener(name, () => label.classList.add("over"));
    for (const name of ["dragleave", "drop"]) label.addEventListener(name, () => label.classList.remove("over"));
  }

  async take(file) {
    if (kindOf(file) !== this.kind) return this.onComplaint(t("file.unknown", { name: file.name }));
    const url = URL.createObjectURL(file);
    if (this.picture && !(await shows(this.picture, url))) {
      URL.revokeObjectURL(url);
      this.picture.hidden = this.file === null;
      if (this.file) this.picture.src = this.url;
      return this.onComplaint(t("picture.bad", { name: file.name }));
    }
    if (this.url) URL.revokeObjectURL(this.url);
    Object.assign(this, { file, url });
    this.chosen.textContent = file.name;
    this.show();
  }

  clear() {
    if (this.url) URL.revokeObjectURL(this.url);
    Object.assign(this, { file: null, url: null });
    this.show();
  }

  show() {
    const chosen = this.file !== null;
    this.input.value = "";
    this.label.classList.toggle("full", chosen);
    this.chosen.hidden = !chosen;
    if (this.picture) this.picture.hidden = !chosen;
    this.onChange(this.file);
  }
}

/** Whatever is dropped on the page goes to `take(file)`, and never makes the browser leave the page. */
export function takeDrops(take) {
  for (const name of ["dragover", "drop"]) {
    window.addEventListener(name, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      if (name === "drop") for (const file of event.dataTransfer.files) take(file, event.target);
    });
  }
}

/** A line of error, or none. */
export function complain(element, message) {
  element.textContent = message ?? "";
  element.hidden = !message;
}

/** The number in a field for seeds; null when it is empty. Raises: Error in words for a person. */
export function seedIn(input) {
  const text = input.value.trim();
  if (!text) return null;
  if (!/^\d{1,15}$/.test(text)) throw new Error(t("seed.bad"));
  return Number(text);
}

async function shows(picture, url) {
  picture.src = url;
  try {
    await picture.decode();
    return true;
  } catch {
    return false;
  }
}
