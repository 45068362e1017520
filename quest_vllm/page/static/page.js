/* One prompt, several budgets: sends the requests, times the streams, and draws what came back. */

import { isSparse, showBytes, stepBytes } from "./bytes.js";
import { Trace, describePlace, drawMap } from "./map.js";

const find = (selector, within = document) => within.querySelector(selector);
const root = new URL(".", location.href); // the server's root, also behind --root-path
const POLL_MS = 400;
const page = { info: null, model: null, runs: [], stop: null, playing: null };

class Refused extends Error {}

async function call(path, options = {}) {
  const key = find("#key").value;
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const reply = await fetch(new URL(path, root), { ...options, headers });
  if (reply.ok) return reply;
  if (reply.status === 401) find("#key-row").hidden = false;
  const text = await reply.text();
  let message = text;
  try {
    const { error } = JSON.parse(text);
    message = error.message || error;
  } catch { /* no JSON: the text itself */ }
  throw new Refused(`${reply.status}: ${String(message).slice(0, 400)}`);
}

async function getServer() {
  const models = await (await call("v1/models")).json();
  page.info = await (await call("v1/quest/info")).json();
  page.model = models.data[0].id;
  const { layers, max_model_len: most, page_size: size, default_budget: budget } = page.info;
  find("#server").textContent = `${page.model}: ${layers} layers, ${most} tokens of context, pages of ${size} tokens,`
    + ` default budget ${budget || "0 (dense)"}`;
}

function problem(text) {
  find("#problem").textContent = text;
}

/* ---- one run ---- */

function makeRun(budget) {
  const card = find("#card").content.cloneNode(true).firstElementChild;
  find("h2", card).textContent = budget ? `${budget} tokens` : "Dense";
  find("#runs").append(card);
  const run = { budget, card, trace: new Trace(), number: 1 + Math.floor(Math.random() * (2 ** 31 - 2)), cursor: 0,
    context: 0, prompt: 0, tokens: 0, text: "", start: 0, first: 0, last: 0, done: false };
  find("canvas", card).addEventListener("pointermove", (event) => pointAt(run, event));
  find("canvas", card).addEventListener("pointerdown", (event) => pointAt(run, event));
  find("canvas", card).addEventListener("pointerleave", () => show(run));
  return run;
}

async function execute(run, prompt, signal) {
  const body = {
    model: page.model, messages: [{ role: "user", content: prompt }], max_tokens: Number(find("#tokens").value),
    temperature: 0, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
    cache_salt: `quest-page-${run.number}`,
    vllm_xargs: { quest_token_budget: run.budget, quest_trace: run.number },
  };
  run.start = performance.now();
  try {
    const reply = await call("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    const polling = page.info.map && run.budget ? poll(run, signal) : null;
    await readStream(reply.body, (event) => take(run, event));
    run.done = true;
    await polling;
  } catch (error) {
    run.done = true;
    if (error.name === "AbortError") return;
    find(".answer", run.card).classList.add("bad");
    find(".answer", run.card).textContent = error instanceof Refused ? error.message : `The stream broke off: ${error.message}`;
  } finally {
    show(run);
  }
}

async function readStream(stream, take) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = stream.getReader(); ;) {
    const { value, done } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") take(JSON.parse(line.slice(6)));
    }
    if (done) return;
  }
}

function take(run, event) {
  if (event.error) throw new Refused(event.error.message);
  const said = event.choices.length ? event.choices[0].delta.content : "";
  if (event.usage) {
    run.prompt = event.usage.prompt_tokens;
    run.tokens = event.usage.completion_tokens;
    run.context = run.prompt + Math.max(0, run.tokens - 1); // the newest token is not in the cache yet
  }
  if (said) {
    run.last = performance.now();
    if (!run.first) run.first = run.last;
    run.text += said;
  }
  show(run);
}

async function poll(run, signal) {
  for (let last = false; ;) {
    const reply = await call(`v1/quest/trace/${run.number}?after=${run.cursor}`, { signal });
    const { next, records } = await reply.json();
    run.cursor = next;
    run.trace.add(records);
    if (records.length) showSteps();
    if (last && !records.length) return;
    last = run.done;
    await new Promise((wake) => setTimeout(wake, records.length ? POLL_MS / 2 : POLL_MS));
  }
}

/* ---- showing ---- */

function seconds(ms) {
  return ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

function show(run) {
  const { card, budget } = run;
  if (run.first) {
    find(".answer", card).textContent = run.text;
    find(".first", card).textContent = seconds(run.first - run.start);
  }
  if (run.tokens > 1 && run.last > run.first) {
    find(".each", card).textContent = seconds((run.last - run.first) / (run.tokens - 1));
  }
  if (run.tokens > 1) {
    const { read, dense } = stepBytes(page.info, run.context, budget);
    find(".bytes", card).textContent = showBytes(read);
    find(".bytes", card).dataset.bytes = read;
    find(".bytes", card).dataset.context = run.context;
    find(".share", card).textContent = `${((100 * read) / dense).toFixed(0)}%`;
  }
  if (run.context) showMap(run);
}

/** Length of the context of the step that the slider is at, for one run; null for all steps. */
function chosenLength(run) {
  if (find("#all-steps").checked) return null;
  return Math.min(run.prompt + 1 + Number(find("#step").value), run.context); // a run may be shorter than the slider
}

function chosenLayers(run) {
  const length = chosenLength(run);
  if (!isSparse(page.info, length === null ? run.context : length, run.budget)) return { layers: new Map(), known: true };
  const layers = run.trace.layers(length);
  return { layers, known: layers.size > 0 };
}

function showMap(run) {
  const canvas = find("canvas", run.card);
  const { layers, known } = chosenLayers(run);
  find("figure", run.card).hidden = false;
  if (!known) {
    canvas.hidden = run.trace.steps.size === 0;
    const why = page.info.map ? (run.done ? "No decode step was recorded here." : "Waiting for the first decode step.")
      : "This backend keeps its selection on the device: no map.";
    find("figcaption", run.card).textContent = why;
    return;
  }
  canvas.hidden = false;
  const length = chosenLength(run) || run.context;
  const pages = Math.ceil(length / page.info.page_size);
  const cells = layers.size ? layers.values().next().value.share.length : Math.min(512, pages);
  drawMap(canvas, page.info, layers, cells);
  const words = caption(run, layers, pages, length);
  canvas.setAttribute("aria-label", words);
  find("figcaption", run.card).textContent = words;
}

function caption(run, layers, pages, length) {
  const where = "Layers from top to bottom, context from left to right.";
  if (!layers.size) return `Every layer reads all ${pages} pages. ${where}`;
  const budget = Math.ceil(Math.max(run.budget, page.info.min_budget) / page.info.page_size);
  const touched = new Set();
  for (const { share } of layers.values()) share.forEach((value, cell) => value && touched.add(cell));
  const cells = layers.values().next().value.share.length;
  const mean = page.info.by_layer ? "On average " : "";
  return `${mean}${budget} of ${pages} pages in each ${page.info.select_heads} head; ${Math.round((100 * touched.size) / cells)}% of the context is`
    + ` read by some layer ${chosenLength(run) === null ? "in some step" : `at ${length} tokens`}. ${where}`;
}

function pointAt(run, event) {
  const { layers, known } = chosenLayers(run);
  const words = known && run.context ? describePlace(find("canvas", run.card), page.info, layers, event) : null;
  if (words) find("figcaption", run.card).textContent = words;
}

/** Let the slider cover the steps of the longest run; it follows the newest step until it is moved. */
function showSteps() {
  const slider = find("#step");
  const steps = Math.max(0, ...page.runs.map((run) => run.context - run.prompt));
  if (!steps) return;
  const follows = slider.dataset.moved !== "true";
  slider.max = String(steps - 1);
  if (follows) slider.value = slider.max;
  find("#steps").hidden = false;
  find("#step-label").textContent = find("#all-steps").checked ? "all" : `${Number(slider.value) + 1} of ${steps}`;
  slider.disabled = find("#all-steps").checked;
  page.runs.forEach((run) => run.context && showMap(run));
}

function play() {
  const slider = find("#step");
  if (page.playing) {
    clearInterval(page.playing);
    page.playing = null;
  } else {
    find("#all-steps").checked = false;
    slider.dataset.moved = "true";
    page.playing = setInterval(() => {
      slider.value = String((Number(slider.value) + 1) % (Number(slider.max) + 1));
      showSteps();
    }, 250);
  }
  find("#play").textContent = page.playing ? "Pause" : "Play";
}

/* ---- the form ---- */

function example(lines) {
  const things = ["river", "garden", "engine", "letter", "window", "market", "bridge", "lamp"];
  const said = [];
  for (let line = 0; line < lines; line += 1) {
    said.push(`Line ${line}: the ${things[(line * 5) % 8]} near the ${things[(line * 3 + 1) % 8]} was quiet that day.`);
    if (line === Math.floor(lines / 3)) said.push("Remember this: the pass key is 48217.");
  }
  return `${said.join("\n")}\n\nWhat is the pass key?`;
}

function setPrompt(text) {
  find("#prompt").value = text;
  find("#size").textContent = `${text.trim().split(/\s+/).filter(Boolean).length} words`;
}

function budgets() {
  const given = [...document.querySelectorAll(".budget")].map((input) => input.value.trim()).filter((text) => text !== "");
  return given.map(Number);
}

async function start(event) {
  event.preventDefault();
  problem("");
  sessionStorage.setItem("quest-key", find("#key").value);
  try {
    if (!page.info) await getServer();
  } catch (error) {
    problem(error.message);
    return;
  }
  const wanted = budgets();
  if (!wanted.length) {
    problem("Give at least one budget.");
    return;
  }
  page.stop = new AbortController();
  find("#run").disabled = true;
  find("#stop").disabled = false;
  find("#runs").replaceChildren();
  delete find("#step").dataset.moved;
  page.runs = wanted.map(makeRun);
  const prompt = find("#prompt").value;
  const { signal } = page.stop;
  if (find("input[name=mode]:checked").value === "once") {
    await Promise.all(page.runs.map((run) => execute(run, prompt, signal)));
  } else {
    for (const run of page.runs) if (!signal.aborted) await execute(run, prompt, signal);
  }
  showSteps();
  find("#run").disabled = false;
  find("#stop").disabled = true;
}

find("#form").addEventListener("submit", start);
find("#stop").addEventListener("click", () => page.stop.abort());
find("#play").addEventListener("click", play);
find("#all-steps").addEventListener("change", showSteps);
find("#step").addEventListener("input", () => {
  find("#step").dataset.moved = "true";
  showSteps();
});
find("#prompt").addEventListener("input", () => setPrompt(find("#prompt").value));
for (const button of document.querySelectorAll("[data-lines]")) {
  button.addEventListener("click", () => setPrompt(example(Number(button.dataset.lines))));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => page.runs.forEach((run) => show(run)));
find("#key").value = sessionStorage.getItem("quest-key") || "";
setPrompt(example(100));
getServer().catch((error) => {
  find("#server").textContent = "";
  problem(error.message);
});
