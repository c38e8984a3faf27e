// The page of `xccl serve --http`: sends a prompt, shows the answer as it comes, and draws what /state says of the ranks.

const POLL_MS = 1000;
const TIGHT_RANKS = 9; // from so many ranks on, cells have no room for numbers
const find = (id) => document.getElementById(id);

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

function formatBytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; count >= 1000 && unit < units.length - 1; unit++) count /= 1000;
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

const shade = (share) => `rgba(var(--accent), ${(0.07 + 0.63 * share).toFixed(3)})`;

// ---- the answer ----

async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (pending + value).split("\n\n");
    pending = events.pop();
    for (const event of events) yield event.slice("data: ".length);
  }
}

async function post(signal) {
  const headers = { "Content-Type": "application/json" };
  if (find("key").value) headers.Authorization = `Bearer ${find("key").value}`;
  const request = {
    model: find("model").textContent,
    prompt: find("prompt").value,
    max_tokens: Number(find("max-tokens").value),
    temperature: Number(find("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (find("seed").value) request.seed = Number(find("seed").value);
  const response = await fetch("v1/completions", { method: "POST", headers, body: JSON.stringify(request), signal });
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

function describe(started, first, last, usage) {
  const parts = [`first token after ${(first - started).toFixed(0)} ms`];
  if (usage) {
    const later = usage.completion_tokens - 1;
    parts.unshift(`${usage.completion_tokens} tokens`);
    if (later > 0) parts.push(`${((last - first) / later).toFixed(1)} ms for each further one`);
  }
  return parts.join(", ");
}

async function stream(answer, signal) {
  const started = performance.now();
  let first, last, usage;
  for await (const event of serverSentEvents((await post(signal)).body)) {
    if (event === "[DONE]") break;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new Error(chunk.error.message);
    usage = chunk.usage ?? usage;
    const text = chunk.choices[0]?.text;
    if (text) {
      last = performance.now();
      first ??= last;
      answer.append(text);
      answer.scrollTop = answer.scrollHeight;
    }
  }
  if (first) find("figures").textContent = describe(started, first, last, usage);
}

async function send(event) {
  event.preventDefault();
  const answer = find("answer");
  const abort = new AbortController();
  find("stop").onclick = () => abort.abort();
  answer.replaceChildren(element("span", find("prompt").value, "prompt"));
  find("figures").textContent = "";
  find("send").disabled = true;
  find("stop").hidden = false;
  answer.dataset.state = "running";
  try {
    await stream(answer, abort.signal);
  } catch (error) {
    if (!abort.signal.aborted) answer.append(element("div", error.message, "error"));
  } finally {
    answer.dataset.state = "ended";
    find("send").disabled = false;
    find("stop").hidden = true;
  }
}

// ---- the ranks ----

function gauge(name, used, total) {
  const label = element("label", name);
  label.append(element("span", `${used} of ${total}`));
  const bar = element("progress");
  bar.max = Math.max(total, 1);
  bar.value = used;
  return [label, bar];
}

function drawRanks(ranks) {
  find("ranks").replaceChildren(
    ...ranks.map((rank) => {
      const card = element("div", "", "rank");
      const title = element("div");
      title.append(element("strong", `rank ${rank.rank}`), ...rank.roles.map((role) => element("span", role, `role ${role}`)));
      card.append(title);
      if (rank.slots) {
        card.append(...gauge("requests", rank.running, rank.slots), ...gauge("KV blocks", rank.kv_blocks_used, rank.kv_blocks));
      }
      card.title = `pid ${rank.pid}, ${rank.steps} steps, ${rank.experts.length} experts, ${rank.waiting} requests wait`;
      return card;
    }),
  );
}

function drawBytes(bytes) {
  const tight = bytes.length >= TIGHT_RANKS;
  const most = Math.max(1, ...bytes.flatMap((row, source) => row.filter((_, destination) => source !== destination)));
  const head = element("tr");
  head.append(element("th"), ...bytes.map((_, number) => element("th", tight ? number : `to ${number}`)));
  const rows = bytes.map((row, source) => {
    const line = element("tr");
    line.append(element("th", tight ? source : `from ${source}`));
    row.forEach((count, destination) => {
      const own = source === destination;
      const cell = element("td", tight ? "" : formatBytes(count), `${tight ? "tight" : ""} ${own ? "own" : ""}`);
      if (!own) cell.style.background = shade(count / most);
      cell.title = `${formatBytes(count)} ${own ? `stay on rank ${source}` : `from rank ${source} to rank ${destination}`}`;
      line.append(cell);
    });
    return line;
  });
  find("bytes").replaceChildren(head, ...rows);
}

function drawExperts(load, ranks) {
  const owner = new Map(ranks.flatMap((rank) => (rank.experts ?? []).map((expert) => [expert, rank.rank])));
  find("experts").replaceChildren(
    ...Object.entries(load).map(([layer, experts]) => {
      const line = element("div", "", "layer");
      const most = Math.max(1, ...experts);
      line.append(element("span", layer));
      experts.forEach((count, expert) => {
        const cell = element("i", "", expert && owner.get(expert) !== owner.get(expert - 1) ? "edge" : "");
        cell.style.background = shade(count / most);
        cell.title = `expert ${expert} on rank ${owner.get(expert)}: ${count} tokens`;
        line.append(cell);
      });
      return line;
    }),
  );
}

function drawServer(state, previous) {
  const milliseconds = (pair) => (pair ? `${pair.p50.toFixed(1)} / ${pair.p99.toFixed(1)} ms` : "none yet");
  const drafted = state.ranks.reduce((sum, rank) => sum + (rank.drafted ?? 0), 0);
  const accepted = state.ranks.reduce((sum, rank) => sum + (rank.accepted ?? 0), 0);
  const seconds = previous ? (state.at - previous.at) / 1000 : 0;
  const rows = [
    ["time to first token p50 / p99", milliseconds(state.ttft_ms)],
    ["time per output token p50 / p99", milliseconds(state.tpot_ms)],
    [`requests (${state.slots} run at a time, ${state.queue} may wait)`, state.unfinished],
    ["tokens generated", state.generated.toLocaleString("en")],
    ["tokens/s", seconds ? ((state.generated - previous.generated) / seconds).toFixed(0) : "-"],
    ["MTP drafts confirmed", drafted ? `${((100 * accepted) / drafted).toFixed(0)} %` : "-"],
  ];
  find("server").replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

let previous = null;

async function poll() {
  try {
    const state = { ...(await (await fetch("state")).json()), at: performance.now() };
    find("model").textContent = state.model;
    find("max-tokens").max = state.context;
    find("key-label").hidden = !state.needs_key;
    find("health").textContent = state.ranks.length === 1 ? "1 rank serves" : `${state.ranks.length} ranks serve`;
    find("health").className = "";
    drawRanks(state.ranks);
    drawBytes(state.bytes);
    drawExperts(state.expert_load, state.ranks);
    drawServer(state, previous);
    previous = state;
  } catch {
    find("health").textContent = "the server does not answer";
    find("health").className = "bad";
  }
}

find("form").addEventListener("submit", send);
setInterval(() => document.hidden || poll(), POLL_MS);
poll();
