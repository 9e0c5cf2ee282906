// A search by words, a picture or a stored note: as the model reads it in several ways, by one release or two.

import { shown } from "./address.js";
import { card, make, nameOf, note, path, replace } from "./cards.js";
import { columnsOf, together } from "./columns.js";
import { adder } from "./feed.js";
import { clearProblem, tell } from "./problem.js";
import { compared, headingOf, inMemory, loadReleases } from "./releases.js";
import { ask } from "./service.js";

const K = 12;
const INPUTS = { multimodal: "Text and picture", text: "Text alone", image: "Picture alone" };
const $ = (id) => document.getElementById(id);
let running = new AbortController();

/** Stop the search that runs, if one does. Its answer is not shown, however late it comes. */
export function stop() {
  if ($("results").ariaBusy === "true") $("summary").textContent = "Stopped.";
  running.abort();
  $("results").ariaBusy = "false";
}

/** Search by what the address says, and by `file`, a picture; without both, show some notes to begin with. */
export async function search(file) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  $("results").ariaBusy = "true";
  clearProblem();
  try {
    await loadReleases();
    const query = await meaning(file, signal);
    const columns = query ? await together(questions(query, signal)) : [examples()];
    const title = query ? await titleOf(query) : "Notes to begin with";
    signal.throwIfAborted();
    present(title, query, columns);
  } catch (error) {
    if (signal.aborted) return;
    present("No answer", null, []);
    tell(error);
  }
  $("results").ariaBusy = "false";
}

/** What is searched by: {noteId}, {words, image}, or null. One word may be the id of a note; isNoId: it is not. */
async function meaning(file, signal) {
  const { id, words } = shown;
  if (id) return { noteId: id };
  if (!words && !file) return null;
  if (file) return { words, image: file };
  if (!/^(?!\.{1,2}$)[^\s/]{1,128}$/u.test(words)) return { words };
  const found = await note(words, compared()[0]);
  signal.throwIfAborted();
  return found ? { noteId: words } : { words, isNoId: true };
}

/** What the service is asked: once for each release and each way to read the query. */
function questions({ noteId, words, image }, signal) {
  const isWhole = noteId !== undefined || (words && image); // a text alone is the same however it is read
  const kinds = isWhole && shown.inputs.length ? shown.inputs : ["multimodal"];
  const question = (release, inputs) => {
    const options = { k: K, inputs, release };
    const name = [kinds.length > 1 ? INPUTS[inputs] : "", headingOf(release)].filter(Boolean).join(" · ");
    if (noteId !== undefined) return { name, get: () => ask(path(noteId, release, "/similar", options), { signal }) };
    const body = { title: words, ...options };
    return { name, get: () => ask("/similar", { body: image ? form({ ...body, image }) : body, signal }) };
  };
  return compared().flatMap((release) => kinds.map((inputs) => question(release, inputs)));
}

function form(fields) {
  const data = new FormData();
  for (const [name, value] of Object.entries(fields)) data.append(name, value);
  return data;
}

function examples() {
  const { release, seq, examples: ids } = inMemory[0];
  return { name: "", answer: { release, seq, hits: ids.map((id) => ({ note_id: id })) } };
}

async function titleOf({ noteId, words, image }) {
  if (noteId !== undefined) return `Notes like “${nameOf(noteId, await note(noteId, compared()[0]))}”`;
  return `Notes near ${[image && "the picture", words && `“${words}”`].filter(Boolean).join(" and ")}`;
}

function present(title, query, columns) {
  $("results-title").textContent = title;
  $("summary").textContent = query ? summaryOf(query, columns) : "";
  replace($("query"), ...(query?.noteId === undefined ? [] : [queryCard(query.noteId)]));
  replace($("columns"), ...columnsOf(columns, columns.length > 1, () => [], adder));
}

function summaryOf({ words, isNoId }, columns) {
  const found = new Set(columns.flatMap(({ answer }) => answer?.hits.map((hit) => hit.note_id) ?? []));
  const by = compared().length > 1 ? `${compared().length} releases` : `release ${compared()[0]}`;
  const why = isNoId ? `No note has the id “${words}”, so it is searched for as a word. ` : "";
  return `${why}${found.size} notes, found by ${by}.`;
}

function queryCard(noteId) {
  const [release] = compared();
  const content = make("span", { className: "content", dir: "auto" });
  note(noteId, release).then((found) => (content.textContent = found?.content ?? ""), () => {});
  return make("ul", { className: "list" }, card(noteId, release, { details: [content], button: adder(noteId) }));
}
