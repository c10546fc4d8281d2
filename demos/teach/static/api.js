// Requests to the server. A refusal becomes an Error with the server's message.

async function asked(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer; start it again with make teach");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Error(said.error ?? `the server answered with status ${response.status}`);
}

export async function post(path, values = {}) {
  const response = await asked(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(values),
  });
  return response.json();
}

/** Sends one picture unchanged. */
export async function send(path, blob) {
  const headers = { "Content-Type": "application/octet-stream" };
  return (await asked(path, { method: "POST", headers, body: blob })).json();
}

export const getJson = async (path) => (await asked(path)).json();
export const getBytes = async (path) => new Uint8Array(await (await asked(path)).arrayBuffer());

/** Calls `changed` with the server's state immediately and after every change; a broken connection is made again. */
export function follow(changed, broken) {
  const events = new EventSource("/api/events");
  events.onmessage = (event) => changed(JSON.parse(event.data));
  events.onerror = broken;
}

export function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}
