// Heat maps of one run: layers x heads as buttons, heads x positions and slots per head as pictures.
class HeadGrid {
  constructor(page, run) {
    this.page = page; this.run = run; this.at = 0;
    const heads = Math.max(...run.all().map((r) => run.headOf(r))) + 1, wide = run.layers.length;
    this.box = make("div", { class: "cells", role: "group", "aria-label": `Heads under ${run.title}: arrow keys, Enter selects` });
    this.box.style.gridTemplateColumns = `max-content repeat(${wide}, minmax(0.8rem, 1fr))`;
    this.box.append(make("span", {}, ""), ...run.layers.map((l) => make("span", { "aria-hidden": "true" }, String(l))));
    this.cells = new Map();
    for (let h = 0; h < heads; h++) {
      this.box.append(make("span", { "aria-hidden": "true" }, `head ${h}`));
      for (const l of run.layers) this.box.append(this.cell(run.all().find((r) => run.layer(r) === l && run.headOf(r) === h)));
    }
    this.box.addEventListener("keydown", (e) => this.key(e));
  }

  cell(r) {
    if (r === undefined) return make("span");
    const cell = make("button", { type: "button", tabindex: r ? -1 : 0, "aria-pressed": "false", onclick: () => this.page.select(this.run, r) });
    this.cells.set(r, cell);
    return cell;
  }

  key(event) {
    const { run } = this, layer = run.layers.indexOf(run.layer(this.at)), head = run.headOf(this.at);
    const move = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const next = run.all().find((r) => run.layer(r) === run.layers[layer + move[0]] && run.headOf(r) === head + move[1]);
    if (next !== undefined) this.focus(next).focus();
  }

  focus(r) { // which cell the tab key reaches
    this.cells.get(this.at).tabIndex = -1;
    this.at = r;
    this.cells.get(r).tabIndex = 0;
    return this.cells.get(r);
  }

  // most: what the darkest colour stands for, the same in all panels.
  show({ held, age, common }, t, selected, most) {
    const { run } = this, values = { held, age, common }[this.page.cell];
    for (const [r, cell] of this.cells) {
      const x = values[r] / most;
      cell.className = `l${level(x)}`;
      cell.setAttribute("aria-pressed", String(r === selected));
      const text = `${run.label(r)}: ${count(held[r])} slots held, ${percent(t ? held[r] / t : 0)} of what was read; mean age of them ${count(age[r])} tokens; ${percent(common[r])} of the other heads hold the same${run.floor[r] ? "; its floor alone at the end" : ""}`;
      cell.title = text;
      cell.setAttribute("aria-label", text);
    }
    if (selected !== null) this.focus(selected);
  }
}

const LEFT = 46, BOTTOM = 16; // of the pictures: room for labels, in CSS pixels

class PositionMap {
  constructor(page, run) {
    this.page = page; this.run = run;
    this.canvas = make("canvas", { role: "img" });
    this.canvas.addEventListener("pointermove", (e) => this.point(e));
    this.canvas.addEventListener("pointerleave", () => page.card.hide());
    this.canvas.addEventListener("click", (e) => { const at = this.place(e); if (at) { page.select(run, at.row, true); page.reveal(at.token); } });
  }

  place(event) {
    const { left, top } = this.canvas.getBoundingClientRect();
    const x = (event.clientX - left - LEFT) / (this.canvas.clientWidth - LEFT), y = Math.floor((event.clientY - top) / this.height);
    if (x < 0 || x >= 1 || y < 0 || y >= this.order.length) return null;
    return { row: this.order[y], token: Math.floor(x * this.run.n_tokens) };
  }

  point(event) {
    const at = this.place(event);
    if (!at) return this.page.card.hide();
    this.page.card.show(at.token, this.run, { left: event.clientX + 12, bottom: event.clientY + 8, top: event.clientY }, at.row);
  }

  show(order, t, selected, measure) {
    const { run, canvas } = this, rows = order.length;
    this.order = order;
    this.height = Math.max(2, Math.min(14, Math.floor(300 / rows)));
    const high = rows * this.height, context = sharp(canvas, high + BOTTOM);
    canvas.setAttribute("aria-label", `${rows} heads by ${count(run.n_tokens)} positions: ${this.page.measureName}. The table of heads has the numbers.`);
    if (!context) return;
    const wide = canvas.clientWidth - LEFT, bins = Math.max(1, Math.min(run.n_tokens, Math.round(wide)));
    context.imageSmoothingEnabled = false;
    context.drawImage(this.picture(run.binned(t, measure, bins), order, bins), LEFT, 0, wide, high);
    this.labels(context, order, wide, high);
    context.strokeStyle = css("--ink");
    if (t < run.n_tokens) context.strokeRect(LEFT + (t / run.n_tokens) * wide, -1, 0.5, high + 2);
    if (selected === null) return;
    context.strokeStyle = css("--hit");
    context.lineWidth = 2;
    context.strokeRect(LEFT, order.indexOf(selected) * this.height - 1, wide - 1, this.height + 2);
  }

  picture(values, order, bins) {
    const image = new ImageData(bins, order.length), colors = palette(), page = css("--page");
    const blank = [1, 3, 5].map((at) => parseInt(page.slice(at, at + 2), 16));
    order.forEach((r, y) => {
      for (let b = 0, at = 4 * y * bins; b < bins; b++, at += 4) {
        const l = level(values[r * bins + b]);
        image.data.set(l < 0 ? blank : colors[l], at);
        image.data[at + 3] = 255;
      }
    });
    const small = make("canvas");
    small.width = bins; small.height = order.length;
    small.getContext("2d").putImageData(image, 0, 0);
    return small;
  }

  labels(context, order, wide, high) {
    const { run } = this, sorted = this.page.order === "layer";
    context.fillStyle = css("--quiet");
    context.textAlign = "right";
    context.textBaseline = "middle";
    let below = -99;
    order.forEach((r, y) => {
      const at = Math.max(6, (y + 0.5) * this.height);
      if ((sorted && run.headOf(r)) || at - below < 12) return;
      context.fillText(sorted ? run.layer(r) : `${run.layer(r)}.${run.headOf(r)}`, LEFT - 5, at);
      below = at;
    });
    context.textBaseline = "top";
    for (const x of ticks(run.n_tokens, wide / 90)) {
      const at = LEFT + (x / run.n_tokens) * wide;
      context.textAlign = x === 0 ? "left" : at > LEFT + wide - 20 ? "right" : "center";
      context.fillText(count(x), at, high + 4);
    }
  }
}

class Density {
  constructor(page, run) {
    this.page = page; this.run = run;
    this.canvas = make("canvas", { role: "img" });
    this.canvas.addEventListener("click", (e) => { const r = this.place(e); if (r !== undefined) page.select(run, r, true); });
    this.canvas.addEventListener("pointermove", (e) => {
      const r = this.place(e);
      this.canvas.title = r === undefined ? "" : `${run.label(r)}: ${count(this.held[r])} slots`;
    });
  }

  place(event) {
    const { left } = this.canvas.getBoundingClientRect();
    return this.order[Math.floor(((event.clientX - left - LEFT) / (this.canvas.clientWidth - LEFT)) * this.order.length)];
  }

  show(order, held, selected) {
    const { run, canvas } = this, high = 84, top = 6;
    this.order = order; this.held = held;
    canvas.setAttribute("aria-label", `Slots held by each of ${order.length} heads, from ${count(Math.min(...held))} to ${count(Math.max(...held))}; the cap is ${count(run.cap)} on average.`);
    const context = sharp(canvas, high + 4);
    if (!context) return;
    const wide = canvas.clientWidth - LEFT, most = Math.max(1, run.cap, ...held) * 1.04, step = wide / order.length;
    const y = (x) => high - (x / most) * (high - top);
    context.fillStyle = css("--b6");
    order.forEach((r, i) => {
      context.fillStyle = css(r === selected ? "--hit" : "--b5");
      context.fillRect(LEFT + i * step, y(held[r]), Math.max(1, step - (step > 4 ? 1 : 0)), high - y(held[r]));
    });
    context.fillStyle = context.strokeStyle = css("--quiet");
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const x of ticks(most, 3)) context.fillText(count(x), LEFT - 5, y(x));
    context.strokeStyle = css("--ink");
    context.setLineDash([2, 3]);
    if (run.cap) { context.beginPath(); context.moveTo(LEFT, y(run.cap)); context.lineTo(LEFT + wide, y(run.cap)); context.stroke(); }
  }
}
