// Lists of hits side by side: of one query as the model reads it in several ways, or of several releases.

import { card, keepUpWith, make } from "./cards.js";

/** Answers to questions {name, get}, in their order: [{name, answer}], or {name, error} for some that have failed.
 *  Throws if all have. */
export async function together(questions) {
  const ended = await Promise.allSettled(questions.map(({ get }) => get()));
  if (ended.every(({ status }) => status === "rejected")) throw ended[0].reason;
  return ended.map(({ value, reason }, n) => ({ name: questions[n].name, answer: value, error: reason }));
}

/** The elements of columns {name, answer, error}. isNarrow: as lists, not as galleries; more(hit): what else is said of
 *  it; button(noteId): its button. */
export function columnsOf(columns, isNarrow, more, button) {
  const answers = columns.map(({ answer }) => answer).filter(Boolean);
  answers.forEach(keepUpWith);
  const ids = answers.flatMap(({ hits }) => hits.map((hit) => hit.note_id));
  const isAlone = ({ note_id }) => answers.length > 1 && ids.indexOf(note_id) === ids.lastIndexOf(note_id);
  return columns.map(({ name, answer, error }) => {
    const column = make("div", { className: "column" });
    const alone = answer?.hits.filter(isAlone) ?? [];
    const isMarked = (hit) => alone.includes(hit) && alone.length < answer.hits.length; // of all, the heading says it
    const aboutOf = (hit) => [...more(hit), ...(isMarked(hit) ? [tag("only here")] : [])];
    if (name) column.append(head(name, alone.length));
    if (error) column.append(make("p", { className: "problem", role: "alert", textContent: error.message }));
    else if (answer.hits.length) column.append(list(answer, isNarrow, aboutOf, button));
    else column.append(make("p", { className: "soft", textContent: "Nothing is near." }));
    return column;
  });
}

function head(name, numAlone) {
  const alone = numAlone ? [make("small", { className: "soft", textContent: `${numAlone} only here` })] : [];
  return make("div", { className: "head" }, make("h3", { textContent: name }), ...alone);
}

function list(answer, isNarrow, aboutOf, button) {
  const items = answer.hits.map((hit, n) => {
    const score = hit.score === undefined ? [] : [scoreOf(hit)];
    const place = isNarrow ? [make("div", { className: "place" }, make("b", { textContent: n + 1 }), ...score)] : [];
    const details = [...(isNarrow ? [] : score), ...aboutOf(hit)];
    return card(hit.note_id, answer.release, { place, details, button: button(hit.note_id) });
  });
  const element = make("ol", { className: isNarrow ? "list" : "gallery" }, ...items);
  element.setAttribute("role", "list"); // some screen readers take a list without marks for none
  return element;
}

function scoreOf(hit) {
  const word = make("span", { className: "unseen", textContent: "score " });
  return make("span", { className: "score" }, word, hit.score.toFixed(3));
}

/** A short word about a note. */
export function tag(text) {
  return make("span", { className: "tag", textContent: text });
}
