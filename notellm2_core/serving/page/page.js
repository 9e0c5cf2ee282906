"use strict";
// The page keeps its state in its address: ?q=words or id, &history=a,b. So an address shows what its sender saw.

const $ = (id) => document.getElementById(id);
const history_ = new Map(); // note_id -> nothing; the order in which the notes were added
const notes = new Map(); // note_id -> what GET /notes/{id} says
const K = 12;

async function ask(path, body) {
  const headers = { Accept: "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const content = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(content.detail || answer.statusText), { status: answer.status });
  return content;
}

function tell(error) {
  $("problem").hidden = !error;
  $("problem").textContent = error ? error.message : "";
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function picture(noteId) { // with the key, which an <img> would not send
  const headers = $("key").value ? { Authorization: `Bearer ${$("key").value}` } : {};
  const answer = await fetch(`/notes/${encodeURIComponent(noteId)}/image`, { headers });
  return answer.status === 200 ? URL.createObjectURL(await answer.blob()) : null;
}

function card(noteId, about, action) {
  const title = make("div", { className: "title", textContent: noteId });
  const text = make("div", { className: "text" }, title);
  if (about) text.append(make("p", { className: "meta", textContent: about }));
  const item = make("li", { className: "card" }, text);
  if (action) item.append(action);
  const known = notes.get(noteId) || ask(`/notes/${encodeURIComponent(noteId)}`).catch(() => null);
  notes.set(noteId, known);
  Promise.resolve(known).then(async (note) => {
    if (!note) return;
    title.textContent = note.title || noteId;
    text.append(make("p", { className: "meta", textContent: [note.topics.join(", "), noteId].filter(Boolean).join(" · ") }));
    const source = await picture(noteId);
    if (source) {
      item.prepend(make("img", { src: source, alt: `picture of ${note.title || noteId}`, loading: "lazy" }));
    }
  });
  return item;
}

function adder(noteId) {
  const button = make("button", { type: "button", textContent: "+", title: "Add to the history" });
  button.setAttribute("aria-label", `Add ${noteId} to the history`);
  button.onclick = () => { history_.set(noteId, 1); showHistory(); };
  return button;
}

function remover(noteId) {
  const button = make("button", { type: "button", textContent: "×", title: "Remove" });
  button.setAttribute("aria-label", `Remove ${noteId} from the history`);
  button.onclick = () => { history_.delete(noteId); showHistory(); };
  return button;
}

function hits(answer) {
  const list = make("ul", { className: "cards" });
  for (const hit of answer.hits) list.append(card(hit.note_id, hit.score.toFixed(3), adder(hit.note_id)));
  if (!answer.hits.length) list.append(make("li", { className: "meta", textContent: "Nothing is near." }));
  return list;
}

function remember() {
  const query = new URLSearchParams();
  if ($("words").value) query.set("q", $("words").value);
  if (history_.size) query.set("history", [...history_.keys()].join(","));
  window.history.replaceState(null, "", query.size ? `?${query}` : "/");
}

async function base64(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

async function search() {
  tell(null);
  remember();
  const words = $("words").value.trim(), file = $("picture").files[0], out = $("results");
  out.replaceChildren();
  if (!words && !file) return;
  const { releases } = await ask("/releases");
  const compared = $("releases").checked ? releases.map((r) => r.release) : [releases[0].release];
  if (!file && words && !/\s/.test(words)) {
    let found = 0;
    for (const release of compared) {
      try {
        const answer = await ask(`/notes/${encodeURIComponent(words)}/similar?k=${K}&release=${release}`);
        out.append(make("div", {}, make("h2", { textContent: `Like ${words}, release ${answer.release}` }), hits(answer)));
        found += 1;
      } catch (error) { if (error.status !== 404) throw error; } // not an id: a word
    }
    if (found) return;
  }
  const image = file ? await base64(file) : undefined;
  const kinds = [...document.querySelectorAll("input[name=inputs]:checked")].map((box) => box.value);
  for (const release of compared) {
    for (const inputs of kinds.length ? kinds : ["multimodal"]) {
      if (inputs === "image" && !image) continue;
      const answer = await ask("/similar", { title: words, ...(image && { image }), k: K, inputs, release });
      const name = { multimodal: image ? "text and picture" : "text", text: "text alone", image: "picture alone" }[inputs];
      out.append(make("div", {}, make("h2", { textContent: `${name}, release ${answer.release}` }), hits(answer)));
    }
  }
}

async function showHistory() {
  remember();
  $("history").replaceChildren(...[...history_.keys()].map((id) => card(id, "", remover(id))));
  $("feed-title").hidden = !history_.size;
  $("feed").replaceChildren();
  if (!history_.size) return;
  try {
    const answer = await ask("/recall", { history: [...history_.keys()], k: K });
    const items = answer.hits.map((hit) => card(hit.note_id, `${hit.score.toFixed(3)}, because of ${hit.because.join(", ")}`, adder(hit.note_id)));
    $("feed").replaceChildren(...items);
    tell(answer.unknown.length ? new Error(`not there: ${answer.unknown.join(", ")}`) : null);
  } catch (error) { tell(error); }
}

async function start() {
  const query = new URLSearchParams(location.search);
  $("words").value = query.get("q") || "";
  for (const id of (query.get("history") || "").split(",").filter(Boolean)) history_.set(id, 1);
  try {
    const { releases } = await ask("/releases");
    const r = releases[0];
    $("state").textContent = `Release ${r.release}, week ${r.week}: ${r.notes.toLocaleString("en")} notes; log up to ${r.seq}`;
    await search();
    await showHistory();
  } catch (error) { tell(error); }
}

$("search").onsubmit = (event) => { event.preventDefault(); search().catch(tell); };
$("picture").onchange = () => { $("picture-name").textContent = $("picture").files[0]?.name || "choose or drop one"; };
$("key").onchange = start;
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
$("drop").addEventListener("dragenter", () => $("drop").classList.add("over"));
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  $("drop").classList.remove("over");
  if (!event.dataTransfer.files.length) return;
  $("picture").files = event.dataTransfer.files;
  $("picture").onchange();
});
start();
