// What is shown of a circuit: the scene that Python laid out, and what a person has done to it.

const LAYERED_FROM = 2000;  // edges; of more, layers are drawn as one box each, which open one by one

// "a3.h1->a5.h0<q>" -> ["a3.h1", "a5.h0", "q"]
function parted(name) {
  const at = name.indexOf("->"), receiver = name.slice(at + 2), port = /^([^]+)<([qkv])>$/.exec(receiver);
  return at < 0 ? null : [name.slice(0, at), port ? port[1] : receiver, port ? port[2] : "direct"];
}
const joined = (sender, receiver, port) => `${sender}->${receiver}${port === "direct" ? "" : `<${port}>`}`;

// Text as one line of plain characters, no longer than a box can be.
function plainText(text, most = 24) {
  const line = String(text).replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+/g, " ").trim();
  const letters = [...line];
  return letters.length > most ? letters.slice(0, most - 1).join("") + "\u2026" : line;
}

// The scene with edges by name, and the nodes and edges that a person has forced in.
function indexed(scene, forced) {
  const nodes = scene.nodes.map((node, id) => ({ ...node, id })), ofName = new Map(nodes.map((node) => [node.name, node]));
  const edges = scene.edges.map((edge, id) => (
    { ...edge, id, name: joined(nodes[edge.from].name, nodes[edge.to].name, edge.port) }
  ));
  const ofEdge = new Map(edges.map((edge) => [edge.name, edge]));
  for (const name of forced) {
    const ends = parted(name);
    if (ofEdge.has(name) || !ends) continue;
    const [from, to] = ends.slice(0, 2).map((end) => ofName.get(end) ?? placed(end));
    if (!from || !to) continue;
    const apart = { q: -1, k: 1 }[ends[2]] ?? 0;
    const edge = {
      id: edges.length, from: from.id, to: to.id, port: ends[2], tone: "forced", name, forced: true, weight: Infinity, width: 2.4,
      strength: 1, lines: [name.replace("->", " \u2192 "), "forced in by hand"], bend: ["cubicBezier", 0.4 + 0.1 * apart],
    };
    edges.push(edge);
    ofEdge.set(name, edge);
  }
  return { nodes, edges, ofName, ofEdge, plan: scene.plan };

  // A node that is not in the circuit, where the circuit's own of its kind and layer would stand.
  function placed(name) {
    const head = /^a(\d+)\.h(\d+)$/.exec(name), mlp = /^m(\d+)$/.exec(name), { width, columns, pitch, mlps } = scene.plan;
    if (!head && !mlp) return undefined;
    const layer = Number((head ?? mlp)[1]), known = nodes.filter((node) => node.kind === "head" || node.kind === "mlp");
    const height = (node) => node.y + (node.kind === "mlp" ? 0.32 * pitch : 0);
    const near = known.sort((a, b) => Math.abs(a.layer - layer) - Math.abs(b.layer - layer))[0];
    const y = (near ? height(near) - (layer - near.layer) * pitch : -layer * pitch) - (mlp ? 0.32 * pitch : 0);
    const node = {
      id: nodes.length, name, kind: head ? "head" : "mlp", tone: head ? "head" : "mlp", label: name, role: "", mark: "", place: "", layer, y, side: null,
      x: head ? width * Number(head[2]) / columns : mlps[layer % mlps.length], lines: [name, "not in the circuit; forced in by hand"],
    };
    nodes.push(node);
    ofName.set(name, node);
    return node;
  }
}

// Boxes and the lines between them: edges that pass all filters, closed groups as one box each.
function shown(circuit, state) {
  const cut = new Set(state.cut), pinned = new Set(state.pinned), { hidden } = state, { plan } = circuit;
  const passes = circuit.nodes.map((node) => !hidden.has(node.tone) && (!state.pinnedOnly || pinned.has(node.name)));
  const edges = circuit.edges.filter((edge) => (
    passes[edge.from] && passes[edge.to] && !hidden.has(edge.port) && !hidden.has(edge.tone) &&
    (edge.forced || (edge.weight >= state.threshold && (edge.pi ?? 1) >= state.confidence))
  ));
  const boxes = [], boxOf = new Array(circuit.nodes.length);
  for (const [group, names] of state.closed) {
    const members = names.map((name) => circuit.ofName.get(name)).filter((node) => node && passes[node.id] && !boxOf[node.id]);
    if (members.length) boxes.push(boxed(members, group));
  }
  for (const node of circuit.nodes) if (passes[node.id] && !boxOf[node.id]) boxes.push(boxed([node], null));

  const links = new Map();
  for (const edge of edges) {
    const from = boxOf[edge.from], to = boxOf[edge.to], gone = cut.has(edge.name), alone = !from.group && !to.group;
    if (from === to) continue;
    const key = alone ? edge.id : `${from.id} ${to.id} ${gone}`, link = links.get(key);
    if (link) {
      link.edges.push(edge);
      link.width = Math.min(7, Math.hypot(link.width, edge.width));
      link.strength = Math.max(link.strength, edge.strength);
      if (link.tone !== edge.tone) link.tone = "direct";
      if (link.port !== edge.port) link.port = "direct";
      link.forced ||= Boolean(edge.forced);
    } else {
      links.set(key, { ...edge, from, to, edges: [edge], gone, bend: alone ? edge.bend : bent(from, to) });
    }
  }
  for (const link of links.values()) {
    if (link.edges.length > 1) {
      link.lines = [`${link.from.label} \u2192 ${link.to.label}`, `${link.edges.length.toLocaleString("en")} edges`];
    }
    link.from.out.push(link);
    link.to.into.push(link);
    for (const box of [link.from, link.to]) box.weight = Math.max(box.weight, Math.min(link.weight, 1e30) || 0);
  }
  return { boxes, links: [...links.values()], boxOf, edges };

  function boxed(members, group) {
    const mean = (key) => members.reduce((sum, node) => sum + node[key], 0) / members.length, [one] = members;
    const tones = new Set(members.map((node) => node.tone)), layers = members.map((node) => node.layer);
    const renamed = group === null && state.names.get(one.name);
    const box = {
      id: boxes.length, key: group === null ? `node ${one.name}` : `group ${group}`, group, members, x: mean("x"), y: mean("y"), into: [], out: [],
      kind: group === null ? one.kind : "group", tone: tones.size > 1 ? "head" : one.tone, side: group === null ? one.side : null, weight: 0,
      layer: Math.min(...layers), label: group === null ? plainText(renamed || one.label) || " " : `${plainText(group)} \u00b7 ${members.length}`,
      mark: group === null ? one.mark : "", pinned: members.some((node) => pinned.has(node.name)),
      noted: members.some((node) => state.notes.has(node.name)),
      lines: group === null ? [...one.lines] : [plainText(group, 120), `group of ${members.length}`, plainText(members.map((node) => node.name).join(", "), 200)],
    };
    if (renamed) box.lines.unshift(plainText(renamed, 120));
    for (const node of members) {
      boxOf[node.id] = box;
      if (state.notes.has(node.name)) box.lines.push(`\u270e ${state.notes.get(node.name)}`);
    }
    if (group !== null && state.auto.has(group)) box.x += 0.42 * (plan.width ?? 300) * Math.sin(2.4 * box.layer);  // not all in one column
    return box;
  }
}

function bent(from, to) {
  if (Math.abs(from.x - to.x) >= 40) return ["cubicBezier", 0.4];
  return ["curvedCCW", Math.min(0.6, 60 / Math.max(Math.hypot(from.x - to.x, from.y - to.y), 1)) + 0.1];
}

// All boxes and lines by which some boxes are reached, and which they reach, on edges that are not cut.
function reach(starts) {
  const boxes = new Set(starts), links = new Set();
  for (const [side, end] of [["into", "from"], ["out", "to"]]) {
    const seen = new Set(starts), queue = [...starts];
    while (queue.length) {
      for (const link of queue.pop()[side]) {
        if (link.gone) continue;
        links.add(link);
        if (!seen.has(link[end])) {
          seen.add(link[end]);
          boxes.add(link[end]);
          queue.push(link[end]);
        }
      }
    }
  }
  return { boxes, links };
}

// Nodes by what they have in common, as groups: only such as have two or more.
function alike(nodes, by) {
  const words = { role: (node) => node.role, position: (node) => node.place && `at ${node.place}`, layer: (node) => `L${node.layer}`, kind: (node) => ({ head: "heads", mlp: "MLPs" })[node.kind] };
  const found = new Map();
  for (const node of nodes) {
    const name = node.kind === "head" || node.kind === "mlp" ? plainText(words[by](node) ?? "", 60) : "";
    if (name) found.set(name, [...(found.get(name) ?? []), node.name]);
  }
  return [...found].filter(([, names]) => names.length > 1);
}
