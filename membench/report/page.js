"use strict";
// Draws the page's pictures out of its data, and sorts, filters and searches its table. Names reach the page as text
// alone: through textContent, or with the signs escaped that the library of pictures would take for markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const isPhone = () => window.innerWidth < 640;
  const plain = (text) => text.replace(/[&<>$]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", $: "&#36;" })[sign]);

  // Colours come from the theme, the reference's grey first; shapes and patterns tell apart what colours do not.
  const SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "triangle-down", "hexagon"];
  const PATTERNS = ["", "/", "\\", "x", "-", "."];
  const colour = (theme, number) => (number === 0 ? theme.marks[0] : theme.marks[1 + ((number - 1) % (theme.marks.length - 1))]);
  const round = (theme, number) => Math.floor(Math.max(0, number - 1) / (theme.marks.length - 1));

  function make(tag, parent, text, attributes = {}) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (parent) parent.append(element);
    return element;
  }

  // What scrolls is reached by keyboard, and so has a name.
  function makeTable(parent, table, name) {
    const made = make("table", make("div", parent, undefined, { class: "wide", tabindex: "0", role: "region", "aria-label": `${name}, as a table` }));
    const head = make("tr", make("thead", made));
    for (const title of table[0]) make("th", head, title, { scope: "col" });
    const body = make("tbody", made);
    for (const row of table.slice(1)) {
      const line = make("tr", body);
      row.forEach((cell, number) => (number ? make("td", line, cell) : make("th", line, cell, { scope: "row" })));
    }
  }

  // The library of pictures stands in the page as text, and runs when the first picture comes near the screen: it is
  // most of the page, and what is read first needs none of it.
  function library() {
    const kept = byId("plotly");
    if (kept.type) kept.replaceWith(make("script", null, kept.textContent, { id: "plotly" }));
    return window.Plotly;
  }

  function themeNow() {
    const ink = getComputedStyle(root);
    const of = (name) => ink.getPropertyValue(name).trim();
    return { ink: of("--ink"), faint: of("--faint"), line: of("--line"), paper: of("--paper"), marks: of("--marks").split(/\s+/) };
  }

  // Every picture of the choice with what draws it: now, or again in other colours.
  const pictures = new Map();
  const isDrawn = (place) => place.classList.contains("js-plotly-plot");

  function figure(parent, picture, draw) {
    const element = make("figure", parent);
    make("h3", element, picture.title);
    const place = make("div", element, undefined, { class: "drawing", role: "img", "aria-label": `${picture.title}. ${picture.caption}` });
    make("figcaption", element, picture.caption);
    const details = make("details", element);
    make("summary", details, "As a table");
    makeTable(details, picture.table, picture.title);
    place.style.minHeight = `${draw(themeNow(), 600).layout.height}px`; // nothing moves when it is drawn
    pictures.set(place, draw);
    near.observe(place);
  }

  // What comes near the screen is drawn, one picture at a time, so that the page answers meanwhile.
  const waiting = [];
  const near = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      waiting.push(target);
    }
    whenIdle(showNext, { timeout: 300 });
  }, { rootMargin: "200px 0px" });
  const whenIdle = window.requestIdleCallback || ((work) => setTimeout(work, 1));

  function showNext() {
    const place = waiting.shift();
    if (place && pictures.has(place)) show(place);
    root.dataset.drawn = String(!waiting.length);
    if (waiting.length) whenIdle(showNext, { timeout: 300 });
  }

  function show(place) {
    const theme = themeNow();
    const { traces, layout } = pictures.get(place)(theme, place.clientWidth);
    library().react(place, traces, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest",
      font: { color: theme.ink, family: 'system-ui, "DejaVu Sans", sans-serif', size: 12 },
      hoverlabel: { bgcolor: theme.paper, bordercolor: theme.line, font: { color: theme.ink }, align: "left", namelength: -1 },
      margin: { l: 8, r: 12, t: 8, b: 8 },
      ...layout,
    }, { responsive: true, displayModeBar: false, displaylogo: false });
  }

  const axis = (theme, more) => ({
    gridcolor: theme.line, zerolinecolor: theme.line, linecolor: theme.line, automargin: true, fixedrange: true, ticklabeloverflow: "allow", ...more,
    title: { text: plain(more.title || ""), standoff: 8 },
  });

  // A long name goes over several lines; the whole of it is in the hover and in the table.
  function label(name) {
    const most = isPhone() ? 16 : 30;
    const lines = [""];
    for (const piece of name.match(/[^+._-]*[+._-]*/gu).flatMap((part) => part.match(new RegExp(`.{1,${most}}`, "gu")) || [])) {
      if (lines.at(-1).length + piece.length <= most) lines[lines.length - 1] += piece;
      else lines.push(piece);
    }
    const shown = lines.length > 4 ? [...lines.slice(0, 2), "…", lines.at(-1)] : lines;
    return shown.map(plain).join("<br>");
  }

  function clear(id) {
    const place = byId(id);
    if (!place) return null;
    for (const old of place.querySelectorAll(".drawing")) {
      near.unobserve(old);
      pictures.delete(old);
      if (isDrawn(old)) library().purge(old);
    }
    place.replaceChildren();
    return place;
  }

  const legend = { orientation: "h", x: 0, xanchor: "left", y: -0.12, yanchor: "top", maxheight: 0.75 };

  // On a phone each name has a line of its own; elsewhere several share one.
  const legendHeight = (names) => 19 * names.reduce((sum, name) => sum + label(name).split("<br>").length, 0) / (isPhone() ? 1 : 3);

  function drawPareto(picture) {
    const place = clear("pareto");
    if (!picture.points.length) { make("p", place, picture.caption); return; }
    const few = picture.points.filter((point) => point.on_front).length <= 8;
    figure(place, picture, (theme) => ({
      traces: [
        { x: picture.lowest.map((p) => p[0]), y: picture.lowest.map((p) => p[1]), mode: "lines", hoverinfo: "skip", showlegend: false,
          line: { dash: "dot", shape: "hv", color: theme.faint, width: 1.5 } },
        ...picture.points.map((point, number) => ({
          x: [point.x], y: [point.y], mode: few && point.on_front && !isPhone() ? "markers+text" : "markers", name: label(point.technique),
          text: [label(point.technique)], textposition: "top right", textfont: { size: 11 }, cliponaxis: false,
          hoverinfo: "text", hovertext: [`<b>${plain(point.technique)}</b><br>${plain(point.told).replaceAll("; ", "<br>")}${point.on_front ? "<br>on the front" : ""}`],
          marker: { size: 9 + 19 * Math.sqrt(point.speed), color: colour(theme, number), line: { width: point.on_front ? 1 : 2, color: point.on_front ? theme.paper : colour(theme, number) },
            symbol: SHAPES[round(theme, number) % SHAPES.length] + (point.on_front ? "" : "-open"), opacity: 1 },
        })),
      ],
      layout: {
        height: 380 + legendHeight(picture.points.map((point) => point.technique)), legend: { ...legend, itemsizing: "constant" },
        xaxis: axis(theme, { title: picture.x_title, zeroline: false, ...(picture.ticks.length
          ? { tickvals: picture.ticks.map((t) => t.at), ticktext: picture.ticks.map((t) => t.text),
              range: [picture.ticks[0].at - 0.4, picture.ticks.at(-1).at + 0.6] } : { rangemode: "tozero" }) }),
        yaxis: axis(theme, { title: picture.y_title, range: [0, 1.12 * Math.max(...picture.points.map((p) => p.y))] }),
      },
    }));
  }

  function drawBars(place, picture) {
    const alone = picture.series.length === 1;
    const lines = Math.max(...picture.names.map((name) => label(name).split("<br>").length));
    const height = picture.names.length * Math.max(picture.stacked || alone ? 28 : 10 + 13 * picture.series.length, 16 * lines) + (alone ? 60 : 110);
    const guessed = picture.estimates ? picture.estimates.values : [];
    const most = Math.max(...picture.series.flatMap((one) => one.values.map((value) => value || 0)), ...guessed.map((value) => value || 0));
    // What is written beside the longest bar has to find room.
    const room = (width) => { const wide = Math.max(width - 7 * longest - 40, 150); return wide / Math.max(wide - 125, 40); };
    const longest = Math.max(...picture.names.flatMap((name) => label(name).split("<br>").map((line) => line.length)));
    // Long names take their room from the row, not from the bars.
    place.closest(".row").style.setProperty("--least", `${24 + Math.max(0, longest - 14) / 2}rem`);
    figure(place, picture, (theme, width) => ({
      traces: picture.series.map((one, number) => ({
        type: "bar", orientation: "h", name: plain(one.name), y: picture.names.map((_, n) => n), x: one.values,
        hoverinfo: "text", hovertext: picture.names.map((name, n) => `<b>${plain(name)}</b><br>${plain(one.name)} ${plain(one.told[n])}`),
        ...(alone ? { text: one.told.map(plain), textposition: "outside", cliponaxis: false, textfont: { size: 11 } } : {}),
        marker: { color: alone ? picture.names.map((_, n) => theme.marks[n ? 1 : 0]) : colour(theme, (one.look ?? number) + 1),
          pattern: alone ? {} : { shape: PATTERNS[(one.look ?? number) % PATTERNS.length], fillmode: "overlay", fgcolor: theme.paper, size: 6, solidity: 0.2 } },
      })).concat(picture.estimates ? [{
        type: "scatter", mode: "markers", name: "estimated", y: picture.names.map((_, n) => n), x: guessed, cliponaxis: false, hoverinfo: "text",
        hovertext: picture.names.map((name, n) => `<b>${plain(name)}</b><br>estimated ${plain(picture.estimates.told[n])}`),
        marker: { symbol: "line-ns-open", size: 22, color: theme.ink, line: { width: 2.5, color: theme.ink } },
      }] : []),
      layout: {
        height, barmode: picture.stacked ? "stack" : "group", bargap: 0.25, showlegend: !alone, legend: { ...legend, y: -46 / (height - 110), traceorder: "normal" },
        xaxis: axis(theme, { title: picture.unit, ...(alone ? { range: [0, room(width) * most || 1] } : { rangemode: "tozero" }), nticks: 6 }),
        yaxis: axis(theme, { tickvals: picture.names.map((_, n) => n), ticktext: picture.names.map(label), range: [picture.names.length - 0.5, -0.5], zeroline: false, showgrid: false }),
      },
    }));
  }

  function drawTimeline(picture) {
    const place = clear("timeline");
    if (!picture.at_s.length && !picture.spans.length) { make("p", place, picture.caption); return; }
    figure(place, picture, (theme) => {
      const peaks = picture.spans.filter((span) => span.peak !== null);
      const ends = picture.spans.map((span) => span.ended_s).concat(picture.at_s);
      const last = Math.max(...ends), first = Math.min(...picture.spans.map((span) => span.began_s).concat(picture.at_s));
      const top = 1.3 * Math.max(0, ...peaks.map((span) => span.peak), ...Object.values(picture.columns).flat());
      return {
        traces: [
          ...Object.entries(picture.columns).map(([name, values], number) => ({
            x: picture.at_s, y: values, mode: "lines", name: `${plain(name)}, sampled`, line: { color: theme.marks[1 + number], width: 1.6, dash: ["solid", "dot", "dash"][number % 3] },
            hovertemplate: `%{y:.4g} ${picture.unit} at %{x:.2f} s<extra></extra>`,
          })),
          ...[[false, "exact peak of a phase", "solid"], [true, "no more than this", "dot"]].map(([isBound, name, dash]) => {
            const spans = peaks.filter((span) => span.is_bound === isBound);
            return { x: spans.flatMap((span) => [span.began_s, (span.began_s + span.ended_s) / 2, span.ended_s, null]),
              y: spans.flatMap((span) => [span.peak, span.peak, span.peak, null]), mode: "lines", name, showlegend: spans.length > 0,
              line: { color: theme.ink, width: 3.5, dash }, hoverinfo: "text",
              hovertext: spans.flatMap((span) => { const told = `<b>${plain(span.phase)}</b>: ${plain(span.told)}<br>${plain(span.allocator)} allocator`; return [told, told, told, ""]; }) };
          }),
        ],
        layout: {
          height: 400, legend, hovermode: "closest", margin: { l: 8, r: 12, t: 12, b: 8 },
          xaxis: axis(theme, { title: "seconds from the case's start", range: [first, last] }),
          yaxis: axis(theme, { title: picture.y_title, range: [Math.min(0, ...Object.values(picture.columns).flat()), top] }),
          shapes: picture.spans.map((span, number) => ({ type: "rect", xref: "x", yref: "paper", x0: span.began_s, x1: span.ended_s, y0: 0, y1: 1, layer: "below",
            line: { width: 0 }, fillcolor: theme.faint, opacity: number % 2 ? 0.05 : 0.13 })),
          annotations: picture.spans.filter((span) => span.ended_s - span.began_s > (isPhone() ? 0.05 : 0.02) * (last - first)).map((span) => ({
            xref: "x", yref: "paper", x: (span.began_s + span.ended_s) / 2, y: 1, yanchor: "top", showarrow: false, text: plain(span.phase),
            textangle: span.ended_s - span.began_s > 0.12 * (last - first) ? 0 : -90, font: { size: 11, color: theme.faint } })),
        },
      };
    });
  }

  function drawLines(place, picture) {
    // A hole after the last run of each stretch: no line goes on from there.
    const withHoles = (values) => values.flatMap((value, n) => (picture.breaks.includes(n) ? [null, value] : [value]));
    const runs = picture.runs.map((_, n) => n);
    figure(place, picture, (theme) => ({
      traces: picture.series.map((one, number) => ({
        x: withHoles(runs), y: withHoles(one.values), mode: "lines+markers", name: label(one.name),
        hoverinfo: "text", hovertext: withHoles(picture.runs.map((run, n) => `<b>${plain(one.name)}</b><br>${plain(picture.title)} ${plain(one.told[n])}<br>${plain(run)}`)),
        line: { color: colour(theme, number), dash: ["solid", "dash", "dot"][round(theme, number) % 3] }, marker: { size: 8, symbol: SHAPES[number % SHAPES.length] },
      })),
      layout: {
        height: 330 + legendHeight(picture.series.map((one) => one.name)), legend: { ...legend, y: -0.17 },
        xaxis: axis(theme, { tickvals: runs, ticktext: picture.runs.map((run) => plain(run).replace(" (", "<br>(").replace(") ", ")<br>")), range: [-0.4, picture.runs.length - 0.6] }),
        yaxis: axis(theme, { title: picture.unit, rangemode: "tozero" }),
        shapes: picture.breaks.map((n) => ({ type: "line", xref: "x", yref: "paper", x0: n - 0.5, x1: n - 0.5, y0: 0, y1: 1, line: { color: theme.faint, width: 1, dash: "dash" } })),
        annotations: picture.breaks.map((n) => ({ xref: "x", yref: "paper", x: n - 0.5, y: 0.02, yanchor: "bottom", xanchor: "right", showarrow: false, textangle: -90,
          text: "other machine or versions", font: { size: 10, color: theme.faint } })),
      },
    }));
  }

  function chooseGroup(number) {
    const group = data.groups[number];
    byId("group").value = String(number);
    drawPareto(group.pareto);
    const memory = clear("memory");
    for (const picture of group.memory) drawBars(memory, picture);
    for (const name of ["conversion", "breakdown", "ranks"]) {
      const place = clear(name);
      if (group[name]) drawBars(place, group[name]);
      else if (name === "breakdown") make("p", place, data.noBreakdown, { class: "note" });
    }
    const history = clear("history");
    if (history) {
      for (const picture of group.history) drawLines(history, picture);
      if (!group.history.length) make("p", history, "This group was measured in one of the runs alone.");
    }
    const choice = byId("case-choice");
    choice.replaceChildren();
    data.cases.forEach((one, index) => {
      if (one.group === number) make("option", choice, one.technique, { value: String(index) });
    });
    chooseCase(Number(choice.value));
  }

  function chooseCase(index) {
    const one = data.cases[index];
    byId("case-choice").value = String(index);
    drawTimeline(one.timeline);
    root.dataset.drawn = "false";
    const place = byId("whole");
    place.replaceChildren();
    make("h3", place, `${data.groups[one.group].label} · ${one.technique}`, { id: "whole-title", tabindex: "-1" });
    make("button", make("p", place), "Back to its row of the table", { type: "button", id: "back" });
    make("p", place, `${one.status}; took ${one.took}${one.repeats > 1 ? `, ${one.repeats} repeats, figures are their medians` : ""}.`);
    const said = make("ul", place);
    for (const line of one.said) make("li", said, line);
    makeTable(place, [["metric", "figure", "how"], ...one.figures.map(([metric, shown, way]) => [data.metrics[metric], shown, data.ways[way]])], "Every figure of the case");
    if (one.output.length) {
      make("h3", place, "The end of what it printed");
      make("pre", place, one.output.join("\n"), { tabindex: "0", role: "region", "aria-label": "The end of what it printed" });
    }
  }

  // Said to who does not see what has changed.
  const tell = (index) => { byId("told").textContent = `Shown: ${data.groups[data.cases[index].group].label}, case ${data.cases[index].technique}.`; };

  // --- the table ---------------------------------------------------------------------------------------------------

  function wireTable() {
    const table = byId("cases"), body = table.tBodies[0], rows = [...body.rows];
    const words = new Map();
    const form = byId("filters"), search = byId("search"), fields = [...form.querySelectorAll("select")];

    function filter() {
      if (!words.size) for (const row of rows) words.set(row, row.textContent.toLowerCase());
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      for (const row of rows) {
        const fits = wanted.every((word) => words.get(row).includes(word)) && fields.every((field) => !field.value || row.dataset[field.dataset.field] === field.value);
        row.hidden = !fits;
        left += fits;
      }
      byId("count").textContent = `${left} of ${rows.length} cases`;
    }

    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", filter);
    form.addEventListener("reset", () => setTimeout(filter));

    const inOrder = new Intl.Collator().compare;
    const heads = [...table.tHead.rows[0].cells];
    const valueOf = (row, column) => {
      const cell = row.cells[column];
      if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
      return cell.classList.contains("number") || !cell.textContent.trim() ? null : cell.textContent.trim();
    };
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const turn = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", turn === 1 ? "ascending" : "descending");
      // What is not known stays at the end, whichever way round.
      const keyed = rows.map((row) => [valueOf(row, column), row]);
      keyed.sort(([a], [b]) => (a === null ? (b === null ? 0 : 1) : b === null ? -1 : turn * (typeof a === "number" && typeof b === "number" ? a - b : inOrder(a, b))));
      body.append(...keyed.map(([, row]) => row));
    }));

    body.addEventListener("click", (event) => {
      const pick = event.target.closest(".pick");
      if (!pick) return;
      const row = pick.closest("tr");
      if (byId("group").value !== row.dataset.group) chooseGroup(Number(row.dataset.group));
      chooseCase(Number(row.dataset.case));
      byId("whole-title").focus({ preventScroll: true });
      byId("case").scrollIntoView();
    });

    byId("whole").addEventListener("click", (event) => {
      if (event.target.id !== "back") return;
      const row = rows.find((one) => one.dataset.case === byId("case-choice").value);
      (row.hidden ? search : row.querySelector(".pick")).focus();
    });
  }

  // --- light and dark ----------------------------------------------------------------------------------------------

  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const redraw = () => { for (const place of pictures.keys()) if (isDrawn(place)) show(place); };
  const tellTheme = () => byId("theme").setAttribute("aria-pressed", String(isDark()));
  byId("theme").addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; tellTheme(); redraw(); });
  prefersDark.addEventListener("change", () => { tellTheme(); redraw(); });
  tellTheme();

  // On paper there is nothing to open, and no dark.
  let before = null;
  window.addEventListener("beforeprint", () => {
    before = { theme: root.dataset.theme, closed: [...document.querySelectorAll("details:not([open])")] };
    root.dataset.theme = "light";
    for (const details of before.closed) details.open = true;
    for (const place of pictures.keys()) show(place); // what was far from the screen, too
  });
  window.addEventListener("afterprint", () => {
    if (before.theme) root.dataset.theme = before.theme; else delete root.dataset.theme;
    for (const details of before.closed) details.open = false;
    redraw();
  });

  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (Math.abs(window.innerWidth - width) < 40) return; // a phone's bars come and go
    width = window.innerWidth;
    redraw();
  });

  if (data.cases.length) {
    byId("group").addEventListener("change", (event) => { chooseGroup(Number(event.target.value)); tell(Number(byId("case-choice").value)); });
    byId("case-choice").addEventListener("change", (event) => { chooseCase(Number(event.target.value)); tell(Number(event.target.value)); });
    wireTable();
    chooseGroup(0);
  } else {
    root.dataset.drawn = "true";
  }
})();
