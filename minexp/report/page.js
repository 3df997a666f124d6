"use strict";
(() => {
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const cards = $$(".card");
  const tabs = $$(".tabs button");
  const state = { view: tabs.length ? tabs[0].dataset.view : "", flag: "", all: false };
  const first = 12; // cards before "show more": the figures below stay in reach

  const value = (card, key) => parseFloat(card.dataset[key]);
  const rank = (card) => parseFloat(card.getAttribute("data-rank-" + state.view));

  function show() {
    const name = byId("class").value;
    const text = byId("find").value.trim().toLowerCase();
    const sort = byId("sort").value;
    const shown = cards.filter((card) =>
      (state.flag ? card.dataset.flags.split(" ").includes(state.flag) : card.hasAttribute("data-rank-" + state.view)) &&
      (!name || card.dataset.name === name) &&
      (!text || card.dataset.id.toLowerCase().includes(text)));
    const key = sort.replace("-", "");
    const sign = sort.startsWith("-") ? -1 : 1;
    const order = key ? (card) => sign * value(card, key) : rank;
    // A card without the figure goes last.
    const finite = (number) => (Number.isNaN(number) ? Infinity : number);
    shown.sort((a, b) => finite(order(a)) - finite(order(b)) || 0);
    const visible = new Set(shown);
    byId("cards").append(...shown);
    const rest = state.all ? 0 : shown.length - first;
    byId("more-cards").hidden = rest <= 0;
    byId("more-cards").textContent = "show " + rest + " more";
    for (const card of cards) card.hidden = !visible.has(card);
    if (rest > 0) for (const card of shown.slice(first)) card.hidden = true;
    for (const tab of tabs) tab.setAttribute("aria-selected", String(!state.flag && tab.dataset.view === state.view));
    const tab = tabs.find((one) => one.dataset.view === state.view);
    const about = state.flag ? "Cards with the warning you chose." : tab ? tab.dataset.about : "";
    byId("about").textContent = about + " " + shown.length + (shown.length === 1 ? " card." : " cards.");
    byId("nothing").hidden = shown.length > 0;
  }

  function view(name) {
    state.view = name;
    state.flag = "";
    state.all = false;
    show();
  }

  for (const tab of tabs) tab.addEventListener("click", () => view(tab.dataset.view));
  byId("more-cards").addEventListener("click", () => { state.all = true; show(); });
  for (const id of ["class", "sort", "find"]) byId(id).addEventListener("input", show);
  for (const button of $$("[data-flag]")) {
    button.addEventListener("click", () => {
      state.flag = button.dataset.flag;
      state.all = false;
      show();
      byId("gallery").scrollIntoView();
    });
  }

  for (const button of $$("[data-show]")) {
    button.addEventListener("click", () => { view(button.dataset.show); byId("gallery").scrollIntoView(); });
  }

  // One card, large.
  const dialog = byId("one");
  let open = null;
  function enlarge(card) {
    if (!card) return;
    open = card;
    const copy = document.createElement("div");
    copy.className = card.className.replace("card", "").trim();
    copy.append(...[...card.childNodes].map((node) => node.cloneNode(true)));
    byId("one-content").replaceChildren(copy);
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  }
  const visibleCards = () => $$(".card").filter((card) => !card.hidden);
  function step(by) {
    const all = visibleCards();
    enlarge(all[(all.indexOf(open) + by + all.length) % all.length]);
  }
  byId("cards").addEventListener("click", (event) => enlarge(event.target.closest(".card")));
  byId("before").addEventListener("click", () => step(-1));
  byId("after").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

  // The class table: sorted by a click on a heading, its first lines shown.
  const table = byId("class-table");
  const heads = $$("thead th", table);
  const few = 20;
  let all = false;
  function cut() {
    const rows = $$("tbody tr", table);
    rows.forEach((row, index) => { row.hidden = !all && index >= few; });
    const more = byId("all-classes");
    more.hidden = rows.length <= few;
    more.textContent = all ? "show the first " + few : "show all " + rows.length + " classes";
  }
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.children[column].dataset.v;
    const compare = column === 0
      ? (a, b) => key(b).localeCompare(key(a), undefined, { numeric: true })
      : (a, b) => key(b) - key(a);
    const rows = $$("tbody tr", table).sort((a, b) => (down ? 1 : -1) * compare(a, b));
    table.tBodies[0].append(...rows);
    cut();
  }));
  byId("all-classes").addEventListener("click", () => { all = !all; cut(); });

  // Theme: the system's until chosen; a browser that forbids storage still switches.
  const root = document.documentElement;
  const remember = (theme) => { try { localStorage.setItem("minexp-theme", theme); } catch { /* not allowed */ } };
  try {
    const stored = localStorage.getItem("minexp-theme");
    if (stored === "light" || stored === "dark") root.dataset.theme = stored;
  } catch { /* not allowed */ }
  function turn() {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    remember(root.dataset.theme);
  }
  byId("theme").addEventListener("click", turn);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (dialog.open) {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
      return;
    }
    if (typing) return;
    const tab = tabs[Number(event.key) - 1];
    if (tab) view(tab.dataset.view);
    else if (event.key === "/") { event.preventDefault(); byId("find").focus(); }
    else if (event.key === "t" || event.key === "T") turn();
    else if (event.key === "Enter" && event.target.classList.contains("card")) enlarge(event.target);
  });

  cut();
  show();
})();
