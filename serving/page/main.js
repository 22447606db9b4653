// The page: a prompt, its streamed answer, and the server's figures.

import { Figures } from "/page/figures.js";
import { getJson, streamed } from "/page/stream.js";
import { Answer, tokensOf } from "/page/tokens.js";

const NUMBERS = ["max_tokens", "temperature", "top_k", "top_p", "seed", "presence_penalty", "frequency_penalty"];
const ALTERNATIVES = 5;
const byId = (id) => document.getElementById(id);
const answer = new Answer();
let talk = [];
let running = null;

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

const isChat = () => document.querySelector("input[name=mode]:checked").value === "chat";

function options() {
  const found = {};
  for (const name of NUMBERS) {
    const value = byId(name).value.trim();
    if (value !== "") found[name] = Number(value);
  }
  const stop = byId("stop").value.replaceAll("\\n", "\n");
  if (stop) found.stop = [stop];
  return found;
}

function question(prompt) {
  if (!isChat()) return ["/v1/completions", { ...options(), prompt, logprobs: ALTERNATIVES }];
  const system = byId("system").value;
  const first = system ? [{ role: "system", content: system }] : [];
  const messages = [...first, ...talk, { role: "user", content: prompt }];
  return ["/v1/chat/completions", { ...options(), messages, logprobs: true, top_logprobs: ALTERNATIVES }];
}

async function generate() {
  const prompt = byId("prompt").value;
  const [path, request] = question(prompt);
  if (!isChat()) answer.clear();
  answer.given(isChat() ? `\n\u203a ${prompt}\n` : prompt);
  running = new AbortController();
  busy(true);
  const begun = performance.now();
  let text = "", usage = null, finish = null;
  try {
    for await (const chunk of streamed(path, request, running.signal)) {
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) {
        const piece = choice.text ?? choice.delta?.content ?? "";
        text += piece;
        finish = choice.finish_reason ?? finish;
        answer.add(piece, tokensOf(choice));
      }
    }
    const seconds = (performance.now() - begun) / 1000;
    const tokens = usage?.completion_tokens ?? answer.count;
    say(`${tokens} tokens in ${seconds.toFixed(1)} s (${(tokens / seconds).toFixed(1)} tokens/s), ended by ${finish}.`);
    if (isChat()) {
      talk.push({ role: "user", content: prompt }, { role: "assistant", content: text });
      byId("prompt").value = "";
    }
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error.message, true);
  } finally {
    busy(false);
  }
}

function busy(now) {
  byId("send").disabled = now;
  byId("halt").disabled = !now;
  if (now) say("Generating ...");
}

function clear() {
  running?.abort();
  talk = [];
  answer.clear();
  say("");
}

async function begin() {
  const { data: [model] } = await getJson("/v1/models");
  document.title = `${model.id} - mtk`;
  byId("model").textContent = model.id;
  byId("max_tokens").max = model.max_model_len;
  byId("modes").querySelector("[value=chat]").disabled = !model.chat;
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!byId("send").disabled) generate();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
});
byId("halt").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", clear);
byId("modes").addEventListener("change", () => {
  byId("system").disabled = !isChat();
  clear();
});
begin().catch((error) => say(error.message, true));
new Figures().start();
