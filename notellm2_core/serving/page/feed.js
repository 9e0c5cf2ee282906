// A user's history, and the feed that follows from it: what is new in it after each change, and because of what.

import { shown, write } from "./address.js";
import { card, make, nameOf, note, noteButton, replace } from "./cards.js";
import { columnsOf, tag, together } from "./columns.js";
import { clearProblem, tell } from "./problem.js";
import { compared, headingOf, inMemory, loadReleases } from "./releases.js";
import { ask } from "./service.js";

const K = 12;
const $ = (id) => document.getElementById(id);
let running = new AbortController();
let before = new Set(); // the notes of the feed before the last change

/** A button that adds a note to the history, or takes it out. */
export function adder(noteId) {
  const button = noteButton(noteId, "add", "“…” in the history");
  button.ariaPressed = String(shown.history.includes(noteId));
  button.onclick = () => (shown.history.includes(noteId) ? remove([noteId]) : add([noteId]));
  return button;
}

export function add(noteIds) {
  const fresh = [...new Set(noteIds)].filter((noteId) => !shown.history.includes(noteId));
  change([...shown.history, ...fresh], "Added", fresh);
}

export function remove(noteIds) {
  change(shown.history.filter((noteId) => !noteIds.includes(noteId)), "Removed", noteIds);
}

function change(history, verb, noteIds) {
  shown.history = history;
  write();
  showFeed(told(verb, noteIds));
}

async function told(verb, noteIds) {
  return `${verb} ${noteIds.length === 1 ? `“${await titleOf(noteIds[0])}”` : `${noteIds.length} notes`}. `;
}

/** Show the history and its feed. change: a promise of a sentence, what a person has just done to the history. */
export async function showFeed(change = null) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  $("user").ariaBusy = "true";
  if (change) clearProblem();
  try {
    if (!inMemory.length) await loadReleases();
    showHistory();
    const columns = shown.history.length ? await together(compared().map((release) => question(release, signal))) : [];
    const done = await change;
    signal.throwIfAborted();
    present(columns, done);
  } catch (error) {
    if (signal.aborted) return;
    present([], null);
    tell(error);
  }
  $("user").ariaBusy = "false";
}

function question(release, signal) {
  const body = { history: shown.history, k: K, release };
  return { name: headingOf(release), get: () => ask("/recall", { body, signal }) };
}

function showHistory() {
  const { history } = shown;
  const items = history.map((noteId) => {
    const button = noteButton(noteId, "remove", "Remove “…” from the history");
    button.onclick = () => {
      remove([noteId]);
      if (!shown.history.length) $("add-id").focus();
    };
    return card(noteId, compared()[0], { button });
  });
  replace($("history"), ...items);
  $("history-hint").hidden = history.length > 0;
  for (const id of ["history", "clear", "feed-title", "jump"]) $(id).hidden = !history.length;
  for (const button of document.querySelectorAll("button.add")) {
    button.ariaPressed = String(history.includes(button.dataset.note));
  }
  $("jump").textContent = `History: ${history.length} ${history.length === 1 ? "note" : "notes"}`;
}

/** done: what a person did; null: the feed is shown for the first time, or again, and nothing in it is new. */
function present(columns, done) {
  const answers = columns.map(({ answer }) => answer).filter(Boolean);
  const found = new Set(answers.flatMap(({ hits }) => hits.map((hit) => hit.note_id)));
  const isChanged = done && before.size && found.size;
  const fresh = new Set(isChanged ? [...found].filter((noteId) => !before.has(noteId)) : []);
  before = found;
  const news = isChanged ? `${fresh.size} of ${found.size} notes of the feed are new. ` : "";
  const unknown = [...new Set(answers.flatMap((answer) => answer.unknown))];
  $("change").textContent = (done ?? "") + news + (unknown.length ? `Not there: ${unknown.join(", ")}.` : "");
  replace($("feed"), ...columnsOf(columns, true, (hit) => [because(hit, fresh.has(hit.note_id))], adder));
}

/** "because of ...": the titles of the history notes that found a hit. */
function because({ because: noteIds }, isNew) {
  const element = make("span", { className: "because" }, ...(isNew ? [tag("new"), " "] : []), "because of ");
  element.dataset.because = JSON.stringify(noteIds);
  noteIds.forEach((noteId, n) => {
    const title = make("bdi", { textContent: noteId });
    titleOf(noteId).then((text) => {
      title.textContent = text;
      element.title = element.textContent; // two lines of it are shown
    });
    element.append(n ? ", " : "", title);
  });
  return element;
}

async function titleOf(noteId) {
  return nameOf(noteId, await note(noteId, compared()[0]).catch(() => null));
}

/** Mark the history notes that a note of the feed is there because of, while it is pointed at or has the focus. */
function mark({ target }) {
  const reason = target.closest?.("#feed .card")?.querySelector(".because");
  const noteIds = reason ? JSON.parse(reason.dataset.because) : [];
  for (const item of $("history").children) item.classList.toggle("why", noteIds.includes(item.dataset.note));
}
$("user").addEventListener("pointerover", mark);
$("user").addEventListener("focusin", mark);
