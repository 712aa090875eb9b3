// A line that says when the kernel does not hear: it runs cells, and answers what is done here when these are done.

const PATIENCE = 1200;  // milliseconds

function render({ model, el }) {
  const line = document.createElement("div"), words = "The kernel is busy with cells: what you do here is answered when they are done.";
  Object.assign(line, { className: "kc-note", role: "status", hidden: true, textContent: words });
  el.classList.add("kcwb");
  el.append(line);
  let asked = "", timer = 0;
  const within = () => Boolean(el.closest(".kcwb-panel")?.parentElement?.closest(".kcwb-panel"));  // another panel, which says it
  function ask() {
    if (asked) return;  // and not heard yet
    asked = `${Date.now()} ${Math.random()}`;
    timer = setTimeout(() => { line.hidden = within(); }, PATIENCE);
    model.send({ asked });
  }
  function hear(message) {
    if (message?.heard !== asked) return;
    clearTimeout(timer);
    [asked, line.hidden] = ["", true];
  }
  const touched = (event) => { if (el.closest(".kcwb-panel")?.contains(event.target)) ask(); };
  model.on("msg:custom", hear);
  for (const kind of ["pointerdown", "keydown"]) document.addEventListener(kind, touched, true);
  ask();
  return () => {
    clearTimeout(timer);
    model.off("msg:custom", hear);
    for (const kind of ["pointerdown", "keydown"]) document.removeEventListener(kind, touched, true);
  };
}

export default { render };
