// The releases in memory: which one answers, and which a person compares.

import { shown } from "./address.js";
import { make } from "./cards.js";
import { ask } from "./service.js";

const box = document.getElementById("releases");

/** [{release, week, seq, notes, examples}], the one that answers first. */
export let inMemory = [];

/** Ask which there are, and show it. */
export async function loadReleases() {
  inMemory = (await ask("/releases")).releases;
  const [{ release, week, notes, seq }] = inMemory;
  const count = `${notes.toLocaleString("en")} notes`;
  document.getElementById("state").textContent = `Release ${release} · week ${week} · ${count} · log up to ${seq}`;
  const names = inMemory.map((each) => each.release);
  if (names.join() !== box.dataset.names) {
    box.dataset.names = names.join();
    const boxes = names.map((name) => make("label", {}, make("input", { type: "checkbox", value: name }), name));
    box.replaceChildren(box.querySelector("legend"), ...boxes);
  }
  box.hidden = names.length < 2;
  for (const input of box.querySelectorAll("input")) input.checked = compared().includes(input.value);
}

/** The ids of the releases that are asked. */
export function compared() {
  return shown.releases.length ? shown.releases : [inMemory[0].release];
}

/** A heading for what one of them has found; empty where only one is asked. */
export function headingOf(release) {
  return compared().length > 1 ? `Release ${release}` : "";
}
