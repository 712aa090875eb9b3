// The legend, which filters by kind, role and port; the keys; a sign.

const HELP = [
  ["click, Shift+click", "select a node or an edge; add one"], ["Shift+drag", "select all in a frame"], ["drag, wheel, pinch", "move, zoom (the wheel after a click)"],
  ["double click", "open a group"], ["Tab, Shift+Tab", "walk through the nodes"], ["Enter", "select the node that was walked to"], ["arrows, + \u2212 0", "move, zoom, show all"],
  ["x or Delete", "cut the selected edges, or all edges of the selected nodes"], ["r", "restore them"], ["f", "force an edge in: a3.h1->m7 or a3.h1->a5.h0<q>"],
  ["Ctrl+Z, Ctrl+Shift+Z", "undo, redo"], ["p", "pin the selection; pinned nodes stay lit"], ["g", "group the selection; ungroup a group"], ["e, then [ ]", "explain: the strongest paths; the one before, the next"],
  ["F2, n", "give a node a name, a note"], ["a", "ask a prompt of your own"], ["/", "find"], ["F", "full screen"], ["Esc, then Tab", "clear; leave the graph"], ["?", "these keys"],
];

function legendOf(scene, hidden, changed) {
  const line = (tone, port) => {
    const svg = drawn("svg", { "aria-hidden": "true" });
    svg.append(drawn("path", { d: "M0 4H28", "stroke-width": 2.5, "stroke-dasharray": (DASHES[port] ?? []).join(" ") }));
    svg.firstChild.style.stroke = `var(--${tone})`;
    return svg;
  };
  const box = (tone) => { const swatch = make("i", { className: `swatch${tone === "mlp" ? " round" : ""}` }); swatch.style.background = `var(--${tone})`; return swatch; };
  const key = (name, sign, words, data, more = []) => {  // more: what else it stands for
    const button = make("button", { className: "key", type: "button", "data-key": name, [`data-${data}`]: name, "aria-pressed": String(!hidden.has(name)), title: "Show or hide", on: { click: () => {
      const change = hidden.has(name) ? "delete" : "add";
      for (const one of [name, ...more]) hidden[change](one);
      button.setAttribute("aria-pressed", String(!hidden.has(name)));
      changed();
    } } }, sign, make("bdi", {}, words));
    return button;
  };
  const gap = () => make("span", { className: "gap" }), tones = new Set(scene.nodes.map((node) => node.tone)), ports = new Set(scene.edges.map((edge) => edge.port)), compared = Object.keys(scene.sides).length > 0;
  const parts = [];
  if (tones.has("head")) parts.push(key("head", box("head"), scene.withRoles ? "other head" : "head", "role"));
  if (tones.has("mlp")) parts.push(key("mlp", box("mlp"), "MLP", "kind"));
  for (const role of ["mover", "relation", "mixture", "suppressor"]) if (tones.has(role)) parts.push(key(role, box(role), role, "role"));
  if (compared) parts.push(gap(), ...Object.entries(scene.sides).map(([side, words]) => key(side, line(side), words, "side")));
  const into = [["q", "query"], ["k", "key"], ["v", compared ? "value, MLP or logits" : "value"], ["direct", "MLP or logits"]].filter(([port]) => ports.has(port) && !(compared && port === "direct" && ports.has("v")));
  if (into.length) parts.push(gap(), make("span", {}, "into"), ...into.map(([port, words]) => key(port, line(compared ? "muted" : port, port), words, "port", compared && port === "v" ? ["direct"] : [])));
  parts.push(gap(), make("span", { id: "kc-width" }, compared ? "width: share of the largest |score|" : "width: |score|"));
  if (scene.sure) parts.push(make("span", { id: "kc-sure" }, "\u00a0 opacity: share of draws"));
  return parts;
}

function corners() {
  const svg = drawn("svg", { viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true" });
  svg.append(drawn("path", { d: "M1 4V1H4M8 1H11V4M11 8V11H8M4 11H1V8", fill: "none", stroke: "currentColor", "stroke-width": 1.5 }));
  return svg;
}
