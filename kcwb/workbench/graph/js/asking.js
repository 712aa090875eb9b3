// Beside the graph: a prompt of a person's own, and what the circuit, before and after, and the full model go on with.

function askingOf({ get, put, guarded, canvas, local, reflect }) {
  const field = (tag, key, words, hint, more) => make("label", {}, words, make(tag, { id: `kc-own-${key}`, placeholder: hint, autocomplete: "off", spellcheck: false, ...more }));
  const ask = make("button", { type: "submit", id: "kc-own-ask" }, "Ask");
  const form = make(
    "form", { id: "kc-own-form" }, field("textarea", "prompt", "Prompt", "The capital of Peru is", { rows: 2 }),
    field("input", "subject", "Subject", "if it matters: Peru", { type: "text" }), field("input", "answer", "Answer", "else what the model says", { type: "text" }),
    make("p", {}, ask, make("button", { type: "button", on: { click: guarded(() => { local.asking = false; put({ question: {} }); reflect(); canvas.focus(); }) } }, "Clear")),
  );
  const fields = Object.fromEntries(["prompt", "subject", "answer"].map((key) => [key, form.querySelector(`#kc-own-${key}`)]));
  form.onsubmit = guarded((event) => {
    event.preventDefault();
    const question = Object.fromEntries(Object.entries(fields).map(([key, one]) => [key, one.value.trim()]).filter(([key, text]) => text || key === "prompt"));
    put({ question });
    reflect();
  });
  form.onkeydown = guarded((event) => {
    event.stopPropagation();
    if (event.key === "Escape") canvas.focus();
    if (event.key === "Enter" && !event.shiftKey && event.target === fields.prompt) { event.preventDefault(); form.requestSubmit(); }
  });
  const follow = () => { for (const [key, one] of Object.entries(fields)) one.value = get("question")[key] ?? ""; };
  follow();
  return {
    follow,
    open() { local.asking = true; local.folded = false; reflect(); fields.prompt.focus(); fields.prompt.select(); },
    section(answered, live) {  // null where nothing is asked, and nothing can be
      const own = isObject(answered) ? answered : null;
      if (!own && !(live && local.asking)) return null;
      return make("section", { id: "kc-own" }, make("h3", {}, "A prompt of your own"), live ? form : null, own ? saidOf(own, live) : null);
    },
  };
}

function saidOf(own, live) {
  if (own.problem) return [make("p", { className: "trouble", role: "alert" }, plainText(own.problem, 400))];
  const runs = [["before", "before"], ["after", "after"], ["model", "full model"]].filter(([key]) => isObject(own[key]));
  const words = live ? [] : [make("p", { className: "prompt", dir: "auto" }, plainText(own.prompt, 400))];
  return [
    ...words, make("p", { id: "kc-own-answer" }, "Answer: ", make("b", { dir: "auto" }, plainText(own.answer, 60))),
    ...runs.map(([key, name]) => make("div", { className: "said", "data-run": key }, barOf(name, key, own[key]), make("p", { className: "tops" }, topsOf(own[key])))),
    own.delivers ? make("p", { className: "tops", id: "kc-own-delivers" }, plainText(own.delivers, 1000)) : null,
  ];
}
