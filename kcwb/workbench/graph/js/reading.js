// Beside the graph: what is read of the selected node. Where a head attends and why, and what a node writes.

// The index of what a person chose, as far as there is one.
const within = (list, i) => Math.max(0, Math.min(list.length - 1, i));
const visible = (token) => plainText(token, 30) || "\u2423";

function menuOf(id, words, options, chosen, choose) {
  const menu = make("select", { id, "aria-label": words, on: { change: () => choose(menu.selectedIndex) } }, options.map((option) => make("option", {}, option)));
  menu.selectedIndex = chosen;
  return options.length > 1 ? menu : make("p", { className: "only", dir: "auto" }, options[0]);
}

// Tokens, each as dark as it is attended to; the one whose key is explained has a rim.
function attentionOf(one) {
  const most = Math.max(...one.attention, 1e-9);
  const chips = one.tokens.map((token, i) => {
    const share = Number(one.attention[i]) || 0, chip = make("span", { className: `token${i === one.at ? " at" : ""}`, title: `${JSON.stringify(String(token))}: ${rounded(share)}` }, make("bdi", {}, visible(token)), make("small", {}, share >= 0.005 ? share.toFixed(2).replace(/^0/, "") : "\u00a0"));
    chip.style.setProperty("--share", `${Math.round(45 * share / most)}%`);
    return chip;
  });
  return [make("h4", {}, "Attention from END"), make("div", { className: "tokens" }, chips)];
}

// Bars from the left, by size; the sign is told by colour and by the number.
function barsOf(words, rows, label) {
  const pairs = (Array.isArray(rows) ? rows : []).filter(Array.isArray), most = Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-9);
  const lines = pairs.map(([name, value]) => {
    const bar = make("i", { className: value < 0 ? "against" : "" });
    bar.style.width = `${100 * Math.abs(value) / most}%`;
    return make("li", {}, label(name), make("span", {}, bar), make("b", {}, rounded(value, 2)));
  });
  return lines.length ? [make("h4", {}, words), make("ul", { className: "bars" }, lines)] : [];
}

// `chosen` is the node that is selected: another one of the layer than what was read, while that is not answered.
function readingOf(reading, names, local, chosen, ink, known, select, redraw) {
  const runs = (Array.isArray(reading.runs) ? reading.runs : []).filter((run) => isObject(run) && Array.isArray(run.prompts) && run.prompts.length);
  if (!runs.length) return null;
  local.run = within(runs, local.run);
  const run = runs[local.run], at = within(run.prompts, local.prompt), one = run.prompts[at], key = one.tokens?.[one.at];
  const node = (name) => (known(name)
    ? make("button", { type: "button", title: `Select ${plainText(name, 60)}`, on: { click: () => select(name) } }, plainText(names[name] ?? name, 20))
    : make("span", { title: "Not a node of the circuit that is drawn" }, plainText(name, 20)));
  const mine = chosen === reading.node, seen = one.layer ? one : run.prompts.find((some) => isObject(some.layer)), heads = seen ? headsOf(seen.layer, seen.prompt, local, { chosen, ink, known, names, select }) : [];
  const token = (text) => make("bdi", { title: JSON.stringify(String(text)) }, visible(text));
  return make(
    "section", { id: "kc-reading" }, make("h3", { dir: "auto" }, plainText(names[chosen] ?? chosen, 40)),
    menuOf("kc-run", "In", runs.map((some) => `in ${plainText(some.run, 60)}`), local.run, (i) => { local.run = i; redraw(); }),
    menuOf("kc-prompt", "Prompt", run.prompts.map((some) => plainText(`${some.prompt} ${some.answer}`, 80)), at, (i) => { local.prompt = i; redraw(); }),
    heads, ...(mine ? [Array.isArray(one.tokens) && Array.isArray(one.attention) ? attentionOf(one) : [],
    barsOf("What makes the query, at END", one.query, node),
    barsOf(`What makes the key, at ${key === undefined ? "the token" : at || run.prompts.length === 1 ? `\u201c${visible(key)}\u201d` : `the ${visible(key)}`}`, one.key, node),
    barsOf("What it writes, in logits", one.writes, token)].flat() : []),
  );
}
