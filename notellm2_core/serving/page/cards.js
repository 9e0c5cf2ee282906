// Notes as cards. Titles and pictures arrive after the card; what users wrote is only ever text, never markup.

import { lead } from "./address.js";
import { ask, askPicture } from "./service.js";

const MAX_NAME = 80; // letters
const notes = new Map(); // release and id -> promise of {title, ...}, null if it is not there
const pictures = new Map(); // likewise -> promise of a Blob, null if it has none
const seen = new Map(); // release -> the place in the log that its last answer was made from

/** Forget titles and pictures if notes have been written since they were read. */
export function keepUpWith({ release, seq }) {
  if (seen.get(release) === seq) return;
  seen.set(release, seq);
  notes.clear();
  pictures.clear();
}

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** What GET /notes/{id} says; null if it is not there. */
export function note(noteId, release) {
  return once(notes, noteId, release, () => ask(path(noteId, release)).catch((e) => {
    if (e.status === 404) return null;
    throw e;
  }));
}

/** What a note is called in a sentence. found: what `note` says. */
export function nameOf(noteId, found) {
  const letters = [...(found?.title || found?.content || noteId)];
  return letters.length > MAX_NAME ? `${letters.slice(0, MAX_NAME - 1).join("")}…` : letters.join("");
}

function picture(noteId, release) {
  return once(pictures, noteId, release, () => askPicture(path(noteId, release, "/image")));
}

function once(kept, noteId, release, get) {
  const name = JSON.stringify([release, noteId]);
  if (!kept.has(name)) kept.set(name, get());
  const promise = kept.get(name);
  promise.catch(() => kept.delete(name)); // it is asked for again the next time
  return promise;
}

export function path(noteId, release, below = "", more = {}) {
  return `/notes/${encodeURIComponent(noteId)}${below}?${new URLSearchParams({ release, ...more })}`;
}

/** A list item: its place; a picture; a title, the link to the note's neighbours, with details below; and a button. */
export function card(noteId, release, { place = [], details = [], button }) {
  const title = make("a", { className: "title", dir: "auto", textContent: noteId });
  title.dataset.note = noteId;
  lead(title);
  const image = make("div", { className: "image" });
  const about = make("span", { className: "about", dir: "auto" });
  const text = make("div", { className: "text" }, title, make("div", { className: "details soft" }, ...details, about));
  const item = make("li", { className: "card" }, ...place, image, text, button);
  item.dataset.note = noteId;
  fill({ noteId, release, title, image, about, button }).catch(() => {}); // the card then shows the id alone
  return item;
}

async function fill({ noteId, release, title, image, about, button }) {
  const found = await note(noteId, release);
  if (!found) {
    about.textContent = "not there";
    return;
  }
  title.textContent = title.title = found.title || found.content || noteId;
  about.textContent = [...found.topics, noteId].join(" · ");
  button.ariaLabel = button.dataset.says.replace("…", () => nameOf(noteId, found));
  const blob = await picture(noteId, release);
  image.append(blob ? imageOf(blob) : make("span", { className: "soft", textContent: "no picture" }));
}

function imageOf(blob) {
  const image = make("img", { alt: "", src: URL.createObjectURL(blob) }); // the title beside it says what it is
  image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
  return image;
}

/** A button whose name for screen readers is `says`, with the note's title in place of "…". */
export function noteButton(noteId, className, says) {
  const button = make("button", { type: "button", className });
  button.dataset.note = noteId;
  button.dataset.says = says;
  button.ariaLabel = says.replace("…", () => noteId);
  return button;
}

/** Replace what is in `box`. Who was on the n-th card by keyboard is on the n-th again. */
export function replace(box, ...children) {
  const cards = () => [...box.querySelectorAll(".card")];
  const place = cards().findIndex((item) => item.contains(document.activeElement));
  const selector = document.activeElement?.tagName === "A" ? "a" : "button";
  box.replaceChildren(...children);
  if (place >= 0) cards()[Math.min(place, cards().length - 1)]?.querySelector(selector)?.focus();
}
