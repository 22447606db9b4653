// Requests to the server, and its streams of events.

export class Refused extends Error {}

/** The JSON that `path` answers; throws Refused with the server's own words. */
export async function getJson(path) {
  const response = await fetch(path);
  return checked(response);
}

async function checked(response) {
  const body = await response.json().catch(() => ({}));
  if (!response.ok) {
    const wait = response.headers.get("Retry-After");
    const later = wait ? ` Try again in ${wait} s.` : "";
    throw new Refused((body.error?.message ?? body.reason ?? `HTTP ${response.status}`) + later);
  }
  return body;
}

/** Chunks of a streamed answer; throws Refused for an error before or in the middle. */
export async function* streamed(path, request, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) await checked(response);
  let ended = false;
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data: ")) continue;
    if (line === "data: [DONE]") { ended = true; break; }
    const chunk = JSON.parse(line.slice(6));
    if (chunk.error) throw new Refused(chunk.error.message);
    yield chunk;
  }
  if (!ended) throw new Refused("the answer was cut off");
}

async function* lines(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const parts = rest.split("\n");
    rest = parts.pop();
    yield* parts;
    if (done) return;
  }
}
