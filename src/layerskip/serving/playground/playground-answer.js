// One answer: its text in coloured pieces, and how fast it came.

const SOURCES = new Set(["accepted", "corrected", "bonus"]);

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** Appends to a place on the page what arrives of an answer, once for each frame. */
export class Answer {
  /** @param {HTMLElement} place that takes the text */
  constructor(place) {
    this.text = "";
    this.tokens = 0;
    this.usage = null;
    this.metrics = null;
    this.rounds = 0;
    this.finishReason = null;
    this.sent = performance.now();
    this.firstAt = null;
    this.lastAt = null;
    this.firstTokens = 0;
    this.place = place;
    this.end = element("span");
    this.tail = element("span", "tail");
    this.tail.setAttribute("aria-hidden", "true");
    this.end.append(this.tail, element("span", "caret"));
    this.place.append(this.end);
    this.told = []; // tokens whose text hasn't come yet
    this.waiting = []; // nodes for the next frame
    this.current = null; // the last piece, which grows while the source stays the same
    this.flash = ""; // drafts that were taken back since the last frame
  }

  /** Takes a chunk of the stream. */
  take(chunk) {
    const now = performance.now();
    const choice = chunk.choices?.[0];
    const round = chunk.speculation;
    const text = choice ? choice.delta?.content ?? choice.text ?? "" : "";
    this.finishReason = choice?.finish_reason ?? this.finishReason;
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.metrics) this.metrics = chunk.metrics;
    if (round) {
      this.rounds += 1;
      this.tokens += round.tokens.length;
      this.told.push(...this.#tokensOf(round));
    } else if (text) {
      this.tokens += 1;
    }
    if (text || round) {
      if (this.firstAt === null) {
        this.firstAt = now;
        this.firstTokens = this.tokens;
      }
      this.lastAt = now;
    }
    if (text) this.#write(text);
  }

  /** The tokens that a round has gained; the one in place of drafts has those that were taken back. */
  #tokensOf(round) {
    const tokens = round.tokens.map(({ text, source }) => ({ text, source, taken: "" }));
    const corrected = tokens.find((token) => token.source === "corrected");
    const taken = round.drafts.slice(round.num_accepted).map((draft) => draft.text).join("");
    if (corrected) corrected.taken = taken;
    this.flash = taken || this.flash;
    return tokens;
  }

  /** Cuts a text that has come along the tokens that it is made of. */
  #write(text) {
    this.text += text;
    while (text) {
      const token = this.told[0];
      if (token === undefined) {
        this.#piece(text, this.current?.source ?? "decoded");
        return;
      }
      this.#takeBack(token);
      if (text.startsWith(token.text)) {
        this.#piece(token.text, token.source);
        text = text.slice(token.text.length);
        this.told.shift();
      } else if (token.text.startsWith(text)) {
        this.#piece(text, token.source);
        token.text = token.text.slice(text.length);
        return;
      } else { // a character of several tokens, none of which is a text by itself
        this.told.forEach((each) => this.#takeBack(each));
        this.#piece(text, token.source);
        this.told = [];
        return;
      }
    }
  }

  #piece(text, source) {
    if (!text) return;
    const known = SOURCES.has(source) ? source : "";
    // Each token is a piece of its own, so that the lines below them show where they begin; plain text isn't cut.
    if (!known && this.current?.source === "decoded") {
      this.current.node.data += text;
      return;
    }
    const node = known ? element("span", known, text) : document.createTextNode(text);
    this.current = { source: known || "decoded", node };
    this.waiting.push(node);
  }

  /** Puts drafts that were taken back before the token in their place. */
  #takeBack(token) {
    if (!token.taken) return;
    const node = element("span", "taken", token.taken);
    node.setAttribute("aria-hidden", "true");
    token.taken = "";
    this.current = null;
    this.waiting.push(node);
  }

  /** Puts on the page what has come since the last frame. */
  draw() {
    if (this.waiting.length) {
      this.end.before(...this.waiting);
      this.waiting = [];
    }
    if (this.flash) {
      const tail = this.tail.cloneNode(false); // a new node begins its animation anew
      tail.textContent = this.flash;
      this.tail.replaceWith(tail);
      this.tail = tail;
      this.flash = "";
    }
  }

  /** Draws the rest; nothing more will come. */
  finish() {
    this.draw();
    this.end.remove();
    if (Number.isInteger(this.usage?.completion_tokens)) this.tokens = this.usage.completion_tokens;
  }

  /** Tokens a second from the first piece on; null while there is only one. */
  get speed() {
    const later = this.tokens - this.firstTokens;
    const seconds = this.writingSeconds;
    return later > 0 && seconds > 0 ? later / seconds : null;
  }

  /**
   * Seconds from the first piece to the end: the server's, once it has told them, because a page that draws reads its
   * stream late.
   */
  get writingSeconds() {
    const { seconds, time_to_first_token_seconds: first } = this.metrics ?? {};
    return seconds > first ? seconds - first : (this.lastAt - this.firstAt) / 1000;
  }

  /** Seconds to the first piece, or null. */
  get first() {
    const told = this.metrics?.time_to_first_token_seconds;
    return told ?? (this.firstAt === null ? null : (this.firstAt - this.sent) / 1000);
  }
}

/** Where two texts part: the number of characters that they begin with in common; -1 if they are the same. */
export function parting(one, other) {
  if (one === other) return -1;
  const [left, right] = [[...one], [...other]];
  let place = 0;
  while (place < left.length && left[place] === right[place]) place += 1;
  return place;
}
