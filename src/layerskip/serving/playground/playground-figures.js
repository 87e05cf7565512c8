// What the rounds of an answer say: layers that run, drafts accepted at each position, figures.

import { element } from "./playground-answer.js";

const LABELLED = 32; // layers that all have their number beside them

export function significant(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  return value >= 99.5 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
}
export const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)}%` : "–");
export function seconds(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  return value >= 1 ? `${significant(value)} s` : `${significant(1000 * value)} ms`;
}

/** The layers as cells that light up as they run, with the number of passes for a token beside them. */
export class Layers {
  constructor(place, adapterMark) {
    this.place = place;
    this.adapterMark = adapterMark;
    this.rows = [];
  }

  /** Draws the layers of a model. */
  show(number, adapted) {
    const step = number > LABELLED ? Math.ceil(number / 12) : 1;
    this.rows = Array.from({ length: number }, (_, index) => {
      const row = element("div", "layer");
      row.classList.toggle("adapted", adapted.includes(index + 1));
      row.classList.toggle("shown", index === 0 || (index + 1) % step === 0);
      const bar = element("span", "bar");
      bar.append(element("i"));
      row.append(element("span", "number", String(index + 1)), element("span", "cell"), bar, element("span", "passes"));
      return row;
    });
    this.place.classList.toggle("many", step > 1);
    this.place.style.setProperty("--row", `${Math.max(5, Math.min(14, Math.floor(400 / number)))}px`);
    this.place.replaceChildren(...this.rows);
    this.adapterMark.hidden = !adapted.length;
    this.reset();
  }

  reset() {
    this.passes = this.rows.map(() => 0);
    this.exit = 0;
    this.lit = null;
    this.draw(0);
  }

  /** What was counted, to be shown again later. */
  get state() {
    return [this.passes, this.exit];
  }

  set state([passes, exit]) {
    [this.passes, this.exit] = [passes, exit];
  }

  /** Counts the passes of a round, or of several plain steps. `depth`: layers that run at all. */
  add(round, depth) {
    const drafted = round.exit_layer ?? 0;
    const whole = round.drafts.length ? 1 : Math.max(1, round.tokens.length);
    for (let layer = 0; layer < Math.min(depth, this.rows.length); layer += 1) {
      this.passes[layer] += layer < drafted ? round.drafts.length + 1 : whole;
    }
    this.exit = drafted || this.exit;
    this.lit = { drafted, depth, adapter: round.drafter === "exit_adapter" };
  }

  /** Lights what ran since the last frame, and draws passes for each token. */
  draw(tokens) {
    if (!this.rows.length) return;
    const each = this.passes.map((passes) => (tokens ? passes / tokens : 0));
    const most = Math.max(1, ...each);
    this.rows.forEach((row, index) => {
      const { drafted, depth, adapter } = this.lit ?? { drafted: 0, depth: 0, adapter: false };
      row.classList.toggle("draft", index < drafted);
      row.classList.toggle("verify", index >= drafted && index < depth);
      row.classList.toggle("adapter", adapter && index + 1 === drafted);
      row.classList.toggle("early", index < this.exit);
      row.style.setProperty("--passes", (each[index] / most).toFixed(3));
      row.lastChild.textContent = tokens ? each[index].toFixed(2) : "";
    });
    this.lit = null;
    const early = this.exit ? `${each[0].toFixed(2)} in layers 1 to ${this.exit}, and in the others ` : "";
    const passes = tokens ? `; passes for a token: ${early}${each.at(-1).toFixed(2)}` : "";
    this.place.setAttribute("aria-label", `${this.rows.length} layers${passes}`);
  }
}

/** Drafts and accepted drafts, by their position in the round. */
export class Positions {
  constructor(place, note) {
    this.place = place;
    this.note = note;
    this.reset();
  }

  reset() {
    this.drafted = [];
    this.accepted = [];
    this.columns = [];
    this.place.replaceChildren();
    this.note.textContent = "Nothing was drafted yet.";
  }

  /** What was counted, to be shown again later. */
  get state() {
    return [this.drafted, this.accepted];
  }

  set state([drafted, accepted]) {
    this.reset();
    [this.drafted, this.accepted] = [drafted, accepted];
  }

  add(round) {
    round.drafts.forEach((_, place) => {
      this.drafted[place] = (this.drafted[place] ?? 0) + 1;
      this.accepted[place] = (this.accepted[place] ?? 0) + (place < round.num_accepted ? 1 : 0);
    });
  }

  /** Accepted drafts as a share of all; NaN without drafts. */
  get rate() {
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    return sum(this.accepted) / sum(this.drafted);
  }

  draw() {
    while (this.columns.length < this.drafted.length) {
      const column = element("div", "position");
      const box = element("div", "column");
      box.append(element("i"));
      column.append(box, element("div"), element("div", "", String(this.columns.length + 1)));
      this.columns.push(column);
      this.place.append(column);
    }
    const rates = this.drafted.map((number, place) => this.accepted[place] / number);
    rates.forEach((rate, place) => {
      const column = this.columns[place];
      column.querySelector("i").style.height = percent(rate);
      column.children[1].textContent = String(Math.round(100 * rate));
      column.title = `Draft ${place + 1}: ${this.accepted[place]} of ${this.drafted[place]} accepted`;
    });
    if (!rates.length) return;
    this.note.textContent = "Percent of the drafts that became part of the text, by their place in the round.";
    const words = rates.map((rate, place) => `draft ${place + 1}: ${percent(rate)}`);
    this.place.setAttribute("aria-label", words.join(", "));
  }
}
