// The service, as the page asks it. Whatever fails becomes a sentence for people.

const KEY = "key"; // in sessionStorage: it is gone when the tab is closed

export const key = () => sessionStorage.getItem(KEY);
export const keepKey = (secret) => sessionStorage.setItem(KEY, secret);
export const forgetKey = () => sessionStorage.removeItem(KEY);

export class Refused extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

/** The JSON that a route answers with. body: an object or a form. Throws Refused, and what `signal` is aborted with. */
export async function ask(path, { body, signal } = {}) {
  const answer = await send(path, body, signal);
  return json(answer, signal);
}

/** The picture of a note; null: it has none that can be used. */
export async function askPicture(path) {
  const answer = await send(path);
  return answer.status === 200 ? answer.blob() : null;
}

async function send(path, body, signal) {
  const headers = { Accept: "application/json" };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  if (body && !(body instanceof FormData)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body, signal });
  } catch {
    signal?.throwIfAborted();
    throw new Refused("The service does not answer. Perhaps it is not running, or the picture cannot be read.");
  }
  if (!answer.ok) throw await refusal(answer, signal);
  return answer;
}

async function json(answer, signal) {
  try {
    return await answer.json();
  } catch {
    signal?.throwIfAborted();
    throw new Refused("The service's answer cannot be read.", answer.status);
  }
}

async function refusal(answer, signal) {
  const { detail } = await json(answer, signal).catch(() => ({}));
  const { status } = answer;
  const reason = detail ? sentence(detail) : `The service answered with the status ${status}.`;
  const wait = answer.headers.get("Retry-After");
  if (status === 401) return new Refused(`The service ${key() ? "does not know this" : "asks for a"} key.`, status);
  if (status === 413) return new Refused(`The picture is too large. ${reason}`, status);
  if (status === 429) return new Refused(`The service is busy. ${reason} Try again in ${wait ?? 1} s.`, status);
  if (status === 503) return new Refused(`The service cannot answer now. ${reason}`, status);
  return new Refused(reason, status);
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
