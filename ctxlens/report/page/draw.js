"use strict";
/* Draws figures, given as plotly's JSON, as SVG: heat maps, bars, and lines and points with intervals.
   Only what ctxlens.report.plots uses is understood. Colours are those of the page's scheme. */
const Chart = (() => {
  const NS = "http://www.w3.org/2000/svg";
  const schemes = JSON.parse(document.getElementById("schemes").textContent);
  const pen = document.createElement("canvas").getContext("2d");
  const DASHES = {dash: "8 5", dot: "2 4", dashdot: "8 4 2 4", longdash: "13 5", longdashdot: "13 4 2 4"};
  const PATTERNS = {"/": "M0,6 6,0", "\\": "M0,0 6,6", x: "M0,0 6,6M0,6 6,0", "-": "M0,3 6,3", "|": "M3,0 3,6",
    "+": "M3,0 3,6M0,3 6,3", ".": "M2.3,3a.7,.7 0 1,0 1.4,0a.7,.7 0 1,0 -1.4,0"};
  let patterns = 0;

  const repaint = (value, dark) => {
    if (typeof value === "string") return schemes[value] ? schemes[value][dark ? 1 : 0] : value;
    if (Array.isArray(value)) return value.map((one) => repaint(one, dark));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, repaint(one, dark)]));
    return value;
  };
  const node = (tag, attributes = {}, text) => {
    const element = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes))
      if (value !== undefined && value !== null) element.setAttribute(name, typeof value === "number" ? +value.toFixed(2) : value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const family = () => getComputedStyle(document.body).fontFamily;
  const measure = (text, size) => {
    pen.font = `${size}px ${family()}`;
    return Math.max(0, ...String(text).split("\n").map((line) => pen.measureText(line).width));
  };
  /* Plotly's markup as text: line breaks stay, other tags go, the entities that Python wrote are read. */
  const decode = (text) => String(text).replace(/<br\s*\/?>/g, "\n").replace(/<\/?[a-z][^<>]*>/g, "")
    .replace(/&(lt|gt|amp|#123);/g, (_, name) => ({lt: "<", gt: ">", amp: "&", "#123": "{"})[name]);
  const formatted = (value, spec) => {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    const found = /^(\+?)\.?(\d*)([f%]?)$/.exec(spec || "");
    if (!spec || !found) return String(+value.toPrecision(6)).replace("-", "−");
    const scaled = found[3] === "%" ? 100 * value : value;
    const text = Math.abs(scaled).toFixed(+found[2] || 0);
    return (+text === 0 ? "" : scaled < 0 ? "−" : found[1]) + text + (found[3] === "%" ? "%" : "");
  };
  const filled = (template, values) => template.replace(/<extra>.*?<\/extra>/g, "").replace(
    /%\{([a-z]+)((?:\[\d+\])*)(?::([^}]*))?\}/g,
    (_, name, path, spec) => formatted([...path.matchAll(/\d+/g)].reduce((found, at) => (found || [])[+at[0]], values[name]), spec));
  const channels = (colour) => {
    if (colour[0] === "#") return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    return colour.match(/[\d.]+/g).slice(0, 3).map(Number);
  };
  const shade = (stops, share) => {
    const at = Math.min(1, Math.max(0, share)) * (stops.length - 1), below = Math.min(stops.length - 2, Math.floor(at));
    const [from, to] = [channels(stops[below][1]), channels(stops[below + 1][1])];
    return "#" + from.map((one, i) => Math.round(one + (to[i] - one) * (at - below)).toString(16).padStart(2, "0")).join("");
  };
  /* Black or white, whichever has the higher contrast; the lower bound of the better one is 4.58:1. */
  const inkOn = (colour) => {
    const [r, g, b] = channels(colour).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
  };
  const marker = (symbol, x, y, r) => ({
    circle: `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
    square: `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    diamond: `M${x},${y - 1.3 * r}l${1.3 * r},${1.3 * r}l${-1.3 * r},${1.3 * r}l${-1.3 * r},${-1.3 * r}z`,
    "triangle-up": `M${x},${y - 1.15 * r}l${1.15 * r},${2 * r}h${-2.3 * r}z`,
    x: `M${x - r},${y - r}l${2 * r},${2 * r}M${x + r},${y - r}l${-2 * r},${2 * r}`,
    cross: `M${x},${y - 1.2 * r}v${2.4 * r}M${x - 1.2 * r},${y}h${2.4 * r}`,
  })[symbol] || "";
  const isOpen = (symbol) => symbol === "x" || symbol === "cross";
  const number = (value) => value !== null && value !== undefined && value !== "" && Number.isFinite(+value);

  /* The values of an axis: its categories, or the numbers from which its range follows. */
  const axisOf = (axis, traces, side) => {
    const values = traces.flatMap((trace) => trace[side] || (trace.type === "heatmap" ? trace.z.map((_, i) => i) : []));
    if (axis.type === "category" || values.some((one) => one !== null && !number(one))) {
      const names = [...new Set(values.map(String))], place = new Map(names.map((name, i) => [name, i]));
      const ends = [-0.5, names.length - 0.5];
      if (axis.autorange === "reversed") ends.reverse();
      return {names, ends, at: (value) => place.get(String(value))};
    }
    const at = axis.type === "log" ? (value) => Math.log10(value) : (value) => +value;
    let [low, high] = extent(axis, traces, side, at);
    if (axis.range) [low, high] = axis.range;
    else if (axis.autorange === "reversed") [low, high] = [high, low];
    return {ends: [low, high], at, log: axis.type === "log"};
  };
  const extent = (axis, traces, side, at) => {
    let [low, high] = [Infinity, -Infinity];
    const grow = (value) => { if (Number.isFinite(value)) { low = Math.min(low, value); high = Math.max(high, value); } };
    let tight = true;
    for (const trace of traces) {
      const values = (trace[side] || []).filter(number).map(at);
      const sorted = [...new Set(values)].sort((a, b) => a - b);
      const step = sorted.length > 1 ? sorted[1] - sorted[0] : 1;
      const half = trace.type === "heatmap" || (trace.type === "bar" && side === "x") ? (trace.width || step) / 2 : 0;
      if (trace.type === "bar" && side === "y") grow(0);
      if (trace.type === "scatter") tight = false;
      const spread = trace["error_" + side] || {};
      values.forEach((value, i) => { grow(value - half - ((spread.arrayminus || [])[i] || 0)); grow(value + half + ((spread.array || [])[i] || 0)); });
    }
    if (side === "y" && traces.some((one) => one.type === "bar")) stacks(traces).flat().forEach((one) => { grow(one.from); grow(one.to); });
    if (axis.rangemode === "tozero") grow(0);
    if (low > high) return [0, 1];
    const room = tight ? 0 : (high - low || 1) * 0.06;
    return [low - (low === 0 ? 0 : room), high + (tight && side === "y" && traces[0].type === "bar" ? (high - low) * 0.05 : room)];
  };
  /* From where to where each bar goes, by trace. */
  const stacks = (traces, overlay = false) => {
    const up = {}, down = {};
    return traces.filter((one) => one.type === "bar").map((trace) => trace.x.map((x, i) => {
      const value = trace.y[i] || 0, sums = value < 0 ? down : up, from = overlay ? 0 : sums[x] || 0;
      sums[x] = from + value;
      return {x, from, to: from + value, value: trace.y[i]};
    }));
  };
  const ticksOf = (axis, scale, length, apart) => {
    if (axis.tickvals)
      return axis.tickvals.map((value, i) => ({value, text: decode(axis.ticktext ? axis.ticktext[i] : formatted(value, axis.tickformat))}));
    if (scale.names) return scale.names.map((value) => ({value, text: decode(value)}));
    const [low, high] = [...scale.ends].sort((a, b) => a - b), found = [];
    if (scale.log) {
      for (let power = Math.ceil(low - 1e-9); power <= high + 1e-9; power++) found.push({value: 10 ** power, text: formatted(10 ** power)});
      return found;
    }
    const rough = (high - low) / Math.max(2, length / apart), ten = 10 ** Math.floor(Math.log10(rough || 1));
    const step = axis.dtick || [1, 2, 5, 10].map((one) => one * ten).find((one) => one >= rough - 1e-12);
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 && found.length < 60; k++)
      found.push({value: +(k * step).toPrecision(10), text: formatted(+(k * step).toPrecision(10), axis.tickformat)});
    return found;
  };
  /* Text broken so that it fits a width; at most three lines. */
  const wrapped = (text, size, width) => {
    const lines = [];
    for (const line of String(text).split("\n")) {
      let rest = line;
      while (measure(rest, size) > width && rest.length > 1) {
        let end = rest.length - 1;
        while (end > 1 && measure(rest.slice(0, end), size) > width) end--;
        const space = Math.max(rest.lastIndexOf(" ", end), rest.lastIndexOf("+", end), rest.lastIndexOf("-", end));
        if (space > end / 3) end = space + 1;
        lines.push(rest.slice(0, end).trim());
        rest = rest.slice(end).trim();
      }
      lines.push(rest);
    }
    return lines.length > 3 ? [...lines.slice(0, 2), lines[2].slice(0, -1) + "…"] : lines;
  };
  const write = (parent, text, x, y, {size = 12, fill, anchor = "start", weight, turn} = {}) => {
    const lines = Array.isArray(text) ? text : String(text).split("\n");
    const element = node("text", {x, y, fill, "font-size": size, "text-anchor": anchor, "font-weight": weight,
      transform: turn ? `rotate(${turn} ${x.toFixed(1)} ${y.toFixed(1)})` : undefined});
    if (lines.length === 1) element.textContent = lines[0];
    else lines.forEach((line, i) => element.append(node("tspan", {x, dy: i ? size * 1.15 : 0}, line)));
    parent.append(element);
    return element;
  };

  /* The panels of a figure: each pair of axes with its traces, in rows and columns. */
  const panelsOf = ({data, layout}) => {
    const key = (name, side) => side + "axis" + (name || side).slice(1), found = new Map();
    for (const raw of data) {
      const trace = {type: "scatter", ...raw}, name = `${trace.xaxis || "x"} ${trace.yaxis || "y"}`;
      if (!found.has(name)) {
        const [x, y] = [layout[key(trace.xaxis, "x")] || {}, layout[key(trace.yaxis, "y")] || {}];
        found.set(name, {names: name.split(" "), x, y, left: (x.domain || [0, 1]), up: (y.domain || [0, 1]), traces: []});
      }
      found.get(name).traces.push(trace);
    }
    const panels = [...found.values()];
    const lefts = [...new Set(panels.map((one) => one.left[0]))].sort((a, b) => a - b);
    const ups = [...new Set(panels.map((one) => one.up[0]))].sort((a, b) => b - a);
    for (const one of panels) [one.column, one.row] = [lefts.indexOf(one.left[0]), ups.indexOf(one.up[0])];
    /* A shared axis has one scale, and only its first panel states labels. */
    for (const one of panels)
      for (const side of ["x", "y"]) {
        const owner = one[side].matches || one.names[side === "x" ? 0 : 1];
        one[side + "like"] = panels.filter((other) => (other[side].matches || other.names[side === "x" ? 0 : 1]) === owner);
      }
    return {panels, columns: lefts.length, rows: ups.length};
  };
  const legendOf = ({data, layout}, width, top) => {
    const seen = new Set(), named = data.filter((one) => one.type !== "heatmap" && one.name && one.showlegend !== false);
    if (layout.showlegend === false || (named.length < 2 && layout.showlegend !== true && !named.some((one) => one.showlegend))) return {items: [], height: 0};
    const items = [];
    let x = 0, y = 0;
    for (const trace of named) {
      const group = trace.legendgroup || trace.name;
      if (seen.has(group)) continue;
      seen.add(group);
      const text = decode(trace.name), room = 34 + measure(text, 12) + 14;
      if (x && x + room > width) [x, y] = [0, y + 20];
      items.push({trace, text, x, y});
      x += room;
    }
    return {items, height: items.length ? y + 24 : 0, top};
  };
  const drawLegend = (svg, legend, y0, ink) => {
    for (const {trace, text, x, y} of legend.items) {
      const at = y0 + y + 9;
      if (trace.type === "bar") svg.append(...bar(trace, x + 4, at - 6, 22, 12, svg));
      else {
        const line = trace.line || {}, symbol = (trace.marker || {}).symbol || "circle", mode = trace.mode || "lines";
        if (mode.includes("lines"))
          svg.append(node("path", {d: `M${x + 2},${at}h26`, stroke: line.color, "stroke-width": line.width || 2, "stroke-dasharray": DASHES[line.dash]}));
        if (mode.includes("markers")) svg.append(point(trace, symbol, x + 15, at));
      }
      write(svg, text, x + 34, at + 4, {fill: ink});
    }
  };
  const point = (trace, symbol, x, y) => {
    const {color, size = 8} = trace.marker || {};
    return node("path", {d: marker(symbol, x, y, size / 2), fill: isOpen(symbol) ? "none" : color,
      stroke: isOpen(symbol) ? color : undefined, "stroke-width": isOpen(symbol) ? 2 : undefined});
  };
  const bar = (trace, x, y, width, height, svg) => {
    const {color, pattern = {}} = trace.marker || {}, box = {x, y, width: Math.max(0.5, width), height: Math.max(0, height)};
    const found = [node("rect", {...box, fill: color, opacity: trace.opacity})], shape = PATTERNS[pattern.shape];
    if (!shape) return found;
    const defs = svg.querySelector("defs"), own = svg.dataset.patterns ? JSON.parse(svg.dataset.patterns) : {};
    if (!own[pattern.shape]) {
      own[pattern.shape] = `pattern-${++patterns}`;
      svg.dataset.patterns = JSON.stringify(own);
      const tile = node("pattern", {id: own[pattern.shape], width: 6, height: 6, patternUnits: "userSpaceOnUse"});
      tile.append(node("path", {d: shape, stroke: "#ffffff", "stroke-width": 1.2, "stroke-opacity": 0.6, fill: "#ffffff", "fill-opacity": pattern.shape === "." ? 0.7 : 0}));
      defs.append(tile);
    }
    return [...found, node("rect", {...box, fill: `url(#${own[pattern.shape]})`})];
  };

  const drawHeat = (group, trace, panel, marks, ink) => {
    const {z, colorscale, zmin, zmax} = trace, [X, Y] = [panel.X, panel.Y];
    const xs = trace.x || z[0].map((_, i) => i), ys = trace.y || z.map((_, i) => i);
    const edge = (values, i) => {
      const step = values.length > 1 ? Math.abs(panel.scaleX.at(values[1]) - panel.scaleX.at(values[0])) : 1;
      return (Number.isFinite(step) && step) || 1;
    };
    const width = Math.abs(X.unit) * edge(xs), height = Math.abs(Y.unit);
    const [gapX, gapY] = [trace.xgap && width > 6 ? Math.min(2, trace.xgap) : width > 3 ? 0.5 : 0, height > 6 ? Math.min(2, trace.ygap || 0) : 0.5];
    const texts = z.map((row, i) => row.map((value, j) => {
      const text = (trace.text || [])[i] && trace.text[i][j];
      if (text !== undefined && text !== null) return decode(text);
      return value === null || !trace.texttemplate ? "" : filled(trace.texttemplate, {z: value});
    }));
    const size = height > 20 && width > 34 ? 11.5 : 10;
    const fits = height >= 12 && texts.every((row) => row.every((text) => measure(text, size) <= width - 3));
    z.forEach((row, i) => row.forEach((value, j) => {
      const [cx, cy] = [X.to(xs[j]), Y.to(ys[i])];
      const box = {x: cx - width / 2 + gapX / 2, y: cy - height / 2 + gapY / 2, width: Math.max(0.5, width - gapX), height: Math.max(0.5, height - gapY)};
      if (value === null || value === undefined) return;
      const colour = shade(colorscale, (value - zmin) / (zmax - zmin || 1));
      group.append(node("rect", {...box, fill: colour}));
      if (texts[i][j] && fits) write(group, texts[i][j], cx, cy + size * 0.36, {size, anchor: "middle", fill: inkOn(colour)});
      else if (texts[i][j][0] === "(" && width > 4) group.append(node("circle", {cx, cy, r: Math.min(1.6, width / 6), fill: inkOn(colour), "fill-opacity": 0.6}));
      marks.push({...box, tip: () => filled(trace.hovertemplate || "%{z}", {x: xs[j], y: ys[i], z: value, text: texts[i][j],
        customdata: trace.customdata && trace.customdata[i][j], hovertext: trace.hovertext && trace.hovertext[i][j]})});
    }));
  };
  const drawBars = (group, panel, layout, marks, svg) => {
    const traces = panel.traces.filter((one) => one.type === "bar");
    stacks(traces, layout.barmode === "overlay").forEach((bars, k) => {
      const trace = traces[k];
      bars.forEach((one, i) => {
        if (!one.value) return;
        const width = Math.abs(panel.X.unit) * (trace.width || 1) * (1 - (layout.bargap || 0.12));
        const [y0, y1] = [panel.Y.at(one.from), panel.Y.at(one.to)].sort((a, b) => a - b), x = panel.X.to(one.x) - width / 2;
        group.append(...bar(trace, x, y0, width, y1 - y0, svg));
        marks.push({x, y: y0, width, height: y1 - y0, tip: () => filled(trace.hovertemplate || "%{y}", {x: one.x, y: one.value, customdata: (trace.customdata || [])[i]})});
      });
    });
  };
  const drawScatter = (group, trace, panel, marks, ink) => {
    const points = trace.x.map((x, i) => (number(trace.y[i]) && (number(x) || panel.scaleX.names) ? [panel.X.to(x), panel.Y.to(trace.y[i])] : null));
    const mode = trace.mode || "lines", line = trace.line || {};
    let path = "", open = false;
    for (const one of points) {
      if (one) path += `${open ? "L" : "M"}${one[0].toFixed(1)},${one[1].toFixed(1)}`;
      open = Boolean(one);
    }
    if (trace.fill === "toself") return group.append(node("path", {d: path + "z", fill: trace.fillcolor}));
    for (const [side, across] of [["x", 0], ["y", 1]]) {
      const spread = trace["error_" + side];
      if (!spread) continue;
      points.forEach((one, i) => {
        if (!one) return;
        const value = +(side === "x" ? trace.x : trace.y)[i], scale = side === "x" ? panel.X : panel.Y;
        const [from, to] = [scale.at(value - (spread.arrayminus[i] || 0)), scale.at(value + (spread.array[i] || 0))];
        group.append(node("path", {d: across ? `M${one[0]},${from}V${to}` : `M${from},${one[1]}H${to}`, stroke: spread.color, "stroke-width": spread.thickness || 1.5}));
      });
    }
    if (mode.includes("lines") && line.width !== 0)
      group.append(node("path", {d: path, fill: "none", stroke: line.color, "stroke-width": line.width || 2, "stroke-dasharray": DASHES[line.dash], "stroke-linejoin": "round"}));
    points.forEach((one, i) => {
      if (!one) return;
      const r = ((trace.marker || {}).size || 8) / 2;
      if (mode.includes("markers")) group.append(point(trace, (trace.marker || {}).symbol || "circle", ...one));
      const text = mode.includes("text") && (trace.text || [])[i];
      if (text) write(group, decode(text), one[0], one[1] - 9, {size: 11, anchor: "middle", fill: ink});
      if (trace.hoverinfo !== "skip")
        marks.push({x: one[0] - r, y: one[1] - r, width: 2 * r, height: 2 * r, tip: () => filled(trace.hovertemplate || "%{y}",
          {x: trace.x[i], y: trace.y[i], customdata: Array.isArray(trace.customdata) ? trace.customdata[i] : undefined})});
    });
  };

  const axisRange = (panel, side) => {
    const like = panel[side + "like"], {range, type, autorange} = like[0][side];
    return axisOf({range, type, autorange, ...panel[side]}, like.flatMap((one) => one.traces), side);
  };
  const project = (scale, from, to) => {
    const [low, high] = scale.ends, unit = (to - from) / (high - low || 1);
    const at = (value) => from + (value - low) * unit;
    return {unit, at: (value) => at(scale.log ? Math.log10(value) : value), to: (value) => at(scale.at(value))};
  };
  /* Which labels of evenly spaced ticks are written: every one, every second one, and so on. */
  const thinning = (panel, size) => {
    const at = panel.ticksX.map((tick) => panel.X.to(tick.value)), steps = at.slice(1).map((one, i) => Math.abs(one - at[i]));
    const step = steps.length ? Math.min(...steps) : Infinity;
    if (steps.some((one) => Math.abs(one - step) > 0.5)) return 1;
    const room = panel.slanted ? size + 3 : Math.max(...panel.ticksX.map((tick) => measure(tick.text, size))) + 6;
    return Math.max(1, Math.ceil(room / step - 0.01));
  };
  const drawAxes = (svg, panel, colours, size) => {
    const {box, X, Y, x, y} = panel, inside = (value, low, high) => value >= Math.min(low, high) - 0.5 && value <= Math.max(low, high) + 0.5;
    const every = thinning(panel, size);
    let last = -Infinity;
    for (const [k, tick] of [...panel.ticksX].sort((a, b) => X.to(a.value) - X.to(b.value)).entries()) {
      const at = X.to(tick.value);
      if (!inside(at, box.x, box.x + box.width)) continue;
      if (x.showgrid !== false && !panel.scaleX.names) svg.append(node("path", {d: `M${at},${box.y}v${box.height}`, stroke: colours.grid}));
      if (!panel.showX || k % every) continue;
      const lines = wrapped(tick.text, size, Math.max(30, panel.slanted ? 90 : 400)), width = measure(lines.join("\n"), size);
      if (panel.slanted ? at - last < size + 3 : at - width / 2 < last + 6) continue;
      last = panel.slanted ? at : at + width / 2;
      if (panel.slanted) write(svg, lines[0], at + 3, box.y + box.height + 12, {size, fill: colours.ink, anchor: "end", turn: -40});
      else write(svg, lines, at, box.y + box.height + 15, {size, fill: colours.ink, anchor: "middle"});
    }
    let below = Infinity;
    for (const tick of [...panel.ticksY].sort((a, b) => Y.to(b.value) - Y.to(a.value))) {
      const at = Y.to(tick.value);
      if (!inside(at, box.y, box.y + box.height)) continue;
      if (y.showgrid !== false && !panel.scaleY.names) svg.append(node("path", {d: `M${box.x},${at}h${box.width}`, stroke: colours.grid}));
      if (!panel.showY) continue;
      const lines = panel.labelsY.get(tick.value), height = lines.length * size * 1.15;
      if (at + height / 2 > below - 1) continue;
      below = at - height / 2;
      write(svg, lines, box.x - 7, at + size * 0.36 - (lines.length - 1) * size * 0.575, {size, fill: colours.ink, anchor: "end"});
    }
    for (const [axis, scale, line] of [[x, X, (at) => `M${at},${box.y}v${box.height}`], [y, Y, (at) => `M${box.x},${at}h${box.width}`]])
      if (axis.zeroline) {
        const at = scale.at(0);
        if (axis === x ? inside(at, box.x, box.x + box.width) : inside(at, box.y, box.y + box.height)) svg.append(node("path", {d: line(at), stroke: axis.zerolinecolor || colours.ink, "stroke-width": 1}));
      }
  };
  const drawTitles = (svg, panel, colours) => {
    const {box} = panel, text = (axis) => decode((axis.title && axis.title.text) || "");
    if (panel.showX && text(panel.x)) write(svg, wrapped(text(panel.x), 12, box.width + 20), box.x + box.width / 2, panel.bottom - 6 - 14 * (panel.linesX - 1), {fill: colours.ink, anchor: "middle"});
    if (panel.showTitleY && text(panel.y)) {
      const at = [box.x - panel.room + 12, box.y + box.height / 2];
      write(svg, wrapped(text(panel.y), 12, box.height + 26).slice(0, 2), ...at, {fill: colours.ink, anchor: "middle", turn: -90});
    }
    if (panel.title) write(svg, wrapped(panel.title, 13, box.width + 10)[0], box.x + box.width / 2, box.y - 8, {size: 13, fill: colours.ink, anchor: "middle"});
  };
  const drawShapes = (svg, layout, panels) => {
    for (const shape of layout.shapes || []) {
      const panel = panels.find((one) => [shape.xref || "x", shape.yref || "y"].every((ref) => ref === "paper" || one.names.includes(ref.split(" ")[0]))) || panels[0];
      const across = (value) => (/paper|domain/.test(shape.xref || "x") ? panel.box.x + value * panel.box.width : panel.X.to(value));
      const up = (value) => (/paper|domain/.test(shape.yref || "y") ? panel.box.y + (1 - value) * panel.box.height : panel.Y.to(value));
      /* Frames lie between categories or numbers, so half units are resolved on the scale itself. */
      const [x0, x1] = [shape.x0, shape.x1].map((v) => (number(v) && !/paper|domain/.test(shape.xref || "x") ? panel.X.at(v) : across(v)));
      const [y0, y1] = [shape.y0, shape.y1].map((v) => (number(v) && !/paper|domain/.test(shape.yref || "y") ? panel.Y.at(v) : up(v)));
      const line = {stroke: shape.line.color, "stroke-width": shape.line.width, "stroke-dasharray": DASHES[shape.line.dash], fill: "none"};
      if (shape.type === "rect") svg.append(node("rect", {x: Math.min(x0, x1), y: Math.min(y0, y1), width: Math.abs(x1 - x0), height: Math.abs(y1 - y0), ...line}));
      else svg.append(node("path", {d: `M${x0},${y0}L${x1},${y1}`, ...line}));
    }
  };
  const drawNotes = (svg, layout, panels, colours) => {
    for (const note of layout.annotations || []) {
      if (note.taken || note.xref === "paper") continue;
      const panel = panels[0], x = panel.X.to(note.x) + (note.xshift || 0), y = panel.box.y + 12;
      const right = x + measure(note.text, 12) > panel.box.x + panel.box.width;
      write(svg, decode(note.text), right ? x - 2 * (note.xshift || 0) : x, y, {fill: colours.ink, anchor: right ? "end" : "start"});
    }
  };
  const drawScale = (svg, trace, right, y, colours) => {
    const id = `pattern-${++patterns}`, gradient = node("linearGradient", {id}), spec = (trace.colorbar || {}).tickformat;
    for (const [at, colour] of trace.colorscale) gradient.append(node("stop", {offset: at, "stop-color": colour}));
    svg.querySelector("defs").append(gradient);
    const text = (value) => formatted(+value.toPrecision(3), spec), width = 110;
    const title = decode(((trace.colorbar || {}).title || {}).text || ""), end = right - measure(text(trace.zmax), 11) - 6;
    write(svg, text(trace.zmax), right, y + 9, {size: 11, fill: colours.ink, anchor: "end"});
    svg.append(node("rect", {x: end - width, y, width, height: 10, fill: `url(#${id})`, stroke: colours.grid}));
    write(svg, [title, text(trace.zmin)].filter(Boolean).join(" "), end - width - 6, y + 9, {size: 11, fill: colours.ink, anchor: "end"});
  };

  /* Titles above panels, and remarks above the figure. */
  const sortNotes = (layout, panels) => {
    const remarks = [];
    for (const note of layout.annotations || []) {
      if (note.xref !== "paper" || note.yref !== "paper") continue;
      const owner = panels.find((one) => note.yanchor === "bottom" && Math.abs((one.left[0] + one.left[1]) / 2 - note.x) < 0.02 && Math.abs(one.up[1] - note.y) < 0.02);
      note.taken = true;
      if (owner) owner.title = decode(note.text);
      else remarks.push(decode(note.text));
    }
    return remarks;
  };
  const arrange = (figure, width) => {
    const {layout} = figure, {panels, columns, rows} = panelsOf(figure), small = width < 480, size = small ? 11 : 12;
    const stacked = columns > 1 && width < 280 * columns;
    const remarks = sortNotes(layout, panels), legend = legendOf(figure, width, ((layout.legend || {}).y ?? 1.02) > 0.5);
    for (const panel of panels) {
      [panel.scaleX, panel.scaleY] = [axisRange(panel, "x"), axisRange(panel, "y")];
      panel.showX = stacked || panel.x.showticklabels !== false;
      panel.showY = stacked || panel.y.showticklabels !== false;
      panel.ticksY = ticksOf(panel.ylike[0].y.tickvals ? panel.ylike[0].y : panel.y, panel.scaleY, 240, 42);
      if (stacked && !(panel.y.title || {}).text) panel.y = {...panel.y, title: panel.ylike[0].y.title};
      panel.showTitleY = panel.showY && Boolean((panel.y.title || {}).text);
      const most = Math.min(width * 0.42, 190);
      panel.labelsY = new Map(panel.ticksY.map((tick) => [tick.value, wrapped(tick.text, size, most)]));
      panel.label = panel.showY ? Math.max(0, ...[...panel.labelsY.values()].map((lines) => measure(lines.join("\n"), size))) : 0;
      panel.room = (panel.showY ? panel.label + 10 : 6) + (panel.showTitleY ? 20 : 0);
      [panel.at, panel.down] = stacked ? [0, panels.indexOf(panel)] : [panel.column, panel.row];
    }
    const across = stacked ? 1 : columns, down = stacked ? panels.length : rows;
    const rooms = [...Array(across).keys()].map((at) => Math.max(...panels.filter((one) => one.at === at).map((one) => one.room)));
    const inner = (width - rooms.reduce((a, b) => a + b, 0) - 14 * across) / across;
    return {panels, remarks, legend, size, across, down, rooms, inner, stacked};
  };
  /* Places every panel's box; returns the figure's height. */
  const place = (plan, layout, scaleOf) => {
    const {panels, legend, remarks, rooms, inner, down, across, size} = plan;
    let y = (legend.top ? legend.height : 0) + 18 * remarks.length + (scaleOf ? 22 : 4);
    const share = Math.max(70, (layout.height - 70) / (plan.stacked ? 1 : down) - (plan.stacked ? 0 : 24));
    for (let row = 0; row < down; row++) {
      const here = panels.filter((one) => one.down === row);
      if (!here.length) continue;
      const top = here.some((one) => one.title) ? 24 : 6;
      let below = 8, height = share;
      for (const panel of here) {
        let x = 0;
        for (let at = 0; at < panel.at; at++) x += rooms[at] + inner + 14;
        panel.box = {x: x + rooms[panel.at], y: y + top, width: inner};
        panel.X = project(panel.scaleX, panel.box.x, panel.box.x + inner);
        panel.ticksX = ticksOf(panel.x, panel.scaleX, inner, 56);
        const widest = Math.max(0, ...panel.ticksX.map((tick) => measure(tick.text, size)));
        panel.slanted = Boolean(panel.scaleX.names) && widest > 26 && (widest + 6) * panel.ticksX.length > inner;
        const lines = panel.showX ? (panel.slanted ? 0 : Math.max(1, ...panel.ticksX.map((tick) => tick.text.split("\n").length))) : 0;
        const title = decode(((panel.x.title || {}).text) || "");
        panel.linesX = title ? wrapped(title, 12, inner + 20).length : 1;
        below = Math.max(below, (panel.slanted ? Math.min(widest, 90) * 0.66 + 18 : lines * 14 + 6) + (panel.showX && title ? 6 + 14 * panel.linesX : 0) + 4);
        const heat = panel.traces.find((one) => one.type === "heatmap");
        if (heat && heat.z.length > 12) height = Math.min(share, heat.z.length * Math.max(12, 1.3 * inner / (heat.z[0] || [1]).length));
      }
      for (const panel of here) {
        panel.box.height = height;
        const [low, high] = [panel.box.y + height, panel.box.y];
        panel.Y = project(panel.scaleY, low, high);
        panel.bottom = panel.box.y + height + below;
      }
      y += top + height + below + 4;
    }
    return {height: y + (legend.top ? 0 : legend.height), bottom: y};
  };
  /* The figure as an SVG element of a width, and the marks that can be pointed at. */
  const render = (source, width, dark) => {
    const figure = repaint(JSON.parse(JSON.stringify(source)), dark), {layout, data} = figure, marks = [];
    const heat = data.find((one) => one.type === "heatmap" && one.showscale !== false);
    const colours = {ink: repaint("#6b7280", dark), grid: repaint("rgba(154,160,168,0.2)", dark)};
    const plan = arrange(figure, width), {panels, legend, remarks} = plan, {height, bottom} = place(plan, layout, heat);
    const svg = node("svg", {xmlns: NS, viewBox: `0 0 ${width} ${Math.ceil(height)}`, width: "100%", "font-family": family(), "aria-hidden": "true", focusable: "false"});
    svg.append(node("defs"));
    remarks.forEach((text, i) => write(svg, wrapped(text, 12, width)[0], 0, 13 + 18 * i, {fill: colours.ink}));
    if (heat) drawScale(svg, heat, width - 14, 18 * remarks.length + (legend.top ? legend.height : 0) + 4, colours);
    for (const panel of panels) {
      drawAxes(svg, panel, colours, plan.size);
      const group = node("g");
      svg.append(group);
      for (const trace of panel.traces) {
        if (trace.type === "heatmap") drawHeat(group, trace, panel, marks, colours.ink);
        else if (trace.type === "scatter") drawScatter(group, trace, panel, marks, colours.ink);
      }
      drawBars(group, panel, layout, marks, svg);
      drawTitles(svg, panel, colours);
    }
    drawShapes(svg, layout, panels);
    drawNotes(svg, layout, panels, colours);
    drawLegend(svg, legend, legend.top ? 18 * remarks.length : bottom + 6, colours.ink);
    delete svg.dataset.patterns;
    return {svg, marks, width, height: Math.ceil(height)};
  };

  /* One tip for the whole page, beside the mark that is pointed at or reached with the arrow keys. */
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);
  const hide = () => {
    tip.hidden = true;
    document.querySelectorAll(".ring").forEach((one) => one.remove());
  };
  const pointAt = (element, mark) => {
    const {svg, width} = element.chart, frame = svg.getBoundingClientRect(), zoom = frame.width / width;
    document.querySelectorAll(".ring").forEach((one) => one.remove());
    svg.append(node("rect", {class: "ring", x: mark.x - 1, y: mark.y - 1, width: mark.width + 2, height: mark.height + 2, rx: 2}));
    tip.replaceChildren(...mark.tip().split(/(<b>.*?<\/b>)/g).filter(Boolean).map((part) => {
      const span = document.createElement(part.startsWith("<b>") ? "b" : "span");
      span.textContent = decode(part);
      return span;
    }));
    tip.hidden = false;
    const x = frame.left + scrollX + (mark.x + mark.width / 2) * zoom, y = frame.top + scrollY + mark.y * zoom;
    tip.style.left = `${Math.max(scrollX + 4, Math.min(x - tip.offsetWidth / 2, scrollX + document.documentElement.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${y - tip.offsetHeight - 8 < scrollY ? y + mark.height * zoom + 8 : y - tip.offsetHeight - 8}px`;
  };
  const nearest = (marks, x, y, reach) => {
    let best = null, least = reach;
    for (const mark of marks) {
      const dx = Math.max(mark.x - x, 0, x - mark.x - mark.width), dy = Math.max(mark.y - y, 0, y - mark.y - mark.height);
      const far = Math.hypot(dx, dy);
      if (far < least || (far === 0 && least === 0)) [best, least] = [mark, far];
    }
    return best;
  };
  const listen = (element) => {
    element.tabIndex = 0;
    const find = (event) => {
      const {svg, width, marks} = element.chart, frame = svg.getBoundingClientRect(), zoom = frame.width / width;
      const mark = nearest(marks, (event.clientX - frame.left) / zoom, (event.clientY - frame.top) / zoom, 18);
      element.current = mark ? marks.indexOf(mark) : -1;
      if (mark) pointAt(element, mark);
      else hide();
    };
    element.addEventListener("pointermove", find);
    element.addEventListener("pointerdown", find);
    element.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    element.addEventListener("blur", hide);
    element.addEventListener("keydown", (event) => {
      const move = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1]}[event.key], {marks} = element.chart;
      if (event.key === "Escape") hide();
      if (!move || !marks.length) return;
      event.preventDefault();
      const from = marks[element.current];
      element.current = from ? step(marks, from, move) : 0;
      pointAt(element, marks[element.current]);
    });
  };
  /* The next mark in a direction, as the eye would find it. */
  const step = (marks, from, [dx, dy]) => {
    const middle = (mark) => [mark.x + mark.width / 2, mark.y + mark.height / 2], [x, y] = middle(from);
    let best = marks.indexOf(from), least = Infinity;
    marks.forEach((mark, i) => {
      const [a, b] = middle(mark), ahead = (a - x) * dx + (b - y) * dy, aside = Math.abs((a - x) * dy) + Math.abs((b - y) * dx);
      if (ahead > 0.5 && ahead + 3 * aside < least) [best, least] = [i, ahead + 3 * aside];
    });
    return best;
  };
  const draw = (element, figure, {dark = false, most = Infinity} = {}) => {
    const width = Math.min(most, Math.floor(element.clientWidth));
    if (!width) return false;
    if (!element.chart) listen(element);
    element.chart = {...render(figure, width, dark), figure};
    element.replaceChildren(element.chart.svg);
    element.style.minHeight = "";
    hide();
    return true;
  };

  const download = (blob, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 5000);
  };
  const still = (figure, title) => {
    const {svg, width, height} = render(figure, 900, false);
    for (const [name, value] of Object.entries({width, height, "aria-hidden": "false", role: "img"})) svg.setAttribute(name, value);
    svg.prepend(node("title", {}, title), node("rect", {width, height, fill: "#ffffff"}));
    return {text: new XMLSerializer().serializeToString(svg), width, height};
  };
  /* One line for every value that the figure shows. */
  const table = (figure) => {
    const rows = [["series", "x", "y", "value", "low", "high"]];
    for (const trace of figure.data) {
      const name = decode(trace.name || "");
      if (trace.type === "heatmap")
        trace.z.forEach((row, i) => row.forEach((value, j) => rows.push([name, (trace.x || [])[j] ?? j, (trace.y || [])[i] ?? i, value, "", ""])));
      else if (trace.hoverinfo !== "skip")
        trace.x.forEach((x, i) => {
          const spread = trace.error_y || trace.error_x, of = trace.error_y ? trace.y[i] : x, custom = (trace.customdata || [])[i];
          const ends = spread ? [of - spread.arrayminus[i], of + spread.array[i]].map((end) => +end.toFixed(5))
            : Array.isArray(custom) && typeof custom[0] === "number" && custom.length > 1 ? custom.slice(0, 2) : ["", ""];
          rows.push([name, x, trace.y[i], "", ...ends]);
        });
    }
    const quote = (value) => (/[",\n]/.test(String(value ?? "")) ? `"${String(value).replace(/"/g, '""')}"` : String(value ?? ""));
    return rows.map((row) => row.map(quote).join(",")).join("\n") + "\n";
  };
  const save = (figure, kind, name, title) => {
    if (kind === "csv") return download(new Blob([table(figure)], {type: "text/csv"}), `${name}.csv`);
    const {text, width, height} = still(figure, title);
    if (kind === "svg") return download(new Blob([text], {type: "image/svg+xml"}), `${name}.svg`);
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [2 * width, 2 * height];
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => download(blob, `${name}.png`));
    };
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
  };
  addEventListener("scroll", hide, {passive: true});
  return {draw, render, save, table, still, hide};
})();
