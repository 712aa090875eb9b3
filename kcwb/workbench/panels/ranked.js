// A table that is sorted by its heads, filtered by a text, and whose rows are chosen. All text is set as text.

function render({ model, el }) {
  const made = (tag, more = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), more);
    element.append(...children);
    return element;
  };
  const local = { by: -1, down: true };
  const field = made("input", { type: "search", placeholder: "filter", className: "kc-filter", autocomplete: "off", spellcheck: false });
  field.setAttribute("aria-label", "Filter the rows");
  const told = made("span", { className: "kc-muted" }), head = made("tr"), body = made("tbody");
  const table = made("table", { className: "kc-table" }, made("thead", {}, head), body), box = made("div", { className: "kc-scroll" }, table);
  const root = made("div", { className: "kcwb kcwb-ranked" }, made("div", { className: "kc-line" }, field, told), box);
  root.dataset.lmSuppressShortcuts = "true";
  el.append(root);
  const raised = (power) => [...power].map((one) => "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"["-0123456789".indexOf(one)] ?? "").join("");
  const number = (value) => {  // as `tables.number` writes it
    const size = Math.abs(value);
    if (size >= 999.5 && size < 1e15) return Math.round(value).toLocaleString("en");
    return size < 1e-4 && value !== 0 ? value.toExponential(2).replace(/\.?0*e/, "e") : Number(value.toPrecision(3)).toString();
  };
  const written = (value) => (typeof value === "number" ? number(value).replace(/e(.*)/, (_, power) => `\u00d710${raised(power)}`).replace("-", "\u2212") : value === null ? "\u2013" : String(value));

  function draw() {
    const columns = model.get("columns"), most = model.get("most"), wanted = field.value.trim().toLowerCase();
    const rows = model.get("rows").map((cells, i) => ({ cells, key: model.get("names")[i] }));
    const found = wanted ? rows.filter(({ cells }) => cells.some((cell) => String(cell).toLowerCase().includes(wanted))) : rows;
    if (local.by >= 0) {
      const value = (row) => row.cells[local.by], size = (one) => (typeof one === "number" ? Math.abs(one) : -1);
      const order = (a, b) => (typeof value(a) === "string" ? value(a).localeCompare(value(b), "en", { numeric: true }) : size(value(a)) - size(value(b)));
      found.sort((a, b) => (local.down ? -1 : 1) * order(a, b));
    }
    head.replaceChildren(...columns.map((name, i) => {
      const button = made("button", { type: "button", title: "Sort", onclick: () => { [local.down, local.by] = [local.by === i ? !local.down : true, i]; draw(); } }, name, local.by === i ? (local.down ? " \u25be" : " \u25b4") : "");
      const cell = made("th", { className: model.get("numeric")[i] ? "kc-number" : "" }, button);
      cell.setAttribute("aria-sort", local.by !== i ? "none" : local.down ? "descending" : "ascending");
      return cell;
    }));
    const shown = found.slice(0, most);
    told.textContent = found.length === rows.length && shown.length === rows.length ? `${rows.length.toLocaleString("en")} rows` : `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    body.replaceChildren(...shown.map(({ cells, key }) => {
      const row = made("tr", { tabIndex: 0, title: "Select in the graph" }, ...cells.map((cell, i) => made("td", { className: model.get("numeric")[i] ? "kc-number" : "", dir: "auto" }, written(cell))));
      row.setAttribute("aria-selected", String(model.get("chosen") === key));
      const choose = () => { model.set("chosen", key); model.save_changes(); };
      row.onclick = choose;
      row.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); } };
      return row;
    }));
  }
  field.addEventListener("input", draw);
  field.addEventListener("keydown", (event) => event.stopPropagation());
  for (const name of ["rows", "chosen"]) model.on(`change:${name}`, draw);
  draw();
  return () => { for (const name of ["rows", "chosen"]) model.off(`change:${name}`, draw); };
}

export default { render };
