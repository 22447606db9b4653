// Live figures: the server's own /metrics, read every two seconds while the page is visible.

const EVERY = 2000;
const KEPT = 60;
const byId = (id) => document.getElementById(id);

/** Sums of Prometheus' samples by name. */
export function parse(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-z_]+)(?:\{[^}]*\})? (\S+)$/.exec(line);
    if (match) sums.set(match[1], (sums.get(match[1]) ?? 0) + Number(match[2]));
  }
  return sums;
}

export class Figures {
  #before = null;
  #speeds = [];

  start() {
    const tick = async () => {
      if (!document.hidden) await this.read().catch(() => this.#light(false, "no answer"));
      setTimeout(tick, EVERY);
    };
    tick();
  }

  async read() {
    const [metrics, health] = await Promise.all([fetch("/metrics"), fetch("/readyz")]);
    if (metrics.ok) this.#write(parse(await metrics.text()), performance.now());
    const state = await health.json();
    this.#light(health.ok, state.reason || "ready");
  }

  #write(now, at) {
    const old = this.#before;
    this.#before = { values: now, at };
    const get = (name) => now.get(name) ?? 0;
    put("running", get("mtk_sequences_running"));
    put("waiting", get("mtk_requests_waiting"));
    put("cached", get("mtk_cached_tokens"));
    if (!old) return;
    const gained = (name) => get(name) - (old.values.get(name) ?? 0);
    const speed = gained("mtk_generated_tokens_total") / ((at - old.at) / 1000);
    put("speed", speed.toFixed(speed < 10 ? 1 : 0));
    for (const [figure, name] of [["first", "time_to_first_token"], ["next", "inter_token"]]) {
      const count = gained(`mtk_${name}_seconds_count`);
      if (count) put(figure, time(gained(`mtk_${name}_seconds_sum`) / count));
    }
    this.#speeds = [...this.#speeds, speed].slice(-KEPT);
    const top = Math.max(1, ...this.#speeds);
    const points = this.#speeds.map((s, i) => `${(120 * i) / (KEPT - 1)},${31 - (30 * s) / top}`);
    byId("curve-line").setAttribute("points", points.join(" "));
  }

  #light(good, words) {
    const light = byId("light");
    light.classList.toggle("good", good);
    light.classList.toggle("bad", !good);
    light.title = words;
  }
}

const put = (name, value) => { byId(`figure-${name}`).textContent = value; };
const time = (seconds) => (seconds < 1 ? `${(1000 * seconds).toFixed(0)} ms` : `${seconds.toFixed(1)} s`);
