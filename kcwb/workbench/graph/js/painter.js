// A circuit on a canvas. The picture is painted whole once; while it is moved, its bitmap is.

const GUTTER = 40, HEAD = 36;  // pixels, for the labels of layers; for the buttons over the picture
const WRAPS = [570, 340];  // below these widths they stand in a row more
const SLOW = 24;  // milliseconds, above which moving shows the bitmap
const FONT = 'system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif';

function textOn(hex) {  // black or white, whichever is read better on a colour
  const [r, g, b] = [1, 3, 5].map((i) => (parseInt(hex.slice(i, i + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#111111" : "#ffffff";
}

function drawn(name, attributes) {  // an element of SVG
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// The control points of a line's curve, by the formulas of `control_points` in drawing.py.
function curve(link, stretch) {
  const [x1, y1, x2, y2] = [link.from.x * stretch, link.from.y, link.to.x * stretch, link.to.y], [kind, roundness] = link.bend;
  if (kind === "cubicBezier") {
    const rise = roundness * (y1 - y2);
    return [[x1, y1], [x1, y1 - rise], [x2, y2 + rise], [x2, y2]];
  }
  const angle = Math.atan2(y1 - y2, x2 - x1) + (0.5 - 0.5 * roundness) * Math.PI, reach = (0.5 * roundness + 0.5) * Math.hypot(x1 - x2, y1 - y2);
  return [[x1, y1], [x1 + reach * Math.sin(angle), y1 + reach * Math.cos(angle)], [x2, y2]];
}
function pointOn(points, t) {
  let row = points;
  while (row.length > 1) row = row.slice(1).map(([x, y], i) => [row[i][0] + t * (x - row[i][0]), row[i][1] + t * (y - row[i][1])]);
  return row[0];
}

class Painter {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.base = document.createElement("canvas");  // everything as it is
    this.sheet = document.createElement("canvas");  // with what is lit
    [this.scale, this.left, this.top, this.stretch] = [1, 0, 0, 1];  // screen = scale * world + (left, top)
    [this.boxes, this.links, this.lit, this.cost, this.painted, this.waiting] = [[], [], null, 0, null, 0];
  }

  // --- what is drawn ---

  draw({ boxes, links }, scene, ink) {
    Object.assign(this, { boxes, links, scene, ink });
    this.trace();
  }
  trace() {
    for (const link of this.links) {
      link.points = curve(link, this.stretch);
      const [[x, y], ...rest] = link.points, path = new Path2D();
      path.moveTo(x, y);
      path[rest.length === 3 ? "bezierCurveTo" : "quadraticCurveTo"](...rest.flat());
      link.path = path;
      link.spots = null;
      const [xs, ys] = [0, 1].map((i) => link.points.map((point) => point[i]));
      link.extent = [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
    }
    this.painted = null;
  }
  light(lit) {  // {boxes, links}, or null for all
    this.lit = lit;
    if (this.painted) this.compose();
    this.show();
  }
  resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (this.width && !(width && height)) return false;  // out of sight for a moment: back at its size, no observer tells
    const ratio = Math.min(2, globalThis.devicePixelRatio || 1);
    if (width === this.width && height === this.height && ratio === this.ratio) return false;
    Object.assign(this, { width, height, ratio });
    for (const one of [this.canvas, this.base, this.sheet]) [one.width, one.height] = [Math.max(1, width * ratio), Math.max(1, height * ratio)];
    this.painted = null;
    return true;
  }

  // --- where things are ---

  get head() { return HEAD + 25 * WRAPS.filter((width) => this.width < width).length; }
  place(box) { return [this.scale * this.stretch * box.x + this.left, this.scale * box.y + this.top]; }
  extent(boxes) {
    const xs = boxes.map((box) => this.stretch * box.x), ys = boxes.map((box) => box.y);
    const [left, right, top, bottom] = [Math.min(...xs) - 44, Math.max(...xs) + 44, Math.min(...ys) - 18, Math.max(...ys) + 18];
    return { left, top, width: right - left, height: bottom - top };
  }
  fit(boxes = this.boxes, most = 1.3) {
    if (!boxes.length || !this.width) return;
    const { left, top, width, height } = this.extent(boxes), room = [Math.max(40, this.width - GUTTER - 16), Math.max(40, this.height - this.head - 8)];
    this.scale = Math.max(0.05, Math.min(most, Math.max(20, room[0] - 40) / (width - 40), room[1] / height));  // labels do not shrink with it
    this.left = GUTTER + room[0] / 2 - this.scale * (left + width / 2);
    this.top = this.head + room[1] / 2 - this.scale * (top + height / 2);
    this.painted = null;
    this.show();
  }
  // Bring the columns nearer or farther, until the circuit has the shape of the window or nodes would touch.
  reshape() {
    if (!this.boxes.length || !this.width || !this.height) return;
    const xs = this.boxes.map((box) => box.x), ys = this.boxes.map((box) => box.y), range = (all) => Math.max(...all) - Math.min(...all);
    const wanted = (range(ys) + 36) * (this.width - GUTTER - 16) / Math.max(40, this.height - this.head - 8) / (range(xs) + 88);
    this.stretch = Math.max(this.scene.tightest, Math.min(2.4, wanted));
    this.trace();
    this.fit();
  }
  move(dx, dy) {
    this.left += dx;
    this.top += dy;
    this.show(true);
  }
  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const scale = Math.max(0.05, Math.min(8, this.scale * factor)), by = scale / this.scale;
    [this.left, this.top, this.scale] = [x - by * (x - this.left), y - by * (y - this.top), scale];
    this.show(true);
  }
  boxAt(x, y) {
    const near = (box) => Math.abs(box.at[0] - x) <= box.size[0] / 2 + 3 && Math.abs(box.at[1] - y) <= box.size[1] / 2 + 3;
    const found = this.boxes.filter((box) => box.at && near(box));
    return found.sort((a, b) => Math.hypot(a.at[0] - x, a.at[1] - y) - Math.hypot(b.at[0] - x, b.at[1] - y))[0] ?? null;
  }
  linkAt(x, y) {
    const wx = (x - this.left) / this.scale, wy = (y - this.top) / this.scale, most = 5 / this.scale;
    let [best, found] = [most, null];
    for (const link of this.links) {
      const [left, top, right, bottom] = link.extent;
      if (wx < left - most || wx > right + most || wy < top - most || wy > bottom + most) continue;
      link.spots ??= Array.from({ length: 25 }, (_, i) => pointOn(link.points, i / 24));
      for (let i = 1; i < 25; i++) {
        const [ax, ay] = link.spots[i - 1], [bx, by] = link.spots[i], length = (bx - ax) ** 2 + (by - ay) ** 2 || 1;
        const t = Math.max(0, Math.min(1, ((wx - ax) * (bx - ax) + (wy - ay) * (by - ay)) / length));
        const away = Math.hypot(wx - ax - t * (bx - ax), wy - ay - t * (by - ay));
        if (away <= best) [best, found] = [away, link];
      }
    }
    return found;
  }

  // --- painting ---

  show(moving = false) {  // soon, once
    if (this.settling) clearTimeout(this.settling);
    this.settling = moving && this.cost > SLOW ? setTimeout(() => { this.painted = null; this.show(); }, 110) : 0;
    if (!this.settling) this.painted = moving ? null : this.painted;
    this.waiting ||= requestAnimationFrame(() => this.now());
  }
  now() {
    cancelAnimationFrame(this.waiting);
    this.waiting = 0;
    if (!this.width || !this.ink) return;
    if (!this.painted) this.paint();
    const { context: ctx, ratio, painted } = this, by = this.scale / painted.scale;
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.bands(ctx, this.width);
    ctx.drawImage(this.sheet, this.left - by * painted.left, this.top - by * painted.top, by * this.width, by * this.height);
    this.gutter(ctx);
    const cursor = this.boxes.find((box) => box.cursor);
    if (cursor) this.card(ctx, ...this.place(cursor), cursor.size[0] + 9, cursor.size[1] + 9, 7, null, this.ink.relation, 2);
    this.frames = (this.frames ?? 0) + 1;
    this.then?.();
  }
  bands(ctx, width) {
    ctx.fillStyle = this.ink.bg;
    ctx.fillRect(0, 0, width, this.height);
    ctx.fillStyle = this.ink.band;
    const pitch = this.scene.pitch * this.scale;
    for (const [i, row] of this.scene.rows.entries()) if (i % 2 === 0) ctx.fillRect(0, this.scale * row.y + this.top - pitch / 2, width, pitch);
  }
  gutter(ctx) {
    this.bands(ctx, GUTTER);
    const pitch = this.scene.pitch * this.scale, every = pitch >= 12 ? 1 : pitch >= 6 ? 2 : 5;
    Object.assign(ctx, { fillStyle: this.ink.muted, textAlign: "left", textBaseline: "middle", font: `11px ${FONT}` });
    for (const [i, row] of this.scene.rows.entries()) if (i % every === 0) ctx.fillText(`L${row.layer}`, 12, this.scale * row.y + this.top);
  }
  paint() {
    const start = performance.now(), ctx = this.base.getContext("2d");
    this.painted = { scale: this.scale, left: this.left, top: this.top };
    this.measure(ctx);
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, this.base.width, this.base.height);
    this.strokes(ctx, this.links, (link) => (link.gone ? 0.5 : link.strength));
    this.fills(ctx, this.boxes);
    this.compose();
    this.cost = performance.now() - start;
  }
  compose() {  // the picture, and what is lit before the rest
    const ctx = this.sheet.getContext("2d"), { lit } = this;
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, this.sheet.width, this.sheet.height);
    ctx.globalAlpha = lit ? 0.13 : 1;
    ctx.drawImage(this.base, 0, 0);
    ctx.globalAlpha = 1;
    if (!lit) return;
    this.strokes(ctx, this.links.filter((link) => lit.links.has(link)), (link) => (link.gone ? 0.8 : this.scene.sure ? link.strength : Math.max(0.75, link.strength)), 1.8);
    const before = this.boxes.filter((box) => lit.boxes.has(box) || box.pinned || box.chosen);
    for (const box of before) if (box.chosen && !box.labelled) this.spell(ctx, box);
    this.fills(ctx, before, true);
    for (const [i, box] of [...(lit.order ?? [])].entries()) this.badge(ctx, box.at[0] - box.size[0] / 2, box.at[1] - box.size[1] / 2, i + 1);
  }
  // How large each box is on screen, and whether its label has room there: the strongest first.
  measure(ctx) {
    const size = Math.max(11, Math.min(16, 13 * this.scale)), cells = new Map(), cell = 40;
    const small = Math.max(6, Math.min(13, 12 * this.scale)), around = function* (x, y, w, h) {
      for (let i = Math.floor((x - w / 2) / cell); i <= Math.floor((x + w / 2) / cell); i++) {
        for (let j = Math.floor((y - h / 2) / cell); j <= Math.floor((y + h / 2) / cell); j++) yield `${i} ${j}`;
      }
    };
    const put = (box, w, h) => {
      for (const key of around(...box.at, w, h)) cells.set(key, [...(cells.get(key) ?? []), [...box.at, w, h, box]]);
    };
    const free = (box, w, h) => {
      for (const key of around(...box.at, w, h)) {
        for (const [x, y, ow, oh, other] of cells.get(key) ?? []) {
          if (other !== box && Math.abs(x - box.at[0]) < (w + ow) / 2 + 1 && Math.abs(y - box.at[1]) < (h + oh) / 2 - 1) return false;
        }
      }
      return true;
    };
    this.size = size;
    for (const box of this.boxes) {
      box.at = this.place(box);
      put(box, small / 2, small / 2);  // what no other label may cover
    }
    const rank = (box) => (box.kind === "input" || box.kind === "logits" ? 3 : box.group ? 2 : box.pinned || box.noted ? 1 : 0);
    for (const box of [...this.boxes].sort((a, b) => rank(b) - rank(a) || b.weight - a.weight || a.id - b.id)) {
      this.spell(ctx, box);
      const [w, h] = box.size;
      box.labelled = rank(box) === 3 || free(box, w, h);
      if (box.labelled) put(box, w, h); else box.size = [small * (box.kind === "mlp" ? 1.4 : 1), small];
      box.marked = box.labelled && box.mark && this.scale >= 1.05;
    }
  }
  spell(ctx, box) {  // with its label
    ctx.font = `${this.size}px ${FONT}`;
    const least = box.kind === "input" || box.kind === "logits" ? Math.max(60, Math.min(150, 110 * this.scale)) : 0;
    [box.labelled, box.size] = [true, [Math.max(least, ctx.measureText(box.label).width + 14), this.size + 8]];
  }
  strokes(ctx, links, strength, least = 0) {
    const { scale, ratio, ink } = this, thin = Math.max(0.65, Math.min(1.5, scale)) / scale;
    const [left, top, right, bottom] = [-this.left / scale, -this.top / scale, (this.width - this.left) / scale, (this.height - this.top) / scale];
    const arrows = this.links.length <= 300;
    for (const link of links) {
      if (link.extent[0] > right || link.extent[2] < left || link.extent[1] > bottom || link.extent[3] < top) continue;
      ctx.setTransform(scale * ratio, 0, 0, scale * ratio, this.left * ratio, this.top * ratio);
      ctx.strokeStyle = link.gone ? ink.muted : link.forced ? ink.forced : ink[link.tone];
      ctx.lineWidth = (link.gone ? 1 : Math.max(least, link.width)) * thin;
      ctx.globalAlpha = strength(link);
      ctx.setLineDash((link.gone ? [1, 5] : DASHES[link.port]).map((length) => length * thin));
      ctx.stroke(link.path);
      if (arrows && !link.gone) this.arrow(ctx, link, Math.max(least, link.width));
    }
    ctx.setLineDash([]);
    ctx.globalAlpha = 1;
  }
  arrow(ctx, link, width) {  // where the line meets its receiver's box
    const [x, y] = link.to.at, [w, h] = link.to.size, screen = ([px, py]) => [px * this.scale + this.left, py * this.scale + this.top];
    let [low, high] = [0.3, 1];
    for (let i = 0; i < 9; i++) {
      const t = (low + high) / 2, [px, py] = screen(pointOn(link.points, t));
      if (Math.abs(px - x) < w / 2 + 1 && Math.abs(py - y) < h / 2 + 1) high = t; else low = t;
    }
    const [px, py] = screen(pointOn(link.points, low)), [bx, by] = screen(pointOn(link.points, Math.max(0, low - 0.03))), length = 4 + 1.1 * width;
    const angle = Math.atan2(py - by, px - bx);
    ctx.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    ctx.beginPath();
    ctx.moveTo(px, py);
    for (const turn of [2.7, -2.7]) ctx.lineTo(px + length * Math.cos(angle + turn), py + length * Math.sin(angle + turn));
    ctx.fillStyle = ctx.strokeStyle;
    ctx.fill();
  }
  fills(ctx, boxes, front = false) {
    const { ink, ratio } = this, ends = (box) => box.kind === "input" || box.kind === "logits";
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    Object.assign(ctx, { textAlign: "center", textBaseline: "middle" });
    for (const box of [...boxes].sort((a, b) => a.labelled - b.labelled)) {
      const [x, y] = box.at, [w, h] = box.size, fill = ink[box.tone], idle = !box.into.length && !box.out.length, chosen = front && box.chosen;
      if (x + w < 0 || x - w > this.width || y + h < 0 || y - h > this.height) continue;
      ctx.globalAlpha = idle && !chosen ? 0.4 : 1;
      if (box.group !== null) {  // a stack of cards
        this.card(ctx, x + 3, y - 3, w, h, 4, fill, ink.rim, 1);
      }
      this.card(ctx, x, y, w, h, box.kind === "mlp" ? h / 2 : ends(box) ? 2 : 4, fill, chosen ? ink.ink : ink[box.side ?? "rim"], chosen ? 2.5 : box.side ? 2 : 1);
      if (box.labelled) {
        ctx.fillStyle = textOn(fill);
        ctx.font = `${this.size}px ${FONT}`;
        ctx.fillText(box.label, x, y + 0.5);
      }
      if (box.marked) {
        Object.assign(ctx, { fillStyle: ink.muted, font: `11px ${FONT}` });
        ctx.fillText(box.mark, x, y + h / 2 + 8);
      }
      if (box.pinned || box.noted) this.dot(ctx, x + w / 2 - 1, y - h / 2 + 1, box.pinned ? ink.relation : ink.note);
    }
    ctx.globalAlpha = 1;
  }
  card(ctx, x, y, w, h, radius, fill, rim, width) {
    ctx.beginPath();
    ctx.roundRect(x - w / 2, y - h / 2, w, h, radius);
    if (fill) {
      ctx.fillStyle = fill;
      ctx.fill();
    }
    [ctx.strokeStyle, ctx.lineWidth] = [rim, width];
    ctx.stroke();
  }
  badge(ctx, x, y, number) {
    this.card(ctx, x, y, 17, 15, 7, this.ink.relation, this.ink.bg, 1);
    Object.assign(ctx, { fillStyle: textOn(this.ink.relation), font: `10px ${FONT}` });
    ctx.fillText(number, x, y + 0.5);
  }
  dot(ctx, x, y, fill) {
    ctx.beginPath();
    ctx.arc(x, y, 3.5, 0, 2 * Math.PI);
    Object.assign(ctx, { fillStyle: fill, strokeStyle: this.ink.bg, lineWidth: 1.5 });
    ctx.fill();
    ctx.stroke();
  }

  // --- pictures ---

  png() {  // what is shown, at twice the size
    const before = this.ratio, [w, h] = [this.width, this.height], picture = document.createElement("canvas");
    const grow = (ratio) => {
      this.ratio = ratio;
      for (const one of [this.canvas, this.base, this.sheet]) [one.width, one.height] = [w * ratio, h * ratio];
      this.painted = null;
      this.now();
    };
    grow(2);
    [picture.width, picture.height] = [2 * w, 2 * h];
    picture.getContext("2d").drawImage(this.canvas, 0, 0);
    grow(before);
    return picture;
  }
  // The whole circuit as it is shown, as shapes and text. Elements are made, never parsed from text.
  svg() {
    const { left: l, top: t, width: w, height: h } = this.extent(this.boxes), round = (value) => Math.round(value * 10) / 10, { ink, scene } = this;
    const [left, top, width, height] = [l - GUTTER - 46, t - 16, w + GUTTER + 92, h + 32].map(round);
    const make = (parent, name, attributes, text) => {
      const element = drawn(name, attributes);
      if (text !== undefined) element.textContent = text.replace(/[^\t\n\r\x20-\ud7ff\ue000-\ufffd]/gu, (c) => (c > "\uffff" ? c : "\ufffd"));
      return parent ? parent.appendChild(element) : element;
    };
    const svg = make(null, "svg", { viewBox: `${left} ${top} ${width} ${height}`, width, height, "font-family": "system-ui, sans-serif" });
    if (scene.title) make(svg, "title", {}, scene.title);
    make(svg, "rect", { x: left, y: top, width, height, fill: ink.bg });
    for (const [i, row] of scene.rows.entries()) {
      if (i % 2 === 0) make(svg, "rect", { x: left, y: row.y - scene.pitch / 2, width, height: scene.pitch, fill: ink.band });
      make(svg, "text", { x: left + 10, y: row.y + 4, "font-size": 11, fill: ink.muted }, `L${row.layer}`);
    }
    for (const link of this.links) {
      const [first, ...rest] = link.points.map((point) => point.map((value) => value.toFixed(1)).join(" ")), dashes = link.gone ? [1, 5] : DASHES[link.port];
      const path = make(svg, "path", {
        d: `M${first}${rest.length === 3 ? "C" : "Q"}${rest.join(" ")}`, fill: "none", "stroke-width": link.gone ? 1 : link.width,
        stroke: link.gone ? ink.muted : link.forced ? ink.forced : ink[link.tone], "stroke-opacity": link.gone ? 0.5 : link.strength,
        ...(dashes.length && { "stroke-dasharray": dashes.join(" ") }),
      });
      make(path, "title", {}, link.lines.join("\n"));
    }
    for (const box of this.boxes) {
      const [x, y, fill] = [this.stretch * box.x, box.y, ink[box.tone]], ends = box.kind === "input" || box.kind === "logits", wide = ends ? 150 : 7.5 * box.label.length + 12;
      const group = make(svg, "g", {});
      make(group, "title", {}, box.lines.join("\n"));
      make(group, "rect", {
        x: round(x - wide / 2), y: round(y - 10.5), width: wide, height: 21, fill, rx: box.kind === "mlp" ? 10 : ends ? 2 : 4,
        stroke: ink[box.side ?? "rim"], "stroke-width": box.side ? 2.5 : 1,
      });
      make(group, "text", { x: round(x), y: round(y + 4.5), "font-size": 13, "text-anchor": "middle", fill: textOn(fill) }, box.label);
    }
    return new XMLSerializer().serializeToString(svg);
  }
}
