"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  // colours: the system's until someone chooses; opened from disk there may be no storage
  const theme = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const kept = { get() { try { return localStorage.getItem("sdo-theme"); } catch { return null; } },
                 set(v) { try { localStorage.setItem("sdo-theme", v); } catch { /* not kept */ } } };
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
  if (["dark", "light"].includes(kept.get())) root.dataset.theme = kept.get();
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; kept.set(root.dataset.theme); showTheme(); });
  system.addEventListener("change", showTheme);
  showTheme();

  // cards get their height when they come into view: what a link leads to moves while one scrolls there
  for (const link of document.querySelectorAll('nav a[href^="#"]')) {
    link.addEventListener("click", (event) => {
      const target = byId(link.hash.slice(1));
      if (!target) return;
      event.preventDefault();
      let left = 60, still = 0, before = NaN;
      const settle = () => {
        target.scrollIntoView({ behavior: "instant", block: "start" });
        const at = target.getBoundingClientRect().top;
        still = at === before ? still + 1 : 0;
        before = at;
        if (still < 6 && left-- > 0) setTimeout(settle, 50);
      };
      addEventListener("wheel", () => { left = 0; }, { once: true, passive: true });
      settle();
    });
  }

  for (const button of document.querySelectorAll(".copy")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(button.previousElementSibling.textContent); button.textContent = "Copied"; }
      catch { button.textContent = "Select and copy it by hand"; }
    });
  }

  if (!byId("controls")) return;
  const data = JSON.parse(byId("data").textContent);
  const PAGE = 24, EXTREMES = 4, SMALL = 128, FEW = 8;
  const single = data.columns.length === 1;
  // every column of a prompt in one row, where there are more than a slider shows
  const strips = data.row && data.columns.length > 2;
  for (const cards of strips ? document.querySelectorAll(".cards") : []) {
    cards.classList.add("strips");
    cards.style.setProperty("--columns", data.columns.length);
  }
  const control = Object.fromEntries(["left", "right", "measure", "category", "gain", "order", "search"].map((id) => [id, byId(id)]));

  const fill = (select, names, chosen) => names.forEach((name, i) => {
    const option = new Option(name, String(i), i === chosen, i === chosen);
    select.add(option);
  });
  fill(control.left, data.columns, 0);
  fill(control.right, data.columns, data.right);
  fill(control.measure, data.measures, 0);
  if (single) { control.left.parentElement.hidden = control.right.parentElement.hidden = true; }
  if (!data.measures.length) for (const id of ["measure", "gain", "order"]) control[id].parentElement.hidden = true;
  // few pictures are seen at a glance: what picks some of them would only stand above them
  if (data.cases.length < FEW) {
    for (const id of ["category", "measure", "gain", "order", "search"]) control[id].parentElement.hidden = true;
    byId("controls").querySelector("button").hidden = true;
  }
  if (single) {
    const words = { better: "above the median", worse: "below the median", most: "highest first", least: "lowest first" };
    for (const option of [...control.gain.options, ...control.order.options]) if (words[option.value]) option.textContent = words[option.value];
    byId("extremes").querySelectorAll("h3").forEach((h, i) => { h.textContent = ["Highest", "Lowest", "All that match"][i]; });
  }

  const left = () => Number(control.left.value), right = () => Number(control.right.value);
  const known = (v) => typeof v === "number";
  // what cases are ordered by: the gain, or the score where there is one column
  const value = (c, m = Number(control.measure.value)) => {
    const row = c.scores[m];
    if (!row) return null;
    const a = row[left()], b = row[right()];
    if (single || left() === right()) return known(b) ? b : null;
    return known(a) && known(b) ? b - a : null;
  };

  let shown = [], drawn = 0;
  function choose() {
    const needle = control.search.value.trim().toLowerCase();
    let some = data.cases.filter((c) => (!control.category.value || c.category === control.category.value) && (!needle || c.prompt.toLowerCase().includes(needle)));
    const valued = some.filter((c) => value(c) !== null).sort((a, b) => value(b) - value(a));
    const tenth = Math.max(1, Math.ceil(valued.length / 10));
    const middle = valued.length ? value(valued[Math.floor((valued.length - 1) / 2)]) : 0;
    const bar = single || left() === right() ? middle : 0;
    const kind = control.gain.value;
    if (kind === "better") some = some.filter((c) => value(c) !== null && value(c) > bar);
    if (kind === "worse") some = some.filter((c) => value(c) !== null && value(c) < bar);
    if (kind === "best") { const top = new Set(valued.slice(0, tenth)); some = some.filter((c) => top.has(c)); }
    if (kind === "worst") { const low = new Set(valued.slice(-tenth)); some = some.filter((c) => low.has(c)); }
    if (control.order.value) {
      const way = control.order.value === "most" ? -1 : 1;
      some = [...some].sort((a, b) => way * ((value(a) ?? -way * Infinity) - (value(b) ?? -way * Infinity)));
    }
    shown = some;
    const plain = !needle && !kind && !control.order.value;
    byId("extremes").hidden = !(plain && valued.length >= 3 * EXTREMES);
    byId("most").replaceChildren(...(byId("extremes").hidden ? [] : valued.slice(0, EXTREMES).map(card)));
    byId("least").replaceChildren(...(byId("extremes").hidden ? [] : valued.slice(-EXTREMES).reverse().map(card)));
    byId("cards").replaceChildren();
    drawn = 0;
    more();
    byId("count").textContent = `${shown.length} of ${data.cases.length} pictures match`;
    remember();
  }

  function more() {
    const next = shown.slice(drawn, drawn + PAGE);
    drawn += next.length;
    byId("cards").append(...next.map(card));
  }
  new IntersectionObserver((seen) => { if (seen.some((s) => s.isIntersecting) && drawn < shown.length) more(); }, { rootMargin: "800px" }).observe(byId("more"));

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function picture(c, column, className) {
    const at = c.images[column];
    if (at === null || at === undefined || at < 0) return element("span", `missing ${className || ""}`, at === null ? "no picture" : "picture not found");
    const image = element("img", className);
    image.decoding = "async";
    image.alt = `${data.columns[column]}: ${c.prompt}`;
    image.addEventListener("load", () => { if (image.naturalWidth <= SMALL) (image.closest(".pair") || image).classList.add("small"); });
    image.src = data.images[at];
    return image;
  }

  function shownAs(c, column) {
    const figure = element("figure");
    figure.append(picture(c, column, ""), element("figcaption", "", data.columns[column]));
    return figure;
  }

  const number = (v) => known(v) ? v.toFixed(4) : "–";
  function scores(c) {
    const list = element("dl", "scores");
    data.measures.forEach((name, m) => {
      const row = c.scores[m], gain = value(c, m);
      list.append(element("dt", "", name));
      const both = !single && left() !== right();
      const shown = element("dd", "", number(row[right()]));
      if (both) shown.title = `${data.columns[left()]} ${number(row[left()])}, ${data.columns[right()]} ${number(row[right()])}`;
      list.append(shown);
      const mark = !both || gain === null ? element("dd", "", "") : element("dd", gain > 0 ? "gain-up" : gain < 0 ? "gain-down" : "", (gain > 0 ? "+" : "") + gain.toFixed(4));
      list.append(mark);
    });
    return list;
  }

  function card(c) {
    const made = element("article", "card");
    const pair = element("div", strips ? "strip" : "pair");
    made.append(pair);
    if (strips) {
      pair.append(...data.columns.map((name, column) => shownAs(c, column)));
      // what may have to be scrolled is reached by keyboard
      if (data.columns.length > 4) Object.assign(pair, { tabIndex: 0, role: "group", ariaLabel: `Pictures of ${c.prompt}` });
    } else if (single || left() === right()) {
      pair.append(picture(c, right(), ""));
      pair.style.cursor = "auto";
    } else {
      pair.append(picture(c, left(), ""), picture(c, right(), "top"), element("span", "cut"));
      for (const [side, column] of [["side first", left()], ["side second", right()]]) {
        const name = element("span", side, data.columns[column]);
        name.setAttribute("aria-hidden", "true");
        pair.append(name);
      }
      const range = element("input");
      Object.assign(range, { type: "range", min: "0", max: "100", value: "50" });
      range.setAttribute("aria-label", `${data.columns[left()]} left of the line, ${data.columns[right()]} right of it: ${c.prompt}`);
      const move = () => pair.style.setProperty("--at", `${range.value}%`);
      range.addEventListener("input", move);
      const follow = (event) => {
        const box = pair.getBoundingClientRect();
        range.value = String(Math.round(100 * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width))));
        move();
      };
      pair.addEventListener("pointerdown", (event) => { pair.setPointerCapture(event.pointerId); follow(event); });
      pair.addEventListener("pointermove", (event) => { if (pair.hasPointerCapture(event.pointerId)) follow(event); });
      made.append(range);
    }
    made.append(element("p", "prompt", c.prompt));
    if (data.measures.length) made.append(scores(c));
    const meta = element("div", "meta");
    meta.append(element("span", "", [c.category, c.details || c.key].filter(Boolean).join(" · ")));
    const larger = element("button", "", "Larger");
    larger.type = "button";
    larger.setAttribute("aria-label", `Larger: ${c.prompt}`);
    larger.addEventListener("click", () => zoom(c));
    meta.append(larger);
    made.append(meta);
    return made;
  }

  const dialog = byId("zoom");
  let zoomed = null;
  function zoom(c) {
    zoomed = c;
    byId("zoom-title").textContent = c.prompt;
    const columns = single ? [0] : [...new Set([left(), right()])];
    byId("zoom-pictures").replaceChildren(...columns.map((column) => shownAs(c, column)));
    const said = data.measures.map((name, m) => `${name} ${columns.map((column) => number(c.scores[m][column])).join(" → ")}`);
    byId("zoom-details").textContent = [c.category, c.details, ...said].filter(Boolean).join(" · ");
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  }
  const step = (by) => {
    const at = shown.indexOf(zoomed) + by;
    if (at >= 0 && at < shown.length) zoom(shown[at]);
  };
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });

  // the view in the address, so that a link to it can be sent
  function remember() {
    const state = new URLSearchParams();
    for (const [id, field] of Object.entries(control)) if (field.value && field.value !== field.dataset.first) state.set(id, field.value);
    try { history.replaceState(null, "", state.size ? `#${state}` : location.pathname + location.search); } catch { /* not from disk */ }
  }
  for (const field of Object.values(control)) field.dataset.first = field.value;
  for (const [id, text] of new URLSearchParams(location.hash.slice(1))) {
    const field = control[id];
    if (field && (field.tagName === "INPUT" || [...field.options].some((o) => o.value === text))) field.value = text;
  }
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("input", choose);
  byId("controls").addEventListener("reset", () => setTimeout(() => {
    for (const field of Object.values(control)) field.value = field.dataset.first;
    choose();
  }));
  choose();
})();
