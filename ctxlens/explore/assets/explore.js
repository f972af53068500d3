/* What Dash has nothing for: the text of thousands of tokens, keys, links, undo, colours. Text from people is
   only ever set as textContent. */
(() => {
  "use strict";
  const skip = () => window.dash_clientside.no_update;
  const context = () => window.dash_clientside.callback_context;
  const control = (key) => ({type: "control", key});
  const set = (key, value) => window.dash_clientside.set_props(control(key), {value});
  const tell = (words) => window.dash_clientside.set_props("notice", {children: words});
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  const byId = (id) => document.getElementById(id);

  /* ---------- the state: from the controls, to the controls ---------- */

  const past = {states: [], at: -1, timer: 0};
  let current = null;

  function nest(pairs, base) {
    const made = structuredClone(base);
    made.chat.messages = [];
    for (const [key, value] of pairs) {
      const path = key.replace("?", "").split(".");
      let place = made;
      path.slice(0, -1).forEach((part, i) => {
        if (place[part] === undefined || place[part] === null) place[part] = /^\d+$/.test(path[i + 1]) ? [] : {};
        place = place[part];
      });
      const last = path[path.length - 1];
      place[last] = key.endsWith("?") ? Boolean(value && value.length) : (value === undefined ? null : value);
    }
    made.chat.messages = made.chat.messages.filter((one) => one && one.role !== undefined)
      .map((one) => ({role: one.role, content: one.content || ""}));
    for (const key of ["template_text", "template_args"]) made.chat[key] = made.chat[key] || "";
    for (const key of ["chosen", "phrase"]) made.steer[key] = made.steer[key] || "";
    for (const key of ["sentence", "question", "keywords", "document", "more"]) made.needle[key] = made.needle[key] || "";
    for (const key of ["upload", "file"]) made.data[key] = made.data[key] || "";
    return made;
  }

  function remember(state) {
    clearTimeout(past.timer);
    past.timer = setTimeout(() => {
      if (past.at >= 0 && same(past.states[past.at], state)) return;
      past.states = [...past.states.slice(0, past.at + 1), state].slice(-100);
      past.at = past.states.length - 1;
      writeAddress(state);
    }, 500);
  }

  function prune(value, standard) {
    if (value === null || typeof value !== "object" || Array.isArray(value)) {
      return same(value, standard) ? undefined : value;
    }
    const kept = {};
    for (const [key, one] of Object.entries(value)) {
      const left = prune(one, (standard || {})[key]);
      if (left !== undefined) kept[key] = left;
    }
    return Object.keys(kept).length ? kept : undefined;
  }

  function fill(standard, given) {
    if (given === undefined) return structuredClone(standard);
    if (given === null || typeof given !== "object" || Array.isArray(given)) return given;
    const made = structuredClone(standard || {});
    for (const [key, value] of Object.entries(given)) made[key] = fill(made[key], value);
    return made;
  }

  async function through(stream, bytes) {
    const body = new Response(new Blob([bytes]).stream().pipeThrough(stream));
    return new Uint8Array(await body.arrayBuffer());
  }

  async function pack(state) {
    const text = JSON.stringify(prune(state, past.defaults) || {});
    const bytes = await through(new CompressionStream("deflate-raw"), new TextEncoder().encode(text));
    let binary = "";
    bytes.forEach((b) => { binary += String.fromCharCode(b); });
    return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  }

  async function unpack(text) {
    const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(binary, (c) => c.charCodeAt(0));
    const found = await through(new DecompressionStream("deflate-raw"), bytes);
    return JSON.parse(new TextDecoder().decode(found));
  }

  async function writeAddress(state) {
    const packed = await pack(state);
    window.history.replaceState(null, "", packed.length < 100000 ? `#s=${packed}` : "#");
  }

  async function readAddress() {
    const match = window.location.hash.match(/^#s=([\w-]+)$/);
    if (!match) return null;
    try {
      return fill(past.defaults, await unpack(match[1]));
    } catch (error) {
      tell("The link holds no state of this page; copy the whole link again.");
      return null;
    }
  }

  function collect(values, first, page) {
    const ids = context().inputs_list[0];
    const state = nest(ids.map((one, i) => [one.id.key, values[i]]), first);
    if (current && !same(current, state) && byId("notice")?.textContent) tell("");
    current = state;
    showScreen(state);
    remember(state);
    const name = page || Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) =>
      b.toString(16).padStart(2, "0")).join("");
    return [state, page ? skip() : name];
  }

  const isTyping = (state, hiding) => state.screen === "needle" && hiding &&
    ["sentence", "document"].some((key) => state.needle[key] !== hiding[key]);

  /* Typing must not start a computation with every letter. */
  let latest = 0, hasStarted = false;
  const derived = {conversation: null, look: null};
  async function derive(state, ...known) {
    if (!state) return known.map(skip);
    const mine = ++latest, [conversation, , , , steering, comparing, hiding, scoring] = known;
    if (hasStarted && (!same(state.chat, conversation) || isTyping(state, hiding))) {
      await new Promise((done) => setTimeout(done, 250));
      if (mine !== latest) return known.map(skip);
    }
    hasStarted = true;
    const where = state.where;
    const next = [
      state.chat, where.view,
      {role: where.role, view: where.view, query: where.query},
      {role: where.role, view: where.view, layer: where.layer, head: where.head, query: where.query},
      state.screen === "steer" ? {chat: state.chat, steer: state.steer} : steering,
      state.screen === "compare" ? {chat: state.chat, compare: state.compare} : comparing,
      state.screen === "needle" ? state.needle : hiding,
      state.screen === "data" ? state.data : scoring,
    ];
    derived.conversation = next[0];
    derived.look = next[3];
    return next.map((one, i) => same(one, known[i]) ? skip() : one);
  }

  async function change(undo, redo, add, drops, loaded, state, first, defaults) {
    const trigger = context().triggered_id;
    past.defaults = defaults;
    if (trigger === undefined || trigger === null || !state) return (await readAddress()) || skip();
    if (trigger === "undo" || trigger === "redo") {
      const at = past.at + (trigger === "undo" ? -1 : 1);
      if (at < 0 || at >= past.states.length) return skip();
      past.at = at;
      return structuredClone(past.states[at]);
    }
    const made = structuredClone(state);
    if (trigger === "add-message" && add) {
      const last = made.chat.messages[made.chat.messages.length - 1];
      made.chat.messages.push({role: last && last.role === "user" ? "assistant" : "user", content: ""});
      return made;
    }
    if (trigger === "loaded" && loaded) {
      made.chat.messages = loaded;
      made.where.query = null;
      return made;
    }
    if (trigger.type === "drop-message" && context().triggered[0].value) {
      if (made.chat.messages.length === 1) made.chat.messages = [{role: "user", content: ""}];
      else made.chat.messages.splice(trigger.i, 1);
      return made;
    }
    return skip();
  }

  function restore(state, looked, values) {
    const ids = context().outputs_list;
    if (context().triggered_id === "chosen") {
      return ids.map(({id}) => {
        const [group, name] = id.key.split(".");
        return group === "where" && name in (looked || {}) ? looked[name] : skip();
      });
    }
    if (!state) return ids.map(skip);
    return ids.map((one, i) => {
      const key = one.id.key;
      if (key.startsWith("chat.messages.")) return skip();
      const value = key.replace("?", "").split(".").reduce((place, part) => (place || {})[part], state);
      const next = key.endsWith("?") ? (value ? ["on"] : []) : (value === undefined ? null : value);
      return same(next, values[i]) ? skip() : next;
    });
  }

  /* Done without Dash, which would render every screen again. */
  function showScreen(state) {
    for (const screen of document.querySelectorAll(".screen")) {
      screen.hidden = !screen.classList.contains(`screen-${state.screen}`);
    }
    const show = (id, shown) => { const box = byId(id); if (box) box.hidden = !shown; };
    show("own-template", state.chat.template === "own");
    show("alpha-box", state.steer.by === "alpha");
    show("mode-box", state.steer.by === "alpha");
    show("share-box", state.steer.by === "share");
    show("chosen-box", state.steer.heads === "chosen");
    show("document-box", state.needle.source === "own");
    const free = state.data.reduction === "lp_gap";
    show("beta-box", state.data.rule === "beta" && !free);
    show("nats-box", state.data.rule === "beta" && free);
    const thumb = byId("needle-thumb");
    if (thumb) thumb.style.left = `${state.needle.depth}%`;
    if (document.body.dataset.screen !== state.screen) {
      document.body.dataset.screen = state.screen;
      setTimeout(() => window.dispatchEvent(new Event("resize")), 0);
    }
  }

  /* ---------- what is being computed ---------- */

  /* Asks the server; never fails, so that the page goes on when the server answers again. */
  async function ask(path, question) {
    try {
      const answer = await fetch(path, {
        method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(question),
      });
      const found = answer.ok ? await answer.json() : {error: `the explorer answers ${answer.status}.`};
      if (found.error) tell(found.error);
      return found;
    } catch (error) {
      tell("The explorer does not answer. Is its command still running?");
      return {error: String(error)};
    }
  }

  const LOOK_EVERY = 100;
  let awaited = [], isLooking = false;
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));

  function watch(wanted, arrived) {
    const slots = context().inputs_list[0].map((one) => one.id.slot);
    awaited = [];
    wanted.forEach((want, i) => {
      const isOpen = Boolean(want) && (!arrived[i] || arrived[i].key !== want.key);
      if (isOpen) awaited.push({slot: slots[i], want});
      document.body.toggleAttribute(`data-busy-${slots[i]}`, isOpen);
    });
    byId("activity").hidden = !awaited.length;
    if (awaited.length && !isLooking) lookForResults();
    return skip();
  }

  async function lookForResults() {
    isLooking = true;
    const told = {};
    while (awaited.length) {
      const asked = awaited, answer = await ask("/explore/progress", {
        wanted: asked.map(({want}) => ({which: want.which, key: want.key})),
      });
      (answer.found || []).forEach((one, i) => {
        const {slot, want} = asked[i], stillOpen = awaited.some((now) => now.slot === slot && now.want.key === want.key);
        const news = JSON.stringify([want.key, one.over, one.partial]);
        if (!stillOpen || told[slot] === news) return;
        told[slot] = news;
        const to = (type, data) => window.dash_clientside.set_props({type, slot}, {data});
        if (one.error) tell(one.error);
        if (one.over) to("arrived", {...want, state: one.state, error: one.error});
        else to("partial", one.partial);
      });
      const bar = byId("activity-bar"), hasShare = typeof answer.share === "number";
      byId("activity-words").textContent = answer.words || "";
      bar.hidden = !hasShare;
      if (hasShare) bar.value = answer.share;
      await pause(answer.error ? 2000 : LOOK_EVERY);
    }
    isLooking = false;
  }

  function sayPart(words) {
    const caret = {children: "▍", className: "caret", "aria-hidden": "true"};
    return [words || "", {type: "Span", namespace: "dash_html_components", props: caret}];
  }

  /* ---------- light and dark ---------- */

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  function wear(scheme, shades) {
    const page = document.documentElement;
    page.dataset.scheme = scheme;
    for (const [name, pair] of Object.entries(shades)) {
      page.style.setProperty(`--role-${name}`, pair[scheme === "dark" ? 1 : 0]);
    }
    requestAnimationFrame(() => { const host = byId("where-tokens"); if (host) minimap(host); });
  }

  function theme(clicks, scheme, shades) {
    let next = scheme;
    if (!next) {
      next = dark.matches ? "dark" : "light";
      dark.addEventListener("change", () => {
        window.dash_clientside.set_props("scheme", {data: dark.matches ? "dark" : "light"});
        wear(dark.matches ? "dark" : "light", shades);
      });
    } else if (clicks) next = scheme === "dark" ? "light" : "dark";
    wear(next, shades);
    return next;
  }

  function recolour(value, table) {
    if (typeof value === "string") return table.get(value) || value;
    if (Array.isArray(value)) return value.map((one) => recolour(one, table));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, one]) =>
        [key, ["z", "x", "y", "text", "customdata"].includes(key) ? one : recolour(one, table)]));
    }
    return value;
  }

  function colour(figure, scheme, schemes) {
    if (!figure) return [skip(), "figure card empty"];
    const table = new Map(Object.entries(schemes).map(([built, pair]) => [built, pair[scheme === "dark" ? 1 : 0]]));
    const made = recolour(figure, table);
    made.layout.autosize = true;
    delete made.layout.height;
    delete made.layout.width;
    const row = drawn["where-tokens"]?.row;
    if (context().outputs_list[0].id.name === "map" && row) {
      made.layout.shapes = frame(row);
      framed = row;
    }
    return [made, "figure card"];
  }

  function save(svg, png) {
    const trigger = context().triggered_id;
    const clicks = context().triggered[0].value;
    if (!trigger || !clicks) return skip();
    const name = JSON.stringify({name: trigger.name, type: "graph"});
    const plot = byId(name)?.querySelector(".js-plotly-plot");
    if (plot && window.Plotly) {
      window.Plotly.downloadImage(plot, {
        format: trigger.type === "save-png" ? "png" : "svg", filename: `ctxlens-${trigger.name}`,
        width: plot.clientWidth, height: plot.clientHeight, scale: 2,
      });
    }
    return skip();
  }

  /* ---------- the text of the tokens ---------- */

  const drawn = {};
  function shown(text) {
    if (!text) return "∅";
    return text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t").replace(/\r/g, "␍");
  }

  function label(name, turn) {
    const made = document.createElement("span");
    made.className = `role-name r-${name}`;
    made.textContent = turn < 0 ? name : `${name} ${turn}`;
    return made;
  }

  function draw(host, payload) {
    const stops = new Set(payload.stops), typed = new Set(payload.typed), all = document.createDocumentFragment();
    const spans = [];
    let before = null;
    payload.tokens.forEach((text, i) => {
      const name = payload.names[payload.roles[i]], turn = payload.turns[i];
      if (`${name} ${turn}` !== before) all.append(label(name, turn));
      before = `${name} ${turn}`;
      const token = document.createElement("span");
      token.className = `tok r-${name}${stops.has(i) ? " stop" : ""}${typed.has(i) ? " typed" : ""}`;
      token.dataset.i = i;
      token.textContent = shown(text);
      all.append(token);
      spans.push(token);
    });
    host.replaceChildren(all);
    drawn[host.id] = {payload, spans, weights: new Array(spans.length).fill("0"), row: null, width: -1};
    if (host.id === "where-tokens") {
      byId("row-facts").textContent = "";
      byId("mass").replaceChildren();
    }
  }

  /* Where tokens lie in the text; measured once, because measuring after a change lays out the page again. */
  function tops(host) {
    const known = drawn[host.id];
    if (known.width !== host.clientWidth) {
      known.width = host.clientWidth;
      known.tops = known.spans.map((span) => span.offsetTop);
    }
    return known.tops;
  }

  function paint(host, row, follow) {
    const known = drawn[host.id];
    const top = Math.max(...row.weights, 1e-9), heaviest = row.weights.indexOf(top);
    if (follow && heaviest >= 0) reveal(host, heaviest);
    row.weights.forEach((weight, i) => {
      const w = (Math.round(Math.sqrt(weight / top) * 32) / 32).toFixed(2);
      if (known.weights[i] === w) return;
      known.weights[i] = w;
      known.spans[i].style.setProperty("--w", w);
    });
    known.spans[known.row?.query]?.classList.remove("query");
    known.spans[row.query]?.classList.add("query");
    known.row = row;
    const name = known.payload.names[known.payload.roles[row.query]];
    byId("row-facts").textContent = `Layer ${row.layer}, head ${row.head}${row.isBest ? " (the strongest)" : ""}, ` +
      `from token ${row.query} (${name}).`;
    requestAnimationFrame(() => { minimap(host); frameHead(row); });
  }

  const percent = (share) => share > 0 && share < 0.0005 ? "< 0.1%" : `${(100 * share).toFixed(1)}%`;
  const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "·") || "∅";

  function make(tag, className, text, ...children) {
    const made = document.createElement(tag);
    made.className = className;
    if (text !== null) made.textContent = text;
    made.append(...children);
    return made;
  }

  /* The tokens that hold most of the attention; a click shows where one stands. */
  function listMass(payload, mass, most) {
    const items = mass.map(([i, weight]) => {
      const name = payload.names[payload.roles[i]], bar = make("span", "bar", null);
      bar.style.width = `${(100 * weight / (mass[0][1] || 1)).toFixed(1)}%`;
      const item = make("button", `mass-item r-${name}`, null, make("code", "", visible(payload.tokens[i])),
        make("span", "role-name", name), make("span", "number", percent(weight)), bar);
      item.type = "button";
      item.title = `token ${i}`;
      item.dataset.i = i;
      return make("li", "", null, item);
    });
    const facts = make("p", "note", `${most} of ${payload.tokens.length.toLocaleString("en")} tokens`);
    const rest = most > mass.length ? [make("p", "note", `and ${most - mass.length} more tokens`)] : [];
    byId("mass").replaceChildren(facts, make("ol", "mass-list", null, ...items), ...rest);
  }

  /* A row of attention is asked for at once and painted; Dash learns afterwards what was chosen. */
  let rowAsked = 0, lookingAt = null, thisPage = null;
  async function showRow(look) {
    const mine = ++rowAsked, conversation = derived.conversation, known = drawn["where-tokens"];
    const isLatest = () => mine === rowAsked;
    lookingAt = look;
    const answer = await ask("/explore/row", {conversation, look, page: thisPage});
    if (!isLatest() || drawn["where-tokens"] !== known) return isLatest();
    if (answer.wanted) window.dash_clientside.set_props({type: "wanted", slot: "row"}, {data: answer.wanted});
    if (!answer.row || answer.row.weights.length !== known.spans.length) return true;
    paint(byId("where-tokens"), answer.row, !current || current.where.follow);
    listMass(known.payload, answer.mass, answer.most);
    await new Promise((done) => requestAnimationFrame(done));
    return isLatest();
  }

  function showTokens(payload, screen, reading, row, map, look, wanted, before, page) {
    thisPage = page;
    if (!payload) return skip();
    const isNew = drawTokens(payload, screen);
    const isRead = reading && reading.state === "done" && wanted && wanted.key === reading.key;
    if (screen !== "where" || !isRead || !look || !derived.conversation) return skip();
    const now = {map, reading: reading.key, row: row ? row.key : null};
    const hasArrived = !before || before.reading !== now.reading || before.row !== now.row;
    if (isNew || hasArrived || !same(look, lookingAt) || !drawn["where-tokens"].row) showRow(look);
    return same(now, before) ? skip() : now;
  }

  let chosen = {};
  async function choose(more) {
    if (!drawn["where-tokens"] || !derived.conversation) return;
    Object.assign(chosen, more);
    if (!await showRow({...(lookingAt || derived.look), ...more})) return;
    window.dash_clientside.set_props("chosen", {data: chosen});
    chosen = {};
  }

  let framed = null;
  function frame(row) {
    const style = getComputedStyle(document.documentElement);
    return [["--card", 6], ["--frame", 3]].map(([name, width]) => ({
      type: "rect", x0: row.head - 0.5, x1: row.head + 0.5, y0: row.layer - 0.5, y1: row.layer + 0.5,
      line: {color: style.getPropertyValue(name).trim(), width},
    }));
  }

  function frameHead(row) {
    if (framed && framed.layer === row.layer && framed.head === row.head) return;
    framed = row;
    const plot = byId(JSON.stringify({name: "map", type: "graph"}))?.querySelector(".js-plotly-plot");
    if (plot && plot.layout && window.Plotly) window.Plotly.relayout(plot, {shapes: frame(row)});
  }

  function reveal(host, i) {
    const top = tops(host)[i];
    if (top < host.scrollTop || top > host.scrollTop + host.clientHeight - 30) {
      host.scrollTop = Math.max(0, top - host.clientHeight / 2);
    }
  }

  function drawTokens(payload, screen) {
    const host = byId(screen === "where" ? "where-tokens" : "chat-tokens");
    if (!host || drawn[host.id]?.payload === payload) return false;
    draw(host, payload);
    document.body.dataset.drawn = Number(document.body.dataset.drawn || 0) + 1;
    return true;
  }

  function minimap(host) {
    const canvas = byId("minimap"), known = drawn[host.id];
    if (!canvas || !known || !known.row || !host.clientHeight) return;
    canvas.style.height = `${host.clientHeight}px`;
    const height = canvas.height = host.clientHeight, width = canvas.width = canvas.clientWidth || 14;
    const paper = canvas.getContext("2d"), whole = Math.max(host.scrollHeight, height);
    const style = getComputedStyle(document.documentElement), rows = new Map();
    const shades = known.payload.names.map((name) => style.getPropertyValue(`--role-${name}`).trim());
    const places = tops(host);
    known.spans.forEach((span, i) => {
      const y = Math.floor(places[i] / whole * height);
      const best = rows.get(y);
      if (!best || Number(known.weights[i]) > best[0]) rows.set(y, [Number(known.weights[i]), known.payload.roles[i]]);
    });
    paper.clearRect(0, 0, width, height);
    const thick = Math.max(2, Math.ceil(24 / whole * height));
    for (const [y, [w, role]] of rows) {
      paper.globalAlpha = 0.08 + 0.92 * w * w;
      paper.fillStyle = shades[role];
      paper.fillRect(0, y, width, thick);
    }
    paper.globalAlpha = 0.9;
    paper.strokeStyle = style.getPropertyValue("--soft").trim();
    paper.strokeRect(0.5, host.scrollTop / whole * height + 0.5, width - 1, host.clientHeight / whole * height - 1);
  }

  /* What is looked at, with what was chosen a moment ago and is not painted yet. */
  function look() {
    const row = drawn["where-tokens"]?.row || {layer: 0, head: 0, query: 0}, next = lookingAt || {};
    return Object.fromEntries(["layer", "head", "query"].map((key) => [key, next[key] ?? row[key]]));
  }

  function clickMap(click) {
    const point = click?.points?.[0];
    if (point) choose({layer: Number(point.y), head: Number(point.x)});
    return skip();
  }

  function nextToken(clicks) {
    if (clicks) choose({query: null});
    return skip();
  }

  function flash(i) {
    const span = drawn["where-tokens"]?.spans[i];
    if (!span) return;
    reveal(byId("where-tokens"), i);
    span.classList.add("flash");
    setTimeout(() => span.classList.remove("flash"), 1200);
  }

  /* ---------- copying ---------- */

  async function copy(copied, clicks, state) {
    let text, title, note = "It is in the clipboard.";
    if (context().triggered_id === "copy-link") {
      const packed = await pack(state);
      if (packed.length > 100000) return ["", "No link", "This conversation is too long for a link; copy as Python."];
      text = `${window.location.origin}/#s=${packed}`;
      title = "Copied the link";
      note = "Whoever opens it in an explorer of the same model sees what you see.";
    } else if (copied) ({text, title} = copied);
    else return [skip(), skip(), skip()];
    try {
      await navigator.clipboard.writeText(text);
    } catch (error) {
      note = "The browser does not allow copying by itself; select the text.";
    }
    const dialog = byId("copy-dialog");
    if (!dialog.open) dialog.showModal();
    return [text, title, note];
  }

  /* ---------- keys, clicks, scrolling ---------- */

  function press(event) {
    const inField = event.target.closest("input, textarea, [contenteditable]");
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !inField) {
      byId(event.shiftKey ? "redo" : "undo")?.click();
      event.preventDefault();
      return;
    }
    if (!event.target.closest("#where-tokens") || event.ctrlKey || event.altKey || event.metaKey) return;
    const {layer, head, query} = look(), known = drawn["where-tokens"];
    if (!known) return;
    const limit = (id, value) => Math.min(Number(byId(JSON.stringify(
      {key: id, type: "control"}))?.max ?? 0), Math.max(0, value));
    const moves = {
      ArrowLeft: ["query", Math.max(0, query - 1)],
      ArrowRight: ["query", Math.min(known.spans.length - 1, query + 1)],
      ArrowUp: event.shiftKey ? ["head", limit("where.head", head - 1)] : ["layer", limit("where.layer", layer - 1)],
      ArrowDown: event.shiftKey ? ["head", limit("where.head", head + 1)] : ["layer", limit("where.layer", layer + 1)],
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    const [key, value] = moves[event.key];
    choose(key === "query" ? {query: value} : {layer, head, [key]: value});
  }

  /* Words selected in an answer: the phrase to measure is the answer up to there. */
  function markPhrase() {
    const chosen = window.getSelection();
    if (!chosen || chosen.isCollapsed || !chosen.rangeCount) return;
    const end = chosen.getRangeAt(0), box = end.endContainer.parentElement?.closest(".screen-steer .answer");
    if (!box || !box.contains(end.startContainer)) return;
    const range = document.createRange();
    range.setStart(box, 0);
    range.setEnd(end.endContainer, end.endOffset);
    const words = range.toString().replace("▍", "").trim();
    if (words) set("steer.phrase", words);
  }

  /* The sentence is dragged along a bar; the slider below it does the same with keys. */
  let dragged = false;
  function dragTo(event) {
    const box = byId("needle-bar").getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const depth = Math.round(share * 10) * 10;
    if (current && current.needle.depth !== depth) set("needle.depth", depth);
  }
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("#needle-bar")) return;
    dragged = true;
    event.preventDefault();
    dragTo(event);
  });
  document.addEventListener("pointermove", (event) => { if (dragged) dragTo(event); });
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => { dragged = false; });

  function showNeedle() {
    const mark = byId("needle-mark"), host = byId("needle-text");
    if (mark && host) host.scrollTop = Math.max(0, mark.offsetTop - host.clientHeight / 2);
    return skip();
  }

  document.addEventListener("mouseup", () => setTimeout(markPhrase, 0));
  document.addEventListener("keydown", press);
  document.addEventListener("click", (event) => {
    const token = event.target.closest("#where-tokens .tok");
    if (token) choose({query: Number(token.dataset.i)});
    const item = event.target.closest(".mass-item");
    if (item) flash(Number(item.dataset.i));
    if (event.target.id === "minimap") {
      const host = byId("where-tokens"), box = event.target.getBoundingClientRect();
      host.scrollTop = (event.clientY - box.top) / box.height * host.scrollHeight - host.clientHeight / 2;
    }
  });
  document.addEventListener("mouseover", (event) => {
    const token = event.target.closest(".tok");
    if (!token || token.title) return;
    const known = drawn[token.closest(".tokens")?.id], i = Number(token.dataset.i);
    if (!known) return;
    const {names, roles, turns, ids} = known.payload;
    const weight = known.row ? ` · attention ${known.row.weights[i]}` : "";
    const turn = turns[i] >= 0 ? ` · turn ${turns[i]}` : "";
    token.title = `${names[roles[i]]}${turn} · id ${ids[i]} · token ${i}${weight}`;
    token.addEventListener("mouseleave", () => token.removeAttribute("title"), {once: true});
  });
  document.addEventListener("scroll", (event) => {
    if (event.target.id === "where-tokens") requestAnimationFrame(() => minimap(event.target));
  }, true);
  window.addEventListener("resize", () => { const host = byId("where-tokens"); if (host) minimap(host); });
  window.addEventListener("hashchange", async () => {
    const found = await readAddress();
    if (found && !same(found, current)) window.dash_clientside.set_props("restored", {data: found});
  });

  /* Dash marks up native radio buttons and checkboxes as a list box with options; what they are is told already. */
  function plainRoles() {
    for (const box of document.querySelectorAll(".dash-radioitems[role=listbox], .dash-checklist[role=listbox]")) {
      box.setAttribute("role", box.classList.contains("dash-radioitems") ? "radiogroup" : "group");
    }
    for (const one of document.querySelectorAll("label.dash-options-list-option[role], label[aria-selected]")) {
      one.removeAttribute("role");
      one.removeAttribute("aria-selected");
    }
    for (const one of document.querySelectorAll("input[type=file]:not([aria-label])")) {
      one.setAttribute("aria-label", one.parentElement.textContent.trim());
    }
    for (const one of document.querySelectorAll("fieldset.slider :is([role=slider], input):not([aria-label])")) {
      one.setAttribute("aria-label", one.closest("fieldset").querySelector("legend").textContent);
    }
  }
  new MutationObserver(plainRoles).observe(document.documentElement, {
    subtree: true, childList: true, attributes: true, attributeFilter: ["role", "aria-selected"],
  });

  window.dash_clientside = Object.assign({}, window.dash_clientside, {explore: {
    collect, derive, change, restore, watch, sayPart, theme, colour, save, showTokens,
    clickMap, nextToken, copy, showNeedle,
  }});
})();
