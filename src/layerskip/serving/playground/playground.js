// The playground: connects the page's controls with the server.
//
// A link may carry a prompt and settings: ?prompt=def+add(&mode=completion&strategy=ngram&compare=1&run=1.

import { Answer, element, parting } from "./playground-answer.js";
import { Layers, Positions, percent, seconds, significant } from "./playground-figures.js";
import { Settings } from "./playground-settings.js";
import { ServerError, askForModel, generate } from "./playground-stream.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = {
  completion: ["def fibonacci(n):\n    ", "import json\n\ndef read_lines(path):\n", "Once upon a time, there was"],
  chat: ["Explain how a bicycle stays upright.", "Write a haiku about rain.", "List five facts about the moon."],
};
const STRATEGIES = { self_speculative: "self-speculative", ngram: "n-gram", early_exit: "early exit" };

const settings = new Settings($("settings"), $("strategy-note"));
const layers = new Layers($("layers"), $("adapter-mark"));
const positions = new Positions($("positions"), $("positions-note"));
let model = null;
let conversation = []; // messages of the chat so far
let lastText = "";
let running = null; // the AbortController of what is being written

const isWide = () => matchMedia("(min-width: 901px)").matches;
const mode = () => document.querySelector("input[name=mode]:checked").value;
const nameOf = (strategy) => STRATEGIES[strategy] ?? strategy;

// ---- The server ----

async function connect() {
  try {
    model = await askForModel(settings.key);
  } catch (error) {
    fail(error);
    return false;
  }
  const about = model.layerskip ?? {};
  $("model").textContent = model.id;
  document.title = `${model.id} – layerskip playground`;
  $("about").textContent = [
    about.num_layers && `${about.num_layers} layers`,
    about.adapted_exits?.length && `exit adapters at: ${about.adapted_exits.join(", ")}`,
    about.max_model_len && `context of ${about.max_model_len.toLocaleString("en")} tokens`,
    about.chat === false && "no chat template, so completions only",
  ].filter(Boolean).join(" · ");
  layers.show(about.num_layers ?? 0, about.adapted_exits ?? []);
  settings.show(about);
  const chat = document.querySelector("input[value=chat]");
  chat.disabled = about.chat === false;
  chat.checked = !chat.disabled;
  changeMode();
  fail(null);
  return true;
}

function fail(error) {
  $("error").hidden = error === null;
  $("error").textContent = error === null ? "" : error.message;
  if (error instanceof ServerError && (error.status === 401 || error.status === 403)) {
    $("key-field").hidden = false;
    $("settings-fold").open = true;
    settings.fields.key.focus();
  }
}

// ---- One answer ----

/** Streams an answer into a place; also what was written when it is stopped. */
async function write(body, place) {
  layers.reset();
  positions.reset();
  const answer = new Answer(place);
  const depth = settings.depth(body);
  const path = body.messages ? "v1/chat/completions" : "v1/completions";
  let frame = 0;
  const draw = () => {
    frame = 0;
    following(() => answer.draw());
    layers.draw(answer.tokens);
    positions.draw();
    show(answer);
  };
  try {
    for await (const chunk of generate(path, body, { key: settings.key, signal: running.signal })) {
      answer.take(chunk);
      if (chunk.speculation) {
        layers.add(chunk.speculation, depth);
        positions.add(chunk.speculation);
      }
      frame ||= requestAnimationFrame(draw);
    }
  } finally {
    cancelAnimationFrame(frame);
    answer.finish();
    draw();
  }
  return answer;
}

/** Figures of an answer beside the text. */
function show(answer) {
  $("speed").textContent = significant(answer.speed);
  $("per-round").textContent = answer.rounds ? significant(answer.tokens / answer.rounds) : "–";
  $("accepted").textContent = percent(positions.rate);
  $("first").textContent = seconds(answer.first);
  $("tokens").textContent = answer.tokens.toLocaleString("en");
  const cached = answer.metrics?.cached_tokens;
  $("cached").textContent = Number.isInteger(cached) ? cached.toLocaleString("en") : "–";
}

/** Draws, and keeps the end of the text in view if it was. */
function following(draw) {
  const box = isWide() ? $("scroll") : document.scrollingElement;
  const below = () =>
    isWide()
      ? box.scrollHeight - box.clientHeight - box.scrollTop
      : $("composer").parentElement.getBoundingClientRect().bottom - innerHeight;
  const follows = below() < 60;
  draw();
  if (follows && below() > 0) box.scrollTop += below();
}

// ---- A turn: one answer, or two to compare ----

/** A column for an answer, with a line that says whose it is. */
function makeAnswer(title, prompt) {
  const column = element("div", "answer");
  const line = element("p", "who");
  const figure = element("span");
  const text = element("div", "text");
  line.append(element("b", "", title), figure);
  if (prompt) text.append(element("span", "given", prompt));
  column.append(line, text);
  return { column, line, figure, text };
}

function describe(answer) {
  const speed = answer.speed === null ? "" : `, ${significant(answer.speed)} tokens/s`;
  return `${answer.tokens.toLocaleString("en")} tokens${speed}`;
}

async function answerOnce(turn, body, prompt) {
  const place = makeAnswer(model.id, prompt);
  turn.append(place.column);
  const answer = await write(body, place.text);
  place.figure.textContent = describe(answer);
  return answer;
}

/** Writes the same answer with speculation and without, one after the other so that neither slows the other down. */
async function answerTwice(turn, body, prompt) {
  const verdict = element("p", "verdict", "Writing with speculation …");
  const pair = element("div", "pair");
  const titles = [nameOf(body.generation_strategy), "autoregressive"];
  const places = titles.map((title) => makeAnswer(title, prompt));
  for (const place of places) {
    place.bar = element("i");
    const speed = element("div", "speed");
    speed.append(place.bar);
    place.line.after(speed);
  }
  pair.append(...places.map((place) => place.column));
  turn.append(verdict, pair);
  const { exit_layer: _exit, num_speculations: _drafts, ...rest } = body;
  const bodies = [body, { ...rest, generation_strategy: "autoregressive" }];
  const answers = [];
  const rounds = [];
  for (const [index, place] of places.entries()) {
    if (running.signal.aborted) break;
    if (index) verdict.textContent = "Writing the same without drafts …";
    answers.push(await write(bodies[index], place.text));
    rounds.push([layers.state, positions.state]);
    const fastest = Math.max(...answers.map((answer) => answer.speed ?? 0));
    answers.forEach((answer, column) => {
      places[column].figure.textContent = describe(answer);
      places[column].bar.style.width = fastest ? percent((answer.speed ?? 0) / fastest) : "0";
    });
  }
  judge(verdict, answers);
  [layers.state, positions.state] = rounds[0]; // the figures beside the texts are those with speculation
  layers.draw(answers[0].tokens);
  positions.draw();
  show(answers[0]);
  verdict.scrollIntoView({ block: "nearest" });
  return answers[0];
}

function judge(verdict, [ours, theirs]) {
  if (!theirs || running.signal.aborted) {
    verdict.textContent = "Stopped before both were written.";
    return;
  }
  const ratio = ours.speed && theirs.speed ? ours.speed / theirs.speed : null;
  const place = parting(ours.text, theirs.text);
  const same = element("span", place < 0 ? "same" : "differs");
  same.textContent = place < 0 ? "The same text." : `The texts differ from character ${place + 1} on.`;
  const figure = element("strong", "", ratio ? `${ratio.toFixed(2)}×` : "–");
  const parts = [figure, element("span", "", "as many tokens/s."), same];
  verdict.replaceChildren(...parts.flatMap((part) => [part, " "]));
}

// ---- Sending ----

function makeBody(prompt) {
  const chosen = settings.read();
  if (chosen === null) return null;
  const options = { include_usage: true, include_drafts: true };
  const body = { model: model.id, stream: true, stream_options: options, ...chosen };
  // The same random numbers for both texts of a comparison.
  if (compares() && chosen.temperature && chosen.seed === undefined) body.seed = Math.floor(Math.random() * 2 ** 31);
  if (mode() !== "chat") return { ...body, prompt };
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  return { ...body, messages: [...system, ...conversation, { role: "user", content: prompt }] };
}

const compares = () => $("compare").checked && settings.strategy !== "autoregressive";

async function send() {
  const prompt = $("prompt").value;
  if (running || !prompt.trim()) return;
  if (model === null && !(await connect())) return;
  const body = makeBody(prompt);
  if (body === null) return;
  fail(null);
  begin();
  const chat = mode() === "chat";
  const added = addTurns(prompt, chat);
  let answer = null;
  try {
    answer = await (compares() ? answerTwice : answerOnce)(added.at(-1), body, chat ? "" : prompt);
  } catch (error) {
    fail(error);
    if (!(error instanceof ServerError)) console.error(error);
    const written = added.at(-1).querySelector(".text")?.textContent;
    if (!written || (!chat && written === prompt)) added.forEach((turn) => turn.remove());
    if (chat) $("prompt").value ||= prompt;
  }
  if (answer !== null) {
    lastText = answer.text;
    if (chat) conversation.push({ role: "user", content: prompt }, { role: "assistant", content: answer.text });
    $("spoken").textContent = answer.text;
  }
  end(answer);
}

/** Places for the message and for its answer. */
function addTurns(prompt, chat) {
  const answered = element("article", "turn");
  const turns = [answered];
  if (chat) {
    const asked = element("article", "turn user");
    asked.append(element("p", "who", "You"), element("div", "text", prompt));
    turns.unshift(asked);
    $("prompt").value = "";
  } else {
    $("turns").replaceChildren();
  }
  $("turns").append(...turns);
  $("empty").hidden = true;
  return turns;
}

function begin() {
  running = new AbortController();
  document.body.dataset.state = "running";
  $("status").textContent = "Writing …";
  setButtons();
}

function end(answer) {
  const stopped = running.signal.aborted ? "Stopped" : "Done";
  running = null;
  document.body.dataset.state = answer === null ? "failed" : "done";
  $("status").textContent = answer === null ? "Failed." : `${stopped}: ${describe(answer)}.`;
  $("empty").hidden = $("turns").hasChildNodes();
  setButtons();
}

function setButtons() {
  $("stop").disabled = running === null;
  $("send").disabled = running !== null;
  $("clear").disabled = running !== null;
  $("copy").disabled = running !== null || !lastText;
}

// ---- Controls ----

function changeMode() {
  const chat = mode() === "chat";
  document.body.classList.toggle("chat", chat);
  $("system-field").hidden = !chat;
  $("prompt").placeholder = chat ? "Your message" : "The beginning of a text";
  const buttons = EXAMPLES[mode()].map((example) => {
    const item = element("li");
    const button = element("button", "", example.split("\n").filter((line) => line.trim())[0]);
    button.type = "button";
    button.addEventListener("click", () => {
      $("prompt").value = example;
      $("prompt").focus();
    });
    item.append(button);
    return item;
  });
  $("examples").replaceChildren(...buttons);
  clear();
}

function clear() {
  conversation = [];
  lastText = "";
  $("turns").replaceChildren();
  $("empty").hidden = false;
  $("status").textContent = "\u00a0";
  fail(null);
  setButtons();
}

async function copy(text, told) {
  try {
    await navigator.clipboard.writeText(text);
    $("status").textContent = told;
  } catch {
    fail(new Error("The browser doesn’t let this page write to the clipboard."));
  }
}

function linkToPrompt() {
  const query = new URLSearchParams({ mode: mode(), prompt: $("prompt").value });
  settings.save(query);
  if ($("compare").checked) query.set("compare", "1");
  return `${location.origin}${location.pathname}?${query}`;
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  $("stop").addEventListener("click", () => {
    running?.abort();
    $("prompt").focus();
  });
  $("clear").addEventListener("click", () => {
    clear();
    $("prompt").focus();
  });
  $("copy").addEventListener("click", () => copy(lastText, "Copied the answer."));
  $("link").addEventListener("click", () => copy(linkToPrompt(), "Copied a link."));
  $("colours").addEventListener("change", (event) => $("scroll").classList.toggle("plain", !event.target.checked));
  $("keep").addEventListener("change", (event) => $("scroll").classList.toggle("keep", event.target.checked));
  document.querySelectorAll("input[name=mode]").forEach((input) => input.addEventListener("change", changeMode));
  settings.fields.key.addEventListener("change", connect);
}

async function start() {
  listen();
  $("settings-fold").open = isWide();
  if (!(await connect())) return;
  const query = new URLSearchParams(location.search);
  const asked = document.querySelector(`input[name=mode][value="${CSS.escape(query.get("mode") ?? "")}"]`);
  if (asked && !asked.disabled) {
    asked.checked = true;
    changeMode();
  }
  settings.load(query);
  $("compare").checked = query.get("compare") === "1";
  $("prompt").value = query.get("prompt") ?? "";
  document.body.dataset.state = "ready";
  if (query.get("run") === "1") await send();
}

start();
