// What went wrong, in a sentence, and a button that tries again.

const TRANSIENT = [0, 429, 503, 507]; // 0: no answer at all
const box = document.getElementById("problem");

/** Show the sentence of an error. Where a key is missing or wrong, the page asks for one. */
export function tell(error) {
  const needsKey = error.status === 401;
  box.querySelector("p").textContent = error.message;
  box.querySelector("button").hidden = !TRANSIENT.includes(error.status);
  box.hidden = false;
  if (needsKey) document.dispatchEvent(new Event("key-needed"));
}

export function clearProblem() {
  box.hidden = true;
}

box.querySelector("button").onclick = () => document.dispatchEvent(new Event("try-again"));
