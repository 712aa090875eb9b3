// What mouse and keyboard do.

function handOn(page, can) {
  const { get, put, local, model, host, root, canvas, painter, search, slider, sure, tip, frame, help, guarded, tell, ask, redraw, choose, describe, fullScreen } = page;

  const spot = (event) => { const { left, top } = canvas.getBoundingClientRect(); return [event.clientX - left, event.clientY - top]; };
  function select(names, edges = [], add = false) {
    const toggled = (old, some) => (some.every((one) => old.includes(one)) ? old.filter((one) => !some.includes(one)) : [...new Set([...old, ...some])]);
    put({ selected: add ? toggled(get("selected"), names) : names, selected_edges: add ? toggled(get("selected_edges"), edges) : edges });
    const all = get("selected"), box = all.length && page.view.boxOf[page.circuit.ofName.get(all.at(-1))?.id];
    tell(box ? `selected ${all.length > 1 ? `${all.length} nodes, last ` : ""}${describe(box)}` : get("selected_edges").length ? `selected edge ${get("selected_edges").at(-1)}` : "nothing selected");
  }
  function hover(next) {
    if (local.hover === next) return;
    local.hover = next;
    canvas.classList.toggle("over", Boolean(next));
    const lit = next && (next.into ? reach([next]) : { links: new Set([next]), boxes: new Set([next.from, next.to]) });
    local.hover = lit ? Object.assign(lit, { of: next }) : null;
    if (lit) painter.light(lit); else choose();
  }
  function showTip(lines, event) {
    tip.replaceChildren(...lines.map((line) => make("div", { dir: "auto" }, line)));
    tip.hidden = false;
    const { clientX: x, clientY: y } = event, { offsetWidth: w, offsetHeight: h } = tip;
    tip.style.left = `${Math.max(4, x + 16 + w > innerWidth ? x - w - 12 : x + 16)}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - h - 4))}px`;
  }
  const fingers = new Map();  // where those are that touch
  const span = () => { const [[ax, ay], [bx, by]] = fingers.values(); return [Math.hypot(bx - ax, by - ay) || 1, (ax + bx) / 2, (ay + by) / 2]; };
  let drag = null, awake = window.parent === window && !model.get("live");
  canvas.addEventListener("pointerdown", guarded((event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    if (event.pointerType === "touch") fingers.set(event.pointerId, spot(event));
    [awake, drag] = [true, fingers.size > 1 ? null : { at: spot(event), last: spot(event), moved: false, frame: event.shiftKey }];
    tip.hidden = true;
  }));
  canvas.addEventListener("pointermove", guarded((event) => {
    const [x, y] = spot(event);
    if (fingers.size > 1) {  // pinched
      const [far, fromX, fromY] = span();
      fingers.set(event.pointerId, [x, y]);
      const [now, toX, toY] = span();
      painter.move(toX - fromX, toY - fromY);
      return painter.zoom(now / far, toX, toY);
    }
    if (!drag) {
      if (fingers.size) return;  // what is left of a pinch
      const box = painter.boxAt(x, y), link = box ? null : painter.linkAt(x, y), over = box ?? link;
      if ((local.hover?.of ?? null) !== over) hover(over);
      if (over) showTip(over.lines, event); else tip.hidden = true;
      return;
    }
    drag.moved ||= Math.hypot(x - drag.at[0], y - drag.at[1]) > 4;
    if (!drag.moved) return;
    if (drag.frame) {
      frame.hidden = false;
      Object.assign(frame.style, { left: `${Math.min(x, drag.at[0])}px`, top: `${Math.min(y, drag.at[1])}px`, width: `${Math.abs(x - drag.at[0])}px`, height: `${Math.abs(y - drag.at[1])}px` });
    } else {
      canvas.classList.add("moving");
      painter.move(x - drag.last[0], y - drag.last[1]);
    }
    drag.last = [x, y];
  }));
  const release = guarded((event) => {
    fingers.delete(event.pointerId);
    if (!drag) return;
    const { moved, at, frame: framed } = drag, [x, y] = spot(event);
    drag = null;
    frame.hidden = true;
    canvas.classList.remove("moving");
    if (event.type === "pointercancel") return;
    if (moved && framed) {
      const inside = ([px, py]) => px >= Math.min(x, at[0]) && px <= Math.max(x, at[0]) && py >= Math.min(y, at[1]) && py <= Math.max(y, at[1]);
      select([...new Set([...get("selected"), ...page.view.boxes.filter((box) => inside(box.at)).flatMap((box) => box.members.map((node) => node.name))])]);
    } else if (!moved) {
      const box = painter.boxAt(x, y), link = box ? null : painter.linkAt(x, y);
      local.cursor = box?.key ?? null;
      local.hover = null;
      select(box ? box.members.map((node) => node.name) : [], link ? link.edges.map((edge) => edge.name) : [], event.shiftKey);
    }
  });
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; hover(null); });
  host.addEventListener("pointerleave", () => { awake = window.parent === window && !model.get("live"); });
  canvas.addEventListener("dblclick", guarded((event) => { const box = painter.boxAt(...spot(event)); if (box) open(box); }));
  canvas.addEventListener("wheel", guarded((event) => {  // in a notebook the wheel scrolls the notebook until the graph is clicked
    if (!awake && !event.ctrlKey) return;
    event.preventDefault();
    tip.hidden = true;
    painter.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), ...spot(event));
  }), { passive: false });
  function open(box) {
    if (box.group !== null) local.open.add(box.group);
    else {
      const [node] = box.members, mine = Object.entries(get("groups")).find(([, names]) => names.includes(node.name));
      if (mine) local.open.delete(mine[0]); else if (local.layered) local.open.delete(`L${node.layer}`); else return;
    }
    redraw();
    select(page.view.boxOf[box.members[0].id].members.map((node) => node.name));
  }
  function walk(by) {  // to the next box from bottom to top; false at the ends, where Tab leaves
    const order = [...page.view.boxes].sort((a, b) => b.y - a.y || a.x - b.x), at = order.findIndex((box) => box.key === local.cursor);
    const box = at < 0 ? (by > 0 ? order[0] : order.at(-1)) : order[at + by];
    local.cursor = box?.key ?? null;
    canvas[box ? "setAttribute" : "removeAttribute"]("aria-activedescendant", `kc-n${box?.id}`);
    choose();
    if (!box) return false;
    const [x, y] = painter.place(box);
    if (x < GUTTER || y < 0 || x > painter.width || y > painter.height) painter.move(painter.width / 2 - x, painter.height / 2 - y);
    tell(describe(box));
    return true;
  }
  function step(by) {
    const paths = get("paths").filter(Array.isArray);
    if (!paths.length) return;
    local.path = (Math.min(local.path, paths.length - 1) + by + paths.length) % paths.length;
    tell(`path ${local.path + 1} of ${paths.length}: ${paths[local.path].join(" to ")}`);
    redraw();
  }
  const KEYS = {
    x: can.cutThem, Delete: can.cutThem, Backspace: can.cutThem, r: can.restoreThem, p: can.pin, g: can.group, e: can.explain, F2: can.rename, n: can.note, F: fullScreen, a: can.askOwn,
    f: () => { search.focus(); search.select(); }, "/": () => { search.focus(); search.select(); }, "?": () => { help.hidden = !help.hidden; },
    "+": () => painter.zoom(1.35), "=": () => painter.zoom(1.35), "-": () => painter.zoom(1 / 1.35), 0: () => painter.fit(), "[": () => step(-1), "]": () => step(1),
    ArrowLeft: () => painter.move(60, 0), ArrowRight: () => painter.move(-60, 0), ArrowUp: () => painter.move(0, 60), ArrowDown: () => painter.move(0, -60),
    Enter: (event) => { const box = page.view.boxes.find((one) => one.key === local.cursor); if (box) select(box.members.map((node) => node.name), [], event.shiftKey); },
    " ": (event) => KEYS.Enter(event),
    Escape: () => {
      if (!help.hidden) help.hidden = true;
      else if (get("paths").length) put({ paths: [] });
      else { local.cursor = null; local.hover = null; local.leaving = true; tip.hidden = true; select([]); }
    },
  };
  canvas.addEventListener("focus", () => { local.leaving = false; });
  root.addEventListener("keydown", guarded((event) => {
    const typing = event.composedPath()[0].matches?.("input, select, textarea"), key = event.key, control = event.ctrlKey || event.metaKey;
    local.leaving &&= key === "Tab" || key === "Shift";
    if (event.composedPath()[0] !== canvas && key === "Escape") {
      if (!help.hidden || !typing) KEYS.Escape(event);
      canvas.focus();
    } else if (typing) return;
    else if (control && key.toLowerCase() === "z") { event.preventDefault(); ask(event.shiftKey ? "redo" : "undo"); }
    else if (control && key.toLowerCase() === "y") { event.preventDefault(); ask("redo"); }
    else if (control || event.altKey) return;
    else if (key === "Tab") { if (event.composedPath()[0] === canvas && !local.leaving && walk(event.shiftKey ? -1 : 1)) event.preventDefault(); }
    else if (event.composedPath()[0].matches?.("button") && (key === "Enter" || key === " ")) return;
    else if (Object.hasOwn(KEYS, key)) { event.preventDefault(); KEYS[key](event); }
    event.stopPropagation();
  }));
  slider.addEventListener("input", () => put({ threshold: Number(slider.value) ? page.levels[Number(slider.value)] : 0 }));
  sure.addEventListener("input", () => put({ confidence: Number(sure.value) }));

  return { select, step };
}
