// A page without Python: a plain object is the model. It undoes and redoes; a selection is told to who holds the page.

function plainModel(data) {
  const values = { ...DEFAULTS, ...data, live: false, steps: 0 }, heard = new Map(), past = [], future = [];
  let before = { cut: values.cut, forced: values.forced }, dirty = new Set(), stepping = false;
  const model = {
    get: (name) => values[name],
    set(name, value) {
      if (values[name] === value) return;
      values[name] = value;
      dirty.add(name);
      for (const work of heard.get(`change:${name}`) ?? []) work();
    },
    on: (name, work) => heard.set(name, [...(heard.get(name) ?? []), work]),
    save_changes() {
      const changed = dirty;
      dirty = new Set();
      if ((changed.has("cut") || changed.has("forced")) && !stepping) {
        past.push(before);
        future.length = 0;
        values.steps = past.length;
      }
      before = { cut: values.cut, forced: values.forced };
      if (changed.has("selected") || changed.has("selected_edges")) {
        const edges = values.selected_edges.map((name) => { const [sender, receiver, port] = parted(name); return [sender, joined("", receiver, port).slice(2)]; });
        try { window.parent.postMessage({ kcwb: "select", nodes: values.selected, edges }, "*"); } catch { /* no parent to tell */ }
      }
      if (changed.has("asked") && values.asked) answer(values.asked);
    },
  };
  function answer(what) {
    const [from, to] = what === "undo" ? [past, future] : [future, past];
    if (what !== "explain" && from.length) {
      to.push(before);
      stepping = true;
      for (const [name, value] of Object.entries(from.pop())) model.set(name, value);
      model.save_changes();
      stepping = false;
    }
    model.set("asked", "");
    dirty.delete("asked");
  }
  return model;
}

const given = JSON.parse(document.getElementById("kc-circuit").textContent);
document.title = given.scene.title || "Knowledge circuit";
render({ model: plainModel(given), el: document.body });
