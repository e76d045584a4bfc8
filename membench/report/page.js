"use strict";
// Draws the page's pictures out of its data, and sorts, filters and searches its table. Names reach the page as text
// alone: through textContent, or with the signs escaped that the library of pictures would take for markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const isPhone = () => window.innerWidth < 640;
  const plain = (text) => text.replace(/[&<>$]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", $: "&#36;" })[sign]);

  // Colours that are told apart by people who see few of them (after Okabe and Ito), and shapes besides.
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c7a00"];
  const SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "triangle-down", "hexagon"];
  const PATTERNS = ["", "/", "\\", "x", "-", "."];
  const colour = (number) => (number === 0 ? "#7f7f7f" : COLOURS[(number - 1) % COLOURS.length]);

  function make(tag, parent, text, attributes = {}) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (parent) parent.append(element);
    return element;
  }

  function makeTable(parent, table) {
    const made = make("table", make("div", parent, undefined, { class: "wide", tabindex: "0" }));
    const head = make("tr", make("thead", made));
    for (const title of table[0]) make("th", head, title, { scope: "col" });
    const body = make("tbody", made);
    for (const row of table.slice(1)) {
      const line = make("tr", body);
      row.forEach((cell, number) => (number ? make("td", line, cell) : make("th", line, cell, { scope: "row" })));
    }
  }

  // Everything drawn, to be drawn again in other colours.
  const drawn = new Map();

  function figure(parent, picture, draw, kind = "") {
    const element = make("figure", parent, undefined, { class: kind });
    make("h3", element, picture.title);
    const place = make("div", element, undefined, { class: "drawing", role: "img", "aria-label": `${picture.title}. ${picture.caption}` });
    make("figcaption", element, picture.caption);
    const details = make("details", element);
    make("summary", details, "As a table");
    makeTable(details, picture.table);
    drawn.set(place, draw);
    waiting.push(place);
  }

  // Only when all of a choice's figures are laid out is it known how wide each is. One is drawn at a time, so that the
  // page answers meanwhile.
  const waiting = [];
  const whenIdle = window.requestIdleCallback || ((work) => setTimeout(work, 1));
  function showNext() {
    const place = waiting.shift();
    if (place && drawn.has(place)) show(place, drawn.get(place));
    root.dataset.drawn = String(!waiting.length);
    if (waiting.length) whenIdle(showNext, { timeout: 300 });
  }

  function show(place, draw) {
    const ink = getComputedStyle(root);
    const of = (name) => ink.getPropertyValue(name).trim();
    const theme = { ink: of("--ink"), faint: of("--faint"), line: of("--line"), raised: of("--raised"), paper: of("--paper") };
    const { traces, layout } = draw(theme, place.clientWidth);
    Plotly.react(place, traces, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest",
      font: { color: theme.ink, family: 'system-ui, "DejaVu Sans", sans-serif', size: 12 },
      hoverlabel: { bgcolor: theme.paper, bordercolor: theme.line, font: { color: theme.ink }, align: "left", namelength: -1 },
      margin: { l: 8, r: 12, t: 8, b: 8 },
      ...layout,
    }, { responsive: true, displayModeBar: false, displaylogo: false });
  }

  const axis = (theme, more) => ({
    gridcolor: theme.line, zerolinecolor: theme.line, linecolor: theme.line, automargin: true, fixedrange: true, ...more,
    title: { text: plain(more.title || ""), standoff: 8 },
  });

  // A long stack goes over several lines; the whole of it is in the hover and in the table.
  function label(name) {
    const most = isPhone() ? 16 : 30;
    const lines = [];
    for (const member of name.split(/(?<=\+)/)) {
      if (lines.length && lines[lines.length - 1].length + member.length <= most) lines[lines.length - 1] += member;
      else lines.push(member.length > most ? `${member.slice(0, most - 1)}…` : member);
    }
    return lines.map(plain).join("<br>");
  }

  function clear(id) {
    const place = byId(id);
    if (!place) return null;
    for (const old of place.querySelectorAll(".drawing")) { Plotly.purge(old); drawn.delete(old); }
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
          marker: { size: 9 + 19 * Math.sqrt(point.speed), color: colour(number), line: { width: 2, color: colour(number) },
            symbol: SHAPES[Math.floor(Math.max(0, number - 1) / 7) % SHAPES.length] + (point.on_front ? "" : "-open"), opacity: 0.85 },
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
    const most = Math.max(...picture.series.flatMap((one) => one.values.map((value) => value || 0)));
    // What is written beside the longest bar has to find room.
    const room = (width) => { const wide = Math.max(width - 7 * longest - 40, 150); return wide / Math.max(wide - 125, 40); };
    const longest = Math.max(...picture.names.flatMap((name) => label(name).split("<br>").map((line) => line.length)));
    figure(place, picture, (theme, width) => ({
      traces: picture.series.map((one, number) => ({
        type: "bar", orientation: "h", name: plain(one.name), y: picture.names.map((_, n) => n), x: one.values,
        hoverinfo: "text", hovertext: picture.names.map((name, n) => `<b>${plain(name)}</b><br>${plain(one.name)} ${plain(one.told[n])}`),
        ...(alone ? { text: one.told.map(plain), textposition: "outside", cliponaxis: false, textfont: { size: 11 } } : {}),
        marker: { color: alone ? picture.names.map((_, n) => (n ? COLOURS[0] : "#7f7f7f")) : COLOURS[number % COLOURS.length],
          pattern: alone ? {} : { shape: PATTERNS[number % PATTERNS.length], fillmode: "overlay", fgcolor: theme.paper, size: 6, solidity: 0.2 } },
      })),
      layout: {
        height, barmode: picture.stacked ? "stack" : "group", bargap: 0.25, showlegend: !alone, legend: { ...legend, y: -50 / height, traceorder: "normal" },
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
            x: picture.at_s, y: values, mode: "lines", name: `${plain(name)}, sampled`, line: { color: COLOURS[number], width: 1.6, dash: ["solid", "dot", "dash"][number % 3] },
            hovertemplate: `%{y:.4g} ${picture.unit} at %{x:.2f} s<extra></extra>`,
          })),
          ...[[false, "exact peak of a phase", "solid"], [true, "at most, file pages in it", "dot"]].map(([isBound, name, dash]) => {
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
          yaxis: axis(theme, { title: picture.unit, range: [Math.min(0, ...Object.values(picture.columns).flat()), top] }),
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
    figure(place, picture, (theme) => ({
      traces: picture.series.map((one, number) => ({
        x: picture.runs.map((_, n) => n), y: one.values, mode: "lines+markers", name: label(one.name),
        hoverinfo: "text", hovertext: picture.runs.map((run, n) => `<b>${plain(one.name)}</b><br>${plain(picture.title)} ${plain(one.told[n])}<br>${plain(run)}`),
        line: { color: colour(number), dash: ["solid", "dash", "dot"][Math.floor(Math.max(0, number - 1) / 7) % 3] }, marker: { size: 8, symbol: SHAPES[number % SHAPES.length] },
      })),
      layout: {
        height: 330 + legendHeight(picture.series.map((one) => one.name)), legend: { ...legend, y: -0.17 },
        xaxis: axis(theme, { tickvals: picture.runs.map((_, n) => n), ticktext: picture.runs.map((run) => plain(run).replace(" (", "<br>(")), range: [-0.4, picture.runs.length - 0.6] }),
        yaxis: axis(theme, { title: picture.unit, rangemode: "tozero" }),
      },
    }));
  }

  function chooseGroup(number) {
    const group = data.groups[number];
    byId("group").value = String(number);
    drawPareto(group.pareto);
    const memory = clear("memory");
    for (const picture of group.memory) drawBars(memory, picture);
    for (const name of ["conversion", "breakdown"]) {
      const place = clear(name);
      if (group[name]) drawBars(place, group[name]);
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
    whenIdle(showNext, { timeout: 300 });
    const place = byId("whole");
    place.replaceChildren();
    make("h3", place, `${data.groups[one.group].label} · ${one.technique}`);
    make("p", place, `${one.status}; took ${one.took}${one.repeats > 1 ? `, ${one.repeats} repeats, figures are their medians` : ""}.`);
    const said = make("ul", place);
    for (const line of one.said) make("li", said, line);
    makeTable(place, [["metric", "figure", "how"], ...one.figures.map(([metric, shown, way]) => [data.metrics[metric], shown, data.ways[way]])]);
    if (one.output.length) {
      make("h3", place, "The end of what it printed");
      make("pre", place, one.output.join("\n"), { tabindex: "0" });
    }
  }

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
      keyed.sort(([a], [b]) => (a === null ? (b === null ? 0 : 1) : b === null ? -1 : turn * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)))));
      body.append(...keyed.map(([, row]) => row));
    }));

    body.addEventListener("click", (event) => {
      const pick = event.target.closest(".pick");
      if (!pick) return;
      const row = pick.closest("tr");
      if (byId("group").value !== row.dataset.group) chooseGroup(Number(row.dataset.group));
      chooseCase(Number(row.dataset.case));
      byId("case").scrollIntoView();
    });
  }

  // --- light and dark ----------------------------------------------------------------------------------------------

  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const redraw = () => { for (const [place, draw] of drawn) show(place, draw); };
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
    redraw();
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
    byId("group").addEventListener("change", (event) => chooseGroup(Number(event.target.value)));
    byId("case-choice").addEventListener("change", (event) => chooseCase(Number(event.target.value)));
    wireTable();
    chooseGroup(0);
  } else {
    root.dataset.drawn = "true";
  }
})();
