// Curves over the tokens read.
const HIGH = 210, PAD = { left: 58, right: 12, top: 10, bottom: 32 };

class Chart {
  constructor(box, page, format) {
    this.page = page; this.format = format;
    this.box = box; this.wide = 640;
    this.root = svg("svg", { role: "img" });
    this.root.addEventListener("click", (e) => {
      const { left, width } = this.root.getBoundingClientRect();
      page.setTime((((e.clientX - left) / width) * this.wide - PAD.left) / (this.wide - PAD.left - PAD.right) * page.n);
    });
    box.append(this.root);
  }

  x(t) { return PAD.left + (t / this.page.n) * (this.wide - PAD.left - PAD.right); }
  y(v) { return HIGH - PAD.bottom - (v / this.most) * (HIGH - PAD.top - PAD.bottom); }
  path(xs, ys) { return xs.map((x, i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)},${this.y(ys[i]).toFixed(1)}`).join(""); }

  // series: [{run, x, y, low?, high?, bound: [[x, y], ...]}]
  show(series, label) {
    this.most = Math.max(1, ...series.flatMap((s) => [...s.y, ...(s.high || []), ...s.bound.map((p) => p[1])])) * 1.05;
    this.wide = Math.max(260, this.box.clientWidth || 640);
    this.root.setAttribute("viewBox", `0 0 ${this.wide} ${HIGH}`);
    this.root.replaceChildren(svg("title", {}, label));
    this.axes();
    for (const s of series) {
      if (s.low) this.root.append(this.colored("path", { class: "area", d: `${this.path(s.x, s.high)}${this.path([...s.x].reverse(), [...s.low].reverse()).replace("M", "L")}Z` }, "fill", s.run));
      this.root.append(this.colored("path", { class: "bound", d: this.path(s.bound.map((p) => p[0]), s.bound.map((p) => p[1])) }, "stroke", s.run));
      this.root.append(this.colored("path", { class: "series", "stroke-dasharray": s.run.dash, d: this.path(s.x, s.y) }, "stroke", s.run));
    }
    this.now = svg("line", { class: "now", y1: PAD.top, y2: HIGH - PAD.bottom });
    this.root.append(this.now);
    this.time();
  }

  colored(tag, attributes, property, run) {
    const element = svg(tag, attributes);
    element.style[property] = run.color;
    return element;
  }

  axes() {
    for (const v of ticks(this.most, 4)) {
      this.root.append(svg("line", { class: "grid", x1: PAD.left, x2: this.wide - PAD.right, y1: this.y(v), y2: this.y(v) }));
      this.root.append(svg("text", { x: PAD.left - 6, y: this.y(v) + 4, "text-anchor": "end" }, this.format(v)));
    }
    for (const t of ticks(this.page.n, this.wide / 100)) this.root.append(svg("text", { x: this.x(t), y: HIGH - PAD.bottom + 14, "text-anchor": "middle" }, count(t)));
    this.root.append(svg("text", { x: (this.wide + PAD.left) / 2, y: HIGH - 2, "text-anchor": "middle" }, "tokens read"));
  }

  time() {
    if (!this.now) return;
    this.now.setAttribute("x1", this.x(this.page.t));
    this.now.setAttribute("x2", this.x(this.page.t));
  }
}

// The table of a run's heads, sorted by a click on a column.
class HeadTable {
  constructor(page, run) {
    this.page = page; this.run = run; this.by = 0; this.down = false;
    this.table = make("table");
    this.box = make("details", {}, make("summary", {}, "Table of heads"), make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": `Table of heads under ${run.title}` }, this.table));
    this.box.addEventListener("toggle", () => this.show(this.numbers, this.t));
  }

  show(numbers, t) {
    this.numbers = numbers; this.t = t;
    if (!this.box.open || !numbers) return;
    const columns = ["Layer", "Head", "Slots held", "Of what was read", "Mean age", "Same in other heads"], { run } = this;
    const rows = run.all().map((r) => [run.layer(r), run.headOf(r), numbers.held[r], t ? numbers.held[r] / t : 0, numbers.age[r], numbers.common[r], r]);
    rows.sort((a, b) => (this.down ? -1 : 1) * (a[this.by] - b[this.by]) || a[6] - b[6]);
    const head = columns.map((name, i) => make("th", { scope: "col", "aria-sort": i === this.by ? (this.down ? "descending" : "ascending") : "none" },
      make("button", { type: "button", onclick: () => this.sort(i) }, name + (i === this.by ? (this.down ? " \u2193" : " \u2191") : ""))));
    const body = rows.map((x) => make("tr", {}, make("th", { scope: "row" }, make("button", { type: "button", onclick: () => this.page.select(run, x[6], true), "aria-label": `Show ${run.label(x[6])}` }, String(x[0]))),
      ...[String(x[1]), count(x[2]), percent(x[3]), count(x[4]), percent(x[5])].map((text) => make("td", {}, text))));
    const buttons = () => [...this.table.querySelectorAll("tbody button")], at = buttons().indexOf(document.activeElement);
    this.table.replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
    if (at >= 0) buttons()[at].focus(); // it was replaced while it had the focus
  }

  sort(i) {
    this.down = this.by === i ? !this.down : i > 1;
    this.by = i;
    this.show(this.numbers, this.t);
    this.table.querySelectorAll("thead button")[i].focus();
  }
}
