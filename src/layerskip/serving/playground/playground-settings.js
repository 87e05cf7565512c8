// The settings: fields of a request, kept in a form; and links that carry them.

const NOTES = {
  adaptive: "Decides before each round who drafts, at which layer, and how many tokens.",
  self_speculative: "The first layers draft, the others verify.",
  ngram: "Drafts what followed the last words where they stood before; all layers verify.",
  autoregressive: "One token for each pass through all layers, without drafts.",
  early_exit: "The layers behind the exit never run. Fast, and another text, which is usually worse.",
};
const USES = { exit_layer: ["self_speculative", "early_exit"], num_speculations: ["self_speculative", "ngram"] };
const NUMBERS = ["exit_layer", "num_speculations", "temperature", "top_p", "seed", "max_tokens"];
const LINKED = ["strategy", ...NUMBERS, "system"];

export class Settings {
  constructor(form, note) {
    this.form = form;
    this.fields = form.elements;
    this.note = note;
    this.numLayers = 0;
    form.addEventListener("input", () => this.#update());
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  /** Offers what a model has. */
  show({ num_layers: layers = 0, adapted_exits: adapted = [], max_model_len: longest = 0 }) {
    this.numLayers = layers;
    const exits = Array.from({ length: Math.max(0, layers - 1) }, (_, place) => place + 1);
    const label = (exit) => `${exit}${adapted.includes(exit) ? " (adapter)" : ""}`;
    const options = exits.map((exit) => new Option(label(exit), String(exit)));
    this.fields.exit_layer.replaceChildren(new Option("auto", ""), ...options);
    if (longest) this.fields.max_tokens.max = String(longest);
    this.#update();
  }

  #update() {
    const strategy = this.strategy;
    for (const [name, strategies] of Object.entries(USES)) this.fields[name].disabled = !strategies.includes(strategy);
    this.note.textContent = NOTES[strategy];
  }

  get strategy() {
    return this.fields.strategy.value;
  }

  get key() {
    return this.fields.key.value.trim();
  }

  get system() {
    return this.fields.system.value.trim();
  }

  /** Layers that run for a token: all but with early exit. */
  depth(body) {
    return body.generation_strategy === "early_exit" ? body.exit_layer : this.numLayers;
  }

  /** The fields of a request; null if one isn't valid, which the form then shows. */
  read() {
    if (!this.form.reportValidity()) return null;
    const body = { generation_strategy: this.strategy };
    for (const name of NUMBERS) {
      const field = this.fields[name];
      if (!field.disabled && field.value !== "") body[name] = Number(field.value);
    }
    if (body.top_p === 1) delete body.top_p;
    if (body.generation_strategy === "early_exit") body.exit_layer ??= Math.max(1, Math.floor(this.numLayers / 4));
    return body;
  }

  /** Takes settings from a link. */
  load(query) {
    for (const name of LINKED) if (query.has(name)) this.fields[name].value = query.get(name);
    this.#update();
  }

  /** Puts settings that aren't the usual ones into a link. */
  save(query) {
    for (const name of LINKED) {
      const field = this.fields[name];
      const usual = field.tagName === "SELECT" ? field.options[0]?.value ?? "" : field.defaultValue;
      if (!field.disabled && field.value !== usual) query.set(name, field.value);
    }
  }
}
