// What the page shows is in its address, all but a picture: a link shows it to others, and Back shows it again.

/** id: of the note that is searched by; else `words`. Empty lists: what the service does by default. */
export const shown = { id: "", words: "", inputs: [], releases: [], history: [] };

/** Take over what the address says. */
export function read() {
  const query = new URLSearchParams(location.search);
  shown.id = query.get("id") ?? "";
  shown.words = query.get("q") ?? "";
  shown.inputs = query.getAll("inputs");
  shown.releases = query.getAll("release");
  shown.history = [...new Set(query.getAll("history"))];
}

/** Make the address say what is shown. isNew: Back leads to what was shown before. */
export function write(isNew = false) {
  window.history[isNew ? "pushState" : "replaceState"](null, "", address(shown));
  for (const link of document.querySelectorAll("a[data-note]")) lead(link);
}

/** Let the link of a note lead to its neighbours. */
export function lead(link) {
  link.href = address({ ...shown, id: link.dataset.note, words: "" });
}

function address({ id, words, inputs, releases, history }) {
  const query = new URLSearchParams();
  if (id) query.set("id", id);
  else if (words) query.set("q", words);
  for (const kind of inputs) query.append("inputs", kind);
  for (const release of releases) query.append("release", release);
  for (const noteId of history) query.append("history", noteId);
  return query.size ? `/?${query}` : "/";
}
