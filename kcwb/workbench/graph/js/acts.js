// What can be done to what is selected: cut, restore, force in, pin, group, name, note, explain; and the buttons for it.

function actsOf(page) {
  const { get, put, local, model, act, acts, prompt, canvas, guarded, tell, ask, redraw, keeping } = page;

  function draw(picked) {
    const names = get("selected"), edges = get("selected_edges"), cut = new Set(get("cut")), pinned = get("pinned"), touched = touchedEdges();
    const grouped = picked.find((box) => box.group !== null), row = [];
    if (names.length || edges.length) {
      const words = names.length === 1 ? get("names")[names[0]] ?? names[0] : names.length ? counted(names.length, "node") : edges.length === 1 ? edges[0].replace("->", " \u2192 ") : counted(edges.length, "edge");
      row.push(make("span", { className: "chip", dir: "auto", title: plainText(words, 200) }, plainText(grouped && names.length > 1 ? grouped.label : words, 44)));
      if (touched.some((name) => !cut.has(name))) row.push(act("cut", "Cut", "Cut (x)", cutThem));
      if (touched.some((name) => cut.has(name))) row.push(act("restore", "Restore", "Restore (r)", restoreThem));
      if (names.length) row.push(act("pin", names.every((name) => pinned.includes(name)) ? "Unpin" : "Pin", "Pin (p)", pin));
      if (grouped && !local.layered || names.length > 1) row.push(act("group", grouped ? "Ungroup" : "Group", "Group (g)", group));
      if (names.length === 1) row.push(act("rename", "Rename", "Rename (F2)", rename), act("note", "Note", "Note (n)", note));
    }
    if (pinned.length) {
      const only = act("only", "Pinned only", "Show pinned nodes alone, and the edges between them", () => { local.pinnedOnly = !local.pinnedOnly; redraw(true); });
      only.setAttribute("aria-pressed", String(local.pinnedOnly));
      row.push(only);
    }
    if (model.get("live") || names.length || get("paths").length) row.push(act("explain", "Explain", "The strongest paths (e)", explain));
    const menu = make("select", { id: "kc-by", "aria-label": "Group by", on: { change: guarded(() => groupBy(menu.value)) } }, make("option", { value: "" }, "Group by\u2026"), GROUPINGS.map(([value, key, needs]) => {
      const unknown = key !== undefined && !page.scene.nodes.some((node) => node[key]);
      return make("option", { value, disabled: unknown, title: unknown ? needs : "" }, unknown ? `${value} (${needs})` : value);
    }));
    if (page.scene.nodes.length && (row.length || Object.keys(get("groups")).length)) row.push(menu);
    keeping(acts, () => acts.replaceChildren(...row));
  }
  function touchedEdges() {  // the selected edges, and all at the selected nodes
    const names = new Set(get("selected")), chosen = new Set(get("selected_edges"));
    return page.circuit.edges.filter((edge) => chosen.has(edge.name) || names.has(page.circuit.nodes[edge.from].name) || names.has(page.circuit.nodes[edge.to].name)).map((edge) => edge.name);
  }
  function cutThem() {
    const cut = new Set(get("cut")), forced = new Set(get("forced")), touched = touchedEdges().filter((name) => !cut.has(name));
    if (!touched.length) return;
    put({ cut: [...cut, ...touched.filter((name) => !forced.has(name))], forced: [...forced].filter((name) => !touched.includes(name)) });
    tell(`cut ${counted(touched.length, "edge")}`);
  }
  function restoreThem() {
    const touched = new Set(touchedEdges()), cut = get("cut"), kept = cut.filter((name) => !touched.has(name));
    if (kept.length === cut.length) return;
    put({ cut: kept });
    tell(`restored ${counted(cut.length - kept.length, "edge")}`);
  }
  function force(name) {
    const ends = parted(name), order = (end) => (end === "input" ? -1 : end === "logits" ? 1e9 : /^[am]\d+/.test(end) ? Number(end.slice(1).split(".")[0]) + (end[0] === "m" ? 0.5 : 0) : NaN);
    if (page.circuit.ofEdge.has(name) && !get("forced").includes(name)) {  // it is there: look at it
      put({ selected: [], selected_edges: [name] });
      return true;
    }
    if (!ends || !(order(ends[0]) < order(ends[1])) || (ends[1][0] === "a") !== (ends[2] !== "direct")) return false;
    put({ forced: [...get("forced").filter((one) => one !== name), name], selected: [], selected_edges: [name] });
    tell(`forced ${name} in`);
    return true;
  }
  function pin() {
    const names = get("selected"), pinned = get("pinned"), all = names.every((name) => pinned.includes(name));
    if (names.length) put({ pinned: all ? pinned.filter((name) => !names.includes(name)) : [...new Set([...pinned, ...names])] });
  }
  function group() {
    const names = get("selected"), groups = get("groups"), held = Object.keys(groups).filter((name) => groups[name].every((node) => names.includes(node)) && groups[name].length);
    if (held.length) return put({ groups: Object.fromEntries(Object.entries(groups).filter(([name]) => !held.includes(name))) });
    if (names.length < 2) return tell("select two nodes or more to group them");
    return question("Name of the group", `group ${Object.keys(groups).length + 1}`, (name) => {
      if (!name) return;
      const others = Object.entries(groups).map(([one, nodes]) => [one, nodes.filter((node) => !names.includes(node))]).filter(([one, nodes]) => nodes.length && one !== name);
      local.open.delete(name);
      put({ groups: Object.fromEntries([...others, [name, names]]) });
    });
  }
  function groupBy(what) {
    local.open.clear();
    local.layered = false;
    put({ groups: what === "none" || !what ? {} : Object.fromEntries(alike(page.circuit.nodes, what)) });
    redraw(true);
  }
  function explain() { ask("explain"); }
  const labelling = (key, words) => () => {
    const [name, ...more] = get("selected");
    if (name === undefined || more.length) return tell("select one node");
    return question(`${words} ${plainText(name, 40)}`, get(key)[name] ?? "", (text) => {
      const others = Object.entries(get(key)).filter(([one]) => one !== name);
      put({ [key]: Object.fromEntries(text ? [...others, [name, text]] : others) });
    });
  };
  const rename = labelling("names", "Name for"), note = labelling("notes", "Note on");
  function question(words, value, done) {
    const field = make("input", { type: "text", value, "aria-label": words, maxLength: 300 });
    const close = () => { prompt.hidden = true; canvas.focus(); };
    prompt.replaceChildren(make("label", {}, words, field), make("button", { type: "submit" }, "OK"), make("button", { type: "button", on: { click: close } }, "Cancel"));
    prompt.onsubmit = guarded((event) => { event.preventDefault(); close(); done(field.value.trim()); });
    prompt.onkeydown = (event) => { event.stopPropagation(); if (event.key === "Escape") close(); };
    prompt.hidden = false;
    field.focus();
    field.select();
  }

  return { draw, cutThem, restoreThem, force, pin, group, explain, rename, note };
}
