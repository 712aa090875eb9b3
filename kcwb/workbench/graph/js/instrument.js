// The instrument: a circuit that is looked at and played, on a model with get, set, save_changes and on.

const DEFAULTS = {
  scene: {}, selected: [], selected_edges: [], pinned: [], cut: [], forced: [], groups: {}, names: {}, notes: {}, threshold: 0, confidence: 0,
  answers: {}, question: {}, asks: false, reading: {}, paths: [], busy: false, problem: "", asked: "", height: 0, view: {},
};
// What nodes are grouped by, the key of a node that says it, and what is wanted for it.
const GROUPINGS = [["role", "role", "find roles first"], ["position", "place", "find roles first"], ["layer"], ["kind"], ["none"]];
const BLANK = { title: "", notice: "", nodes: [], edges: [], rows: [], pitch: 40, tightest: 1, sides: {}, withRoles: false, sure: false, plan: {}, differences: [] };

function render({ model, el }) {
  const get = (name) => {  // of the kind that it should be, whatever the model holds
    const value = model.get(name), usual = DEFAULTS[name];
    const same = Array.isArray(usual) ? Array.isArray(value) : isObject(usual) ? isObject(value) : typeof value === typeof usual;
    return same ? value : usual;
  };
  const put = (values) => {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  };
  const local = { hidden: new Set(), pinnedOnly: false, open: new Set(), layered: null, hover: null, cursor: null, path: 0, facts: new Set(), run: 0, prompt: 0, folded: false, asking: false, cell: null };
  let circuit = indexed(BLANK, []), view = { boxes: [], links: [], edges: [] }, scene = BLANK, levels = [];

  // --- the page ---

  const host = make("div", { className: "kcwb-instrument", "data-lm-suppress-shortcuts": "true" }), shadow = host.attachShadow({ mode: "open" });
  const act = (id, words, title, work) => make("button", { id: `kc-${id}`, type: "button", title, "aria-label": words.length > 2 ? undefined : title, on: { click: guarded(work) } }, words);
  const title = make("h2", { id: "kc-title", dir: "auto" }), counts = make("span", { id: "kc-counts", className: "muted" }), notice = make("span", { id: "kc-notice" });
  const undo = act("undo", "\u21b6", "Undo (Ctrl+Z)", () => ask("undo")), redo = act("redo", "\u21b7", "Redo (Ctrl+Shift+Z)", () => ask("redo"));
  const asks = act("asks", "Ask", "Ask a prompt of your own (a)", () => asking.open());
  const layers = act("layers", "Layers", "One box for each layer", () => { local.layered = !local.layered; local.open.clear(); redraw(true); });
  const search = make("input", { id: "kc-search", type: "search", placeholder: "a node, or a3.h1->m7", autocomplete: "off", spellcheck: false, on: {
    keydown: guarded((event) => { if (event.key === "Enter") find(); }),  // JupyterLab keeps fields from telling of a change
    input: guarded((event) => { if (!search.value || event.inputType === "insertReplacementText") find(); }),
  } });
  search.setAttribute("list", "kc-names");
  const options = make("datalist", { id: "kc-names" }), slider = make("input", { id: "kc-slider", type: "range", min: 0, value: 0, step: 1 });
  const below = make("span", { id: "kc-below" }, "Hide below |score|"), told = make("output", { id: "kc-shown" });
  const sure = make("input", { id: "kc-confidence", type: "range", min: 0, max: 1, step: 0.01, value: 0 }), sureTold = make("output"), sureLabel = make("label", {}, "Confidence", sure, sureTold);
  const canvas = make("canvas", { id: "kc-canvas", tabIndex: 0, role: "application", "aria-label": "Circuit" });
  const acts = make("div", { className: "bar-of-acts", id: "kc-acts" }), tip = make("div", { className: "tip", id: "kc-tip", role: "tooltip", hidden: true }), aside = make("aside", { id: "kc-aside", "aria-label": "The selected node, paths and answers", hidden: true });
  const empty = make("div", { className: "empty", hidden: true }, "This circuit has no edges."), frame = make("div", { className: "frame", hidden: true }), prompt = make("form", { className: "ask", id: "kc-ask", hidden: true });
  const mirror = make("ul", { id: "kc-mirror", className: "unseen", role: "listbox", "aria-label": "Nodes of the circuit" }), live = make("div", { className: "unseen", id: "kc-live", "aria-live": "polite" });
  const trouble = make("span"), problem = make("div", { className: "problem", id: "kc-problem", role: "alert", hidden: true }, trouble, make("button", { type: "button", on: { click: () => { problem.hidden = true; put({ problem: "" }); canvas.focus(); } } }, "Dismiss"));
  const help = make("div", { className: "help", id: "kc-help", role: "dialog", "aria-label": "Keys", hidden: true }, make("h3", {}, "Keys"), make("dl", {}, HELP.flatMap(([key, words]) => [make("dt", {}, key), make("dd", {}, words)])), make("button", { type: "button", on: { click: () => { help.hidden = true; canvas.focus(); } } }, "Close"));
  const legend = make("footer"), main = make("main", {}, make("div", { className: "card" }, canvas, empty, acts, prompt, frame, help), aside);
  const header = make("header", {}, make("div", { className: "top" }, title, counts, notice, make("span", { className: "push" }, undo, redo, asks, layers,
    act("out", "\u2212", "Zoom out (\u2212)", () => painter.zoom(1 / 1.35)), act("in", "+", "Zoom in (+)", () => painter.zoom(1.35)), act("fit", "Fit", "Show the whole circuit (0)", () => painter.fit()),
    act("png", "PNG", "Save what is shown as a picture", savePicture), act("svg", "SVG", "Save the whole circuit as a drawing that can be edited", saveDrawing),
    act("full", corners(), "Full screen (F)", fullScreen), act("keys", "?", "Keys (?)", () => { help.hidden = !help.hidden; }))),
  make("label", {}, "Find", search), options, make("label", {}, below, slider, told), sureLabel);
  const root = make("div", { className: "kc" }, header, problem, main, legend, mirror, live, tip);
  shadow.append(make("style", {}, CSS), root);
  el.append(host);
  const painter = new Painter(canvas);

  // --- what goes wrong is said, and what is drawn stays ---

  function say(words) {
    trouble.textContent = words;
    problem.hidden = !words;
  }
  function guarded(work) {
    return (...args) => {
      try { return work(...args); } catch (error) { say(`The graph could not do this: ${error.message}`); return undefined; }
    };
  }

  // --- from the model to the picture ---

  // Python answers one request at a time, and clears it; what is asked meanwhile waits.
  const requests = [];
  function ask(what) {
    requests.push(what);
    next();
  }
  function next() { if (requests.length && get("asked") === "") put({ asked: requests.shift() }); }

  function load() {
    scene = { ...BLANK, ...get("scene") };
    Object.assign(local, { open: new Set(), layered: scene.edges.length > LAYERED_FROM, hover: null, cursor: null, path: 0 });
    levels = [...new Set(scene.edges.map((edge) => edge.weight))].sort((a, b) => a - b);
    title.textContent = scene.title;
    canvas.setAttribute("aria-label", `${scene.title || "Circuit"}: Tab walks through its nodes, Escape and then Tab leaves them, ? shows the keys`);
    notice.textContent = scene.notice;
    empty.hidden = scene.edges.length > 0;
    slider.max = Math.max(0, levels.length - 1);
    slider.disabled = levels.length < 2;
    options.replaceChildren(...scene.nodes.map((node) => make("option", { value: node.name })));
    sureLabel.hidden = !scene.sure;
    below.textContent = Object.keys(scene.sides).length ? "Hide below share" : "Hide below |score|";
    root.style.setProperty("--height", get("height") > 0 ? `${get("height")}px` : "100%");
    legend.replaceChildren(...legendOf(scene, local.hidden, redraw));
    redraw(true);
  }
  function state() {
    const groups = Object.entries(get("groups")).filter(([, names]) => Array.isArray(names)), auto = new Set();
    const closed = groups.filter(([name]) => !local.open.has(name));
    if (local.layered) {
      const rows = new Map();
      for (const node of circuit.nodes) if (node.kind === "head" || node.kind === "mlp") rows.set(node.layer, [...(rows.get(node.layer) ?? []), node.name]);
      for (const [layer, names] of rows) {
        if (local.open.has(`L${layer}`) || names.length < 2) continue;
        auto.add(`L${layer}`);
        closed.push([`L${layer}`, names]);
      }
    }
    const named = (key) => new Map(Object.entries(get(key)).map(([name, value]) => [name, String(value)]));
    return { ...local, closed, auto, names: named("names"), notes: named("notes"), cut: get("cut"), pinned: get("pinned"), threshold: get("threshold"), confidence: get("confidence") };
  }
  const redraw = guarded((anew = false) => {
    circuit = indexed(scene, get("forced"));
    view = shown(circuit, state());
    painter.draw(view, scene, COLOURS[theme()]);
    choose();
    const grown = painter.resize();  // else whoever watches the size finds nothing new, and the view is that of another size
    if (anew || grown || !painter.painted && !painter.frames) painter.reshape();
    counts.textContent = `${counted(scene.nodes.length, "node")} \u00b7 ${counted(scene.edges.length, "edge")}`;
    counts.hidden = Boolean(scene.notice);
    const all = circuit.edges.length, threshold = get("threshold"), some = `${view.edges.length.toLocaleString("en")} of ${counted(all, "edge")} shown`;
    told.textContent = view.edges.length === all ? `all ${counted(all, "edge")} shown` : threshold > 0 ? `${rounded(threshold)} \u00b7 ${some}` : some;
    slider.value = threshold > 0 ? Math.max(0, levels.findIndex((level) => level >= threshold)) : 0;
    slider.setAttribute("aria-valuetext", told.textContent);
    [sure.value, sureTold.textContent] = [get("confidence"), `\u2265 ${get("confidence").toFixed(2)}`];
    layers.hidden = !local.layered && scene.edges.length <= LAYERED_FROM;
    layers.setAttribute("aria-pressed", String(Boolean(local.layered)));
    const played = get("cut").length + get("forced").length > 0 || model.get("steps") > 0;
    asks.hidden = !model.get("live") || !get("asks");
    undo.hidden = redo.hidden = !played && !model.get("live");
    reflect();
  });
  function choose() {  // what is selected, pinned to boxes, and lit
    const names = new Set(get("selected")), chosen = new Set(get("selected_edges"));
    for (const box of view.boxes) [box.chosen, box.cursor] = [box.members.every((node) => names.has(node.name)), box.key === local.cursor];
    const picked = view.boxes.filter((box) => box.chosen), links = view.links.filter((link) => link.edges.some((edge) => chosen.has(edge.name)));
    const path = pathLinks();
    if (local.hover) painter.light(local.hover.boxes ? local.hover : reach([local.hover]));
    else if (path) painter.light(path);
    else if (picked.length || links.length) {
      const lit = new Set([...links, ...picked.flatMap((box) => [...box.into, ...box.out])]);
      painter.light({ links: lit, boxes: new Set([...picked, ...[...lit].flatMap((link) => [link.from, link.to])]) });
    } else painter.light(null);
    can.draw(picked);
  }
  function pathLinks() {
    const paths = get("paths").filter(Array.isArray);
    if (!paths.length) return null;
    const names = paths[Math.min(local.path, paths.length - 1)], boxes = names.map((name) => view.boxOf?.[circuit.ofName.get(name)?.id]).filter(Boolean);
    const steps = new Set(boxes.slice(1).map((box, i) => `${boxes[i].id} ${box.id}`));
    return { order: boxes.filter((box, i) => boxes.indexOf(box) === i), boxes: new Set(boxes), links: new Set(view.links.filter((link) => !link.gone && steps.has(`${link.from.id} ${link.to.id}`))) };
  }
  function theme() {
    const page = document.body?.dataset ?? {};
    let lab = page.jpThemeLight;  // JupyterLab's, also when this page stands in one of its cells
    try { lab ??= window.parent.document.body.dataset.jpThemeLight; } catch { /* another origin */ }
    const code = page.vscodeThemeKind;
    const dark = lab !== undefined ? lab === "false" : code !== undefined ? /dark|(?<!light-)high-contrast$/.test(code.replace("vscode-", "")) : matchMedia("(prefers-color-scheme: dark)").matches;
    return dark ? "dark" : "light";
  }
  function wear() {
    for (const [name, colour] of Object.entries(COLOURS[theme()])) root.style.setProperty(`--${name}`, colour);
    root.style.colorScheme = theme();
    if (el === document.body || el.parentElement === document.body) document.body.style.background = COLOURS[theme()].bg;
  }
  function setTheme() {
    wear();
    redraw();
  }

  // --- words for those who listen ---

  const describe = (box) => {
    const some = (links, side) => links.slice(0, 12).map((link) => link[side].label).join(", ") + (links.length > 12 ? ` and ${links.length - 12} more` : "");
    const ends = [[box.into, "from", "reads"], [box.out, "to", "read by"]].filter(([links]) => links.length).map(([links, side, words]) => `${words} ${some(links, side)}`);
    return [...box.lines.slice(0, 2), box.pinned ? "pinned" : "", ...ends].filter(Boolean).join("; ");
  };
  function tell(words) { live.textContent = words; }
  function keeping(where, work) {  // the focus stays where it was, else it goes to the picture
    const { activeElement: focused } = shadow, inside = focused !== where && where.contains(focused);
    work();
    if (inside) (shadow.getElementById(focused.id) ?? canvas).focus({ preventScroll: true });
  }
  function reflect() { keeping(aside, fill); }
  function fill() {
    mirror.replaceChildren(...view.boxes.map((box) => make("li", { id: `kc-n${box.id}`, role: "option", "aria-selected": String(box.chosen) }, describe(box))));
    const answers = get("answers"), paths = get("paths").filter(Array.isArray), parts = [], reading = get("reading"), chosen = get("selected");
    const alone = chosen.length === 1 ? chosen[0] : !chosen.length && !model.get("live") ? reading.node : undefined;  // a page keeps the last one
    if (reading.node !== undefined && (reading.node === alone || layerOf(alone) && layerOf(alone) === layerOf(reading.node))) parts.push(readingOf(reading, get("names"), local, alone, COLOURS[theme()], (name) => circuit.ofName.has(name), (name) => select([name]), reflect));
    if (paths.length) parts.push(pathsOf(paths, Math.min(local.path, paths.length - 1), (i) => { local.path = i; redraw(); }));
    parts.push(asking.section(answers.own, model.get("live") && get("asks")));
    if (Array.isArray(answers.facts) && answers.facts.length) parts.push(answersOf(answers, local.facts, (i) => { local.facts[local.facts.has(i) ? "delete" : "add"](i); reflect(); }));
    if (scene.differences.length > 1) {
      const isEdge = (part) => part === "cut" || part === "forced", names = (part, what) => (part === "groups" ? [] : [what].filter((name) => circuit.ofName.has(name)));
      parts.push(differencesOf(scene.differences, (part, what) => (isEdge(part) ? circuit.ofEdge.has(what) : names(part, what).length > 0), (part, what) => (isEdge(part) ? select([], [what]) : select(names(part, what)))));
    }
    aside.hidden = !parts.some(Boolean);
    aside.classList.toggle("busy", get("busy"));
    aside.setAttribute("aria-busy", String(get("busy")));
    aside.classList.toggle("folded", local.folded);
    const fold = make("button", { className: "fold", id: "kc-fold", type: "button", title: local.folded ? "Unfold" : "Fold away", "aria-expanded": String(!local.folded), on: { click: () => { local.folded = !local.folded; reflect(); } } }, local.folded ? "\u2039" : "\u203a");
    aside.replaceChildren(fold, ...(local.folded ? [] : parts.filter(Boolean)));
  }

  // --- finding, saving, full screen ---

  function find() {
    const wanted = search.value.trim(), lower = wanted.toLowerCase(), names = get("names");
    const by = (test) => circuit.nodes.find((node) => test(node.name.toLowerCase()) || (names[node.name] && test(String(names[node.name]).toLowerCase())));
    const hit = lower && (by((name) => name === lower) ?? by((name) => name.startsWith(lower)) ?? by((name) => name.includes(lower)));
    const forced = lower && !hit && wanted.includes("->") && can.force(wanted);
    search.setAttribute("aria-invalid", String(hit === undefined && !forced));
    if (hit === undefined || forced) return;
    put({ selected: hit ? [hit.name] : [], selected_edges: [] });
    if (!hit) return painter.fit();
    const box = view.boxOf[hit.id];
    if (box) painter.fit([box, ...box.into.map((link) => link.from), ...box.out.map((link) => link.to)]);
    return undefined;
  }
  function download(url, name) {
    make("a", { href: url, download: name }).click();
    if (url.startsWith("blob:")) setTimeout(() => URL.revokeObjectURL(url), 60000);
  }
  function savePicture() { download(painter.png().toDataURL("image/png"), "circuit.png"); }
  function saveDrawing() { download(URL.createObjectURL(new Blob([painter.svg()], { type: "image/svg+xml" })), "circuit.svg"); }
  function fullScreen() {
    const done = document.fullscreenElement ? document.exitFullscreen() : root.requestFullscreen?.();
    Promise.resolve(done).catch(() => tell("this page may not fill the screen"));
  }

  // --- what is shared with those who act on it ---

  const page = {
    get, put, local, model, act, acts, prompt, host, root, canvas, painter, search, slider, sure, tip, frame, help, guarded, tell, ask, redraw, choose, describe, fullScreen, reflect, keeping,
    get circuit() { return circuit; }, get view() { return view; }, get scene() { return scene; }, get levels() { return levels; },
  };
  const can = actsOf(page), asking = askingOf(page), { select, step } = handOn(page, { ...can, askOwn: () => { if (!asks.hidden) asking.open(); } });

  // --- following the model, the theme and the size ---

  const followed = { scene: load, height: load, asked: next, problem: () => say(get("problem")), busy: reflect, answers: reflect, reading: reflect, asks: redraw, question: () => { asking.follow(); reflect(); }, paths: () => { local.path = 0; redraw(); step(0); } };
  const listeners = ["pinned", "cut", "forced", "groups", "names", "notes", "threshold", "confidence"].map((name) => [name, redraw]);
  let due = 0;
  const soon = () => { due ||= requestAnimationFrame(() => { due = 0; redraw(); }); };  // several traits at once are one change
  for (const name of ["selected", "selected_edges"]) followed[name] = () => { choose(); reflect(); };
  const heard = [...Object.entries(followed), ...listeners].map(([name, work]) => [`change:${name}`, work === redraw ? soon : guarded(() => work())]);
  for (const [name, work] of heard) model.on(name, work);
  const light = matchMedia("(prefers-color-scheme: dark)"), watcher = new MutationObserver(setTheme);
  light.addEventListener("change", setTheme);
  for (const where of [() => document.body, () => window.parent.document.body]) {
    try { watcher.observe(where(), { attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind"] }); } catch { /* another origin */ }
  }
  const resized = guarded(() => { root.classList.toggle("narrow", root.clientWidth < 640); if (painter.resize()) { painter.reshape(); painter.now(); } });
  const sizes = new ResizeObserver(resized);
  for (const one of [canvas, root]) sizes.observe(one);
  wear();
  root.classList.toggle("narrow", root.clientWidth > 0 && root.clientWidth < 640);
  guarded(load)();
  painter.now();
  // A sandboxed frame out of sight has no size at first, and no observer tells when: it is asked, for what is printed.
  const begin = (tries) => {
    if (painter.width) return;
    resized();
    if (tries > 0 || host.isConnected) setTimeout(begin, tries > 0 ? 60 : 500, tries - 1);
  };
  begin(50);
  let telling = 0;
  painter.then = () => {  // what is looked at is told once it stands, for what Python saves
    clearTimeout(telling);
    if (model.get("live")) telling = setTimeout(guarded(tellView), 400);
  };
  function tellView() {
    const { width, height, scale, left, top, stretch } = painter, looked = { width, height, scale, left, top, stretch };
    Object.assign(looked, { hidden: [...local.hidden], open: [...local.open], pinned_only: local.pinnedOnly, layered: Boolean(local.layered), dark: theme() === "dark" });
    if (width && JSON.stringify(looked) !== JSON.stringify(get("view"))) put({ view: looked });
  }
  painter.then();
  if (get("problem")) say(get("problem"));
  host.graph = {  // what is on screen, for tests and for who is curious
    place: (name) => { const box = view.boxOf?.[circuit.ofName.get(name)?.id]; if (box && !box.at) painter.now(); return box && { x: box.at[0], y: box.at[1], width: box.size[0], height: box.size[1], labelled: box.labelled, label: box.label, tone: box.tone, group: box.group }; },
    along: (name, t) => { const link = view.links.find((one) => one.edges.some((edge) => edge.name === name)), [x, y] = pointOn(link.points, t); return { x: painter.scale * x + painter.left, y: painter.scale * y + painter.top }; },
    edgeAt: (x, y) => (painter.boxAt(x, y) ? null : painter.linkAt(x, y)?.edges[0].name ?? null),
    boxes: () => view.boxes.map((box) => box.label), links: () => view.links.map((link) => ({ name: link.edges[0].name, edges: link.edges.length, gone: link.gone, tone: link.tone, forced: Boolean(link.forced) })),
    lit: () => (painter.lit ? { boxes: [...painter.lit.boxes].map((box) => box.label), links: [...painter.lit.links].map((link) => link.edges[0].name) } : null),
    view: () => ({ scale: painter.scale, left: painter.left, top: painter.top, cost: painter.cost, frames: painter.frames }), model, painter,
  };
  return () => {
    clearTimeout(telling);
    painter.then = null;
    for (const [name, work] of heard) model.off?.(name, work);
    light.removeEventListener("change", setTheme);
    watcher.disconnect();
    sizes.disconnect();
    host.remove();
  };
}
