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
    remember(state);
    const name = page || Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) =>
      b.toString(16).padStart(2, "0")).join("");
    return [state, page ? skip() : name];
  }

  const isTyping = (state, hiding) => state.screen === "needle" && hiding &&
    ["sentence", "document"].some((key) => state.needle[key] !== hiding[key]);

  /* Typing must not start a computation with every letter. */
  let latest = 0, hasStarted = false;
  async function derive(state, ...known) {
    if (!state) return known.map(skip);
    const mine = ++latest, [conversation, , , , steering, comparing, hiding, scoring] = known;
    if (hasStarted && (!same(state.chat, conversation) || isTyping(state, hiding))) {
      await new Promise((done) => setTimeout(done, 350));
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

  function restore(state, values) {
    const ids = context().outputs_list;
    if (!state) return ids.map(skip);
    return ids.map((one, i) => {
      const key = one.id.key;
      if (key.startsWith("chat.messages.")) return skip();
      const value = key.replace("?", "").split(".").reduce((place, part) => (place || {})[part], state);
      const next = key.endsWith("?") ? (value ? ["on"] : []) : (value === undefined ? null : value);
      return same(next, values[i]) ? skip() : next;
    });
  }

  function showScreen(state) {
    const ids = context().outputs_list[0];
    if (!state) return [ids.map(skip), skip()];
    const show = (id, shown) => { const box = byId(id); if (box) box.hidden = !shown; };
    show("alpha-box", state.steer.by === "alpha");
    show("mode-box", state.steer.by === "alpha");
    show("share-box", state.steer.by === "share");
    show("chosen-box", state.steer.heads === "chosen");
    show("document-box", state.needle.source === "own");
    const free = state.data.correct || state.data.reduction === "lp_gap";
    show("beta-box", state.data.rule === "beta" && !free);
    show("deviations-box", state.data.rule === "beta" && free);
    const thumb = byId("needle-thumb");
    if (thumb) thumb.style.left = `${state.needle.depth}%`;
    if (document.body.dataset.screen !== state.screen) {
      document.body.dataset.screen = state.screen;
      setTimeout(() => window.dispatchEvent(new Event("resize")), 0);
    }
    return [ids.map((one) => one.id.key !== state.screen), state.chat.template !== "own"];
  }

  /* ---------- what is being computed ---------- */

  function tick(wanted, arrived) {
    const ids = context().inputs_list[0];
    let busy = false;
    wanted.forEach((want, i) => {
      const open = Boolean(want) && (!arrived[i] || arrived[i].key !== want.key);
      busy = busy || open;
      document.body.toggleAttribute(`data-busy-${ids[i].id.slot}`, open);
    });
    return [!busy, !busy];
  }

  function failures(arrived) {
    const failed = arrived.filter((one) => one && one.error).map((one) => one.error);
    return failed.length ? failed[failed.length - 1] : skip();
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
    if (!figure) return [skip(), skip()];
    const table = new Map(Object.entries(schemes).map(([built, pair]) => [built, pair[scheme === "dark" ? 1 : 0]]));
    const made = recolour(figure, table);
    made.layout.autosize = true;
    delete made.layout.height;
    delete made.layout.width;
    const row = drawn["where-tokens"]?.row;
    if (context().outputs_list[0].id.name === "map" && row) made.layout.shapes = frame(row);
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

  function draw(host, payload) {
    const stops = new Set(payload.stops), typed = new Set(payload.typed), all = document.createDocumentFragment();
    let before = null;
    payload.tokens.forEach((text, i) => {
      const name = payload.names[payload.roles[i]], turn = payload.turns[i];
      if (`${name} ${turn}` !== before) {
        const label = document.createElement("span");
        label.className = `role-name r-${name}`;
        label.textContent = turn < 0 ? name : `${name} ${turn}`;
        all.append(label);
        before = `${name} ${turn}`;
      }
      const token = document.createElement("span");
      token.className = `tok r-${name}${stops.has(i) ? " stop" : ""}${typed.has(i) ? " typed" : ""}`;
      token.dataset.i = i;
      token.textContent = shown(text);
      all.append(token);
    });
    host.replaceChildren(all);
    drawn[host.id] = {payload, spans: Array.from(host.querySelectorAll(".tok")), weights: null};
  }

  function paint(host, row, follow) {
    const known = drawn[host.id];
    if (!known || row.weights.length !== known.spans.length) return;
    const top = Math.max(...row.weights, 1e-9);
    known.spans.forEach((span, i) => {
      const w = Math.sqrt(row.weights[i] / top).toFixed(2);
      if (!known.weights || known.weights[i] !== w) span.style.setProperty("--w", w);
    });
    known.weights = row.weights.map((w) => Math.sqrt(w / top).toFixed(2));
    known.row = row;
    host.querySelector(".query")?.classList.remove("query");
    known.spans[row.query]?.classList.add("query");
    const heaviest = known.spans[row.weights.indexOf(top)];
    if (follow && heaviest) reveal(host, heaviest);
    minimap(host);
    frameHead(row);
    const name = known.payload.names[known.payload.roles[row.query]];
    byId("row-facts").textContent = `Layer ${row.layer}, head ${row.head}${row.isBest ? " (the strongest)" : ""}, ` +
      `from token ${row.query} (${name}).`;
  }

  function frame(row) {
    const style = getComputedStyle(document.documentElement);
    return [["--card", 6], ["--frame", 3]].map(([name, width]) => ({
      type: "rect", x0: row.head - 0.5, x1: row.head + 0.5, y0: row.layer - 0.5, y1: row.layer + 0.5,
      line: {color: style.getPropertyValue(name).trim(), width},
    }));
  }

  function frameHead(row) {
    const plot = byId(JSON.stringify({name: "map", type: "graph"}))?.querySelector(".js-plotly-plot");
    if (plot && plot.layout && window.Plotly) window.Plotly.relayout(plot, {shapes: frame(row)});
  }

  function reveal(host, span) {
    const top = span.offsetTop;
    if (top < host.scrollTop || top > host.scrollTop + host.clientHeight - 30) {
      host.scrollTop = Math.max(0, top - host.clientHeight / 2);
    }
  }

  function drawTokens(payload, row, screen, state) {
    if (!payload) return skip();
    const host = byId(screen === "where" ? "where-tokens" : "chat-tokens");
    if (!host) return skip();
    if (drawn[host.id]?.payload !== payload) {
      draw(host, payload);
      document.body.dataset.drawn = Number(document.body.dataset.drawn || 0) + 1;
    }
    if (screen === "where" && row) paint(host, row, !state || state.where.follow);
    return skip();
  }

  function minimap(host) {
    const canvas = byId("minimap"), known = drawn[host.id];
    if (!canvas || !known || !known.row || !host.clientHeight) return;
    canvas.style.height = `${host.clientHeight}px`;
    const height = canvas.height = host.clientHeight, width = canvas.width = canvas.clientWidth || 14;
    const paper = canvas.getContext("2d"), whole = Math.max(host.scrollHeight, height);
    const style = getComputedStyle(document.documentElement), rows = new Map();
    const shades = known.payload.names.map((name) => style.getPropertyValue(`--role-${name}`).trim());
    known.spans.forEach((span, i) => {
      const y = Math.floor(span.offsetTop / whole * height);
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

  function look() {
    const row = drawn["where-tokens"]?.row;
    return row || {layer: 0, head: 0, query: 0};
  }

  function clickMap(click) {
    if (!click || !click.points || !click.points.length) return skip();
    set("where.layer", Number(click.points[0].y));
    set("where.head", Number(click.points[0].x));
    return skip();
  }

  function goTo() {
    const trigger = context().triggered_id;
    if (!context().triggered[0].value) return skip();
    if (trigger === "query-next") set("where.query", null);
    else if (trigger) {
      const span = drawn["where-tokens"]?.spans[trigger.i];
      if (span) {
        reveal(byId("where-tokens"), span);
        span.classList.add("flash");
        setTimeout(() => span.classList.remove("flash"), 1200);
      }
    }
    return skip();
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
      ArrowLeft: ["where.query", Math.max(0, query - 1)],
      ArrowRight: ["where.query", Math.min(known.spans.length - 1, query + 1)],
      ArrowUp: event.shiftKey ? ["where.head", limit("where.head", head - 1)] : ["where.layer", limit("where.layer", layer - 1)],
      ArrowDown: event.shiftKey ? ["where.head", limit("where.head", head + 1)] : ["where.layer", limit("where.layer", layer + 1)],
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    const [key, value] = moves[event.key];
    if (key !== "where.query") {
      set("where.layer", key === "where.layer" ? value : layer);
      set("where.head", key === "where.head" ? value : head);
    } else set(key, value);
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
    if (token) set("where.query", Number(token.dataset.i));
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
    for (const one of document.querySelectorAll("fieldset.slider :is([role=slider], input):not([aria-label])")) {
      one.setAttribute("aria-label", one.closest("fieldset").querySelector("legend").textContent);
    }
  }
  new MutationObserver(plainRoles).observe(document.documentElement, {
    subtree: true, childList: true, attributes: true, attributeFilter: ["role", "aria-selected"],
  });

  window.dash_clientside = Object.assign({}, window.dash_clientside, {explore: {
    collect, derive, change, restore, showScreen, tick, failures, theme, colour, save, drawTokens, clickMap, goTo,
    copy, showNeedle,
  }});
})();
