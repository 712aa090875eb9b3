// Beside the graph: what the circuit answers before and after, and the paths that explain it.

// An element with properties, ARIA and data attributes, handlers and children; strings become text.
function make(tag, { on = {}, ...more } = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(more)) {
    if (value === undefined || value === null) continue;
    if (name in element && !name.includes("-")) element[name] = value;
    else element.setAttribute(name, value);
  }
  for (const [name, handler] of Object.entries(on)) element.addEventListener(name, handler);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const RAISED = "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079";  // -0123456789
const powered = (power) => `\u00d710${[...power].map((one) => RAISED["-0123456789".indexOf(one)] ?? "").join("")}`;
const rounded = (value, digits = 3) => {  // never less than its whole part
  if (!Number.isFinite(value)) return "\u2013";
  const size = Math.abs(value), shown = size >= 10 ** digits && size < 1e15 ? Math.round(value) : Number(value.toPrecision(digits));
  return shown.toString().replace(/e(.*)/, (_, power) => powered(power)).replace("-", "\u2212");
};
const counted = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

// A run's probability of the answer as a bar, and its likeliest tokens as text.
function barOf(words, name, run) {
  const p = Math.max(0, Math.min(1, Number(run.p) || 0)), bar = make("i");
  bar.style.width = `${100 * p}%`;
  return make("div", { className: `bar ${name}`, title: `${words}: probability ${rounded(p)}, rank ${run.rank}` }, make("span", {}, words), make("span", {}, bar), make("b", {}, `${p && p < 0.001 ? "<0.001" : rounded(p, 2)} \u00b7 #${Number(run.rank).toLocaleString("en")}`));
}
const topsOf = (run) => (Array.isArray(run.top) ? run.top : []).map(([token, p]) => `${JSON.stringify(String(token))} ${rounded(Number(p), 2)}`).join(", ");

// The table of facts: for each a bar of the answer's probability before and after.
function answersOf(answers, opened, toggle) {
  const facts = Array.isArray(answers.facts) ? answers.facts.filter(isObject) : [];
  const rows = facts.flatMap((fact, i) => {
    const states = [["before", fact.before], ["after", fact.after]].filter(([, run]) => isObject(run));
    const bars = states.map(([name, run]) => barOf(name, name, run));
    const line = make(
      "tr", { className: "fact" },
      make("td", {}, make("button", {
        id: `kc-fact-${i}`, className: "key", "aria-expanded": String(opened.has(i)), title: "The most probable tokens", on: { click: () => toggle(i) },
      }, opened.has(i) ? "\u25be" : "\u25b8"), make("span", { className: "prompt", dir: "auto" }, plainText(fact.prompt, 90)), " ", make("span", { className: "answer", dir: "auto" }, plainText(fact.answer, 40)), bars),
    );
    const more = opened.has(i) ? states.map(([name, run]) => make("tr", {}, make("td", { className: "tops" }, `${name}: ${topsOf(run)}`))) : [];
    return [line, ...more];
  });
  const losses = ["before", "after", "model"].map((one) => [one, Number(answers[`loss_${one}`])]).filter(([one]) => answers[`loss_${one}`] !== undefined);
  const loss = losses.length ? make("p", { className: "loss" }, "Loss, nats: ", losses.flatMap(([one, value], i) => [i ? " \u00b7 " : "", `${one === "model" ? "full model" : one} `, make("b", {}, rounded(value))])) : null;
  return make("section", {}, make("h3", {}, "Answers"), loss, make("table", { id: "kc-answers" }, make("tbody", {}, rows)));
}

function pathsOf(paths, current, choose) {
  const rows = paths.map((path, i) => make("li", {}, make("button", {
    id: `kc-path-${i}`, "aria-current": String(i === current), on: { click: () => choose(i) },
  }, `${i + 1}. ${path.map((name) => plainText(name, 20)).join(" \u2192 ")}`)));
  return make("section", {}, make("h3", {}, "Strongest paths"), make("ol", { className: "paths" }, rows));
}

// What differs between two sessions: a line for each edge, node or group, which leads to it.
function differencesOf([names, ...rows], known, choose) {
  const cell = (text) => make("td", { dir: "auto" }, plainText(text, 80) || "\u2013");
  const lines = rows.map(([part, what, ...sides]) => make("tr", {}, make("td", {}, known(part, what)
    ? make("button", { type: "button", title: "Select", on: { click: () => choose(part, what) } }, plainText(what, 40).replace("->", " \u2192 "))
    : make("span", { dir: "auto" }, plainText(what, 40)), make("small", {}, part)), sides.map(cell)));
  const head = make("tr", {}, make("th", {}, ""), names.map((name) => make("th", { dir: "auto" }, plainText(name, 24))));
  return make("section", { id: "kc-differences" }, make("h3", {}, `What differs (${rows.length.toLocaleString("en")})`), make("table", {}, make("thead", {}, head), make("tbody", {}, lines)));
}
