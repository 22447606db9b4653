// The answer as tokens, coloured by how likely they were; the alternatives of the one pointed at.

const byId = (id) => document.getElementById(id);

/** One shape for both interfaces: {token, logprob, top: [{token, logprob}]} for each token. */
export function tokensOf(choice) {
  const found = choice.logprobs;
  if (!found) return [];
  if (found.content) {
    return found.content.map((t) => ({ ...t, top: t.top_logprobs }));
  }
  return found.tokens.map((token, i) => ({
    token,
    logprob: found.token_logprobs[i],
    top: Object.entries(found.top_logprobs[i] ?? {}).map(([t, logprob]) => ({ token: t, logprob })),
  }));
}

export class Answer {
  constructor() {
    this.box = byId("answer");
    this.count = 0;
    this.silent = [];
    this.box.addEventListener("pointerover", (event) => this.#show(event.target));
    this.facts = new WeakMap();
  }

  clear() {
    this.box.replaceChildren();
    byId("alternatives").hidden = true;
    this.count = 0;
    this.silent = [];
  }

  given(text) {
    const span = document.createElement("span");
    span.className = "given";
    span.textContent = text;
    this.box.append(span);
  }

  /** Tokens without text (parts of a character) belong to the text that they lead to. */
  add(text, tokens) {
    this.count += tokens.length;
    tokens = [...this.silent, ...tokens];
    this.silent = text ? [] : tokens;
    if (!text) return;
    const span = document.createElement("span");
    span.textContent = text;
    span.className = "token";
    if (tokens.length) {
      const least = Math.min(...tokens.map((t) => Math.exp(t.logprob)));
      if (least < 0.8) span.classList.add(`sure${Math.min(3, Math.floor(least * 5))}`);
      this.facts.set(span, tokens);
    }
    const atEnd = this.box.scrollTop + this.box.clientHeight >= this.box.scrollHeight - 8;
    this.box.append(span);
    if (atEnd) this.box.scrollTop = this.box.scrollHeight;
  }

  #show(span) {
    const tokens = this.facts.get(span);
    if (!tokens) return;
    this.box.querySelector(".shown")?.classList.remove("shown");
    span.classList.add("shown");
    byId("chosen").textContent = tokens.map((t) => `${JSON.stringify(t.token)} ${percent(t.logprob)}`).join(", ");
    const rows = tokens.flatMap((t) => [...t.top].sort((a, b) => b.logprob - a.logprob).map(row));
    byId("rows").replaceChildren(...rows);
    byId("alternatives").hidden = false;
  }
}

function row({ token, logprob }) {
  const tr = document.createElement("tr");
  const meter = document.createElement("meter");
  meter.value = Math.exp(logprob);
  for (const content of [JSON.stringify(token), percent(logprob), meter]) {
    const td = document.createElement("td");
    td.append(content);
    tr.append(td);
  }
  return tr;
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
