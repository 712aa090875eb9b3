// Beside the graph: where all heads of a layer attend. Small pictures to choose from, and one of them large.

// The number of the layer that a head or an MLP is in; undefined of others.
const layerOf = (name) => /^(?:a(\d+)\.h\d+|m(\d+))$/.exec(name ?? "")?.slice(1).find(Boolean);

// Where a token attends to another, of a head's triangle in thousandths: its rows one after the other.
const cell = (head, query, key) => (key > query ? 0 : (head[(query * (query + 1)) / 2 + key] ?? 0) / 1000);

// A canvas of one cell for each pair of tokens, each so many pixels wide.
function patternOf(head, n, size, ink, more) {
  const canvas = make("canvas", more), context = canvas.getContext("2d");
  canvas.width = canvas.height = n * size;
  context.fillStyle = ink.q;
  for (let query = 0; query < n; query++) {
    for (let key = 0; key <= query; key++) {
      context.globalAlpha = Math.min(1, Math.max(0, cell(head, query, key))) ** 0.8;
      context.fillRect(key * size, query * size, size, size);
    }
  }
  context.globalAlpha = 1;
  return canvas;
}

// The layer's heads, those of the circuit with a rim; the chosen one large.
function headsOf(layer, prompt, local, { chosen, ink, known, names, select }) {
  if (!isObject(layer) || !Array.isArray(layer.heads) || !Array.isArray(layer.tokens) || !layer.tokens.length) return [];
  const n = layer.tokens.length, name = (i) => `a${layer.number}.h${i}`, small = Math.max(1, Math.floor(64 / n));
  const thumbs = layer.heads.map((head, i) => {
    const inside = known(name(i)), words = `${plainText(names[name(i)] ?? name(i), 40)}, ${inside ? "in the circuit" : "not in the circuit"}`;
    return make(
      "button", { id: `kc-head-${i}`, type: "button", className: inside ? "inside" : "", title: words, "aria-label": words, "aria-pressed": String(name(i) === chosen), on: { click: () => { local.cell = null; select(name(i)); } } },
      patternOf(head, n, small, ink, { "aria-hidden": "true" }), make("small", {}, `h${i}`),
    );
  });
  const at = layer.heads.findIndex((_, i) => name(i) === chosen);
  return [
    make("h4", {}, `All heads of layer ${layer.number}`), make("p", { className: "only", dir: "auto" }, `on \u201c${plainText(prompt, 80)}\u201d; those of the circuit have a rim`),
    make("div", { className: "heads", id: "kc-heads" }, thumbs), at < 0 ? null : largeOf(layer.heads[at], layer.tokens, name(at), local, ink),
  ].filter(Boolean);
}

// One head large: rows are the tokens that look, columns those that are looked at. Below, the tokens as dark as the
// chosen row looks at them.
function largeOf(head, tokens, name, local, ink) {
  const n = tokens.length, size = Math.max(4, Math.min(24, Math.floor(280 / n)));
  const canvas = patternOf(head, n, size, ink, { id: "kc-pattern", tabIndex: 0, role: "application", "aria-label": `Attention of ${name}: arrow keys go through the tokens` });
  const bare = document.createElement("canvas"), told = make("output", { id: "kc-pattern-told", "aria-live": "polite" });
  [bare.width, bare.height] = [canvas.width, canvas.height];
  bare.getContext("2d").drawImage(canvas, 0, 0);
  const chips = tokens.map((token, i) => make("span", { className: "token", on: { pointerenter: () => go(i, null), click: () => go(i, null) } }, make("bdi", {}, visible(token)), make("small", {}, "\u00a0")));
  function go(query, key) {
    local.cell = [query, key] = [Math.max(0, Math.min(n - 1, query)), key === null ? null : Math.max(0, Math.min(n - 1, key))];
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bare, 0, 0);
    Object.assign(context, { strokeStyle: ink.ink, lineWidth: 1 });
    context.strokeRect(0.5, query * size + 0.5, n * size - 1, size - 1);
    if (key !== null) context.strokeRect(key * size + 0.5, query * size + 0.5, size - 1, size - 1);
    for (const [i, chip] of chips.entries()) {
      const share = cell(head, query, i);
      chip.style.setProperty("--share", `${Math.round(45 * share)}%`);
      chip.classList.toggle("at", i === query);
      chip.classList.toggle("later", i > query);
      chip.lastChild.textContent = share >= 0.005 ? share.toFixed(2).replace(/^0/, "") : "\u00a0";
    }
    told.textContent = key === null ? `\u201c${visible(tokens[query])}\u201d looks at the tokens below` : `\u201c${visible(tokens[query])}\u201d looks at \u201c${visible(tokens[key])}\u201d: ${cell(head, query, key).toFixed(2)}`;
  }
  const under = (event) => { const { left, top, width } = canvas.getBoundingClientRect(), by = n / width; return [Math.floor((event.clientY - top) * by), Math.floor((event.clientX - left) * by)]; };
  canvas.addEventListener("pointermove", (event) => go(...under(event)));
  canvas.addEventListener("pointerleave", () => go(local.cell[0], null));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const [query, key] = local.cell;
    go(query + step[0], (key ?? query) + step[1]);
  });
  go(...(local.cell && local.cell[0] < n ? local.cell : [n - 1, null]));
  return make("figure", { id: "kc-large", "aria-label": `Attention of ${name}` }, canvas, told, make("div", { className: "tokens" }, chips));
}
