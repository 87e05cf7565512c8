// Talks to the server: its model, and streamed answers.

/** An error that is told to the user in these words. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const LOST = "The connection to the server was lost. Is it still running?";

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** The message in an error body of OpenAI's shape, with the field that it is about. */
function messageOf(body, status) {
  const error = body?.error ?? body;
  const message = typeof error === "string" ? error : error?.message ?? error?.detail;
  if (typeof message === "string" && message) {
    const field = typeof error?.param === "string" && !message.includes(error.param) ? ` (${error.param})` : "";
    return `${message}${field}`;
  }
  return `The server answered with HTTP ${status}.`;
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  return new ServerError(messageOf(body, response.status) + (wait ? ` Try again in ${wait} s.` : ""), response.status);
}

/** The first model of the server: its entry in /v1/models. */
export async function askForModel(key) {
  const response = await fetch("v1/models", { headers: headers(key) }).catch(() => null);
  if (response === null) throw new ServerError(LOST);
  if (!response.ok) throw await refusal(response);
  const model = (await response.json().catch(() => null))?.data?.[0];
  if (!model) throw new ServerError("The server names no model.");
  return model;
}

/** The data of server-sent events, wherever the bytes are cut. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (held + value).split(/\r\n|\n|\r(?!$)/);
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

/**
 * Sends a request and hands over the chunks of its answer.
 * @param {string} path of the endpoint
 * @param {object} body of the request
 * @param {{key: string, signal: AbortSignal}} options
 * @yields {object} chunks
 */
export async function* generate(path, body, { key, signal }) {
  let response;
  try {
    response = await fetch(path, { method: "POST", headers: headers(key), body: JSON.stringify(body), signal });
  } catch (error) {
    if (signal.aborted) return;
    throw new ServerError(LOST);
  }
  if (!response.ok) throw await refusal(response);
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(messageOf(chunk, 500));
      finished ||= Boolean(chunk.choices?.[0]?.finish_reason);
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted) return;
    if (error instanceof ServerError) throw error;
    throw new ServerError(error instanceof SyntaxError ? "The server’s answer can’t be read." : LOST);
  }
  if (!finished && !signal.aborted) throw new ServerError(LOST);
}
