"use strict";
(() => {
  const darkQuery = matchMedia("(prefers-color-scheme: dark)");
  const PRINTED = 680;
  const views = new Map(), queue = new Set();
  let printing = false, settled = false, timer = 0;

  const draw = (element) => Chart.draw(element, views.get(element).figure, printing ? {most: PRINTED} : {dark: darkQuery.matches});
  /* Figures are drawn after the first paint, those in sight first, without blocking the page. */
  const work = () => {
    timer = 0;
    const start = performance.now(), seen = (one) => one && one.getBoundingClientRect().top < innerHeight ? 0 : 1;
    for (const element of [...queue].sort((a, b) => seen(a) - seen(b))) {
      queue.delete(element);
      if (element === null) settled = true;
      else if (views.get(element).figure) draw(element);
      if (performance.now() - start > 30) break;
    }
    if (queue.size) timer = setTimeout(work, 0);
    else if (settled) document.documentElement.dataset.ready = "yes";
  };
  const enqueue = (element) => {
    queue.add(element);
    timer = timer || setTimeout(work, 0);
  };
  const sizes = new ResizeObserver((entries) => {
    for (const {target, contentRect} of entries) {
      const view = views.get(target), width = Math.floor(contentRect.width);
      if (width && width !== view.width) enqueue(target);
      view.width = width;
    }
  });
  const watch = (element, figure) => {
    views.set(element, {figure, width: 0});
    sizes.observe(element);
  };
  const read = (element) => {
    const script = element.querySelector(":scope > script[type='application/json']");
    const value = JSON.parse(script.textContent);
    script.remove();
    return value;
  };
  const make = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const format = (value, signed) => {
    if (value === null || value === undefined) return "–";
    const text = Math.abs(value).toFixed(2);
    return +text === 0 ? text : (value < 0 ? "−" : signed ? "+" : "") + text;
  };
  const mean = (matrix) => {
    const values = matrix.flat().filter((one) => one !== null);
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
  };
  const escape = (text) => String(text).replace(/[&<>]/g, (c) => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"})[c]);
  const slug = (text) => text.toLowerCase().replace(/[^a-z0-9α]+/g, "-").replace(/^-|-$/g, "").slice(0, 60) || "figure";

  /* Below each figure: its files. */
  const addTools = (element) => {
    const tools = make("p", "Save as ", {class: "tools"}), label = () => element.getAttribute("aria-label") || "figure";
    for (const kind of ["svg", "png", "csv"]) {
      const button = make("button", kind.toUpperCase(), {type: "button", "data-save": kind});
      button.addEventListener("click", () => Chart.save(views.get(element).figure, kind, slug(label()), label()));
      tools.append(button);
    }
    element.after(tools);
  };
  /* A figure whose layout has a slider shows one step of it at a time. */
  const addSlider = (element, figure) => {
    const [slider] = figure.layout.sliders || [];
    if (!slider) return;
    const {prefix = ""} = slider.currentvalue || {}, input = make("input", undefined, {type: "range", min: 0, max: slider.steps.length - 1, value: 0, "aria-label": prefix.trim() || "step"});
    const label = make("label", undefined, {class: "slider"}), shown = make("output", prefix + slider.steps[0].label);
    input.addEventListener("input", () => {
      const step = slider.steps[input.value];
      figure.data.forEach((trace, i) => { trace.z = step.args[0].z[i]; });
      shown.textContent = prefix + step.label;
      draw(element);
    });
    label.append(shown, input);
    element.before(label);
  };

  function explore(root) {
    const data = read(root);
    const plot = root.querySelector(".plot");
    const inputs = [...root.querySelectorAll("input")];
    const chosen = (name) => {
      const input = inputs.find((one) => one.name.endsWith("-" + name) && (one.type === "checkbox" || one.checked));
      if (!input) return data[name];
      return (input.type === "checkbox" ? input.checked : input.value);
    };
    const minus = (a, b) => a.map((row, i) => row.map((v, j) => (v === null || b[i][j] === null ? null : +(v - b[i][j]).toFixed(4))));
    const matrix = (model, view, share, role) => {
      const parts = data.models[model];
      if (view !== "difference") return parts[view] && parts[view][share][role].z;
      const [first, second] = data.pair.map((one) => parts[one]);
      return first && second && minus(second[share][role].z, first[share][role].z);
    };
    const ceiling = (view, share, role) => {
      let largest = 0;
      for (const model of Object.keys(data.models))
        for (const one of view === "difference" ? ["difference"] : data.views)
          for (const value of (matrix(model, one, share, role) || []).flat()) largest = Math.max(largest, Math.abs(value || 0));
      return Math.max(0.05, Math.ceil(largest * 20 - 1e-9) / 20);
    };
    const update = () => {
      const [model, view, share, role] = ["model", "view", "share", "role"].map(chosen);
      const signed = view === "difference";
      const z = matrix(model, view, share, role);
      const name = (data.options.find((one) => one[0] === view) || [])[1];
      root.querySelector(".shown").textContent = `${role}: ${model}, ${name}, ${share} shares`;
      for (const panel of document.querySelectorAll(`[data-group="${data.group}"]`)) {
        panel.hidden = panel.dataset.variant !== `${model}|${share}`;
      }
      fill(model, share, role);
      const readout = root.querySelector(".readout");
      if (!z) {
        views.get(plot).figure = null;
        plot.replaceChildren();
        readout.textContent = "This model was not read under this condition.";
        return;
      }
      const entry = data.models[model][signed ? data.pair[1] : view];
      const top = ceiling(view, share, role);
      const heads = z[0].length, layers = entry.layers;
      const step = (n) => Math.max(1, Math.ceil(n / 16));
      const unit = signed ? "difference in share" : "share";
      const number = signed ? "%{z:+.3f}" : "%{z:.3f}";
      const uniform = signed ? "" : `<br>if attention were uniform: ${entry[share][role].uniform.toFixed(3)}`;
      const figure = {
        data: [{
          type: "heatmap", z, x: [...Array(heads).keys()], y: layers, zmin: signed ? -top : 0, zmax: top,
          colorscale: signed ? data.diverging : data.sequential, xgap: 2, ygap: 2, hoverongaps: false,
          texttemplate: signed ? "%{z:+.2f}" : "%{z:.2f}",
          colorbar: {title: {text: unit}},
          hovertemplate: `layer %{y}, head %{x}<br>${unit} of <b>${escape(role)}</b>: <b>${number}</b>${uniform}<br>mean over ${entry.n} quer${entry.n === 1 ? "y" : "ies"}<extra></extra>`,
        }],
        layout: {
          height: Math.min(900, Math.max(270, 40 * layers.length + 60)),
          xaxis: {title: {text: "head"}, showgrid: false, dtick: step(heads)},
          yaxis: {title: {text: "layer"}, showgrid: false, autorange: "reversed",
            tickvals: layers.filter((_, i) => i % step(layers.length) === 0)},
          shapes: chosen("frames") && data.frames[model] ? data.frames[model].map((head, i) => ({type: "rect",
            x0: head - 0.5, x1: head + 0.5, y0: layers[i] - 0.5, y1: layers[i] + 0.5, line: {color: data.ink, width: 2.5}})) : [],
        },
      };
      views.get(plot).figure = figure;
      draw(plot);
      plot.setAttribute("aria-label", `Heatmap by layer and head of the ${unit} of ${role} tokens, ${model}, ${name}, ${share}`);
      const all = mean(z);
      const baseline = signed ? "" : ` If every token got the same attention, it would be ${format(entry[share][role].uniform)}.`;
      readout.textContent = all === null ? "No attention is left for this role." :
        `Mean ${unit} of ${role} tokens over all layers and heads: ${format(all, signed)}.${baseline}`;
    };
    const fill = (model, share, role) => {
      const parts = data.models[model];
      const columns = data.options.map((one) => one[0]).filter((one) => matrix(model, one, share, data.roles[0]));
      const head = root.querySelector(".means thead"), body = root.querySelector(".means tbody");
      const last = columns.filter((one) => one !== "difference").pop();
      const top = make("tr");
      for (const text of ["role", ...columns.map((one) => (one === "difference" ? "change" : one)), "uniform"])
        top.append(make("th", text, {scope: "col"}));
      head.replaceChildren(top);
      body.replaceChildren(...data.roles.map((one) => {
        const row = make("tr", undefined, {class: one === role ? "chosen" : ""});
        const name = make("th", undefined, {scope: "row"});
        name.append(make("span", "", {class: `swatch r-${one}`}), one);
        row.append(name);
        for (const view of columns) row.append(make("td", format(mean(matrix(model, view, share, one)), view === "difference")));
        row.append(make("td", format(parts[last][share][one].uniform)));
        return row;
      }));
    };
    for (const input of inputs) input.addEventListener("change", update);
    watch(plot, null);
    addTools(plot);
    update();
  }

  /* Attention weights of one row, in ten-thousandths; long rows hold only the weights above zero, by place. */
  function unpack(row, length) {
    if (Array.isArray(row)) return row;
    const weights = Array(length).fill(0);
    let at = 0;
    row.steps.forEach((step, i) => { weights[at += step] = row.weights[i]; });
    return weights;
  }
  function showTokens(root) {
    const data = read(root), MOST = 12, BINS = 240;
    const spans = [...root.querySelectorAll(".tok")], box = root.querySelector(".tokens"), map = root.querySelector(".minimap");
    const pick = (name) => root.querySelector(`select[name="${name}"]`);
    const value = (name) => (pick(name) ? +pick(name).value : 0);
    const roles = [...new Set(data.roles)], one = root.querySelector(".onetoken"), view = make("div", undefined, {class: "window"});
    let weights = [], here = -1;
    for (const name of ["layer", "head", "query"]) if (pick(name)) pick(name).value = data.start[name];
    const show = (text) => text.replace(/\n/g, "↵").replace(/^ /, "␣") || "∅";
    const told = (i) => `${data.roles[i]} · token ${i} · attention ${(weights[i] / 10000).toFixed(4)}`;
    /* Only the box scrolls; the page stays where it is. */
    const reach = (i) => {
      const inner = spans[i].getBoundingClientRect(), outer = box.getBoundingClientRect();
      box.scrollTop += inner.top - outer.top - (box.clientHeight - inner.height) / 2;
    };
    const go = (i, scroll = true) => {
      if (here >= 0) spans[here].classList.remove("here");
      here = Math.max(0, Math.min(spans.length - 1, i));
      spans[here].classList.add("here");
      one.textContent = `“${show(spans[here].textContent.replace("↵\n", "\n"))}”: ${told(here)}`;
      map.setAttribute("aria-valuenow", here);
      map.setAttribute("aria-valuetext", one.textContent);
      if (scroll) reach(here);
    };
    /* One bar for a stretch of tokens: its largest weight, in the colour of that token's role. */
    const drawMap = () => {
      const bins = Math.min(BINS, spans.length), top = Math.max(1, ...weights), width = 1000 / bins;
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      for (const [name, to] of Object.entries({viewBox: "0 0 1000 40", preserveAspectRatio: "none", "aria-hidden": "true"})) svg.setAttribute(name, to);
      for (let k = 0; k < bins; k++) {
        const from = Math.floor(k * spans.length / bins), to = Math.floor((k + 1) * spans.length / bins);
        let best = from;
        for (let i = from; i < to; i++) if (weights[i] > weights[best]) best = i;
        const height = Math.max(2, 38 * Math.sqrt(weights[best] / top)), bar = document.createElementNS(svg.namespaceURI, "rect");
        for (const [name, size] of Object.entries({x: k * width, y: 40 - height, width: width * 0.92, height, fill: `var(--role-${data.roles[best]})`})) bar.setAttribute(name, size);
        svg.append(bar);
      }
      map.replaceChildren(svg, view);
      slide();
    };
    const slide = () => {
      const whole = Math.max(1, box.scrollHeight);
      view.hidden = whole <= box.clientHeight + 1;
      view.style.left = `${100 * box.scrollTop / whole}%`;
      view.style.width = `${100 * Math.min(1, box.clientHeight / whole)}%`;
    };
    const list = () => {
      const order = weights.map((_, i) => i).filter((i) => weights[i] > 0).sort((a, b) => weights[b] - weights[a]).slice(0, MOST);
      root.querySelector(".most ol").replaceChildren(...order.map((i) => {
        const item = make("li"), button = make("button", undefined, {type: "button", class: `r-${data.roles[i]}`});
        button.append(make("span", show(spans[i].textContent.replace("↵\n", "\n")), {class: "word"}), make("span", (weights[i] / 10000).toFixed(3)), make("small", `${data.roles[i]}, token ${i}`));
        button.addEventListener("click", () => go(i));
        item.append(button);
        return item;
      }));
    };
    const update = () => {
      const query = data.queries[value("query")];
      weights = unpack(data.weights[value("layer")][value("head")][value("query")], spans.length);
      const top = Math.max(1, ...weights);
      const sums = Object.fromEntries(roles.map((role) => [role, 0]));
      let most = -1;
      spans.forEach((span, i) => {
        span.style.setProperty("--w", Math.sqrt(weights[i] / top).toFixed(3));
        span.title = told(i);
        span.classList.toggle("query", i === query.position);
        sums[data.roles[i]] += weights[i] / 10000;
        if (data.roles[i] === "user" && weights[i] > (most < 0 ? 0 : weights[most])) most = i;
      });
      const shares = roles.sort((a, b) => sums[b] - sums[a]).map((role) => `${role} ${format(sums[role])}`).join(" · ");
      root.querySelector(".readout").textContent = `Attention by role from token ${query.position}: ${shares}`;
      list();
      drawMap();
      go(most < 0 ? weights.indexOf(Math.max(...weights)) : most);
    };
    for (const select of root.querySelectorAll("select")) select.addEventListener("change", update);
    const jump = (event) => {
      const frame = map.getBoundingClientRect();
      go(Math.floor(spans.length * (event.clientX - frame.left) / frame.width));
    };
    map.addEventListener("pointerdown", (event) => { map.setPointerCapture(event.pointerId); jump(event); });
    map.addEventListener("pointermove", (event) => event.buttons && jump(event));
    const page = Math.max(1, Math.round(spans.length / 20));
    const steps = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: page, ArrowUp: -page, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity};
    for (const [name, text] of Object.entries({tabindex: 0, role: "group", "aria-label": "The tokens; the arrow keys go from token to token"})) box.setAttribute(name, text);
    for (const element of [map, box])
      element.addEventListener("keydown", (event) => {
        if (!(event.key in steps)) return;
        event.preventDefault();
        go(here + steps[event.key]);
      });
    box.addEventListener("click", (event) => {
      const span = event.target.closest(".tok");
      if (span) go(spans.indexOf(span), false);
    });
    box.addEventListener("scroll", slide, {passive: true});
    new ResizeObserver(() => { slide(); if (here >= 0) reach(here); }).observe(box);
    update();
  }

  function showAnswers(root) {
    const data = read(root);
    const pick = (name) => root.querySelector(`select[name="${name}"]`);
    const list = root.querySelector(".pairs"), more = root.querySelector(".more"), step = 8;
    const filters = ["task", "model", "condition", "metrics"];
    let shown = step;
    const filter = () => {
      for (const row of root.querySelectorAll("tbody tr"))
        row.hidden = filters.some((name) => {
          const wanted = pick(name) && pick(name).value;
          return wanted && row.dataset[name] !== wanted;
        });
    };
    const fillMetrics = () => {
      const names = data.tasks[pick("of").value].metrics;
      pick("metric").replaceChildren(...names.map((name, i) => make("option", name, {value: i})));
    };
    const update = () => {
      const task = data.tasks[pick("of").value];
      const [metric, left, right] = ["metric", "left", "right"].map((name) => +pick(name).value);
      const sign = task.better[metric] ? 1 : -1;
      const value = (answer) => (answer.scores[metric] === undefined || answer.scores[metric] === null ? null : answer.scores[metric]);
      const good = (answer) => value(answer) !== null && sign * (value(answer) - 0.5) >= 0;
      const keep = {
        worst: () => true,
        lost: (a, b) => good(a) && !good(b),
        won: (a, b) => !good(a) && good(b),
        both: (a, b) => good(a) && good(b),
        neither: (a, b) => !good(a) && !good(b),
        truncated: (a, b) => a.truncated || b.truncated,
        empty: (a, b) => a.empty || b.empty,
        cut: (a, b) => a.cut || b.cut,
      }[pick("show").value];
      const worse = (one) => sign * ((value(one.answers[left]) || 0) - (value(one.answers[right]) || 0));
      const found = task.examples.filter((one) => one.answers[left] && one.answers[right] && keep(one.answers[left], one.answers[right]));
      found.sort((a, b) => worse(b) - worse(a));
      root.querySelector(".readout").textContent =
        `${found.length} of ${task.examples.length} examples on this page` +
        (task.total > task.examples.length ? `; the file holds ${task.total}. The page shows those that differ most.` : ".");
      list.replaceChildren(...found.slice(0, shown).map((one) => {
        const item = make("li"), sides = make("div", undefined, {class: "sides"});
        item.append(make("small", one.name), make("p", one.question, {class: "example", dir: "auto"}));
        const asked = make("div", undefined, {class: "asked"}), prompt = make("details", undefined, {class: "how"});
        prompt.append(make("summary", "End of the prompt"), make("pre", one.context, {tabindex: 0, role: "group", "aria-label": "End of the prompt"}));
        asked.append(make("small", "gold answer"), make("pre", one.gold || "–"), prompt);
        item.append(asked);
        for (const side of [left, right]) {
          const answer = one.answers[side], box = make("div", undefined, {class: good(answer) ? "said right" : "said wrong"});
          const score = value(answer) === null ? "not scored" : `${good(answer) ? "✓ right" : "✗ wrong"}, ${task.metrics[metric]} ${format(value(answer))}`;
          box.append(make("small", data.variants[side]), make("pre", answer.text.trim() ? answer.text : "(empty)"),
            make("small", score + (answer.truncated ? ", prompt truncated" : "") + (answer.cut ? ", answer cut" : "")));
          sides.append(box);
        }
        item.append(sides);
        return item;
      }));
      more.hidden = found.length <= shown;
    };
    const restart = () => { shown = step; update(); };
    for (const name of filters) if (pick(name)) pick(name).addEventListener("change", filter);
    pick("of").addEventListener("change", () => { fillMetrics(); restart(); });
    for (const name of ["metric", "left", "right", "show"]) pick(name).addEventListener("change", restart);
    more.addEventListener("click", () => { shown += step; update(); });
    fillMetrics();
    filter();
    update();
  }

  /* Every view with switches has an address that holds their state. */
  const switches = (root) => [...root.querySelectorAll("input[name],select[name]")].map((one) => [one.name.split("-").pop(), one]);
  const address = (root) => "#" + new URLSearchParams([["at", root.id], ...switches(root)
    .filter(([, one]) => one.type !== "radio" || one.checked).map(([name, one]) => [name, one.type === "checkbox" ? +one.checked : one.value])]);
  const restore = (root, state) => {
    for (const [name, one] of switches(root)) {
      if (!state.has(name)) continue;
      const wanted = state.get(name);
      if (one.type === "radio") { if (one.value !== wanted) continue; one.checked = true; }
      else if (one.type === "checkbox") one.checked = wanted === "1";
      else one.value = wanted;
      one.dispatchEvent(new Event("change", {bubbles: true}));
    }
  };
  /* What an address leads to is opened: a section, or a view with the state of its switches. */
  const follow = () => {
    const name = decodeURIComponent(location.hash.slice(1)), state = new URLSearchParams(location.hash.slice(1));
    const root = document.getElementById(state.get("at") || name);
    if (!root) return;
    if (state.has("at")) restore(root, state);
    const inner = root.querySelector(":scope > details");
    if (inner) inner.open = true;
    for (let one = root.closest("details"); one; one = one.parentElement.closest("details")) one.open = true;
    root.scrollIntoView();
  };
  addEventListener("hashchange", follow);

  /* The side navigation marks the section that is being read. */
  const links = new Map([...document.querySelectorAll(".side a")].map((link) => [link.getAttribute("href").slice(1), link]));
  const mark = () => {
    const parts = [...links.keys()].map((id) => document.getElementById(id)).filter(Boolean);
    const current = scrollY < 40 ? parts[0] : parts.filter((one) => one.getBoundingClientRect().top < innerHeight / 3).pop() || parts[0];
    for (const [id, link] of links) {
      const here = id === current.id;
      if (here === (link.getAttribute("aria-current") === "true")) continue;
      if (here) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
      if (here) link.closest("ul").scrollTo({left: link.offsetLeft - 40});
    }
  };
  addEventListener("scroll", mark, {passive: true});
  mark();

  let closed = [];
  const updateAll = () => views.forEach((view, element) => view.figure && view.width && draw(element));
  darkQuery.addEventListener("change", updateAll);
  addEventListener("beforeprint", () => {
    printing = true;
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
    views.forEach((view, element) => view.figure && draw(element));
  });
  addEventListener("afterprint", () => {
    printing = false;
    for (const one of closed) one.open = false;
    updateAll();
  });
  /* Text and tables are painted first, then figures and switches are set up. */
  const begin = () => {
    for (const element of document.querySelectorAll(".plot:not(.drawn)")) {
      const figure = read(element);
      watch(element, figure);
      addSlider(element, figure);
      addTools(element);
    }

    for (const element of document.querySelectorAll("[data-explorer]")) explore(element);
    for (const element of document.querySelectorAll("[data-tokens]")) showTokens(element);
    for (const element of document.querySelectorAll("[data-answers]")) showAnswers(element);
    for (const root of document.querySelectorAll("[data-view]")) {
      const link = make("a", "Link to this view", {class: "state", href: address(root)});
      root.addEventListener("change", () => { link.href = address(root); });
      root.append(link);
    }
    follow();
    /* Sizes are reported within a frame; what is queued by then is what the page shows at first. */
    requestAnimationFrame(() => requestAnimationFrame(() => enqueue(null)));
  };
  const soon = () => setTimeout(begin, 0);
  if (document.hidden) soon();
  else requestAnimationFrame(soon);
})();
