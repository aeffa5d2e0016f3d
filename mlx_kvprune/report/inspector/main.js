// The page: what is chosen, and who must be told.
const $ = (id) => document.getElementById(id);
const STEP = 32; // tokens between two places of the slider
const BUILD_MS = 12; // of each idle moment that goes into building the text

class Panel {
  constructor(page, run) {
    this.run = run; this.page = page;
    this.grid = new HeadGrid(page, run);
    this.map = new PositionMap(page, run);
    this.density = new Density(page, run);
    this.table = new HeadTable(page, run);
    this.text = new TextView(page, run);
    this.about = make("p", { class: "quiet" });
    const part = (title, note, ...children) => [make("h4", {}, title, " ", make("span", { class: "quiet" }, note)), ...children];
    this.box = make("article", { class: "panel", "aria-label": run.title },
      make("header", {}, make("h3", {}, swatch(run), run.title), this.about),
      ...part("Layers and heads", "choose one to colour the text by it", make("div", { class: "heads" }, this.grid.box)),
      ...part("Positions", "a line per head, layers from top to bottom", this.map.canvas),
      ...part("Slots held by each head", "dotted: the cap, on average", this.density.canvas),
      make("p", { class: "quiet floors" }, floors(run)),
      this.table.box,
      ...part("Text", "underlined: held by at least half of the chosen heads", this.text.box));
  }

  show(numbers, most) {
    const { page, run } = this, t = Math.min(page.t, run.n_tokens), rows = page.rows(run);
    const { value, count: holders } = run.perToken(rows, t, page.measure), levels = Int8Array.from(value, level);
    const selected = rows.length === 1 ? rows[0] : null, order = page.ordered(run, numbers);
    this.about.textContent = this.summary(holders, t, rows.length);
    this.grid.show(numbers, t, selected, most);
    this.map.show(order, t, selected, page.measure);
    this.density.show(order, numbers.held, selected);
    this.table.show(numbers, t);
    this.text.show(levels, holders.map((n) => 2 * n >= rows.length), t);
  }

  summary(holders, t, n) {
    let any = 0, sum = 0;
    for (let i = 0; i < t; i++) { any += holders[i] > 0; sum += holders[i]; }
    return n === 1 ? `holds ${count(sum)} of ${count(t)} tokens` : `${count(sum / n)} of ${count(t)} tokens per head; ${count(any)} held by some head`;
  }
}

// What there is to say of heads that hold their floor alone at the end, and of local layers.
function floors(run) {
  const rows = run.all().filter((r) => run.floor[r]), out = [];
  if (run.local) out.push(`Local layers (sinks and the newest tokens alone): ${run.local}.`);
  if (rows.length) out.push(`${rows.length} of ${run.nRows} heads end with their floor alone${rows.length > 12 ? "" : `: ${rows.map((r) => run.label(r)).join("; ")}`}.`);
  if (run.could_be_local) out.push(`Layers of which all heads do could be local: --local-layers ${run.could_be_local}.`);
  return out.join(" ");
}

class Page {
  constructor(data, runs) {
    Object.assign(this, { runs, pieces: data.pieces, before: data.before, about: data });
    this.n = data.pieces.length;
    this.t = this.n;
    this.measure = "stay"; this.cell = "age"; this.order = "layer"; this.selected = null; this.hits = new Set(); this.found = []; this.place = -1;
    this.hidden = new Set(runs.slice(3)); // more than three at once are narrow columns
    this.rows = (run) => this.chosenRows(run);
    this.card = new Card(this);
    this.panels = runs.map((run) => new Panel(this, run));
    this.slots = new Chart($("chart-slots"), this, count);
    this.bytes = new Chart($("chart-bytes"), this, bytes);
    this.redraw = later(() => this.show());
    this.head(); this.table(); this.controls(); this.help();
    $("panels").append(...this.panels.map((panel) => panel.box));
  }

  visible(run) { return !this.hidden.has(run); }
  get shown() { return this.panels.filter((panel) => this.visible(panel.run)); }
  get measureName() { return $("measure").selectedOptions[0].textContent; }
  live(text) { $("live").textContent = text; }

  chosenRows(run) {
    if (!this.selected) return run.all();
    const rows = run.all().filter((r) => run.layer(r) === this.selected.layer && run.headOf(r) === this.selected.head);
    return rows.length ? rows : run.all();
  }

  select(run, r, keep = false) { // a second click takes it back
    const next = { layer: run.layer(r), head: run.headOf(r) }, same = this.selected && this.selected.layer === next.layer && this.selected.head === next.head;
    this.selected = same && !keep ? null : next;
    this.redraw();
  }

  ordered(run, numbers) {
    const by = numbers[this.order];
    return by ? run.all().sort((a, b) => by[b] - by[a] || a - b) : run.all();
  }

  setTime(t) {
    this.t = t >= this.n ? this.n : Math.max(0, Math.min(this.n, Math.round(t / STEP) * STEP));
    $("time").value = Math.ceil(this.t / STEP);
    this.redraw();
  }

  show() {
    this.card.hide(); // it spoke of another moment
    $("time-out").textContent = `${count(this.t)} of ${count(this.n)}`;
    $("time").setAttribute("aria-valuetext", `${count(this.t)} of ${count(this.n)} tokens read`);
    $("head").textContent = this.selected ? `layer ${this.selected.layer}, head ${this.selected.head}` : "all";
    $("all-heads").hidden = !this.selected;
    for (const panel of this.panels) panel.box.hidden = !this.visible(panel.run);
    const numbers = this.shown.map(({ run }) => run.perRow(Math.min(this.t, run.n_tokens)));
    const most = this.cell === "common" ? 1 : Math.max(1, ...numbers.flatMap((x) => [...x[this.cell]]));
    this.shown.forEach((panel, i) => panel.show(numbers[i], most));
    this.slots.time(); this.bytes.time();
    this.legend();
  }

  charts() {
    const runs = this.runs.filter((run) => this.visible(run)), n = this.n;
    this.slots.show(runs.map((run) => {
      const { x, mean, least, most } = run.overTime();
      return { run, x, y: mean, low: least, high: most, bound: run.cap ? [[0, run.cap], [n, run.cap]] : [] };
    }), `Slots held per head over the tokens read: ${runs.map((run) => `${run.title} ends with ${count(run.slots_held)} at most of a cap of ${count(run.cap)} on average`).join("; ")}`);
    this.bytes.show(runs.map((run) => {
      const x = Array.from(run.bounds).slice(1);
      return { run, x: [0, ...x], y: [0, ...run.nbytes], bound: [[0, 0], ...x.map((t, i) => [t, run.nbytes_full[i]])] };
    }), `Bytes held over the tokens read: ${runs.map((run) => `${run.title} ${bytes(run.kv_bytes)} of ${bytes(run.kv_bytes_full)}`).join("; ")}`);
  }

  head() {
    const { name, model, question } = this.about;
    $("about").textContent = visible(`${name}, ${count(this.n)} tokens, read by ${model}${question ? `; question: ${question}` : ""}`);
  }

  table() {
    const columns = ["Shown", "Policy", "Allocator", "Budget", "Bits", "Positions", "Sinks", "Window", "Slots held, most", "Bytes held", "At their peak", "Full cache", "Smaller by"];
    const bits = (run) => [...new Set([run.key_bits, run.value_bits].map((b) => (b === null ? "all" : b)))].join(" and ");
    const row = (run) => {
      const box = make("input", { type: "checkbox", "aria-label": `Show ${run.title}` });
      box.checked = this.visible(run);
      box.addEventListener("change", () => { this.hidden[box.checked ? "delete" : "add"](run); this.charts(); this.redraw(); });
      const cells = [run.allocator, run.budget, bits(run), `in the ${run.positions}`, run.sinks, run.window, count(run.slots_held), bytes(run.kv_bytes), bytes(run.kv_bytes_peak), bytes(run.kv_bytes_full), `${(run.kv_bytes_full / run.kv_bytes).toFixed(1)} times`];
      return make("tr", {}, make("td", {}, box), make("th", { scope: "row", class: "left" }, swatch(run), run.policy), ...cells.map((x) => make("td", {}, String(x))));
    };
    $("runs").append(make("thead", {}, make("tr", {}, ...columns.map((x, i) => make("th", { scope: "col", class: i < 2 ? "left" : "" }, x)))), make("tbody", {}, ...this.runs.map(row)));
  }

  legend() {
    const ends = { stay: ["evicted at once", "still there"], heads: ["no head", "all chosen heads"], rank: ["lowest score", "highest score"] }[this.measure];
    const ramp = Array.from({ length: LEVELS }, (_, i) => make("i", { class: `l${i}` }, String(i)));
    const sample = (name, text, meaning) => make("span", { class: "chunk" }, make("s", { class: `sample ${name}` }, text), ` ${meaning}`);
    $("legend").replaceChildren(make("span", { class: "ends" }, `${ends[0]} `, make("span", { class: "ramp", "aria-hidden": "true" }, ...ramp), ` ${ends[1]}`),
      sample("held", "token", "held now"), sample("unread", "token", "not read yet"), ...(this.measure === "rank" ? [sample("none", "token", "never competed")] : []),
      ...(this.before ? [sample("before", "token", "the prompt before the document")] : []));
  }

  controls() {
    const time = $("time");
    time.max = Math.ceil(this.n / STEP);
    time.value = time.max; // not before there is room for it: 100 is the most until then
    time.addEventListener("input", () => this.setTime(Number(time.value) * STEP));
    $("measure").addEventListener("change", (e) => { this.measure = e.target.value; this.redraw(); });
    $("cell").addEventListener("change", (e) => { this.cell = e.target.value; this.redraw(); });
    $("sort").addEventListener("change", (e) => { this.order = e.target.value; this.redraw(); });
    $("all-heads").addEventListener("click", () => { this.selected = null; this.redraw(); });
    $("play").addEventListener("click", () => this.play());
    $("search").addEventListener("input", (e) => this.search(e.target.value));
    $("search").addEventListener("keydown", (e) => { if (e.key === "Enter") { e.preventDefault(); this.step(e.shiftKey ? -1 : 1); } });
    $("next").addEventListener("click", () => this.step(1));
    $("previous").addEventListener("click", () => this.step(-1));
    document.addEventListener("keydown", (e) => this.key(e));
    document.addEventListener("scroll", (e) => { if (e.target === document) this.scrolled(); }, { passive: true });
    document.addEventListener("kvp-theme", () => this.redraw());
    const resized = later(() => { this.charts(); this.show(); });
    window.addEventListener("resize", resized);
    window.addEventListener("beforeprint", () => { this.card.hide(); for (const panel of this.shown) panel.text.build(); this.charts(); this.show(); });
    window.addEventListener("afterprint", () => { this.charts(); this.show(); });
  }

  help() {
    const lines = [
      ["Colour", "How long it stayed: the share of the time since a token was read during which the chosen heads held it. Rank of its score: among what competed with it the last time slots changed hands, or when it was evicted."],
      ["Heads", "A KV head of a layer has slots of its own and keeps tokens of its own. Choose one to see its tokens alone, in all panels; choose it again to see all."],
      ["← →", "in the text: from token to token, with what is known of it; Home and End. In the grid of heads: from head to head, with ↑ ↓; Enter chooses."],
      ["[ ]", "back and forth in time; the slider takes arrow keys, too"],
      ["/", "find in the text; Enter and Shift+Enter go to the next match and the one before"],
      ["a", "all heads"], ["t", "theme"], ["Esc", "closes what hovers"],
    ];
    for (const [term, text] of lines) $("help").append(make("dt", {}, term), make("dd", {}, text));
  }

  key(event) {
    if (event.key === "Escape") return this.card.hide();
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('input[type="search"], input[type="text"], select, textarea')) return;
    const does = {
      "/": () => $("search").focus(), "[": () => this.setTime((Math.ceil(this.t / STEP) - 1) * STEP), "]": () => this.setTime(this.t + STEP),
      a: () => { this.selected = null; this.redraw(); }, t: () => Theme.next(),
    }[event.key];
    if (does) { event.preventDefault(); does(); }
  }

  play() {
    const on = !this.playing;
    $("play").setAttribute("aria-pressed", String(on));
    $("play").textContent = on ? "Pause" : "Play";
    clearInterval(this.playing);
    this.playing = 0;
    if (!on) return;
    if (this.t >= this.n) this.setTime(0);
    const stride = Math.max(STEP, Math.round(this.n / 160 / STEP) * STEP);
    this.playing = setInterval(() => { this.setTime(this.t + stride); if (this.t >= this.n) this.play(); }, 80);
  }

  search(text) {
    this.found = []; this.hits = new Set(); this.place = -1;
    if (text) this.find(text.toLowerCase());
    $("hits").textContent = text ? `${count(this.found.length)} found` : "";
    for (const { text: view } of this.panels) view.paint(0, view.spans.length);
    if (this.found.length) this.step(1);
  }

  find(wanted) {
    if (!this.lower) {
      let at = 0;
      const low = this.pieces.map((x) => x.toLowerCase());
      this.lower = low.join("");
      this.offsets = low.map((x) => { const start = at; at += x.length; return start; });
    }
    for (let at = this.lower.indexOf(wanted), i = 0; at >= 0; at = this.lower.indexOf(wanted, at + wanted.length)) {
      while (i + 1 < this.n && this.offsets[i + 1] <= at) i++;
      this.found.push(i);
      for (let j = i; j < this.n && this.offsets[j] < at + wanted.length; j++) this.hits.add(j);
    }
  }

  step(by) {
    if (!this.found.length) return;
    this.place = (Math.max(this.place, by < 0 ? 0 : -1) + by + this.found.length) % this.found.length;
    $("hits").textContent = `${count(this.place + 1)} of ${count(this.found.length)}`;
    this.reveal(this.found[this.place]);
  }

  reveal(i) { for (const panel of this.shown) panel.text.go(i); }

  scrolled() { // the page: the keyboard's token keeps its card
    const view = this.shown.map((panel) => panel.text).find(({ box, at }) => box === document.activeElement && at >= 0);
    if (view) view.placeCard(); else this.card.hide();
  }

  followScroll(box) { // texts side by side scroll together
    if (this.leading && this.leading !== box) return;
    this.leading = box;
    clearTimeout(this.led);
    this.led = setTimeout(() => { this.leading = null; }, 120);
    const share = box.scrollTop / Math.max(1, box.scrollHeight - box.clientHeight);
    for (const { text } of this.shown) if (text.box !== box) text.box.scrollTop = share * (text.box.scrollHeight - text.box.clientHeight);
  }

  build() { // the rest of the texts, while nothing else happens
    const idle = window.requestIdleCallback || ((work) => setTimeout(work, 16));
    idle(() => { if (!this.panels.every((panel) => panel.text.build(performance.now() + BUILD_MS))) this.build(); });
  }
}

async function start() {
  const data = JSON.parse($("data").textContent);
  const runs = await Promise.all(data.runs.map((run, i) => Run.from(run, i)));
  const page = new Page(data, runs);
  $("main").hidden = false;
  for (const panel of page.shown) panel.text.build(Infinity, 1500);
  page.show();
  page.charts();
  $("state").hidden = true;
  page.build();
  window.page = page; // for the console
  document.documentElement.dataset.ready = Math.round(performance.now());
  for (const run of runs) await run.finish();
  page.redraw();
  document.documentElement.dataset.done = Math.round(performance.now());
}
start().catch((error) => { $("state").textContent = `This page could not be drawn: ${error.message}`; throw error; });
