// What a person does on the page.

import { read, shown, write } from "./address.js";
import { add, remove, showFeed } from "./feed.js";
import { search, stop } from "./search.js";
import { forgetKey, keepKey, key } from "./service.js";

const $ = (id) => document.getElementById(id);
let picture = null; // the file that is searched by

async function start() {
  read();
  $("words").value = shown.id || shown.words;
  for (const box of $("inputs").querySelectorAll("input")) {
    box.checked = (shown.inputs.length ? shown.inputs : ["multimodal"]).includes(box.value);
  }
  $("forget-key").hidden = !key();
  await search(picture);
  if ($("key-form").hidden) await showFeed(); // else it would fail for the same reason
}

$("search").onsubmit = (event) => {
  event.preventDefault();
  const words = $("words").value.trim();
  if (words !== shown.id) Object.assign(shown, { id: "", words });
  write(true);
  search(picture);
};

for (const group of ["inputs", "releases"]) {
  $(group).onchange = () => {
    shown[group] = [...$(group).querySelectorAll("input:checked")].map((box) => box.value);
    write();
    search(picture).then(() => group === "releases" && showFeed());
  };
}

// Another note: its neighbours, without leaving the page. A link is still one, for another tab.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-note]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  take(null);
  Object.assign(shown, { id: link.dataset.note, words: "" });
  $("words").value = shown.id;
  write(true);
  search(null).then(() => $("results-title").focus());
});
window.addEventListener("popstate", () => {
  take(null);
  start();
});
document.addEventListener("try-again", start);
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());

// Pictures: chosen, dropped anywhere, or pasted.
function take(file) {
  picture = file;
  $("picture").value = "";
  $("picture-name").textContent = file?.name ?? "Choose, drop or paste one";
  $("preview").hidden = $("no-picture").hidden = !file;
  URL.revokeObjectURL($("preview").src);
  if (file) $("preview").src = URL.createObjectURL(file);
}

function searchBy(file) {
  take(file);
  if (shown.id) $("words").value = ""; // it names the note that was searched by
  Object.assign(shown, { id: "", words: $("words").value.trim() });
  write(true);
  search(file);
}

$("picture").onchange = () => $("picture").files.length && searchBy($("picture").files[0]);
$("no-picture").onclick = () => {
  searchBy(null);
  $("picture").focus();
};
$("preview").onerror = () => ($("preview").hidden = true);
document.addEventListener("paste", ({ clipboardData: { files, types } }) => {
  if (files.length && !types.includes("text/plain")) searchBy(files[0]); // programs add a picture to a text
});
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) $("drop").classList.remove("over"); // it has left the window
});
document.addEventListener("drop", (event) => {
  $("drop").classList.remove("over");
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  searchBy(event.dataTransfer.files[0]);
});

// The history. On a narrow screen it is far below.
$("jump").onclick = (event) => {
  event.preventDefault();
  $("user-title").focus();
};
$("add").onsubmit = (event) => {
  event.preventDefault();
  const ids = $("add-id").value.split(",").map((id) => id.trim()).filter(Boolean);
  $("add-id").value = "";
  add(ids);
};
$("clear").onclick = () => {
  remove(shown.history);
  $("add-id").focus();
};

// The key.
document.addEventListener("key-needed", () => {
  forgetKey();
  $("forget-key").hidden = true;
  $("key-form").hidden = false;
  $("key").focus();
});
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  keepKey($("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  start();
};
$("forget-key").onclick = () => {
  forgetKey();
  location.reload();
};

start();
